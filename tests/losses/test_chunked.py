"""The chunked losses against the plain ones of `likelihood.py` in double precision, and that they stay small."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from expunge.losses import chunked_cross_entropy, chunked_sequence_logps, chunked_token_kl, sequence_logps, token_kl
from expunge.losses.chunked import Projection

B, T, D, V = 3, 7, 5, 11
PROJECTIONS = [Projection(), Projection(scale=0.3), Projection(softcap=2.0), Projection(scale=1.7, softcap=0.8)]


@pytest.fixture
def draw():
    torch.manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    return draw


def logits(hidden, weight, bias, projection):
    """The head as the models write it."""
    out = (hidden @ weight.T + (0 if bias is None else bias)) * projection.scale
    return out if projection.softcap is None else projection.softcap * torch.tanh(out / projection.softcap)


def gradients(value, *tensors):
    return torch.autograd.grad(value, tensors)


def mask():
    kept = torch.rand(B, T) < 0.6
    kept[:, 0] = False
    kept[-1] = False  # a row without a token
    return kept


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("tokens", [1, 4, 100])
def test_token_kl_is_the_plain_one(draw, projection, direction, tokens):
    hidden, weight, bias = draw(B, T, D), draw(V, D), draw(V)
    ref_hidden, ref_weight, ref_bias = draw(B, T, D), draw(V, D), draw(V)
    kept = mask()
    with torch.no_grad():
        reference = logits(ref_hidden, ref_weight, ref_bias, projection)
    plain = token_kl(logits(hidden, weight, bias, projection), reference, kept, direction)
    options = {"bias": bias, "ref_bias": ref_bias, "projection": projection, "chunk": tokens * V}
    ours = chunked_token_kl(hidden, weight, ref_hidden, ref_weight, kept, direction, **options)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
    wanted = gradients(plain * 3, hidden, weight, bias)
    for found, expected in zip(gradients(ours * 3, hidden, weight, bias), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("tokens", [1, 4, 100])
def test_sequence_logps_and_cross_entropy_are_the_plain_ones(draw, projection, tokens):
    hidden, weight, bias = draw(B, T, D), draw(V, D), draw(V)
    ids, kept = torch.randint(V, (B, T)), mask()
    options = {"bias": bias, "projection": projection, "chunk": tokens * V}
    plain, lengths = sequence_logps(logits(hidden, weight, bias, projection), ids, kept)
    ours, counted = chunked_sequence_logps(hidden, weight, ids, kept, **options)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-14)
    assert counted.tolist() == lengths.tolist()
    worth = torch.tensor([2.0, -0.5, 7.0], dtype=torch.float64)  # rows weigh differently
    wanted = gradients((plain * worth).sum(), hidden, weight, bias)
    for found, expected in zip(gradients((ours * worth).sum(), hidden, weight, bias), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    entropy = chunked_cross_entropy(hidden, weight, ids, kept, **options)
    targets = torch.where(kept, ids, -100)[:, 1:]
    wide = logits(hidden, weight, bias, projection)[:, :-1]
    torch.testing.assert_close(entropy, F.cross_entropy(wide.flatten(0, 1), targets.flatten()), rtol=1e-12, atol=0)


def test_the_first_token_has_no_prediction(draw):
    with pytest.raises(ValueError, match="first token"):
        chunked_sequence_logps(draw(B, T, D), draw(V, D), torch.zeros(B, T, dtype=torch.long), torch.ones(B, T).bool())


def test_a_frozen_head_and_a_frozen_body(draw):
    hidden, weight, kept = draw(B, T, D), draw(V, D), mask()
    ids, reference = torch.randint(V, (B, T)), draw(B, T, D).detach()

    def both(hidden, weight):
        kl = chunked_token_kl(hidden, weight, reference, weight, kept)
        return kl + chunked_sequence_logps(hidden, weight, ids, kept)[0].sum()

    of_hidden, of_weight = gradients(both(hidden, weight), hidden, weight)
    torch.testing.assert_close(gradients(both(hidden, weight.detach()), hidden)[0], of_hidden)
    torch.testing.assert_close(gradients(both(hidden.detach(), weight), weight)[0], of_weight)
    assert not both(hidden.detach(), weight.detach()).requires_grad


def test_no_token_is_zero_with_zero_gradients(draw):
    hidden, weight, kept = draw(B, T, D), draw(V, D), torch.zeros(B, T, dtype=torch.bool)
    kl = chunked_token_kl(hidden, weight, hidden, weight, kept)
    logps, lengths = chunked_sequence_logps(hidden, weight, torch.zeros(B, T, dtype=torch.long), kept)
    assert kl == 0 and logps.tolist() == [0] * B and lengths.tolist() == [0] * B
    for gradient in gradients(kl + logps.sum(), hidden, weight):
        assert not gradient.any()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("loss", ["kl", "logps"])
def test_bfloat16_is_as_near_as_the_plain_form(draw, loss, autocast):
    """Large sums over a vocabulary: the log-sum-exp and the head's gradient are float32 inside."""
    dtype = torch.float32 if autocast else torch.bfloat16
    hidden, weight = (draw(*shape).detach() for shape in ((1, 64, 32), (4096, 32)))
    reference, ids = draw(1, 64, 32).detach(), torch.randint(4096, (1, 64))
    kept = torch.arange(64)[None] > 0

    def plain(hidden, weight):
        if loss == "kl":
            return token_kl(hidden @ weight.T, reference.to(hidden.dtype) @ weight.detach().T, kept)
        return sequence_logps(hidden @ weight.T, ids, kept)[0].sum()

    def chunked(hidden, weight):
        if loss == "kl":
            return chunked_token_kl(hidden, weight, reference.to(hidden.dtype), weight, kept, chunk=4096 * 7)
        return chunked_sequence_logps(hidden, weight, ids, kept, chunk=4096 * 7)[0].sum()

    def found(form, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.float32):
            value = form(*inputs)
        return value, gradients(value, *inputs)

    def error(found, truth):
        return (found.double() - truth).norm() / truth.norm()

    ours, wide, (_, truth) = found(chunked, dtype), found(plain, dtype), found(plain, torch.float64)
    assert ours[0].dtype == torch.float32
    torch.testing.assert_close(ours[0], wide[0])
    for one, other, exact in zip(ours[1], wide[1], truth, strict=True):
        assert one.dtype == dtype
        assert error(one, exact) < 1.1 * error(other, exact)


