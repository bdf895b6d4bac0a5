import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from expunge.losses import dpo_loss


def logps(seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [-20 * torch.rand(6, dtype=torch.double) for _ in range(4)]


def test_ln_2_at_the_reference():
    chosen, rejected, _, _ = logps()
    assert dpo_loss(chosen, rejected, chosen, rejected, beta=0.5).item() == pytest.approx(math.log(2))


def test_by_hand():
    one = torch.tensor([1.0])
    loss = dpo_loss(-2 * one, -9 * one, -3 * one, -7 * one, beta=0.5)  # z = 0.5 ((-2 + 3) - (-9 + 7)) = 1.5
    assert loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(-1.5))))


def test_swapping_the_sides_turns_the_sign_of_z():
    chosen, rejected, ref_chosen, ref_rejected = logps()
    z = 0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected))
    swapped = dpo_loss(rejected, chosen, ref_rejected, ref_chosen)
    torch.testing.assert_close(swapped, -logsigmoid(-z).mean())


def test_the_gradient_raises_chosen_and_lowers_rejected_and_rows_may_come_in_any_order():
    chosen, rejected, ref_chosen, ref_rejected = logps()
    chosen.requires_grad_()
    rejected.requires_grad_()
    loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected)
    loss.backward()
    assert (chosen.grad < 0).all()
    torch.testing.assert_close(rejected.grad, -chosen.grad)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(dpo_loss(*(x[order] for x in (chosen, rejected, ref_chosen, ref_rejected))), loss)


@pytest.mark.parametrize("margin", [200.0, -200.0])
def test_the_clamp_bounds_the_loss_and_stops_the_gradient_on_both_sides(margin):
    chosen = torch.tensor([margin], requires_grad=True)
    zero = torch.zeros(1)
    free = dpo_loss(chosen, zero, zero, zero, beta=1.0)
    held = dpo_loss(chosen, zero, zero, zero, beta=1.0, clamp=30.0)
    torch.testing.assert_close(held, -logsigmoid(torch.tensor(math.copysign(30.0, margin))))
    assert held.item() != free.item()
    assert torch.autograd.grad(held, chosen)[0].item() == 0
    within = chosen / 100
    assert dpo_loss(within, zero, zero, zero, beta=1.0, clamp=30.0) == dpo_loss(within, zero, zero, zero, beta=1.0)
