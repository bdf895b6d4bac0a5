import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import log_softmax
from transformers.modeling_outputs import CausalLMOutput

from expunge.adapters import add_lora
from expunge.engine import Step, Whole, check_head, collate, inside_forward, run_step
from expunge.errors import ExpungeError
from expunge.layout import Side
from expunge.methods.dpo import DPO
from expunge.methods.repo import REPO
from expunge.models import Reference, head_logits

ROWS = [
    {"retain": ([5, 6, 7], [8, 9]), "forget": ([5, 6, 7], [10, 11, 12])},
    {"retain": ([20], [21, 22, 23, 0]), "forget": ([20], [0])},
    {"retain": ([30, 31], [32]), "forget": ([30, 31], [33, 34])},
]
LAYERS = (0, 2, "pre_norm", "final")


def step_of(model: nn.Module, rows=ROWS, reference: Reference | None = None, heads=None) -> Step:
    """A step in float64 where the architecture keeps it, so that layouts can be told from noise."""
    return run_step(model, reference, collate(rows), LAYERS, LAYERS if reference else (), heads or {}, progress=0.25)


@pytest.fixture
def moved(tiny_model):
    """A model, and the reference that it left behind."""

    def make(architecture: str = "gpt2") -> tuple[nn.Module, Reference]:
        model = tiny_model(architecture, dtype=torch.double)
        reference = Reference(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        return model, reference

    return make


def test_a_batch_on_exact_tensors():
    batch = collate(ROWS[:2])
    assert list(batch) == ["retain", "forget"]
    assert batch["retain"]["ids"].tolist() == [[5, 6, 7, 8, 9, 0], [20, 21, 22, 23, 0, 0]]
    assert batch["forget"]["ids"].tolist() == [[5, 6, 7, 10, 11, 12], [20, 0, 0, 0, 0, 0]]
    assert batch["retain"]["prompts"].tolist() == batch["forget"]["prompts"].tolist() == [3, 1]
    assert batch["retain"]["lengths"].tolist() == [5, 5]
    assert batch["forget"]["lengths"].tolist() == [6, 2]


def test_masks_on_exact_tensors_where_a_pad_id_is_also_a_token():
    side = Side(**collate(ROWS[:2])["forget"])
    region = {name: side.mask(name).int().tolist() for name in ("all", "prompt", "continuation", "last")}
    assert region["all"] == [[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]]
    assert region["prompt"] == [[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert region["continuation"] == [[0, 0, 0, 1, 1, 1], [0, 1, 0, 0, 0, 0]]
    assert region["last"] == [[0, 0, 0, 0, 0, 1], [0, 1, 0, 0, 0, 0]]


def test_a_step_is_the_plain_computation(moved):
    model, reference = moved()
    step = step_of(model, reference=reference)
    for row, features in enumerate(ROWS):
        for side, (prompt, continuation) in features.items():
            ids = torch.tensor([prompt + continuation])
            logps = {
                False: log_softmax(model(ids).logits[0], -1),
                True: log_softmax(reference.copy(ids).logits[0], -1),
            }
            for ref in (False, True):
                summed, lengths = step.logps(side, ref=ref)
                scored = [logps[ref][t - 1, ids[0, t]] for t in range(len(prompt), ids.shape[1])]
                torch.testing.assert_close(summed[row], torch.stack(scored).sum())
                assert lengths[row] == len(continuation)


def test_the_kl_of_a_step_is_the_plain_one_on_each_region_and_in_each_direction(moved):
    model, reference = moved()
    step = step_of(model, reference=reference)
    for direction in ("forward", "reverse"):
        for region in ("all", "continuation", "last"):
            values = []
            for features in ROWS:
                prompt, continuation = features["retain"]
                ids = torch.tensor([prompt + continuation])
                q, p = log_softmax(model(ids).logits[0], -1), log_softmax(reference.copy(ids).logits[0], -1)
                if direction == "reverse":
                    p, q = q, p
                start = {"all": 0, "continuation": len(prompt), "last": ids.shape[1] - 1}[region]
                values.append((p.exp() * (p - q)).sum(-1)[start:])
            torch.testing.assert_close(step.token_kl("retain", region, direction), torch.cat(values).mean())


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3", "gemma2"])
def test_padding_changes_nothing_that_a_method_sees(moved, architecture):
    model, reference = moved(architecture)
    long = {"retain": ([1] * 9, [2] * 9), "forget": ([1] * 9, [3] * 9)}
    padded = step_of(model, [*ROWS, long], reference)
    for row, features in enumerate(ROWS):
        alone = step_of(model, [features], reference)
        for side in ("retain", "forget"):
            mask = alone.mask(side)[0]
            assert torch.equal(padded.mask(side)[row, : len(mask)], mask)
            for ref in (False, True):
                for layer in LAYERS:
                    states = padded.hidden(side, layer, ref)[row, : len(mask)]
                    close(states[mask], alone.hidden(side, layer, ref)[0][mask])
                close(padded.logps(side, ref)[0][row], alone.logps(side, ref)[0][0])
    kl = [step_of(model, [features], reference).token_kl("retain") for features in ROWS]
    lengths = torch.tensor([sum(map(len, features["retain"])) for features in ROWS])
    close(step_of(model, ROWS, reference).token_kl("retain"), (torch.stack(kl) * lengths).sum() / lengths.sum())


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_padding_changes_nothing_where_the_sides_share_no_prompt(moved, architecture):
    model, reference = moved(architecture)
    rows = [
        {"retain": ([5, 6, 7], [8, 9]), "forget": ([0], [10, 11, 12, 13, 14])},
        {"retain": ([0], [21, 22, 23, 0, 24, 25, 26]), "forget": ([20, 30], [0])},
    ]

    def plain(rows) -> Step:
        return run_step(model, reference, collate(rows), LAYERS, LAYERS, {}, progress=0, plain=True)

    both = plain(rows)
    for side in ("retain", "forget"):
        for i, row in enumerate(rows):
            alone = run_step(model, reference, collate([{side: row[side]}]), LAYERS, LAYERS, {}, progress=0)
            mask = alone.mask(side)[0]
            for region in ("all", "prompt", "continuation", "last"):
                assert torch.equal(both.mask(side, region)[i, : len(mask)], alone.mask(side, region)[0])
            for ref in (False, True):
                for layer in LAYERS:
                    close(both.hidden(side, layer, ref)[i, : len(mask)], alone.hidden(side, layer, ref)[0])
                close(both.logps(side, ref)[0][i], alone.logps(side, ref)[0][0])


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # RMS norms work in float32, whatever the model does


def test_chunked_logits_are_the_whole_ones(moved, architecture):
    model, reference = moved(architecture)

    def found(chunked: bool) -> list[torch.Tensor]:
        step = run_step(model, reference, collate(ROWS), ("final",), ("final",), {}, progress=0, chunked=chunked)
        values = [step.token_kl("retain"), step.token_kl("retain", "continuation", "reverse"), step.logps("forget")[0].sum()]
        gradients = torch.autograd.grad(torch.stack(values).sum(), list(model.parameters()))
        return [*values, step.logps("forget", ref=True)[0], *gradients]

    for ours, whole in zip(found(True), found(False), strict=True):
        close(ours, whole)


def test_an_adapter_on_the_head_is_in_the_logits(tiny_model):
    model = add_lora(tiny_model("llama"), target_modules=["lm_head"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    step = step_of(model, reference=Reference(model))
    logps = log_softmax(model(collate(ROWS)["retain"]["ids"]).logits[0], -1)
    close(step.logps("retain")[0][0], logps[2, 8] + logps[3, 9])
    assert step.token_kl("retain") > 0.1


@pytest.mark.parametrize("method", [REPO(), REPO(layer=1), DPO()], ids=["repo", "repo-middle", "dpo"])
def test_an_adapter_and_the_weights_it_amounts_to_make_the_same_step(tiny_model, method):
    """LoRA with its adapter off as the reference, against full weights with a frozen copy: losses, and gradients for D."""
    base = tiny_model("llama", dtype=torch.double)
    adapted = add_lora(copy.deepcopy(base), r=4).double()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    merged = copy.deepcopy(adapted).merge_and_unload()
    torch.manual_seed(0)
    heads = nn.ModuleDict(method.heads(32)).double()
    found = []
    for model, reference in ((adapted, Reference(adapted)), (merged, Reference(base))):
        step = run_step(model, reference, collate(ROWS), method.layers, method.ref_layers, heads, 0.5, method.ref_sides)
        losses = method.loss(step)
        heads.zero_grad()
        if heads:  # what else is trained differs
            torch.stack(list(losses.values())).sum().backward()
        found.append((losses, [parameter.grad.clone() for parameter in heads.parameters()]))
    (one, gradients), (other, wanted) = found
    for name, loss in other.items():
        torch.testing.assert_close(one[name], loss, rtol=1e-9, atol=1e-12)
    for gradient, expected in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-12)
    assert other.keys() == one.keys() and all(loss > 1e-3 for loss in other.values())


def test_a_head_that_expunge_does_not_know_is_one_line(tiny_model, monkeypatch):
    model = tiny_model("llama")
    check_head(model, collate(ROWS))
    own = type(model).forward

    def offset(*args, **inputs) -> CausalLMOutput:
        return CausalLMOutput(logits=own(*args, **inputs).logits + 1)

    monkeypatch.setattr(type(model), "forward", offset)
    with pytest.raises(ExpungeError, match="LlamaForCausalLM: its logits do not follow"):
        check_head(model, collate(ROWS))


def test_both_sides_see_the_same_prompt_states(moved):
    model, _ = moved("llama")
    step = step_of(model)
    prompt = step.mask("retain", "prompt")
    assert torch.equal(prompt, step.mask("forget", "prompt"))
    for layer in LAYERS:
        assert torch.equal(step.hidden("retain", layer)[prompt], step.hidden("forget", layer)[prompt])
    following = step.mask("retain", "continuation") & step.mask("forget", "continuation")
    assert not torch.allclose(step.hidden("retain")[following], step.hidden("forget")[following])


def test_the_reference_carries_no_gradient_and_the_model_does(moved):
    model, reference = moved()
    step = step_of(model, reference=reference)
    assert step.hidden("retain").requires_grad
    assert step.logps("retain")[0].requires_grad
    assert not step.hidden("retain", ref=True).requires_grad
    assert not step.logps("retain", ref=True)[0].requires_grad
    step.token_kl("retain").backward()
    assert model.transformer.h[0].mlp.c_fc.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in reference.copy.parameters())


@pytest.mark.parametrize("lora", [False, True])
def test_at_the_reference_the_kl_and_its_gradient_are_zero(tiny_model, lora):
    model = add_lora(tiny_model(), r=2) if lora else tiny_model()
    step = step_of(model, reference=Reference(model))
    kl = step.token_kl("retain")
    kl.backward()
    assert kl.item() == 0
    assert max(p.grad.abs().max() for p in model.parameters() if p.grad is not None) < 1e-6
    for ref in (False, True):
        torch.testing.assert_close(step.logps("forget", ref)[0], step.logps("forget")[0])


def test_a_third_side_may_be_longer_and_has_no_prompt(moved):
    model, reference = moved()
    rows = [{**row, "anchor": ([], [40, 41, 42, 43, 44, 45, 46, 47])} for row in ROWS]
    step = step_of(model, rows, reference)
    assert step.sides == ["retain", "forget", "anchor"]
    assert step.ids("anchor").shape == step.ids("retain").shape == (3, 8)
    assert step.mask("anchor").all()
    torch.testing.assert_close(step.token_kl("retain"), step_of(model, ROWS, reference).token_kl("retain"))
    alone = step_of(model, [{"anchor": row["anchor"]} for row in rows])
    torch.testing.assert_close(step.hidden("anchor"), alone.hidden("anchor"))


def test_what_was_not_run_is_an_error_that_says_what_to_do(tiny_model):
    step = step_of(tiny_model())
    with pytest.raises(KeyError, match="no side 'neutral'"):
        step.hidden("neutral")
    with pytest.raises(KeyError, match="no state 1: name it in the method's `layers`"):
        step.hidden("retain", 1)
    for ask in (step.token_kl, lambda side: step.logps(side, ref=True)):
        with pytest.raises(KeyError, match="no state 'final': name it in the method's `ref_layers`"):
            ask("retain")


def test_a_mean_of_a_step_is_over_tokens_windows_or_rows(tiny_model):
    step = step_of(tiny_model())
    values = torch.arange(18.0).view(3, 6)
    mask = step.mask("forget", "continuation")
    assert mask.sum() == 6
    assert step.mean(values, "forget") == step.mean(values[mask], "forget") == values[mask].mean()
    assert step.mean(values, "forget", "all") == values[step.mask("forget")].mean()
    assert step.mean(torch.tensor([1.0, 2.0, 6.0]), "forget", "last") == 3
    assert step.mean(torch.tensor([1.0, 2.0, 6.0, 7.0]), "forget", segment=2) == 4  # windows of 3, 1 and 2 tokens
    assert step.mean(torch.tensor([1.0, 2.0, 6.0]), "forget", segment=0) == 3


def test_a_mean_of_a_step_weighs_a_micro_batch_by_its_tokens(tiny_model):
    """Two micro-batches, whose means, averaged, are the mean over all tokens: 6 and 1 of them."""
    rows = [ROWS, ROWS[1:2]]
    counts = torch.tensor([[len(row["forget"][0]), sum(map(len, row["forget"]))] for part in rows for row in part])
    whole = Whole.of({"forget": counts}, parts=2)
    found = []
    for part, value in zip(rows, (1.0, 8.0), strict=True):
        step = run_step(tiny_model(), None, collate(part), LAYERS, (), {}, progress=0.0, whole=whole)
        found.append(step.mean(torch.full_like(step.ids("forget"), value, dtype=torch.float32), "forget"))
    torch.testing.assert_close(sum(found) / 2, torch.tensor((6 * 1.0 + 1 * 8.0) / 7))


def test_values_that_fit_no_mean_are_one_line(tiny_model):
    step = step_of(tiny_model())
    for values, more, said in (
        (torch.zeros(5), {}, r"expected values \[3, 6\] or \[6\] for side 'forget', found \[5\]"),
        (torch.zeros(()), {}, r"found \[\]"),
        (torch.zeros(4), {"region": "last"}, r"or \[3\] for side 'forget', found \[4\]"),
        (torch.zeros(3, 6), {"segment": 2}, r"expected values \[4\]"),
    ):
        with pytest.raises(ExpungeError, match=r"^step\.mean: .*" + said):
            step.mean(values, "forget", **more)


def test_a_step_logs_plain_numbers(tiny_model):
    step = step_of(tiny_model())
    step.log("norm", step.hidden("retain").norm())
    assert type(step.logged["norm"]) is float
    assert step.progress == 0.25


class Wrapper(nn.Module):
    """Stands for DDP: its forward must run, and must reach the module that it wraps."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *inputs):
        self.calls += 1
        return self.module(*inputs)


def test_a_function_runs_inside_the_wrapped_forward(tiny_model):
    model = tiny_model()
    wrapped = Wrapper(model)
    ids = torch.tensor([[3, 4, 5]])

    def loss(inner: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        assert inner is model
        states = inner.transformer(ids).last_hidden_state
        torch.testing.assert_close(head_logits(inner, states), inner(ids).logits)  # its own forward is back
        return states.sum()

    assert inside_forward(wrapped, model, loss, ids).requires_grad
    assert wrapped.calls == 1
    assert "forward" not in vars(model)


def test_forward_is_restored_after_an_exception(tiny_model):
    model = tiny_model()

    def fail(inner: nn.Module) -> None:
        raise RuntimeError("inside")

    class Broken(nn.Module):
        def forward(self):
            raise RuntimeError("before")

    for wrapped, word in ((Wrapper(model), "inside"), (model, "inside"), (Broken(), "before")):
        with pytest.raises(RuntimeError, match=word):
            inside_forward(wrapped, model, fail)
        assert "forward" not in vars(model)
        assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 320)


def test_a_forward_that_somebody_else_patched_is_left_as_it_was(tiny_model):
    model = tiny_model()
    theirs = model.forward = lambda *args, **kwargs: "theirs"
    inside_forward(Wrapper(model), model, lambda inner: None)
    assert model.forward is theirs
