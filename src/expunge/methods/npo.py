"""NPO: negative preference optimization (Zhang et al. 2024), weighed as the REPO paper does (appendix B).

    L = alpha L_f + L_r,     L_f = -(2 / beta) mean log sigmoid( -beta (log p(y-|x) - log p0(y-|x)) ),     L_r = NLL(y+)

A sequence's gradient is that of gradient ascent times 2 p^beta / (p^beta + p0^beta): it fades as y- becomes unlikely.

    NPO(alpha=0.2, beta=0.5)
"""

from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from expunge.losses import npo_loss
from expunge.methods.base import Method, check, method
from expunge.methods.retain import Retain, retain_losses

if TYPE_CHECKING:
    from expunge.engine import Step


@method("npo")
class NPO(Method):
    """Lower the likelihood of rejected continuations below the reference's, ever more gently; keep the chosen ones."""

    paper: ClassVar[str] = "Negative Preference Optimization, Zhang et al. 2024"
    data: ClassVar[Literal["pairs", "any"]] = "any"
    max_grad_norm: ClassVar[float] = 10.0

    alpha: float = 0.2
    """Weight of the forget loss beside the retain loss, > 0 (REPO Table 5: 0.2, 0.4, 0.8)."""
    beta: float = 0.5
    """Scale of the log-ratio, > 0; towards 0 the loss becomes gradient ascent (REPO Table 5: 0.5)."""
    clamp: float | None = 30.0
    """beta times the log-ratio is held to [-clamp, clamp]; null turns it off."""
    retain: Retain | Literal["none"] = "nll"
    """What keeps y+: its "nll" per token, the "kl" to the reference at its tokens, or "none"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.alpha > 0, "npo", "alpha", self.alpha, "a number > 0")
        check(self.beta > 0, "npo", "beta", self.beta, "a number > 0")
        check(self.clamp is None or self.clamp > 0, "npo", "clamp", self.clamp, "a number > 0, or null")

    @property
    def ref_sides(self) -> tuple[str, ...] | None:  # type: ignore[override]
        return None if self.retain == "kl" else ("forget",)

    @property
    def sides(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("retain", "forget", "anchor") if self.retain == "kl" else ("retain", "forget")

    def loss(self, step: "Step") -> dict[str, torch.Tensor]:
        rejected, _ = step.logps("forget")
        ref_rejected, _ = step.logps("forget", ref=True)
        ratios = (rejected - ref_rejected).detach()
        step.log("log_ratio", ratios.mean())
        step.log("weight", 2 * torch.sigmoid(self.beta * ratios).mean())
        if self.clamp is not None:
            step.log("clamped", (self.beta * ratios.abs() >= self.clamp).float().mean())
        forget = npo_loss(rejected, ref_rejected, self.beta, self.clamp)
        losses = {"forget": self.alpha * step.mean(forget, "forget", "last")}
        return losses if self.retain == "none" else losses | retain_losses(step, self.retain)
