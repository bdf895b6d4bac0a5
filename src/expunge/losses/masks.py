"""MM(x, m) = sum(x * m) / sum(m): the token-weighted masked mean that every token loss uses (methods.md, notation).

masked_mean(torch.tensor([[1.0, 5.0]]), torch.tensor([[True, False]]))    # 1.0
"""

import torch


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `values` where `mask` is true; both of one shape. Zero, with a zero gradient, where nothing is true."""
    kept = torch.where(mask, values, torch.zeros_like(values))
    return kept.sum() / mask.sum().clamp(min=1)
