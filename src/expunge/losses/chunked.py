"""The losses of `likelihood.py` straight from hidden states: logits exist for a few tokens at a time, never `[B, T, V]`.

    kl = chunked_token_kl(hidden, weight, ref_hidden, ref_weight, mask)
    logps, lengths = chunked_sequence_logps(hidden, weight, ids, mask)

Logits are products in the dtype of `hidden` and `weight` (or autocast's); what follows is in at least float32, and so is
the sum of the chunks' gradients for the head.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from expunge.losses.likelihood import Direction

CHUNK = 2**24  # logits at once: some four tensors of 64 MiB; smaller chunks go over the gradient of the head more often


@dataclass(frozen=True)
class Projection:
    """What a head does besides `hidden @ weight.T`: logits = cap(scale * (hidden @ weight.T + bias))."""

    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`[n, V]`, at least float32."""
        logits = F.linear(hidden, weight, bias)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def slope(self, grad: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
        """The gradient for `hidden @ weight.T + bias`, given that for the `logits`, which only a cap needs."""
        if self.softcap is not None:
            assert logits is not None
            grad = grad * (1 - (logits / self.softcap) ** 2)
        return grad if self.scale == 1 else grad * self.scale


PLAIN = Projection()


def chunked_token_kl(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    mask: torch.Tensor,
    direction: Direction = "forward",
    *,
    bias: torch.Tensor | None = None,
    ref_bias: torch.Tensor | None = None,
    projection: Projection = PLAIN,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """`token_kl` of the logits that two heads give: mean KL per token between reference and model, a scalar.

    hidden, ref_hidden: final states `[..., d]`; weight, ref_weight: `[V, d]`; bias, ref_bias: `[V]`;
    mask: bool `[...]`, the positions that count; chunk: the most logits of either model that are made at a time.
    """
    kept, ref_kept = hidden[mask], ref_hidden[mask].detach()
    heads = (weight, bias, ref_weight.detach(), None if ref_bias is None else ref_bias.detach())
    return _TokenKL.apply(kept, ref_kept, *heads, direction, projection, chunk)  # type: ignore[return-value]


def chunked_sequence_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    projection: Projection = PLAIN,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sequence_logps` of the logits that a head gives: the sum over each row's masked tokens, and their number.

    hidden: final states `[B, T, d]`; weight: `[V, d]`; bias: `[V]`; ids: `[B, T]`; mask: bool `[B, T]`, true at the TOKENS
    that are scored, never at the first of a row. Returns float `[B]` and int64 `[B]`.
    """
    if mask[:, 0].any():
        raise ValueError("the first token of a row has no prediction: its mask must be false")
    scored = mask[:, 1:]
    logps = _TokenLogps.apply(hidden[:, :-1][scored], weight, bias, ids[:, 1:][scored], projection, chunk)
    return logps.new_zeros(scored.shape).masked_scatter(scored, logps).sum(-1), mask.sum(-1)  # type: ignore[union-attr]


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    projection: Projection = PLAIN,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """Mean negative log-probability per masked token, a scalar; arguments as in `chunked_sequence_logps`."""
    logps, lengths = chunked_sequence_logps(hidden, weight, ids, mask, bias=bias, projection=projection, chunk=chunk)
    return -logps.sum() / lengths.sum().clamp(min=1)


def _slices(tokens: int, vocabulary: int, chunk: int) -> Iterator[slice]:
    """Runs of tokens whose logits are at most `chunk` numbers."""
    size = max(1, chunk // vocabulary)
    return (slice(start, start + size) for start in range(0, tokens, size))


class _Gradients:
    """Sums of a head's gradients over chunks."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, needed: tuple[bool, ...]):
        self.hidden = torch.zeros_like(hidden) if needed[0] else None
        self._weight: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None
        self._head, self._offset = (weight if needed[1] else None), (bias if needed[2] else None)

    def add(self, rows: slice, grad: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> None:
        """The share of one chunk; grad: `[n, V]`, for `hidden @ weight.T`."""
        if self._offset is not None:
            self._bias = grad.sum(0) if self._bias is None else self._bias.add_(grad.sum(0))
        grad = grad.to(weight.dtype)
        if self.hidden is not None:
            self.hidden[rows] = grad @ weight
        if self._head is None:
            return
        if self._weight is None:  # no zeros to add to: writing fresh memory of `[V, d]` takes as long as the product
            self._weight = (grad.T @ hidden[rows]).to(_wide(weight))
        elif self._weight.dtype == hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
            self._weight.addmm_(grad.T, hidden[rows])
        else:
            self._weight += grad.T @ hidden[rows]

    @property
    def weight(self) -> torch.Tensor | None:
        """`[V, d]`, at least float32; None if nobody needs it."""
        return _zeros(self._head) if self._weight is None else self._weight

    @property
    def bias(self) -> torch.Tensor | None:
        """`[V]`, at least float32; None if nobody needs it."""
        return _zeros(self._offset) if self._bias is None else self._bias


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _zeros(like: torch.Tensor | None) -> torch.Tensor | None:
    return None if like is None else torch.zeros_like(like, dtype=_wide(like))


class _TokenKL(torch.autograd.Function):
    """Mean KL of `[n, d]` states; each chunk's gradient is computed with its loss, while its logits are there."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        ref_hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        ref_weight: torch.Tensor,
        ref_bias: torch.Tensor | None,
        direction: Direction,
        projection: Projection,
        chunk: int,
    ) -> torch.Tensor:
        need_hidden, _, need_weight, need_bias = ctx.needs_input_grad[:4]
        grads = _Gradients(hidden, weight, bias, (need_hidden, need_weight, need_bias))
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)

        def add(rows: slice) -> None:  # a function, so that one chunk's tensors are gone before the next one's are made
            logits = projection.logits(hidden[rows], weight, bias)
            model = F.log_softmax(logits, dim=-1)
            capped = None if projection.softcap is None else logits
            del logits
            reference = F.log_softmax(projection.logits(ref_hidden[rows], ref_weight, ref_bias), dim=-1)
            gap = reference - model
            if direction == "forward":
                p = reference.exp_()
                total.add_(gap.mul_(p).sum())
                slope = model.exp_().sub_(p)
            else:
                q = model.exp_()
                kl = gap.mul_(q).sum(-1, keepdim=True).neg_()
                total.add_(kl.sum())
                slope = gap.neg_().sub_(q.mul_(kl))
            if any(ctx.needs_input_grad):
                grads.add(rows, projection.slope(slope, capped), hidden, weight)

        for rows in _slices(len(hidden), len(weight), chunk):
            add(rows)
        ctx.count = max(1, len(hidden))
        ctx.grads, ctx.dtypes = grads, (weight.dtype, None if bias is None else bias.dtype)
        return total / ctx.count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:  # type: ignore[override]
        if ctx.grads is None:
            raise RuntimeError("the gradient of chunked_token_kl is there for one backward pass; compute the loss again")
        found = ctx.grads.hidden, ctx.grads.weight, ctx.grads.bias
        ctx.grads = None  # scaled in place and given away: a second `[V, d]` costs more time than its product
        scale = grad / ctx.count  # not in forward: half precision would round small slopes to zero
        hidden, weight, bias = (None if tensor is None else tensor.mul_(scale) for tensor in found)
        of_weight = None if weight is None else weight.to(ctx.dtypes[0])
        of_bias = None if bias is None else bias.to(ctx.dtypes[1])
        return hidden, None, of_weight, of_bias, None, None, None, None, None


class _TokenLogps(torch.autograd.Function):
    """Log-probability `[n]` of each id given its `[n, d]` state.

    What a row's log-probability is worth is not known before backward, so that the logits are made there once more.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        ids: torch.Tensor,
        projection: Projection,
        chunk: int,
    ) -> torch.Tensor:
        norms, logps = [], []
        for rows in _slices(len(hidden), len(weight), chunk):
            logits = projection.logits(hidden[rows], weight, bias)
            norms.append(logits.logsumexp(-1))
            logps.append(logits.gather(-1, ids[rows, None]).squeeze(-1) - norms[-1])
            del logits  # before the next chunk's are made
        empty = hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
        ctx.save_for_backward(hidden, weight, bias, ids, torch.cat([empty, *norms]))
        ctx.projection, ctx.chunk = projection, chunk
        device = hidden.device.type
        ctx.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return torch.cat([empty, *logps])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:  # type: ignore[override]
        hidden, weight, bias, ids, norms = ctx.saved_tensors
        grads = _Gradients(hidden, weight, bias, ctx.needs_input_grad)
        enabled, dtype = ctx.autocast
        with torch.autocast(hidden.device.type, dtype, enabled):
            for rows in _slices(len(hidden), len(weight), ctx.chunk):
                logits = ctx.projection.logits(hidden[rows], weight, bias)
                slope = (logits - norms[rows, None]).exp_().mul_(-grad[rows, None])
                slope.scatter_add_(-1, ids[rows, None], grad[rows, None])
                grads.add(rows, ctx.projection.slope(slope, logits), hidden, weight)
                del logits, slope
        of_weight = None if grads.weight is None else grads.weight.to(weight.dtype)
        of_bias = None if grads.bias is None else grads.bias.to(bias.dtype)
        return grads.hidden, of_weight, of_bias, None, None, None
