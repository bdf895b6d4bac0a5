"""Pure tensor mathematics: no model, no trainer. One file per family.

from expunge.losses import token_kl, dpo_loss
"""

from expunge.losses.adversarial import domain_bce, reverse_gradient, segment_means
from expunge.losses.chunked import chunked_cross_entropy, chunked_sequence_logps, chunked_token_kl
from expunge.losses.likelihood import sequence_logps, token_kl
from expunge.losses.masks import masked_mean
from expunge.losses.preference import dpo_loss

__all__ = [
    "chunked_cross_entropy",
    "chunked_sequence_logps",
    "chunked_token_kl",
    "domain_bce",
    "dpo_loss",
    "masked_mean",
    "reverse_gradient",
    "segment_means",
    "sequence_logps",
    "token_kl",
]
