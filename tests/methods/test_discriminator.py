import copy
import math

import pytest
import torch
from torch import nn

from expunge.engine import collate, run_step
from expunge.errors import ExpungeError
from expunge.losses import domain_bce
from expunge.methods.discriminator import Upkeep, build, members
from expunge.methods.repo import REPO
from expunge.models import Reference

ROWS = [
    {"retain": ([5, 6, 7], [8, 9]), "forget": ([5, 6, 7], [10, 11, 12])},
    {"retain": ([20], [21, 22, 23, 24]), "forget": ([20], [25])},
]


@pytest.fixture
def model(tiny_model):
    return tiny_model(dtype=torch.double)


@pytest.fixture
def step_of(model):
    """`step_of(method)`: a step on ROWS with heads of its own."""

    def make(method: REPO):
        torch.manual_seed(0)
        heads = {name: head.double() for name, head in method.heads(32).items()}
        return run_step(model, Reference(model), collate(ROWS), method.layers, method.ref_layers, heads, 0.0)

    return make


def plain_bce(step, discriminator: nn.Module) -> torch.Tensor:
    sides = ("retain", "forget")
    logits = {side: discriminator(step.hidden(side)).squeeze(-1) for side in sides}
    return domain_bce(logits, {side: step.mask(side, "continuation") for side in sides})


def test_an_ensemble_weighs_as_much_as_one_the_mean_of_its_members(model, step_of):
    method = REPO(weight=0.3, ensemble=3)
    step = step_of(method)
    judges = members(step.heads)
    assert list(judges) == ["discriminator", "discriminator_1", "discriminator_2"]
    mean = torch.stack([plain_bce(step, judge) for judge in judges.values()]).mean()
    weight = model.transformer.h[0].mlp.c_fc.weight
    [theta] = torch.autograd.grad(mean, [weight], retain_graph=True)
    erase = method.loss(step)["erase"]
    torch.testing.assert_close(erase, mean)
    torch.testing.assert_close(torch.autograd.grad(erase, [weight])[0], -0.3 * theta)


def test_members_differ_from_the_start():
    one, other = build(8, width=4, depth=1, members=2, normed=False).values()
    assert not torch.equal(one[0].weight, other[0].weight)


def test_extra_steps_are_those_of_torchs_adam_on_the_same_states(step_of):
    method = REPO(extra_steps=3, extra_rate=1e-2)
    step = step_of(method)
    oracle = copy.deepcopy(step.heads["discriminator"])
    adam = torch.optim.Adam(oracle.parameters(), lr=1e-2)
    for _ in range(2):  # the moments go on from batch to batch
        for _ in range(3):
            adam.zero_grad()
            plain_bce(step, oracle).backward(retain_graph=True)
            adam.step()
        method.loss(step)
    for ours, theirs in zip(step.heads["discriminator"].parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_extra_steps_leave_no_gradient_and_the_model_meets_the_better_discriminator(model, step_of):
    lazy, keen = REPO(), REPO(extra_steps=20, extra_rate=1e-2)
    before, after = (method.loss(step_of(method))["erase"] for method in (lazy, keen))
    assert after < before - 0.05
    assert all(p.grad is None for p in model.parameters())


def test_no_extra_step_is_taken_where_nothing_is_trained(step_of):
    method = REPO(extra_steps=2)
    step = step_of(method)
    before = copy.deepcopy(step.heads["discriminator"].state_dict())
    with torch.no_grad():
        method.loss(step)
    assert all(torch.equal(before[name], tensor) for name, tensor in step.heads["discriminator"].state_dict().items())


def test_discriminators_start_anew_in_turn():
    torch.manual_seed(0)
    method = REPO(ensemble=2, restart=2, extra_steps=1)
    heads = method.heads(16)
    judges = members(heads)
    heads["upkeep"].discriminator_moments.fill_(1.0)
    changed = []
    for _ in range(8):
        before = {name: judge[0].weight.clone() for name, judge in judges.items()}
        method.after_step(heads, {})
        changed.append([name for name, judge in judges.items() if not torch.equal(before[name], judge[0].weight)])
    first, second = ["discriminator"], ["discriminator_1"]
    assert changed == [[], first, [], second, [], first, [], second]
    assert not heads["upkeep"].discriminator_moments.any()


def test_a_new_start_is_the_same_after_a_resume():
    heads = build(16, width=4, depth=1, members=1, normed=False)
    upkeep = Upkeep(heads, seed=7)
    for _ in range(3):
        upkeep.advance(heads, 2)
    resumed, saved = copy.deepcopy(upkeep), copy.deepcopy(heads)
    torch.manual_seed(99)  # random state elsewhere has no part in it
    for one, other in ((upkeep, heads), (resumed, saved)):
        one.advance(other, 2)
    assert torch.equal(heads["discriminator"][0].weight, saved["discriminator"][0].weight)


@pytest.mark.parametrize("field", ["ensemble=0", "extra_steps=-1", "extra_rate=0", "restart=-1"])
def test_out_of_range_is_refused(field):
    name, value = field.split("=")
    with pytest.raises(ExpungeError, match=rf"^method.{name}="):
        REPO(**{name: int(value)})


def test_the_plain_method_has_no_upkeep():
    assert list(REPO().heads(16)) == ["discriminator"]
    assert REPO().observes == ()
    assert math.isclose(REPO(restart=1).heads(16)["upkeep"].steps.item(), 0)
