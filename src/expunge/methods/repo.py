"""REPO: representation erasure-based preference optimization.

    min_theta max_phi  L_ret(theta) - lambda L_adv(theta, phi)                              (section 2.2)
    L_ret = MM( KL(p_theta0 || p_theta) ) over prompt + y+,   L_adv = token BCE of D_phi, retain 0 / forget 1

D sits behind a gradient-reversal layer, so one joint step descends for phi and ascends for theta.

    REPO(weight=0.2, width=256)
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from expunge.losses import domain_bce, domain_losses, reverse_gradient, segment_means
from expunge.losses.likelihood import Direction
from expunge.methods.base import Method, check, method
from expunge.methods.discriminator import Upkeep, build, members

if TYPE_CHECKING:
    from expunge.engine import Step
    from expunge.models import Layer


@method("repo")
class REPO(Method):
    """Erase what tells forget tokens from retain tokens; anchor retain tokens to the reference by KL."""

    family: ClassVar[str] = "representation"
    paper: ClassVar[str] = "Detoxifying LLMs via Representation Erasure-based Preference Optimization, section 2"
    ref_sides: ClassVar[tuple[str, ...] | None] = ("retain", "anchor")
    sides: ClassVar[tuple[str, ...]] = ("retain", "forget", "anchor")
    scored: ClassVar[tuple[str, ...]] = ("retain", "anchor")
    data: ClassVar[Literal["pairs", "any"]] = "any"

    weight: float = 0.2
    """lambda, >= 0: the pressure of the reversed gradient (Table 5)."""
    width: int = 256
    """Hidden units in each layer of the discriminator."""
    depth: int = 1
    """Hidden layers of the discriminator; 0 is linear, 1 the paper's two-layer MLP (Table 4)."""
    layer: int | Literal["final", "pre_norm"] = "final"
    """The states to erase from: after the final norm, the raw output of the last block, or the stream into a block."""
    segment: int = 1
    """Tokens averaged before a decision: 1 is token level, 0 one decision for the whole region (section 7)."""
    kl: Direction = "forward"
    """KL(reference || model), or "reverse"."""
    anchor_on: Literal["continuation", "all"] = "all"
    """Positions of prompt + chosen that are anchored."""
    erase_on: Literal["continuation", "all"] = "continuation"
    """Positions that D judges. The prompt's states are the same on both sides and can only dilute."""
    ramp: bool = False
    """Raise lambda from 0 as DANN does: lambda (2 / (1 + exp(-10 p)) - 1), p the share of training done."""
    ensemble: int = 1
    """Discriminators side by side; the loss is their mean."""
    extra_steps: int = 0
    """Further steps of each discriminator on the states of every batch, before the model is pushed by it."""
    extra_rate: float = 1e-3
    """Adam's learning rate in these steps, > 0."""
    restart: int = 0
    """Start a discriminator anew, each in turn, after every so many optimizer steps; 0 is never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.weight >= 0, "repo", "weight", self.weight, "a number >= 0")
        check(self.width >= 1, "repo", "width", self.width, "at least 1 hidden unit (method.depth=0 is linear)")
        check(self.depth >= 0, "repo", "depth", self.depth, "0 (linear) or more hidden layers")
        check(self.layer in ("final", "pre_norm") or self.layer >= 0, "repo", "layer", self.layer, "0 or more")
        check(self.segment >= 0, "repo", "segment", self.segment, "1 or more tokens, or 0 for all")
        check(self.ensemble >= 1, "repo", "ensemble", self.ensemble, "at least 1 discriminator")
        check(self.extra_steps >= 0, "repo", "extra_steps", self.extra_steps, "0 or more steps")
        check(self.extra_rate > 0, "repo", "extra_rate", self.extra_rate, "a number > 0")
        check(self.restart >= 0, "repo", "restart", self.restart, "0 (never) or more steps")

    @property
    def layers(self) -> "tuple[Layer, ...]":
        return ("final",) if self.layer == "final" else ("final", self.layer)

    def heads(self, width: int) -> dict[str, nn.Module]:
        heads = build(width, self.width, self.depth, self.ensemble, normed=self.layer != "final")
        if self.extra_steps or self.restart:
            heads["upkeep"] = Upkeep(heads, seed=torch.initial_seed() % 2**31)
        return heads

    @property
    def observes(self) -> Sequence[str]:
        return ("discriminator_bce",) if self.restart else ()

    def after_step(self, heads: Mapping[str, nn.Module], figures: Mapping[str, float]) -> Mapping[str, float]:
        heads["upkeep"].advance(members(heads), self.restart)  # type: ignore[operator]
        return {}

    def pressure(self, progress: float) -> float:
        return self.weight * (2 / (1 + math.exp(-10 * progress)) - 1) if self.ramp else self.weight

    def loss(self, step: "Step") -> dict[str, torch.Tensor]:
        losses = {"anchor": step.token_kl("retain", self.anchor_on, self.kl)}
        if "anchor" in step.sides:
            losses["anchor_text"] = step.token_kl("anchor", "all", self.kl)
        discriminators = members(dict(step.heads.items()))
        states, masks = {}, {}
        for side in ("retain", "forget"):
            raw = reverse_gradient(step.hidden(side, self.layer), self.pressure(step.progress))
            with step.float32():
                raw = raw.to(_dtype(step.heads["discriminator"]))
                states[side], masks[side] = segment_means(raw, step.mask(side, self.erase_on), self.segment)
        with step.float32():
            self._practise(step, discriminators, states, masks)
            logits = {
                side: torch.cat([judge(found) for judge in discriminators.values()]).squeeze(-1)
                for side, found in states.items()
            }  # [E B, S]: the members' rows below each other
        losses["erase"] = (self._erase(step, "retain", logits, masks) + self._erase(step, "forget", logits, masks)) / 2
        _log_decisions(step, logits, {side: mask.repeat(self.ensemble, 1) for side, mask in masks.items()})
        return losses

    def _erase(
        self, step: "Step", side: str, logits: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """The domain loss of one side, the mean over its decisions and over the discriminators."""
        each = domain_losses(logits[side], side).view(self.ensemble, *masks[side].shape).mean(0)  # [B, S]
        return step.mean(each[masks[side]], side, self.erase_on, self.segment)

    def _practise(
        self,
        step: "Step",
        discriminators: Mapping[str, nn.Module],
        states: Mapping[str, torch.Tensor],
        masks: Mapping[str, torch.Tensor],
    ) -> None:
        """The steps that discriminators take by themselves on this batch, in training only."""
        if not (self.extra_steps and torch.is_grad_enabled()):
            return
        seen = {side: found.detach() for side, found in states.items()}
        for name, judge in discriminators.items():
            for _ in range(self.extra_steps):
                step.heads["upkeep"].practise(  # type: ignore[operator]
                    name,
                    judge,
                    lambda judge=judge: domain_bce({side: judge(found).squeeze(-1) for side, found in seen.items()}, masks),
                    self.extra_rate,
                )


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


@torch.no_grad()
def _log_decisions(step: "Step", logits: dict[str, torch.Tensor], masks: dict[str, torch.Tensor]) -> None:
    """Token BCE (healthy is about 0.6 to 0.9, ln 2 = no idea) and the balanced share of right decisions."""
    right = [
        ((logits["retain"] < 0) & masks["retain"]).sum() / masks["retain"].sum().clamp(min=1),
        ((logits["forget"] > 0) & masks["forget"]).sum() / masks["forget"].sum().clamp(min=1),
    ]
    step.log("discriminator_accuracy", sum(right) / 2)
    step.log("discriminator_forget", torch.sigmoid(logits["forget"][masks["forget"]]).mean())
    targets = torch.cat(
        [torch.zeros_like(logits["retain"][masks["retain"]]), torch.ones_like(logits["forget"][masks["forget"]])]
    )
    decisions = torch.cat([logits["retain"][masks["retain"]], logits["forget"][masks["forget"]]])
    step.log("discriminator_bce", F.binary_cross_entropy_with_logits(decisions, targets))
