from typing import Literal

import pytest
import torch

from expunge.errors import ExpungeError
from expunge.methods import METHODS, Method, method


@pytest.fixture
def mine():
    @method("mine")
    class Mine(Method):
        """Pull the model back to its reference."""

        weight: float = 1.0
        steps: int = 3
        where: Literal["here", "there"] = "here"
        note: str | None = None

        def loss(self, step):
            return {"anchor": self.weight * step.token_kl("retain")}

    yield Mine
    METHODS._entries.pop("mine")


def test_a_method_is_a_dataclass_under_a_name(mine):
    assert METHODS.get("mine") is mine
    assert mine.name == "mine"
    assert mine(weight=2.0) == mine(weight=2.0) != mine()
    assert mine().layers == mine().ref_layers == ("final",)
    assert mine().heads(8) == {}


def test_without_a_reference_none_is_asked_for(mine):
    mine.reference = False
    assert mine().ref_layers == ()


def test_numbers_widen_where_that_is_exact(mine):
    assert type(mine(weight=2).weight) is float
    assert type(mine(steps=2.0).steps) is int


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": "much"}, "method.weight='much': expected a number"),
        ({"steps": 1.5}, "method.steps=1.5: expected a whole number"),
        ({"where": "elsewhere"}, "method.where='elsewhere': expected one of here, there"),
        ({"note": 3}, "method.note=3: expected text or null"),
    ],
)
def test_a_value_of_the_wrong_type_is_one_line(mine, settings, message):
    with pytest.raises(ExpungeError, match=f"^{message}$"):
        mine(**settings)


def test_a_loss_must_be_written():
    with pytest.raises(NotImplementedError):
        Method().loss(torch.zeros(()))
