"""DPO: direct preference optimization (Rafailov et al. 2023), as the REPO paper runs it (appendix B).

z = beta [ (log p(y+|x) - log p0(y+|x)) - (log p(y-|x) - log p0(y-|x)) ],   L = -log sigmoid(z)

DPO(beta=0.5)
"""

from typing import TYPE_CHECKING, ClassVar

import torch

from expunge.losses import dpo_loss
from expunge.methods.base import Method, check, method

if TYPE_CHECKING:
    from expunge.engine import Step


@method("dpo")
class DPO(Method):
    """Prefer the chosen continuation to the rejected one, relative to the reference."""

    paper: ClassVar[str] = "Direct Preference Optimization, Rafailov et al. 2023"
    max_grad_norm: ClassVar[float] = 10.0

    beta: float = 0.5
    """Scale of the log-ratio difference, > 0 (REPO Table 5: 0.5 for GPT-2, 0.2 for Gemma)."""
    clamp: float | None = 30.0
    """z is held to [-clamp, clamp]; null turns it off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.beta > 0, "dpo", "beta", self.beta, "a number > 0")
        check(self.clamp is None or self.clamp > 0, "dpo", "clamp", self.clamp, "a number > 0, or null")

    def loss(self, step: "Step") -> dict[str, torch.Tensor]:
        chosen, _ = step.logps("retain")
        rejected, _ = step.logps("forget")
        ref_chosen, _ = step.logps("retain", ref=True)
        ref_rejected, _ = step.logps("forget", ref=True)
        margins = self.beta * ((chosen - ref_chosen) - (rejected - ref_rejected)).detach()
        step.log("reward_margin", margins.mean())
        step.log("reward_accuracy", (margins > 0).float().mean())
        if self.clamp is not None:
            step.log("clamped", (margins.abs() >= self.clamp).float().mean())
        loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, self.beta, self.clamp)
        return {"preference": step.mean(loss, "retain", "last")}
