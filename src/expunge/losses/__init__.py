"""Pure tensor mathematics: no model, no trainer. One file per family.

from expunge.losses import token_kl, dpo_loss
"""

from expunge.losses.adversarial import domain_bce, domain_losses, reverse_gradient, segment_means
from expunge.losses.chunked import chunked_cross_entropy, chunked_sequence_logps, chunked_token_kl
from expunge.losses.likelihood import sequence_logps, token_kl
from expunge.losses.masks import masked_mean
from expunge.losses.preference import dpo_loss, npo_loss, simnpo_loss
from expunge.losses.steering import (
    cosine_steer_loss,
    distance_loss,
    probe_direction_loss,
    rerouting_loss,
    rmu_forget_loss,
    rmu_retain_loss,
)

__all__ = [
    "chunked_cross_entropy",
    "chunked_sequence_logps",
    "chunked_token_kl",
    "cosine_steer_loss",
    "distance_loss",
    "domain_bce",
    "domain_losses",
    "dpo_loss",
    "masked_mean",
    "npo_loss",
    "probe_direction_loss",
    "rerouting_loss",
    "reverse_gradient",
    "rmu_forget_loss",
    "rmu_retain_loss",
    "segment_means",
    "sequence_logps",
    "simnpo_loss",
    "token_kl",
]
