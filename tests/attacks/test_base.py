"""What attacks share: cases of a grid, what is lacking, budgets, and a copy that shares weights and leaks nothing."""

from typing import ClassVar

import pytest
import torch

from expunge.attacks import ATTACKS, Attack, AttackData, Budget, Meter, attack, cases
from expunge.attacks.base import frozen
from expunge.data import Text
from expunge.errors import ExpungeError
from expunge.models import sharing_copy
from expunge.registry import UnknownName


@pytest.fixture
def made():
    @attack("made_up")
    class MadeUp(Attack):
        """For these tests."""

        needs: ClassVar[tuple[str, ...]] = ("reference", "forget")
        budgets: ClassVar = {"small": {"seed": [0, 1], "scale": [0.5, 1.0], "layers": [[1, 2]]}}
        scale: float = 1.0
        layers: list[int] | None = None

    yield MadeUp
    del ATTACKS._entries["made_up"]


def test_every_combination_of_a_budgets_values_is_a_case(made):
    found = cases("made_up", "small")
    assert [(one.seed, one.scale, one.layers) for one in found] == [(s, c, [1, 2]) for s in (0, 1) for c in (0.5, 1.0)]
    assert len(cases("made_up", "small", {"scale": 2, "seed": 7})) == 1
    assert [one.layers for one in cases("made_up", "none", {"layers": [[0], [1]]})] == [[0], [1]]
    assert [one.layers for one in cases("made_up", "none", {"layers": [0, 1]})] == [[0, 1]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scall": 1}, r"attack\.made_up\.scall.*did you mean 'scale'"),
        ({"scale": "big"}, r"attack\.made_up\.scale='big': expected a number"),
        ({"scale": []}, r"attack\.made_up\.scale=\[\]"),
        ({"seed": -1}, r"attack\.made_up\.seed=-1"),
    ],
)
def test_a_setting_that_is_none_is_one_line(made, settings, message):
    with pytest.raises(ExpungeError, match=message):
        cases("made_up", "small", settings)


def test_an_unknown_attack_is_one_line():
    with pytest.raises(UnknownName, match="did you mean 'gcg'"):
        cases("gcgg", "small")


def test_what_is_lacking_is_named(made, tokenizer):
    full = AttackData(tokenizer, forget=[Text("a", " b")])
    made().check(True, full)
    with pytest.raises(ExpungeError, match="give --reference"):
        made().check(False, full)
    with pytest.raises(ExpungeError, match="forget set is empty"):
        made().check(True, AttackData(tokenizer))


def test_a_budget_of_nothing_is_refused_and_one_that_is_spent_says_so():
    for bad in ({"steps": 0}, {"queries": -1}, {"seconds": 0}):
        with pytest.raises(ExpungeError, match="budget"):
            Budget(**bad)
    meter = Meter(Budget(steps=2, queries=100))
    meter.step(loss=3)
    assert not meter.spent
    meter.queries += 100
    assert meter.spent
    meter.step(loss=2)
    assert meter.spent and [line["loss"] for line in meter.trace] == [3, 2]
    result = meter.result(torch.nn.Linear(1, 1), about={"found": 1})
    assert (result.steps, result.queries) == (2, 100) and result.peak_memory_bytes > 0


def test_a_sharing_copy_owns_what_changes_and_nothing_else(tiny_model):
    model = tiny_model()
    name = "transformer.h.1.mlp.c_proj.weight"
    made = sharing_copy(model, [name])
    own = [n for (n, a), b in zip(made.named_parameters(), model.parameters(), strict=True) if a is not b]
    assert own == [name]
    made.get_parameter(name).data.zero_()
    assert model.get_parameter(name).abs().sum() > 0
    made.transformer.h[0].register_forward_hook(lambda *_: None)
    assert not model.transformer.h[0]._forward_hooks


def test_frozen_puts_everything_back_when_the_block_raises(tiny_model):
    model = tiny_model().train()
    model.transformer.wpe.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(KeyboardInterrupt), frozen(model):
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        raise KeyboardInterrupt
    assert model.training and {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_texts_are_tokenized_once_and_cut(tokenizer):
    data = AttackData(
        tokenizer, forget=[Text("The river runs past the mill", " and on to the sea")], max_continuation_tokens=3
    )
    [(prompt, continuation)] = data.rows("forget")
    assert tokenizer.decode(prompt) == "The river runs past the mill" and len(continuation) == 3
    assert data.rows("forget") is data.rows("forget")
