import math

import pytest
import torch
from torch import nn

from expunge.losses import domain_bce, reverse_gradient, segment_means


def test_reversal_is_the_identity_forward_and_minus_weight_backward():
    x = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    reversed_x = reverse_gradient(x, 0.3)
    assert torch.equal(reversed_x, x)
    (reversed_x * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([-0.3, -3.0, -30.0]))


@pytest.mark.parametrize("weight", [0.0, 0.2, 5.0])
def test_reversal_turns_the_gradient_of_the_model_and_leaves_that_of_the_discriminator(weight):
    torch.manual_seed(0)
    theta, phi = nn.Linear(4, 4).double(), nn.Linear(4, 1).double()
    inputs = {side: torch.randn(2, 5, 4, dtype=torch.double) for side in ("retain", "forget")}
    masks = {side: torch.rand(2, 5) < 0.7 for side in inputs}

    def gradients(through):
        logits = {side: phi(through(theta(x))).squeeze(-1) for side, x in inputs.items()}
        return torch.autograd.grad(domain_bce(logits, masks), [theta.weight, phi.weight])

    plain_theta, plain_phi = gradients(lambda h: h)
    theta_gradient, phi_gradient = gradients(lambda h: reverse_gradient(h, weight))
    assert plain_theta.abs().max() > 1e-3
    torch.testing.assert_close(theta_gradient, -weight * plain_theta)
    assert torch.equal(phi_gradient, plain_phi)


def test_domain_bce_by_hand():
    logits = {"retain": torch.tensor([[math.log(3.0), 99.0]]), "forget": torch.tensor([[0.0, math.log(3.0)]])}
    masks = {"retain": torch.tensor([[True, False]]), "forget": torch.tensor([[True, True]])}
    # D = 3/4 on the one retain token; D = 1/2, 3/4 on the two forget tokens
    expected = 0.5 * (-math.log(1 / 4) + (-math.log(1 / 2) - math.log(3 / 4)) / 2)
    assert domain_bce(logits, masks).item() == pytest.approx(expected, rel=1e-6)


def test_domain_bce_is_ln_2_where_the_discriminator_cannot_tell_and_then_labels_do_not_matter():
    logits = {"retain": torch.zeros(2, 3), "forget": torch.zeros(2, 3)}
    masks = {"retain": torch.ones(2, 3, dtype=torch.bool), "forget": torch.tensor([[True, False, False]] * 2)}
    swapped = {"retain": masks["forget"], "forget": masks["retain"]}
    assert domain_bce(logits, masks).item() == pytest.approx(math.log(2))
    assert domain_bce(logits, masks) == domain_bce(logits, swapped)


def test_domain_bce_falls_as_the_discriminator_learns():
    right = {"retain": torch.full((1, 2), -3.0), "forget": torch.full((1, 2), 3.0)}
    wrong = {"retain": right["forget"], "forget": right["retain"]}
    masks = {side: torch.ones(1, 2, dtype=torch.bool) for side in right}
    assert domain_bce(right, masks) < math.log(2) < domain_bce(wrong, masks)


def test_domain_bce_knows_neither_padding_nor_the_order_of_rows_nor_huge_logits():
    torch.manual_seed(0)
    logits = {side: torch.randn(3, 4) for side in ("retain", "forget")}
    masks = {side: torch.rand(3, 4) < 0.6 for side in logits}
    plain = domain_bce(logits, masks)
    padded = domain_bce(
        {side: torch.cat([x, torch.full((3, 2), 1e9)], 1) for side, x in logits.items()},
        {side: torch.cat([m, torch.zeros(3, 2, dtype=torch.bool)], 1) for side, m in masks.items()},
    )
    order = torch.tensor([2, 0, 1])
    shuffled = domain_bce({s: x[order] for s, x in logits.items()}, {s: m[order] for s, m in masks.items()})
    torch.testing.assert_close(padded, plain)
    torch.testing.assert_close(shuffled, plain)


def test_segments_by_hand():
    hidden = torch.arange(7.0)[None, :, None]  # [1, 7, 1]
    mask = torch.tensor([[False, False, True, True, True, False, False]])  # tokens 2, 3, 4
    means, kept = segment_means(hidden, mask, 2)
    assert means.squeeze().tolist() == [2.5, 4.0]
    assert kept.tolist() == [[True, True]]


def test_a_segment_of_one_is_the_token_level():
    hidden, mask = torch.randn(2, 5, 3), torch.rand(2, 5) < 0.5
    means, kept = segment_means(hidden, mask, 1)
    assert torch.equal(means, hidden)
    assert torch.equal(kept, mask)


def test_segment_zero_is_the_mean_of_the_row():
    torch.manual_seed(0)
    hidden = torch.randn(2, 5, 3)
    mask = torch.tensor([[False, True, True, True, False], [True, False, False, False, False]])
    means, kept = segment_means(hidden, mask, 0)
    torch.testing.assert_close(means[:, 0], torch.stack([hidden[0, 1:4].mean(0), hidden[1, 0]]))
    assert kept.tolist() == [[True], [True]]


def test_segments_know_no_padding_and_rows_may_be_shorter_or_empty():
    torch.manual_seed(0)
    hidden = torch.randn(3, 4, 2)
    mask = torch.tensor([[True] * 4, [True, True, True, False], [False] * 4])
    means, kept = segment_means(hidden, mask, 2)
    assert kept.tolist() == [[True, True], [True, True], [False, False]]
    torch.testing.assert_close(means[1], torch.stack([hidden[1, :2].mean(0), hidden[1, 2]]))
    longer = torch.cat([hidden, torch.full((3, 3, 2), 1e9)], 1)
    padded, kept_padded = segment_means(longer, torch.cat([mask, torch.zeros(3, 3, dtype=torch.bool)], 1), 2)
    torch.testing.assert_close(padded[kept_padded], means[kept])
