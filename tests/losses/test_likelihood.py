import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from expunge.losses import sequence_logps, token_kl


def test_kl_by_hand():
    model = torch.log(torch.tensor([[0.5, 0.5], [0.9, 0.1]]))
    reference = torch.log(torch.tensor([[0.25, 0.75], [0.5, 0.5]]))
    mask = torch.tensor([True, False])
    forward = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    reverse = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert token_kl(model, reference, mask).item() == pytest.approx(forward, rel=1e-5)
    assert token_kl(model, reference, mask, "reverse").item() == pytest.approx(reverse, rel=1e-5)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_equals_that_of_torch_distributions_in_double_precision(direction):
    torch.manual_seed(0)
    model, reference = 5 * torch.randn(2, 7, 50), 5 * torch.randn(2, 7, 50)
    mask = torch.rand(2, 7) < 0.6
    p, q = Categorical(logits=reference.double()), Categorical(logits=model.double())
    plain = kl_divergence(p, q) if direction == "forward" else kl_divergence(q, p)
    ours = token_kl(model, reference, mask, direction)
    torch.testing.assert_close(ours.double(), plain[mask].mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(token_kl(model.double(), reference.double(), mask, direction), plain[mask].mean())


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_and_its_gradient_are_zero_at_the_reference(direction):
    torch.manual_seed(0)
    logits = torch.randn(3, 40, dtype=torch.double, requires_grad=True)
    loss = token_kl(logits, logits.detach(), torch.ones(3, dtype=torch.bool), direction)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() < 1e-15


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_descending_the_kl_comes_nearer_to_the_reference(direction):
    torch.manual_seed(0)
    logits, reference = torch.randn(3, 40, requires_grad=True), torch.randn(3, 40)
    mask = torch.ones(3, dtype=torch.bool)
    before = token_kl(logits, reference, mask, direction)
    (gradient,) = torch.autograd.grad(before, logits)
    assert token_kl(logits - 0.1 * gradient, reference, mask, direction) < before


def test_kl_of_half_precision_logits_is_computed_in_float32():
    torch.manual_seed(0)
    logits, reference = torch.randn(3, 400).bfloat16(), torch.randn(3, 400).bfloat16()
    mask = torch.ones(3, dtype=torch.bool)
    assert torch.equal(token_kl(logits, reference, mask), token_kl(logits.float(), reference.float(), mask))


def test_log_probabilities_by_hand():
    logits = torch.log(torch.tensor([[[0.2, 0.8], [0.6, 0.4], [0.5, 0.5]]]))
    ids = torch.tensor([[1, 1, 0]])
    summed, lengths = sequence_logps(logits, ids, torch.tensor([[False, True, True]]))
    assert summed.item() == pytest.approx(math.log(0.8) + math.log(0.6))
    assert lengths.tolist() == [2]


def test_log_probabilities_know_neither_padding_nor_the_order_of_rows():
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 5, 9), torch.randint(9, (2, 5))
    mask = torch.tensor([[False, False, True, True, True], [False, True, True, False, False]])
    summed, lengths = sequence_logps(logits, ids, mask)
    padded, _ = sequence_logps(
        torch.cat([logits, torch.full((2, 3, 9), 1e4)], 1),
        torch.cat([ids, torch.zeros(2, 3, dtype=torch.long)], 1),
        torch.cat([mask, torch.zeros(2, 3, dtype=torch.bool)], 1),
    )
    torch.testing.assert_close(padded, summed)
    torch.testing.assert_close(sequence_logps(logits.flip(0), ids.flip(0), mask.flip(0))[0], summed.flip(0))
    assert lengths.tolist() == [3, 2]


def test_a_first_token_cannot_be_scored():
    with pytest.raises(ValueError, match="first token"):
        sequence_logps(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long), torch.tensor([[True, True]]))
