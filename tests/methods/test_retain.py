"""The retain terms against a plain form, and what holds for every method that is built on them."""

from collections.abc import Mapping

import pytest
import torch
from torch import nn
from torch.nn.functional import log_softmax

from expunge.engine import Step, Whole, collate, run_step
from expunge.methods import METHODS, Method
from expunge.methods.retain import retain_losses
from expunge.models import Reference
from expunge.training import UnlearnConfig, UnlearnTrainer

ROWS = [
    {"retain": ([5, 6, 7], [8, 9]), "forget": ([5, 6, 7], [10, 11, 12])},
    {"retain": ([20], [21, 22, 23, 24]), "forget": ([20], [25])},
    {"retain": ([30, 31], [32]), "forget": ([30, 31], [33, 34])},
]
CASES = {
    "npo": {},
    "npo-kl": {"retain": "kl"},
    "npo-none": {"retain": "none", "clamp": None},
    "simnpo": {"beta": 0.3, "delta": 0.5},  # at 4.5 a random model has next to nothing to forget
    "grad_diff": {"gamma": 0.7, "alpha": 1.5},
    "grad_diff-kl": {"retain": "kl"},
    "ce": {},
    "sure": {"width": 8},
}


@pytest.fixture(params=CASES)
def method(request) -> Method:
    return METHODS.get(request.param.partition("-")[0])(**CASES[request.param])


@pytest.fixture
def moved(tiny_model):
    """A model in double precision, and the reference that it left behind."""
    model = tiny_model(dtype=torch.double)
    reference = Reference(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model, reference


def heads_of(method: Method) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(dict(method.heads(32))).double()


def step_of(moved, method: Method, rows=ROWS, plain=False, whole=None, batch=None) -> Step:
    model, reference = moved
    wanted = (method.layers, method.ref_layers, heads_of(method), 0.5, method.ref_sides)
    return run_step(model, reference, batch or collate(rows), *wanted, plain=plain, whole=whole)


def plain_nll(model: nn.Module, side: str, rows=ROWS) -> torch.Tensor:
    """Over the tokens of all rows, one forward of the model itself a row."""
    found = []
    for row in rows:
        prompt, continuation = row[side]
        logps = log_softmax(model(torch.tensor([prompt + continuation])).logits[0], -1)
        found += [-logps[len(prompt) + i - 1, token] for i, token in enumerate(continuation)]
    return torch.stack(found).mean()


def gradients(losses: Mapping[str, torch.Tensor], model: nn.Module) -> torch.Tensor:
    found = torch.autograd.grad(sum(losses.values()), list(model.parameters()), allow_unused=True)  # type: ignore[arg-type]
    return torch.cat([tensor.flatten() for tensor in found if tensor is not None])


def test_the_likelihood_is_the_mean_over_tokens(moved):
    step = step_of(moved, METHODS.get("ce")())
    for side in ("retain", "forget"):
        torch.testing.assert_close(step.token_nll(side), plain_nll(moved[0], side))
    torch.testing.assert_close(retain_losses(step, "nll")["retain"], plain_nll(moved[0], "retain"))


def test_the_divergence_is_that_of_the_tokens_kept_and_of_neutral_text(moved):
    method = METHODS.get("npo")(retain="kl")
    step = step_of(moved, method)
    assert set(retain_losses(step, "kl")) == {"retain"}
    torch.testing.assert_close(retain_losses(step, "kl")["retain"], step.token_kl("retain", "continuation"))
    step = step_of(moved, method, [{**row, "anchor": ([], [40, 41, 42])} for row in ROWS])
    losses = method.loss(step)
    assert set(losses) == {"forget", "retain", "anchor_text"}
    torch.testing.assert_close(losses["anchor_text"], step.token_kl("anchor"))
    assert losses["anchor_text"] > 0


def test_both_layouts_padding_and_the_order_of_rows_give_the_same_losses(moved, method):
    plain = method.loss(step_of(moved, method, plain=True))
    batch = collate(ROWS)
    for side in batch.values():
        side["ids"] = torch.cat([side["ids"], torch.full((len(ROWS), 5), 77)], 1)
    others = {
        "shared": step_of(moved, method),
        "padded": step_of(moved, method, batch=batch),
        "turned": step_of(moved, method, ROWS[::-1]),
    }
    assert all(abs(value) > 1e-3 for value in plain.values())
    slopes = gradients(plain, moved[0])
    for step in others.values():
        losses = method.loss(step)
        assert losses.keys() == plain.keys()
        for name, value in plain.items():
            torch.testing.assert_close(losses[name], value)
        torch.testing.assert_close(gradients(losses, moved[0]), slopes)


def test_two_micro_batches_are_one_batch(moved, method):
    one = method.loss(step_of(moved, method))
    counts = {side: torch.stack([part["prompts"], part["lengths"]], 1) for side, part in collate(ROWS).items()}
    whole = Whole.of(counts, parts=2)
    parts = [method.loss(step_of(moved, method, rows, whole=whole)) for rows in (ROWS[:1], ROWS[1:])]
    for name, value in one.items():
        torch.testing.assert_close((parts[0][name] + parts[1][name]) / 2, value)
    halves = sum(gradients(losses, moved[0]) / 2 for losses in parts)
    torch.testing.assert_close(halves, gradients(one, moved[0]))


def test_the_reference_is_read_where_it_is_needed_and_kept_nowhere_else(tmp_path, tiny_model, tokenizer, pairs, method):
    config = UnlearnConfig(output_dir=str(tmp_path), max_steps=1, disable_tqdm=True, save_strategy="no")
    trainer = UnlearnTrainer(tiny_model(), method, config, pairs, tokenizer)
    trainer.train()
    needs = method.name == "npo" or getattr(method, "retain", "nll") == "kl"
    assert (trainer.reference is not None) == needs == bool(method.ref_layers)
    assert method.max_grad_norm == trainer.args.max_grad_norm == (10 if method.name == "npo" else 1)
    figures = {**trainer.state.log_history[0]}
    assert {"loss", "grad_norm"} < figures.keys() and figures["grad_norm"] > 0


def test_two_sets_are_taken_too(method):
    method.check_data(paired=False)
    assert method.family == ("representation" if method.name == "sure" else "output")
