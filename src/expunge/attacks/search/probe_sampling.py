"""Probe sampling (Zhao et al. 2024): a small draft model decides which strings the victim measures.

The draft ranks all N strings of a step, the victim a random N/16 of them. The better the two rankings agree, by Spearman's
rho, the fewer of the draft's best go to the victim besides: max(1, floor((1 - (1 + rho)/2) N/8)).

    strings, losses = probe_sample(strings, draft_losses, measure, generator)
"""

import math
from collections.abc import Callable

import torch

from expunge.metrics.stats import rank_correlation


def probe_sample(
    strings: torch.Tensor,
    guesses: torch.Tensor,
    measure: Callable[[torch.Tensor], torch.Tensor],
    draw: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of `strings` `[N, S]` that were measured, and their losses: a random sixteenth, and the draft's best.

    guesses: the draft's losses `[N]`.
    """
    probed = torch.randperm(len(strings), generator=draw)[: max(2, len(strings) // 16)]
    losses = measure(strings[probed])
    rho = rank_correlation(guesses[probed].numpy(), losses.numpy(), len(probed))[0]
    best = guesses.argsort(stable=True)[: kept_after_probing(rho, len(strings))]
    best = best[~torch.isin(best, probed)]
    rest = [measure(strings[best])] if len(best) else []
    return strings[torch.cat([probed, best])], torch.cat([losses, *rest])


def kept_after_probing(rho: float, width: int) -> int:
    """How many of the draft's best are measured; a rho that is not defined tells nothing, as 0 does."""
    return max(1, math.floor((1 - (1 + (0.0 if math.isnan(rho) else rho)) / 2) * width / 8))
