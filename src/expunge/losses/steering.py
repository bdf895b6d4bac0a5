"""What methods ask of residual states: RMU's steering and its cosine form, probe directions, rerouting.

    L_F = MM( ||h - c u||^2 / d )        or  MM( 1 - cos(h, u) )          Objectives Vary, equations 2 and 4
    L_R = MM( ||h - h0||^2 / d )         or  MM( 1 - cos(h, h0) )         equations 3 and 5

Each function returns one value a token, `[B, T]`; MM is their mean over the tokens of a mask (`Step.mean`). The paper's sums
over tokens are means here. States are compared in float32.
"""

import torch
import torch.nn.functional as F


def rmu_forget_loss(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over d of (h - target)^2, `[B, T]`; 0 where h is the target (Li et al. 2024).

    hidden: `[B, T, d]`; target: c u, `[d]`, or states `[B, T, d]`.
    """
    return (_wide(hidden) - _wide(target)).square().mean(-1)


def rmu_retain_loss(hidden: torch.Tensor, ref_hidden: torch.Tensor) -> torch.Tensor:
    """Mean over d of (h - h0)^2, `[B, T]`. hidden, ref_hidden: `[B, T, d]`."""
    return rmu_forget_loss(hidden, ref_hidden)


def cosine_steer_loss(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """1 - cos(h, target), `[B, T]` in [0, 2]; no scale of either matters (equations 4 and 5).

    hidden: `[B, T, d]`; target: a direction u `[d]`, or the reference's states `[B, T, d]`.
    """
    return 1 - F.cosine_similarity(_wide(hidden), _wide(target), dim=-1)


def probe_direction_loss(hidden_last: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Mean over layers of (h . w)^2, `[B]`: 0 where states are orthogonal to the direction (equation 6).

    hidden_last: states of each row's last token, `[B, I, d]`, or `[B, d]` of one layer; directions: `[I, d]`, or `[d]`.
    The paper writes a sum over layers and speaks of a mean; alpha absorbs what is between them.
    """
    squares = (_wide(hidden_last) * _wide(directions)).sum(-1).square()  # [B, I] or [B]
    return squares.mean(-1) if squares.dim() == 2 else squares


def rerouting_loss(hidden: torch.Tensor, ref_hidden: torch.Tensor) -> torch.Tensor:
    """ReLU(cos(h, h0)), `[B, T]`: 1 at the reference, 0 from orthogonal on (Zou et al. 2024).

    hidden, ref_hidden: `[B, T, d]`.
    """
    return F.cosine_similarity(_wide(hidden), _wide(ref_hidden), dim=-1).relu()


def distance_loss(hidden: torch.Tensor, ref_hidden: torch.Tensor) -> torch.Tensor:
    """The Euclidean distance ||h - h0||, `[B, T]`; circuit breakers' retain loss.

    hidden, ref_hidden: `[B, T, d]`. At h = h0 the value and the gradient are 0.
    """
    squared = (_wide(hidden) - _wide(ref_hidden)).square().sum(-1)
    apart = squared > 0  # the root has no gradient at 0
    return torch.where(apart, squared.where(apart, 1.0).sqrt(), 0.0)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
