import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from expunge.losses import dpo_loss, npo_loss, simnpo_loss


def logps(seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [-20 * torch.rand(6, dtype=torch.double) for _ in range(4)]


def test_ln_2_at_the_reference():
    chosen, rejected, _, _ = logps()
    assert dpo_loss(chosen, rejected, chosen, rejected, beta=0.5).mean().item() == pytest.approx(math.log(2))


def test_by_hand():
    one = torch.tensor([1.0])
    loss = dpo_loss(-2 * one, -9 * one, -3 * one, -7 * one, beta=0.5).mean()  # z = 0.5 ((-2 + 3) - (-9 + 7)) = 1.5
    assert loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(-1.5))))


def test_swapping_the_sides_turns_the_sign_of_z():
    chosen, rejected, ref_chosen, ref_rejected = logps()
    z = 0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected))
    swapped = dpo_loss(rejected, chosen, ref_rejected, ref_chosen).mean()
    torch.testing.assert_close(swapped, -logsigmoid(-z).mean())


def test_the_gradient_raises_chosen_and_lowers_rejected_and_rows_may_come_in_any_order():
    chosen, rejected, ref_chosen, ref_rejected = logps()
    chosen.requires_grad_()
    rejected.requires_grad_()
    loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected).mean()
    loss.backward()
    assert (chosen.grad < 0).all()
    torch.testing.assert_close(rejected.grad, -chosen.grad)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(dpo_loss(*(x[order] for x in (chosen, rejected, ref_chosen, ref_rejected))).mean(), loss)


@pytest.mark.parametrize("margin", [200.0, -200.0])
def test_the_clamp_bounds_the_loss_and_stops_the_gradient_on_both_sides(margin):
    chosen = torch.tensor([margin], requires_grad=True)
    zero = torch.zeros(1)
    free = dpo_loss(chosen, zero, zero, zero, beta=1.0).mean()
    held = dpo_loss(chosen, zero, zero, zero, beta=1.0, clamp=30.0).mean()
    torch.testing.assert_close(held, -logsigmoid(torch.tensor(math.copysign(30.0, margin))))
    assert held.item() != free.item()
    assert torch.autograd.grad(held, chosen)[0].item() == 0
    within = chosen / 100
    assert (
        dpo_loss(within, zero, zero, zero, beta=1.0, clamp=30.0).mean()
        == dpo_loss(within, zero, zero, zero, beta=1.0).mean()
    )


@pytest.mark.parametrize(("beta", "value"), [(0.5, 2.7726), (0.1, 13.863)])
def test_npo_at_the_reference_is_gradient_ascent(beta, value):
    rejected, _, _, _ = logps()
    rejected.requires_grad_()
    loss = npo_loss(rejected, rejected.detach(), beta).mean()
    assert loss.item() == pytest.approx(value, rel=1e-4)
    assert loss.item() == pytest.approx(2 / beta * math.log(2))
    ascent = rejected.mean()
    torch.testing.assert_close(torch.autograd.grad(loss, rejected)[0], torch.autograd.grad(ascent, rejected)[0])


def test_npo_by_hand():
    one = torch.tensor([1.0])
    loss = npo_loss(-9 * one, -7 * one, beta=0.5).mean()  # the odds p / p0 are exp(-2), to the power 0.5 exp(-1)
    assert loss.item() == pytest.approx(4 * math.log(1 + math.exp(-1)))


@pytest.mark.parametrize("beta", [0.05, 0.5, 2.0])
def test_npo_and_the_weight_of_its_rows_from_probabilities(beta):
    rejected, reference, _, _ = logps()
    rejected.requires_grad_()
    p, p0 = rejected.detach().exp(), reference.exp()
    loss = npo_loss(rejected, reference, beta).mean()
    torch.testing.assert_close(loss, (2 / beta * (1 + (p / p0) ** beta).log()).mean())
    (gradient,) = torch.autograd.grad(loss, rejected)
    torch.testing.assert_close(gradient, 2 * p**beta / (p**beta + p0**beta) / len(p))
    assert (gradient > 0).all()  # descent lowers the log-probability of what is rejected


def test_npo_becomes_gradient_ascent_as_beta_goes_to_0():
    rejected, reference, _, _ = logps()
    beta = 1e-6
    ascent = (rejected - reference).mean()
    loss = npo_loss(rejected, reference, beta).mean()
    torch.testing.assert_close(loss - 2 / beta * math.log(2), ascent, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("ratio", [200.0, -200.0])
def test_the_clamp_of_npo_bounds_its_loss_and_stops_its_gradient(ratio):
    rejected = torch.tensor([ratio], requires_grad=True)
    zero = torch.zeros(1)
    held = npo_loss(rejected, zero, beta=1.0, clamp=30.0).mean()
    torch.testing.assert_close(held, 2 * torch.tensor(math.copysign(30.0, ratio)).exp().log1p())
    assert torch.autograd.grad(held, rejected)[0].item() == 0
    within = rejected / 100
    assert npo_loss(within, zero, beta=1.0, clamp=30.0).mean() == npo_loss(within, zero, beta=1.0).mean()


def test_simnpo_by_hand():
    loss = simnpo_loss(
        torch.tensor([-6.0]), torch.tensor([3]), beta=0.5, delta=0.25
    ).mean()  # z = 0.5 (6 / 3 - 0.25) = 0.875
    assert loss.item() == pytest.approx(4 * math.log(1 + math.exp(-0.875)))


@pytest.mark.parametrize(("beta", "delta"), [(4.5, 0.0), (0.7, 0.4)])
def test_simnpo_and_the_weight_of_its_rows_from_probabilities(beta, delta):
    rejected, _, _, _ = logps()
    rejected.requires_grad_()
    lengths = torch.tensor([1, 2, 3, 20, 7, 40])
    p = (rejected.detach() / lengths).exp()  # the geometric mean over the tokens
    limit = math.exp(-delta)
    loss = simnpo_loss(rejected, lengths, beta, delta).mean()
    torch.testing.assert_close(loss, (2 / beta * (1 + (p / limit) ** beta).log()).mean())
    (gradient,) = torch.autograd.grad(loss, rejected)
    torch.testing.assert_close(gradient, 2 * p**beta / (p**beta + limit**beta) / lengths / len(p))
    assert (gradient > 0).all()


def test_simnpo_weighs_rows_by_their_tokens_not_by_their_sums():
    lengths = torch.tensor([1, 10])
    rejected = -2.0 * lengths
    one, ten = (simnpo_loss(rejected[i : i + 1], lengths[i : i + 1]).mean() for i in range(2))
    assert one == ten == simnpo_loss(rejected, lengths).mean()


@pytest.mark.parametrize("of", [lambda a, b: npo_loss(a, b).mean(), lambda a, b: simnpo_loss(a, 1 - b.long()).mean()])
def test_rows_of_what_is_rejected_may_come_in_any_order_and_in_two_batches(of):
    rejected, reference, _, _ = logps()
    whole = of(rejected, reference)
    torch.testing.assert_close(of(rejected.flip(0), reference.flip(0)), whole)
    torch.testing.assert_close((of(rejected[:2], reference[:2]) * 2 + of(rejected[2:], reference[2:]) * 4) / 6, whole)
