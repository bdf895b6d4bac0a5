"""Losses on next-token distributions: the KL that anchors to a reference, and log-probabilities of sequences.

KL(p || q) = sum_v p(v) (log p(v) - log q(v)),   p = reference, q = trained model ("forward"), or the other way round
"""

from typing import Literal

import torch
import torch.nn.functional as F

from expunge.losses.masks import masked_mean

Direction = Literal["forward", "reverse"]


def token_kl(
    logits: torch.Tensor, ref_logits: torch.Tensor, mask: torch.Tensor, direction: Direction = "forward"
) -> torch.Tensor:
    """Mean KL per token between reference and model, a scalar; at least float32 inside (REPO section 2.2, L_ret).

    logits, ref_logits: `[..., V]`; mask: bool `[...]`, the positions that count.
    direction: "forward" is KL(reference || model), "reverse" is KL(model || reference).
    """
    model, reference = (F.log_softmax(_at_least_float32(x), dim=-1) for x in (logits, ref_logits))
    p, q = (reference, model) if direction == "forward" else (model, reference)
    return masked_mean((p.exp() * (p - q)).sum(-1), mask)


def sequence_logps(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probability of the masked tokens of each row, and how many there are.

    logits: `[B, T, V]`, position t predicting token t + 1; ids: `[B, T]`; mask: bool `[B, T]`, true at the TOKENS that
    are scored (the first token of a row has no prediction and cannot be). Returns float `[B]` and int64 `[B]`.
    """
    if mask[:, 0].any():
        raise ValueError("the first token of a row has no prediction: its mask must be false")
    logps = F.log_softmax(_at_least_float32(logits[:, :-1]), dim=-1)
    scored = logps.gather(-1, ids[:, 1:, None]).squeeze(-1)
    kept = torch.where(mask[:, 1:], scored, torch.zeros_like(scored))
    return kept.sum(-1), mask.sum(-1)


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
