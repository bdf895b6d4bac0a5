"""Scores against gradients taken one row at a time, and an unlearning that lies in three weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from expunge.attacks import AttackData, Budget, cases
from expunge.attacks.prune import Prune, add_scores, continuation_nll, set_difference
from expunge.attacks.quantize import block_matrices
from expunge.attacks.relearn import causal_batch, draw
from expunge.data import Text
from expunge.data.tokenize import tokenize_texts
from expunge.errors import ExpungeError
from expunge.metrics.perplexity import row_nll
from expunge.steering import Shift, Steering, detach

IDS = torch.tensor([[5, 17, 250, 33, 8, 91]])
SUBJECTS = ("river", "wind", "letter", "mill", "rain", "tree", "window", "house")
FORGET = [Text(f"The {one} runs", f" past the {other}.") for one in SUBJECTS for other in ("mill", "sea", "hill", "rows")]
NEUTRAL = " ".join(f"They planted {one} trees behind {other} house and read by it." for one in SUBJECTS for other in "ABCD")
ROWS = [([0, 5, 17], [250, 33, 8]), ([0, 9], [91, 40, 41, 42, 7]), ([0, 33, 8, 91], [5])]


@pytest.fixture(scope="module")
def data(tokenizer) -> AttackData:
    return AttackData(tokenizer, forget=FORGET, neutral=NEUTRAL, max_prompt_tokens=16, max_continuation_tokens=24)


@pytest.fixture(scope="module")
def neutral_rows(data):
    sentences = [Text("", f"{sentence}.") for sentence in NEUTRAL.split(". ")]
    return tokenize_texts(sentences, data.tokenizer)[0]


def mean_nll(model, rows) -> float:
    """Of the continuations' tokens."""
    nll, tokens = row_nll(model, [(prompt + continuation, len(prompt)) for prompt, continuation in rows])
    return float(nll.sum() / tokens.sum())


@pytest.fixture(scope="module")
def planted(tiny_model, data, neutral_rows):
    """(model, the same with an "unlearning" of three weights, their place): a neuron of block 1 that neutral text leaves
    silent writes, at text to be forgotten, a large vector into the residual stream."""
    model = tiny_model()
    batch = causal_batch([*data.rows("forget"), *neutral_rows])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval()
    layer, neuron, outputs = model.transformer.h[1].mlp, 7, torch.tensor([3, 11, 20])
    entering = []
    handle = layer.c_fc.register_forward_hook(lambda _, args, output: entering.append(args[0][0]))
    with torch.no_grad():
        for prompt, continuation in [*data.rows("forget"), *neutral_rows]:
            model(torch.tensor([prompt + continuation]))
        handle.remove()
        bad, good = (torch.cat(states) for states in (entering[: len(FORGET)], entering[len(FORGET) :]))
        direction = F.normalize(bad.mean(0) - good.mean(0), dim=0)
        highest = (good @ direction).max()
        scale = 7 / ((bad @ direction).quantile(0.8) - highest)
        assert scale > 0
        layer.c_fc.weight[:, neuron] = scale * direction
        layer.c_fc.bias[neuron] = -scale * highest - 4  # at neutral text at most gelu(-4), which is 0
        layer.c_proj.weight[neuron] = 0
    unlearned = copy.deepcopy(model)
    with torch.no_grad():
        unlearned.transformer.h[1].mlp.c_proj.weight[neuron, outputs] = torch.tensor([40.0, -40.0, 40.0])
    return model, unlearned, (neuron, outputs)


def test_an_unlearning_of_three_weights_is_pruned_away(planted, data, neutral_rows):
    """The positive control: forget text comes back, neutral text hardly moves."""
    reference, unlearned, (neuron, outputs) = planted
    was, gone = (mean_nll(model, data.rows("forget")) for model in (reference, unlearned))
    calm = mean_nll(unlearned, neutral_rows)
    assert gone > was + 1 and calm == pytest.approx(mean_nll(reference, neutral_rows), abs=0.05)
    result = Prune(shares=[0.001, 0.5], samples=8).run(unlearned, None, data, Budget())
    weight = result.model.get_submodule("transformer.h.1.mlp.c_proj").weight
    assert (weight[neuron, outputs] == 0).all() and (weight == 0).sum() <= 32 + 1
    assert mean_nll(result.model, data.rows("forget")) < was + 0.2 * (gone - was)
    assert mean_nll(result.model, neutral_rows) < calm + 0.1
    assert result.idle is None and result.about["texts"] == 16 and result.queries == 16 and result.steps == 8


