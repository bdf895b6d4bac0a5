"""Losses on the log-probabilities of a preferred and a dispreferred continuation, or of the dispreferred one alone.

Each returns one loss a row, whose mean is trained.

DPO     z = beta [ (log p(y+|x) - log p0(y+|x)) - (log p(y-|x) - log p0(y-|x)) ],   L = -log sigmoid(z)
NPO     z = -beta (log p(y-|x) - log p0(y-|x)),                                     L = -(2 / beta) log sigmoid(z)
SimNPO  z = -beta (log p(y-|x) / |y-| + delta),                                     L = -(2 / beta) log sigmoid(z)
"""

import torch
import torch.nn.functional as F


def dpo_loss(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    ref_chosen_logps: torch.Tensor,
    ref_rejected_logps: torch.Tensor,
    beta: float = 0.1,
    clamp: float | None = None,
) -> torch.Tensor:
    """Direct preference optimization (Rafailov et al. 2023, eq. 7), `[B]`; ln 2 at the reference.

    All log-probabilities: `[B]`, summed over continuation tokens. clamp: z is held to [-clamp, clamp] (REPO appendix B
    uses 30); beyond it the gradient is zero, also on the wrong side.
    """
    z = beta * ((chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps))
    if clamp is not None:
        z = z.clamp(-clamp, clamp)
    return -F.logsigmoid(z)


def npo_loss(
    rejected_logps: torch.Tensor,
    ref_rejected_logps: torch.Tensor,
    beta: float = 0.1,
    clamp: float | None = None,
) -> torch.Tensor:
    """Negative preference optimization (Zhang et al. 2024), `[B]`; (2 / beta) ln 2 at the reference.

    All log-probabilities: `[B]`, summed over continuation tokens. clamp: z is held to [-clamp, clamp]. A row's gradient is
    2 p^beta / (p^beta + p0^beta) times that of its log p: 1 at the reference, as in gradient ascent, towards 0 far below.
    """
    z = beta * (ref_rejected_logps - rejected_logps)
    if clamp is not None:
        z = z.clamp(-clamp, clamp)
    return -2 / beta * F.logsigmoid(z)


def simnpo_loss(
    rejected_logps: torch.Tensor, rejected_lengths: torch.Tensor, beta: float = 4.5, delta: float = 0.0
) -> torch.Tensor:
    """SimNPO (Fan et al. 2024), `[B]`: NPO by log-probability per token, with no reference.

    rejected_logps: `[B]`, summed over continuation tokens; rejected_lengths: `[B]`, how many those are.
    delta: nats per token at which a row weighs 1, as it would in gradient ascent; it weighs less beyond.
    """
    z = -beta * (rejected_logps / rejected_lengths + delta)
    return -2 / beta * F.logsigmoid(z)
