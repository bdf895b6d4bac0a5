"""Domain-adversarial pieces (Ganin et al. 2016; REPO section 2): gradient reversal, the domain loss, segment means.

L_adv = 1/2 [ MM(-log(1 - D(h)), retain) + MM(-log D(h), forget) ]
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from expunge.losses.masks import masked_mean


class _ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: float) -> torch.Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):  # type: ignore[override]
        return -ctx.weight * gradient, None


def reverse_gradient(x: torch.Tensor, weight: float) -> torch.Tensor:
    """The identity forward; multiplies the gradient by `-weight` backward (Ganin et al. 2016, eq. 14-15)."""
    return _ReverseGradient.apply(x, weight)  # type: ignore[return-value]


def domain_losses(logits: torch.Tensor, side: str) -> torch.Tensor:
    """-log(1 - D) where `side` is "retain", -log D where it is "forget", of the shape of `logits`; ln 2 where D cannot tell.

    logits: of D, whose sigmoid is P(forget).
    """
    return F.softplus(logits if side == "retain" else -logits)


def domain_bce(logits: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """L_adv above, a scalar: the two domains weigh the same whatever their lengths.

    logits: {"retain": `[B, T]`, "forget": `[B, T]`} of D; masks: bool, the same shapes.
    """
    means = [masked_mean(domain_losses(logits[side], side), masks[side]) for side in ("retain", "forget")]
    return 0.5 * (means[0] + means[1])


def segment_means(hidden: torch.Tensor, mask: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of `hidden` over windows of `size` masked tokens, counted from the first masked token of each row.

    hidden: `[B, T, d]`; mask: bool `[B, T]`; size: 1 returns both unchanged, 0 means one window for the whole row.
    Returns `[B, S, d]` and bool `[B, S]` (REPO section 7, the granularity ablation).
    """
    if size == 1:
        return hidden, mask
    rank = mask.cumsum(-1) - 1  # [B, T] index among the masked tokens of the row
    segment = torch.zeros_like(rank) if size == 0 else rank.clamp(min=0) // size
    count = int(segment.max()) + 1
    member = F.one_hot(segment, count).to(hidden.dtype) * mask[..., None]  # [B, T, S]
    sizes = member.sum(1)  # [B, S]
    means = torch.einsum("bts,btd->bsd", member, hidden) / sizes.clamp(min=1)[..., None]
    return means, sizes > 0
