"""SURE-style erasure, as the REPO paper compares itself with it (section 7, Table 3; after Sepahvand et al. 2025).

    min over model, max over D:   NLL(y+) - weight L_adv
    L_adv = 1/2 mean( -log(1 - D(h)) ) over y+  +  1/2 mean( -log D(h) ) over y-,     h: mean state of a continuation

It is REPO with one decision a sequence in place of one a token, and cross-entropy in place of the KL.

    SURE(weight=0.2)
"""

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import nn

from expunge.losses import domain_losses, reverse_gradient, segment_means
from expunge.methods.base import Method, check, method
from expunge.methods.repo import REPO
from expunge.methods.retain import retain_losses

if TYPE_CHECKING:
    from expunge.engine import Step


@method("sure")
class SURE(Method):
    """Erase what tells the mean state of forget sequences from that of retain ones; cross-entropy on the retain side."""

    family: ClassVar[str] = "representation"
    paper: ClassVar[str] = "Selective Unlearning via Representation Erasure, Sepahvand et al. 2025"
    reference: ClassVar[bool] = False
    scored: ClassVar[tuple[str, ...]] = ("retain",)
    data: ClassVar[Literal["pairs", "any"]] = "any"

    weight: float = 0.2
    """lambda, >= 0: the pressure of the reversed gradient."""
    width: int = 256
    """Hidden units in each layer of the discriminator."""
    depth: int = 1
    """Hidden layers of the discriminator; 0 is linear."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.weight >= 0, "sure", "weight", self.weight, "a number >= 0")
        check(self.width >= 1, "sure", "width", self.width, "at least 1 hidden unit (method.depth=0 is linear)")
        check(self.depth >= 0, "sure", "depth", self.depth, "0 (linear) or more hidden layers")

    def heads(self, width: int) -> dict[str, nn.Module]:
        return REPO(width=self.width, depth=self.depth).heads(width)

    def loss(self, step: "Step") -> dict[str, torch.Tensor]:
        discriminator = step.heads["discriminator"]
        wide = next(discriminator.parameters()).dtype
        logits, masks = {}, {}
        for side in ("retain", "forget"):
            states = reverse_gradient(step.hidden(side), self.weight)
            with step.float32():
                means, masks[side] = segment_means(states.to(wide), step.mask(side, "continuation"), 0)  # [B, 1, d]
                logits[side] = discriminator(means).squeeze(-1)
        erase = {side: step.mean(domain_losses(found, side)[masks[side]], side, segment=0) for side, found in logits.items()}
        right = ((logits["retain"] < 0).float().mean() + (logits["forget"] > 0).float().mean()) / 2
        step.log("discriminator_accuracy", right)
        step.log("discriminator_forget", torch.sigmoid(logits["forget"].detach()).mean())
        return {**retain_losses(step, "nll"), "erase": (erase["retain"] + erase["forget"]) / 2}
