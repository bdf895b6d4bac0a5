import math

import pytest
import torch

from expunge.engine import collate, run_step
from expunge.errors import ExpungeError
from expunge.methods.dpo import DPO
from expunge.models import Reference

ROWS = [
    {"retain": ([5, 6, 7], [8, 9]), "forget": ([5, 6, 7], [10, 11, 12])},
    {"retain": ([20], [21, 22, 23, 24]), "forget": ([20], [25])},
]


def swap(rows):
    return [{"retain": row["forget"], "forget": row["retain"]} for row in rows]


def step_of(model, reference, rows=ROWS):
    return run_step(model, reference, collate(rows), ("final",), ("final",), {}, 0.0)


@pytest.fixture
def moved(tiny_model):
    model = tiny_model(dtype=torch.double)
    reference = Reference(model)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(1.3)
    return model, reference


def test_ln_2_at_the_reference_and_the_gradient_prefers_chosen(tiny_model):
    model = tiny_model(dtype=torch.double)
    reference = Reference(model)
    step = step_of(model, reference)
    loss = DPO().loss(step)["preference"]
    assert loss.item() == pytest.approx(math.log(2))
    assert step.logged["reward_margin"] == pytest.approx(0, abs=1e-9)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-3 * parameter.grad
    after = step_of(model, reference)
    assert DPO().loss(after)["preference"] < math.log(2)
    assert after.logged["reward_margin"] > 0
    assert after.logged["reward_accuracy"] == 1


def test_swapping_the_sides_turns_the_margin(moved):
    model, reference = moved
    step, swapped = step_of(model, reference), step_of(model, reference, swap(ROWS))
    DPO().loss(step)
    DPO().loss(swapped)
    assert abs(step.logged["reward_margin"]) > 1e-3
    assert swapped.logged["reward_margin"] == pytest.approx(-step.logged["reward_margin"])


def test_the_margin_is_beta_times_the_difference_of_log_ratios(moved):
    model, reference = moved
    step = step_of(model, reference, ROWS[:1])
    DPO(beta=0.2, clamp=None).loss(step)
    ratio = {side: step.logps(side)[0] - step.logps(side, ref=True)[0] for side in ("retain", "forget")}
    assert step.logged["reward_margin"] == pytest.approx(0.2 * (ratio["retain"] - ratio["forget"]).item())
    assert "clamped" not in step.logged


def test_the_share_of_clamped_pairs_is_logged(moved):
    model, reference = moved
    step = step_of(model, reference)
    DPO(clamp=1e-6).loss(step)
    assert step.logged["clamped"] == 1
    DPO(clamp=1e6).loss(step)
    assert step.logged["clamped"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0}, "method.beta=0.0: dpo wants a number > 0"),
        ({"beta": -1.0}, "method.beta=-1.0: dpo wants a number > 0"),
        ({"clamp": 0}, "method.clamp=0.0: dpo wants a number > 0, or null"),
        ({"clamp": "wide"}, "method.clamp='wide': expected a number or null"),
    ],
)
def test_bad_hyper_parameters_are_one_line(settings, message):
    with pytest.raises(ExpungeError, match=f"^{message}$"):
        DPO(**settings)
