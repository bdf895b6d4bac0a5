"""The weight alpha of a retain loss, fixed or learned: what cosine RMU and probe directions share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from expunge.methods.base import Method, check
from expunge.methods.policy import BOUNDS, AlphaPolicy, Reward

if TYPE_CHECKING:
    from expunge.engine import Step


@dataclass(kw_only=True)
class LearnedAlpha(Method):
    """Fields of alpha, and L = L_F + alpha L_R."""

    alpha: Literal["fixed", "learned"] = "learned"
    """The weight of the retain loss: `alpha0` throughout, or learned by REINFORCE (section 4.2)."""
    alpha0: float = 1.0
    """Its value, > 0, or the first mean of what is learned, which is held to [0.001, 10000]."""
    reward: Reward = "normalised"
    """What the policy is rewarded for: normalised, improvement, product, or literal, which is degenerate."""
    alpha_learning_rate: float = 1e-2
    """Adam's for the policy's mean, > 0 (appendix B)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.alpha0 > 0, self.name, "alpha0", self.alpha0, "a number > 0")
        low, high = BOUNDS
        inside = self.alpha == "fixed" or low < self.alpha0 < high
        check(inside, self.name, "alpha0", self.alpha0, f"a number between {low:g} and {high:g} where alpha is learned")
        rate = self.alpha_learning_rate
        check(rate > 0, self.name, "alpha_learning_rate", rate, "a number > 0")

    def policy(self, bounded: bool) -> dict[str, nn.Module]:
        """The head that holds alpha, where it is learned; its noise follows from the seed that training set."""
        if self.alpha == "fixed":
            return {}
        seed = torch.initial_seed() % 2**31
        return {"policy": AlphaPolicy(self.alpha0, self.reward, self.alpha_learning_rate, seed, bounded)}

    def joined(
        self, step: "Step", forget: torch.Tensor, retain: torch.Tensor, relative: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """L_F and alpha L_R; relative: L_R in units that a policy can judge, where it is no 1 - cos."""
        step.log("forget_loss", forget.detach())
        step.log("retain_loss", (retain if relative is None else relative).detach())
        alpha = step.heads["policy"].alpha if self.alpha == "learned" else self.alpha0
        return {"forget": forget, "retain": alpha * retain}  # type: ignore[dict-item, operator]

    @property
    def observes(self) -> Sequence[str]:
        return ("forget_loss", "retain_loss") if self.alpha == "learned" else ()

    def after_step(self, heads: Mapping[str, nn.Module], figures: Mapping[str, float]) -> Mapping[str, float]:
        return heads["policy"].observe(figures["forget_loss"], figures["retain_loss"])  # type: ignore[operator]
