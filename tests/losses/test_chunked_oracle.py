"""The chunked losses against the independent ones of TRL and liger, which also never make `[B, T, V]`, on the CPU."""

import pytest
import torch
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from expunge.losses import chunked_sequence_logps, chunked_token_kl, dpo_loss
from expunge.losses.chunked import Projection

B, T, D, V = 4, 9, 6, 50
PROJECTIONS = [Projection(), Projection(scale=0.7), Projection(scale=1.3, softcap=2.0)]


@pytest.fixture
def heads():
    """hidden `[B, T, D]`, weight `[V, D]`, bias `[V]`, of the model and of its reference; the model's take gradients."""
    torch.manual_seed(0)
    drawn = [torch.randn(*shape) for _ in range(2) for shape in ((B, T, D), (V, D), (V,))]
    return [tensor.requires_grad_(i < 3) for i, tensor in enumerate(drawn)]


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    wanted = torch.autograd.grad(theirs, leaves)
    for found, expected in zip(torch.autograd.grad(ours, leaves), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize(("direction", "beta"), [("forward", 0.0), ("reverse", 1.0)])
def test_token_kl_is_trl_s(heads, projection, direction, beta):
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = heads
    mask = torch.rand(B, T) < 0.6
    theirs, _ = ChunkedDivergenceFunction.apply(
        hidden[mask],
        weight,
        bias,
        ref_hidden[mask],
        ref_weight,
        ref_bias,
        beta,
        1.0,
        *[projection.scale, projection.softcap] * 2,
    )
    options = {"bias": bias, "ref_bias": ref_bias, "projection": projection, "chunk": 3 * V}
    ours = chunked_token_kl(hidden, weight, ref_hidden, ref_weight, mask, direction, **options)
    assert_same(ours, theirs.mean(), [hidden, weight, bias])


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_sequence_logps_are_trl_s(heads, projection):
    hidden, weight, bias, *_ = heads
    ids, mask, worth = torch.randint(V, (B, T)), torch.rand(B, T) < 0.6, torch.randn(B)
    mask[:, 0] = False
    theirs, *_ = ChunkedLogProbFunction.apply(
        hidden[:, :-1].reshape(-1, D), weight, bias, ids[:, 1:].flatten(), 1.0, 16, projection.softcap, projection.scale, ()
    )
    theirs = (theirs.view(B, T - 1) * mask[:, 1:]).sum(-1)
    ours, _ = chunked_sequence_logps(hidden, weight, ids, mask, bias=bias, projection=projection, chunk=3 * V)
    assert_same((ours * worth).sum(), (theirs * worth).sum(), [hidden, weight, bias])


def test_dpo_is_liger_s(heads):
    liger_losses = pytest.importorskip("liger_kernel.chunked_loss", reason="the Makefile installs it, without Triton")
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = heads
    ids, mask = torch.randint(V, (B, T)), torch.rand(B, T) < 0.6
    mask[:, 0] = False
    target = torch.where(mask, ids, -100)[:, 1:]  # chosen rows first
    liger = liger_losses.LigerFusedLinearDPOLoss(beta=0.3, compute_nll_loss=False, compiled=False)
    theirs, _ = liger(weight, hidden[:, :-1], target, bias, ref_hidden[:, :-1], ref_weight, ref_bias)
    logps, _ = chunked_sequence_logps(hidden, weight, ids, mask, bias=bias, chunk=3 * V)
    ref_logps, _ = chunked_sequence_logps(ref_hidden, ref_weight, ids, mask, bias=ref_bias, chunk=3 * V)
    ours = dpo_loss(*logps.chunk(2), *ref_logps.chunk(2), beta=0.3).mean()
    assert_same(ours, theirs, [hidden, weight, bias])