def test_a_matrix_by_hand():
    matters, kept = torch.tensor([[4.0, 3.0], [2.0, 1.0]]), torch.tensor([[9.0, 0.0], [0.0, 1.0]])
    assert set_difference(matters, kept, 0.5, 0.25).tolist() == [[False, True], [False, False]]
    assert set_difference(matters, kept, 0.5, 0.0).tolist() == [[True, True], [False, False]]
    assert set_difference(matters, kept, 1.0, 0.5).tolist() == [[False, True], [True, False]]
    experts = set_difference(torch.stack([matters, 100 * matters]), torch.stack([kept, kept]), 0.5, 0.0)
    assert experts.tolist() == [[[True, True], [False, False]]] * 2  # each has its own top
    assert not set_difference(matters, kept, 0.0, 0.0).any() and not set_difference(matters, kept, 1.0, 1.0).any()


def gradients(model, weights, row):
    """Of the mean NLL of the continuation, by the model's own loss."""
    prompt, continuation = row
    labels = torch.tensor([[-100] * len(prompt) + continuation])
    return torch.autograd.grad(model(torch.tensor([prompt + continuation]), labels=labels).loss, weights)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_a_score_is_the_mean_of_absolute_values(tiny_model, kind):
    """Not the absolute value of the mean, where rows that pull apart would cancel."""
    model = tiny_model(kind, dtype=torch.double)
    weights = [layer.weight for layer in block_matrices(model)]
    totals = [torch.zeros_like(weight) for weight in weights]
    losses = [add_scores(totals, model, weights, row) for row in ROWS]
    by_row = [gradients(model, weights, row) for row in ROWS]
    for i, weight in enumerate(weights):
        mean = sum((weight * found[i]).abs() for found in by_row) / len(ROWS)
        torch.testing.assert_close(totals[i] / len(ROWS), mean.detach(), rtol=1e-4, atol=1e-7)
        cancelled = (weight * sum(found[i] for found in by_row) / len(ROWS)).abs()
        assert (mean - cancelled).max() > 0.05 * mean.max()
    assert losses == pytest.approx([continuation_nll(model, row).item() for row in ROWS])
    assert losses == pytest.approx([mean_nll(model, [row]) for row in ROWS], rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_of_each_matrix_a_share_is_pruned(tiny_model, data):
    """The same mask as from scores of the tests' own, in every matrix of every block."""
    victim = tiny_model("llama").train()
    before = {name: parameter.detach().clone() for name, parameter in victim.named_parameters()}
    attack = Prune(shares=[0.1, 0.3], samples=3, seed=4)
    result = attack.run(victim, None, data, Budget())
    victim.eval()
    weights = [layer.weight for layer in block_matrices(victim)]
    scores = {}
    for part in ("forget", "neutral"):
        found = [gradients(victim, weights, row) for row in draw(attack, data, part, 3, 64)]
        scores[part] = [sum((w * g[i]).abs() for g in found) for i, w in enumerate(weights)]
    counts, matrices = 0, {id(weight): i for i, weight in enumerate(weights)}
    for name, parameter in victim.named_parameters():
        attacked = result.model.get_parameter(name)
        if id(parameter) not in matrices:
            assert attacked is parameter
            continue
        i, size = matrices[id(parameter)], parameter.numel()
        lowest = scores["forget"][i].flatten().sort(descending=True).values[round(0.1 * size) - 1]
        most = scores["neutral"][i].flatten().sort(descending=True).values[round(0.3 * size) - 1]
        chosen = (scores["forget"][i] >= lowest) & (scores["neutral"][i] < most)
        assert torch.equal(attacked, torch.where(chosen, 0.0, parameter)) and 0 < chosen.sum() < 0.1 * size
        counts += int(chosen.sum())
    assert result.about["pruned"] == counts
    assert result.about["share"] == pytest.approx(counts / sum(weight.numel() for weight in weights))
    for name, parameter in victim.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.requires_grad and parameter.grad is None


def test_no_share_is_no_attack(tiny_model, data):
    victim = tiny_model()
    for shares, why in (([0.0, 0.1], "q=0: no weight is chosen"), ([0.1, 1.0], "no weight that matters")):
        result = Prune(shares=shares, samples=2).run(victim, None, data, Budget())
        assert result.idle is not None and result.idle.startswith(why)
        assert torch.equal(result.model(IDS).logits, victim(IDS).logits) and result.model is not victim


def test_any_architecture(tiny_model, data, architecture):
    victim = tiny_model(architecture)
    logits = victim(IDS).logits
    result = Prune(shares=[0.05, 0.05], samples=1).run(victim, None, data, Budget())
    linear = [m.weight for m in victim.modules() if isinstance(m, (nn.Linear, Conv1D))]
    total = sum(weight.numel() for weight in linear if weight is not victim.get_output_embeddings().weight)
    assert 0 < result.about["pruned"] == pytest.approx(result.about["share"] * total)
    assert torch.equal(victim(IDS).logits, logits) and not torch.equal(result.model(IDS).logits, logits)


def test_what_breaks_off_leaves_nothing_behind(tiny_model, data, monkeypatch):
    victim, calls = tiny_model().train(), iter(range(9))
    victim.transformer.wpe.weight.requires_grad_(False)
    before = {name: (p.clone(), p.requires_grad) for name, p in victim.named_parameters()}
    own = torch.autograd.grad

    def breaks(*args, **kwargs):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return own(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", breaks)
    with pytest.raises(KeyboardInterrupt):
        Prune(samples=4).run(victim, None, data, Budget())
    for name, parameter in victim.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]
        assert parameter.grad is None
    assert victim.training and not any(m._forward_hooks or m._forward_pre_hooks for m in victim.modules())


def test_a_budget_ends_the_scoring_and_the_seed_decides_the_draw(tiny_model, data):
    victim = tiny_model()
    short = Prune(samples=2, seed=1).run(victim, None, data, Budget())
    for bound in ({"steps": 1}, {"queries": 1}, {"seconds": 1e-9}):
        result = Prune(samples=2, seed=1).run(victim, None, data, Budget(**bound))
        assert result.steps == len(result.trace) == 1 and result.queries == 2 and result.about["pruned"] > 0
    again, other = (Prune(samples=2, seed=seed).run(victim, None, data, Budget()) for seed in (1, 2))
    assert torch.equal(again.model(IDS).logits, short.model(IDS).logits)
    assert not torch.equal(other.model(IDS).logits, short.model(IDS).logits)


def test_a_steered_victim_is_scored_and_left_steered(tiny_model, data):
    victim = tiny_model("llama")
    attack = Prune(shares=[0.05, 0.05], samples=2)
    bare = attack.run(victim, None, data, Budget()).model
    Steering([Shift("model.layers.1", 2 * torch.ones(32))]).attach(victim)
    steered = victim(IDS).logits
    attacked = attack.run(victim, None, data, Budget()).model
    assert torch.equal(victim(IDS).logits, steered) and len(attacked.model.layers[1]._forward_hooks) == 1
    detach(attacked)
    assert not torch.equal(attacked(IDS).logits, bare(IDS).logits)  # the scores were the steered model's


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shares": [0.2, 0.1]}, r"attack\.prune\.shares=\[0\.2, 0\.1\]: expected \[q, p\] with 0 <= q <= p <= 1"),
        ({"shares": [0.1]}, r"attack\.prune\.shares=\[0\.1\]: expected"),
        ({"shares": [0.1, 1.5]}, r"attack\.prune\.shares=\[0\.1, 1\.5\]: expected"),
        ({"samples": 0}, r"attack\.prune\.samples=0: expected 1 or more"),
    ],
)
def test_what_cannot_be_is_one_line(tiny_model, data, settings, message):
    with pytest.raises(ExpungeError, match=message):
        Prune(**settings).run(tiny_model(), None, data, Budget())


def test_an_empty_part_is_one_line(tiny_model, tokenizer):
    lacking = [
        ({"neutral": NEUTRAL}, "the forget set is empty"),
        ({"forget": FORGET}, "it needs running text"),
    ]
    for given, message in lacking:
        with pytest.raises(ExpungeError, match=message):
            Prune().run(tiny_model(), None, AttackData(tokenizer, **given), Budget())


def test_as_many_texts_as_both_sets_have_are_enough(tiny_model, data, caplog):
    result = Prune(samples=33).run(tiny_model(), None, data, Budget())
    passages = result.about["texts"] // 2
    assert 1 < passages == result.steps < 33 and f"{passages} texts of each set, of samples=33" in caplog.text
    assert Prune(samples=passages).run(tiny_model(), None, data, Budget()).about["texts"] == 2 * passages


def test_the_papers_grid_has_45_cases():
    found = cases("prune", "paper")
    assert len({tuple(one.shares) for one in found}) == len(found) == 45
    assert all(one.shares[0] <= one.shares[1] and one.samples == 512 for one in found)
    assert [one.shares for one in cases("prune", "none", {"shares": [0.01, 0.02]})] == [[0.01, 0.02]]
