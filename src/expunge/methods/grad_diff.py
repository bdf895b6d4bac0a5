"""GradDiff: gradient ascent on what is to go, descent on what is to stay (Liu et al. 2022; Maini et al. 2024).

L = -gamma NLL(y-) + alpha L_r,     L_r = NLL(y+)  or  KL(p0 || p) on y+

GradDiff(gamma=1.0, alpha=1.0)
"""

from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from expunge.methods.base import Method, check, method
from expunge.methods.retain import Retain, retain_losses

if TYPE_CHECKING:
    from expunge.engine import Step


@method("grad_diff")
class GradDiff(Method):
    """Climb the loss of rejected continuations without a bound, and descend that of the chosen ones."""

    paper: ClassVar[str] = "TOFU, Maini et al. 2024, gradient difference"
    ref_sides: ClassVar[tuple[str, ...] | None] = ("retain", "anchor")
    data: ClassVar[Literal["pairs", "any"]] = "any"

    gamma: float = 1.0
    """Weight of the ascent, > 0."""
    alpha: float = 1.0
    """Weight of the retain loss, >= 0; 0 is gradient ascent alone."""
    retain: Retain = "nll"
    """What keeps y+: its "nll" per token, or the "kl" to the reference at its tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.gamma > 0, "grad_diff", "gamma", self.gamma, "a number > 0")
        check(self.alpha >= 0, "grad_diff", "alpha", self.alpha, "a number >= 0")

    @property
    def reference(self) -> bool:  # type: ignore[override]
        return self.retain == "kl"

    @property
    def sides(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("retain", "forget", "anchor") if self.retain == "kl" else ("retain", "forget")

    def loss(self, step: "Step") -> dict[str, torch.Tensor]:
        nll = step.token_nll("forget")
        kept = {name: self.alpha * value for name, value in retain_losses(step, self.retain).items()}
        return {"forget": -self.gamma * nll, **kept}
