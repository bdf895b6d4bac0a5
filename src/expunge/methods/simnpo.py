"""SimNPO: negative preference optimization without a reference, by likelihood per token (Fan et al. 2024).

L = gamma L_f + NLL(y+),     L_f = -(2 / beta) mean log sigmoid( -beta (log p(y-|x) / |y-| + delta) )

SimNPO(beta=4.5, gamma=0.125)
"""

import logging
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from expunge.losses import simnpo_loss
from expunge.methods.base import Method, check, method
from expunge.methods.retain import retain_losses

if TYPE_CHECKING:
    from expunge.engine import Step

LEAST = 1e-3
"""Of the weight before the first step: below it the forget loss is nothing beside the retain loss."""

log = logging.getLogger("expunge")


@method("simnpo")
class SimNPO(Method):
    """Lower the likelihood per token of rejected continuations until it is low; keep the chosen ones. No reference."""

    paper: ClassVar[str] = "Simplicity Prevails: Rethinking Negative Preference Optimization, Fan et al. 2024"
    reference: ClassVar[bool] = False
    data: ClassVar[Literal["pairs", "any"]] = "any"

    gamma: float = 0.125
    """Weight of the forget loss beside the retain loss, > 0."""
    beta: float = 4.5
    """Scale of the log-probability per token, > 0."""
    delta: float = 0.0
    """Nats per token, >= 0, at which y- weighs 1, as in gradient ascent; it weighs less beyond."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.gamma > 0, "simnpo", "gamma", self.gamma, "a number > 0")
        check(self.beta > 0, "simnpo", "beta", self.beta, "a number > 0")
        check(self.delta >= 0, "simnpo", "delta", self.delta, "a number >= 0")
        self._looked = False

    def loss(self, step: "Step") -> dict[str, torch.Tensor]:
        rejected, lengths = step.logps("forget")
        nll = -(rejected / lengths).detach()
        step.log("forget_nll", nll.mean())
        step.log("weight", 2 * torch.sigmoid(-self.beta * (nll - self.delta)).mean())
        if step.progress == 0 and not self._looked and step.logged["weight"] < LEAST:
            log.warning(
                "simnpo: what is to be forgotten costs %.1f nats a token as it is, so it weighs %.0e of gradient ascent "
                "and next to nothing will be forgotten: raise method.delta to about that cost, or lower method.beta",
                step.logged["forget_nll"],
                step.logged["weight"],
            )
        self._looked = True
        forget = simnpo_loss(rejected, lengths, self.beta, self.delta)
        return {"forget": self.gamma * step.mean(forget, "forget", "last"), **retain_losses(step, "nll")}
