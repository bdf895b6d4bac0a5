"""Circuit breakers by representation rerouting (Zou et al. 2024), weighted as in the REPO paper.

L_s = mean over target blocks of MM( ReLU(cos(h, h0)) ) over the forget text
L_r = mean over all layers of MM( ||h - h0||_2 ) over the retain text
L = c_s L_s + c_r L_r,     c_s = gamma (1 - p / 2),   c_r = p / 2,   p the share of training done

CircuitBreakers(gamma=100)
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from expunge.losses import distance_loss, rerouting_loss
from expunge.methods.base import check, method
from expunge.methods.placement import Default, rerouted
from expunge.methods.steered import AtBlocks, weights_to_train

if TYPE_CHECKING:
    from expunge.engine import Step
    from expunge.models import Layer


@method("circuit_breakers")
class CircuitBreakers(AtBlocks):
    """Turn states of forget text away from the reference's; hold those of retain text to them at every layer."""

    paper: ClassVar[str] = "Improving Alignment and Robustness with Circuit Breakers, Zou et al. 2024"

    gamma: float = 100.0
    """Weight of the rerouting loss beside the retain loss, > 0 (REPO, Table 5; Gemma 2B: 1000)."""
    parameters: str = "all_block"
    """Which weights of the blocks up to the deepest target are trained: all_block, mlp_out, or a part of their names; or
    `all` weights of the model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.gamma > 0, "circuit_breakers", "gamma", self.gamma, "a number > 0")

    def defaults(self, depth: int) -> Mapping[str, Default]:
        return {"blocks": rerouted(depth)}

    @property
    def layers(self) -> "tuple[Layer, ...]":
        return (*range(self.model_depth), "pre_norm")

    def trains(self, model: nn.Module) -> list[str] | None:
        return weights_to_train(model, range(max(self.blocks or [0]) + 1), self.parameters)

    def loss(self, step: "Step") -> dict[str, torch.Tensor]:
        turned = [rerouting_loss(step.hidden("forget", at), step.hidden("forget", at, ref=True)) for at in self.targets]
        held = [distance_loss(step.hidden("retain", at), step.hidden("retain", at, ref=True)) for at in self.layers]
        reroute = step.mean(torch.stack(turned).mean(0), "forget")
        retain = step.mean(torch.stack(held).mean(0), "retain")
        step.log("reroute_cosine", reroute.detach())
        step.log("retain_distance", retain.detach())
        return {
            "reroute": self.gamma * (1 - step.progress / 2) * reroute,
            "retain": step.progress / 2 * retain,
        }
