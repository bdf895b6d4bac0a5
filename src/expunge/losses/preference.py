"""Losses on the log-probabilities of a preferred and a dispreferred continuation.

z = beta [ (log p(y+|x) - log p0(y+|x)) - (log p(y-|x) - log p0(y-|x)) ],   L = -log sigmoid(z)
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
    """Direct preference optimization (Rafailov et al. 2023, eq. 7), the mean over the batch; ln 2 at the reference.

    All log-probabilities: `[B]`, summed over continuation tokens. clamp: z is held to [-clamp, clamp] (REPO appendix B
    uses 30); beyond it the gradient is zero, also on the wrong side.
    """
    z = beta * ((chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps))
    if clamp is not None:
        z = z.clamp(-clamp, clamp)
    return -F.logsigmoid(z).mean()
