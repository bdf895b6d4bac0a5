"""RMU: representation misdirection for unlearning (Li et al. 2024, WMDP), in its own form and in the REPO paper's.

    L_F = MM( ||h - c u||^2 / d ) over the forget text,    L_R = MM( ||h - h0||^2 / d ) over the retain text

    form "repo":          (1 - alpha) L_F + alpha L_R,    c 500,   alpha 0.95        REPO paper, Table 5
    form "repo_forget":   alpha L_F + (1 - alpha) L_R,    the same numbers
    form "wmdp":          L_F + alpha L_R,                c 20,    alpha 100         WMDP's code

The REPO paper calls alpha the "interpolation weight between forgetting and retaining representations" (appendix B) and gives
no equation. Which of the two it weighs is our guess: "repo" takes the retain loss, "repo_forget" is the other reading.

h are states at the output of one block, h0 the reference's, u a unit vector drawn once. As in WMDP's code only the output
matrices of the MLPs of that block and of the two below it are trained; the REPO paper trains all weights of GPT-2
(appendix C), which is `parameters="all"`.

    RMU(form="wmdp", c=6.5, alpha=1200, layer=7)
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import nn

from expunge.losses import rmu_forget_loss, rmu_retain_loss
from expunge.methods.base import check, method
from expunge.methods.placement import Default
from expunge.methods.steered import Control, Steered

if TYPE_CHECKING:
    from expunge.engine import Step
    from expunge.models import Layer


@method("rmu")
class RMU(Steered):
    """Steer states of forget text to a random vector; hold those of retain text to the reference."""

    paper: ClassVar[str] = "The WMDP Benchmark, Li et al. 2024; as in REPO's Table 5"

    form: Literal["repo", "repo_forget", "wmdp"] = "repo"
    """How the losses are joined: (1 - alpha) L_F + alpha L_R; the other way round; or L_F + alpha L_R."""
    c: float | None = None
    """Length of the target, > 0; null: the form's, 500 or 20."""
    alpha: float | None = None
    """Weight of the retain loss, in the form repo_forget of the forget loss, >= 0; at most 1 but in the form wmdp; null: the
    form's, 0.95 or 100."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.c is None or self.c > 0, "rmu", "c", self.c, "a number > 0, or null")
        most = float("inf") if self.form == "wmdp" else 1
        wanted = "a number >= 0" if self.form == "wmdp" else f"a number from 0 to 1 in the form {self.form}"
        check(self.alpha is None or 0 <= self.alpha <= most, "rmu", "alpha", self.alpha, wanted)

    def defaults(self, depth: int) -> Mapping[str, Default]:
        c, alpha, why = (20.0, 100.0, "WMDP's code") if self.form == "wmdp" else (500.0, 0.95, "REPO, Table 5")
        return {**super().defaults(depth), "c": Default(c, "paper", why), "alpha": Default(alpha, "paper", why)}

    def heads(self, width: int) -> dict[str, nn.Module]:
        return {"control": Control(width, self.vector, self.c or 1.0)}

    def loss(self, step: "Step") -> dict[str, torch.Tensor]:
        assert self.alpha is not None, "placed() fills it in"
        weights = {
            "repo": (1 - self.alpha, self.alpha),
            "repo_forget": (self.alpha, 1 - self.alpha),
            "wmdp": (1.0, self.alpha),
        }
        of_forget, of_retain = weights[self.form]
        forget, retain = steering_losses(step, self.state)
        return {"forget": of_forget * forget, "retain": of_retain * retain}


def steering_losses(step: "Step", state: "Layer") -> tuple[torch.Tensor, torch.Tensor]:
    """L_F and L_R over continuation tokens, and the length of both sides' states for the log."""
    hidden, mask = step.hidden("forget", state), step.mask("forget", "continuation")
    control: Control = step.heads["control"]  # type: ignore[assignment]
    forget = step.mean(rmu_forget_loss(hidden, control.target), "forget")
    kept, kept_mask = step.hidden("retain", state), step.mask("retain", "continuation")
    retain = rmu_retain_loss(kept, step.hidden("retain", state, ref=True))
    step.log("forget_norm", hidden.detach().float().norm(dim=-1)[mask].mean())
    step.log("retain_norm", kept.detach().float().norm(dim=-1)[kept_mask].mean())
    return forget, step.mean(retain, "retain")
