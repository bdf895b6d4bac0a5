"""Cosine RMU with a learned trade-off (Objectives Vary, sections 4.1 and 4.2): two changes to RMU, each by itself.

distance: cosine      L_F = MM( 1 - cos(h, u) ),    L_R = MM( 1 - cos(h, h0) )        equations 4 and 5
distance: l2          RMU's squares (equations 2 and 3), c as adaptive RMU has it
alpha: learned        L = L_F + alpha L_R, alpha drawn by a policy that REINFORCE trains (`expunge.methods.policy`)
alpha: fixed          alpha stays `alpha0`

CosineRMU(distance="cosine", alpha="learned")
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import nn

from expunge.losses import cosine_steer_loss
from expunge.methods.adaptive_rmu import scale_target
from expunge.methods.base import Material, check, method
from expunge.methods.learned import LearnedAlpha
from expunge.methods.rmu import steering_losses
from expunge.methods.steered import Control, Steered

if TYPE_CHECKING:
    from expunge.engine import Step


@method("cosine_rmu")
class CosineRMU(LearnedAlpha, Steered):
    """RMU by angles instead of squares, its trade-off learned by REINFORCE; either change by itself."""

    paper: ClassVar[str] = "Model Unlearning Objectives Vary for Distinct Language Functions, sections 4.1 and 4.2"

    distance: Literal["cosine", "l2"] = "cosine"
    """Between states and their target: 1 - cos, or RMU's mean square."""
    s: float = 5.0
    """With l2: the target's length in mean lengths of the reference's states, > 0, as in adaptive RMU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.s > 0, "cosine_rmu", "s", self.s, "a number > 0")

    def heads(self, width: int) -> dict[str, nn.Module]:
        return {**super().heads(width), **self.policy(bounded=self.distance == "cosine")}

    def prepare(self, heads: Mapping[str, nn.Module], material: Material) -> None:
        if self.distance == "l2":
            scale_target(heads, material, self.s, self.state)

    def loss(self, step: "Step") -> dict[str, torch.Tensor]:
        if self.distance == "l2":
            forget, retain = steering_losses(step, self.state)
            control: Control = step.heads["control"]  # type: ignore[assignment]
            square = (control.scale / self.s) ** 2 / len(control.direction)  # of the reference's states, a mean over d
            return self.joined(step, forget, retain, relative=retain.detach() / square)
        direction = step.heads["control"].direction
        losses = {}
        for side, target in (("forget", direction), ("retain", step.hidden("retain", self.state, ref=True))):
            loss = cosine_steer_loss(step.hidden(side, self.state), target)  # type: ignore[arg-type]
            losses[side] = step.mean(loss, side)
        return self.joined(step, losses["forget"], losses["retain"])