class Peak(TorchDispatchMode):
    """The most numbers that lived at once in tensors made inside."""

    live, peak = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {x.data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor) and made.data_ptr() not in known:  # not a view of what is there
                self.live += made.numel()
                weakref.finalize(made, self.free, made.numel())
        self.peak = max(self.peak, self.live)
        return out

    def free(self, size: int) -> None:
        self.live -= size


def test_no_more_than_a_few_chunks_of_logits_are_ever_there(draw):
    tokens, vocabulary = 64, 1000
    hidden, weight = draw(1, tokens, D), draw(vocabulary, D)
    ids, kept = torch.randint(vocabulary, (1, tokens)), torch.ones(1, tokens, dtype=torch.bool)
    kept[:, 0] = False

    def peak(chunk):
        with Peak() as seen:
            kl = chunked_token_kl(hidden, weight, hidden * 0.9, weight, kept, chunk=chunk)
            logps, _ = chunked_sequence_logps(hidden, weight, ids, kept, chunk=chunk)
            gradients(kl + logps.sum(), hidden, weight)
        return seen.peak - 3 * weight.numel()  # its gradients and their sum

    assert peak(4 * vocabulary) < 5 * 4 * vocabulary
    assert peak(tokens * vocabulary) > 2 * (tokens - 1) * vocabulary  # the control: all at once is seen


def test_a_second_backward_pass_is_an_error_and_not_a_wrong_gradient(draw):
    hidden, weight = draw(1, 4, D), draw(V, D)
    kl = chunked_token_kl(hidden, weight, hidden * 0.9, weight, torch.ones(1, 4, dtype=torch.bool))
    kl.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        kl.backward()
