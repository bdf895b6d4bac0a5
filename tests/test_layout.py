import pytest
import torch

from expunge.engine import collate, run_step, shares_prefix
from expunge.layout import Side, pack
from expunge.models import Reference

PAIRS = [
    {"retain": ([5, 6, 7], [8, 9]), "forget": ([5, 6, 7], [10, 11, 12])},
    {"retain": ([20], [21, 22, 23, 0]), "forget": ([20], [0])},
    {"retain": ([30, 31], [32]), "forget": ([30, 31], [33, 34])},
]
ANCHORED = [{**pair, "anchor": ([], [40 + row, 41, 42, 43, 44, 45, 46])} for row, pair in enumerate(PAIRS)]
LAYERS = (0, 2, "pre_norm", "final")


def sides(rows):
    return {name: Side(**tensors) for name, tensors in collate(rows).items()}


def test_a_shared_row_on_exact_tensors():
    packed = pack(sides(PAIRS[:2]), plain=False)
    assert packed.ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22, 23, 0, 0, 0, 0]]
    assert packed.positions[0].tolist() == [0, 1, 2, 3, 4, 3, 4, 5]
    assert packed.positions[1].tolist() == [0, 1, 2, 3, 4, 1, 0, 0]
    first = packed.mask[0, 0].int().tolist()
    assert first[4] == [1, 1, 1, 1, 1, 0, 0, 0]  # the end of chosen
    assert first[6] == [1, 1, 1, 0, 0, 1, 1, 0]  # inside rejected: the prompt and itself, nothing of chosen
    assert packed.mask[1, 0, 5].int().tolist() == [1, 0, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("rows", [PAIRS, ANCHORED], ids=["pairs", "anchored"])
def test_both_layouts_give_the_same_states_and_gradients(tiny_model, architecture, rows):
    model = tiny_model(architecture, dtype=torch.double)
    reference = Reference(model)
    batch = collate(rows)
    assert shares_prefix(model, batch, LAYERS)
    found = []
    for plain in (True, False):
        step = run_step(model, reference, batch, LAYERS, LAYERS, {}, 0.0, plain=plain)
        model.zero_grad()
        total, states = torch.zeros((), dtype=torch.double), []
        for side in batch:
            for layer in LAYERS:
                kept = step.hidden(side, layer)[step.mask(side)]
                torch.testing.assert_close(kept, step.hidden(side, layer, ref=True)[step.mask(side)])
                states.append(kept.detach())
                total = total + (kept * torch.linspace(-1, 1, kept.shape[-1])).sin().sum()
        total.backward()
        found.append((states, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    for plain, shared in zip(*(states + gradients for states, gradients in found), strict=True):
        assert (plain - shared).abs().max() <= 1e-6 * plain.abs().max()  # RMSNorm is fp32 inside


def test_a_mask_that_the_model_does_not_heed_is_found_out(tiny_model, monkeypatch):
    model = tiny_model("gpt2")
    forward = type(model.transformer).forward

    def deaf(self, *args, attention_mask=None, **kwargs):
        return forward(self, *args, attention_mask=None if attention_mask.ndim == 4 else attention_mask, **kwargs)

    monkeypatch.setattr(type(model.transformer), "forward", deaf)
    assert not shares_prefix(model, collate(PAIRS), LAYERS)


@pytest.mark.parametrize("architecture", ["mistral", "gemma2"])
@pytest.mark.parametrize(("window", "rows"), [(4, 2 * len(PAIRS)), (6, len(PAIRS))])  # the longest side has 6 tokens
def test_rows_beyond_a_sliding_window_stay_plain(tiny_model, architecture, window, rows):
    model = tiny_model(architecture)
    model.config.sliding_window = window
    step = run_step(model, None, collate(PAIRS), ("final",), (), {}, 0.0)
    assert len(step._policy.packed.ids) == rows
    side = sides(PAIRS)["forget"]
    own = model(side.ids, side.mask("all").long(), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(step.hidden("forget")[side.mask("all")], own[side.mask("all")], rtol=1e-4, atol=1e-5)


def test_the_reference_reads_only_the_sides_that_a_method_names(tiny_model):
    model = tiny_model("gpt2")
    step = run_step(model, Reference(model), collate(PAIRS), ("final",), ("final",), {}, 0.0, ref_sides=("retain",))
    assert step.hidden("retain", ref=True).shape == step.hidden("retain").shape
    with pytest.raises(KeyError, match="ref_sides"):
        step.hidden("forget", ref=True)


def test_a_shared_row_may_be_longer_than_the_context(tiny_model):
    model = tiny_model("gpt2")  # of 64 tokens
    rows = [
        {"retain": ([5, 6], list(range(60))), "forget": ([5, 6], list(range(60, 120)))},
        {"retain": ([7], [8]), "forget": ([7], [9])},
    ]
    assert shares_prefix(model, collate(rows), ("final",))
