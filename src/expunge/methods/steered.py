"""What methods on states share: the blocks at whose outputs they work, the weights that are trained, a direction.

The direction u is drawn once: its buffer is saved and resumed with a checkpoint, and the same on every process.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from expunge.anatomy import check_blocks, parameters_in
from expunge.errors import ExpungeError
from expunge.methods.base import Method, check
from expunge.methods.placement import Default, after, states_after, steered, three_up_to

if TYPE_CHECKING:
    from expunge.models import Layer

ALL = "all"
"""The value of `parameters` that means every weight of the model, as in full fine-tuning."""


@dataclass(kw_only=True)
class Steered(Method):
    """Fields and places of a method that steers the output of one block."""

    family: ClassVar[str] = "representation"
    data: ClassVar[Literal["pairs", "any"]] = "any"
    ref_sides: ClassVar[tuple[str, ...] | None] = ("retain",)

    layer: int | None = None
    """The block, from 0, at whose output states are steered; null: by depth."""
    train_blocks: list[int] | None = None
    """The blocks, up to `layer`, of which weights are trained; null: `layer` and the two below it."""
    parameters: str = "mlp_out"
    """Which weights of those blocks: mlp_out, all_block, or a part of their names; or `all` weights of the model."""
    vector: Literal["uniform", "gaussian"] = "uniform"
    """What u is drawn from before it is normalised: U[0, 1], all of whose parts are positive, or a normal."""

    def defaults(self, depth: int) -> Mapping[str, Default]:
        layer = steered(depth)
        if self.parameters == ALL:
            return {"layer": layer}
        return {"layer": layer, "train_blocks": three_up_to(layer.value if self.layer is None else self.layer)}

    def placed(self, depth: int):
        made = super().placed(depth)
        assert made.layer is not None, "defaults() knows it"
        check_blocks([made.layer, *(made.train_blocks or [])], depth)
        if made.train_blocks is None:
            return made
        check(self.parameters != ALL, self.name, "train_blocks", made.train_blocks, "null beside method.parameters=all")
        reached = bool(made.train_blocks) and max(made.train_blocks) <= made.layer
        check(reached, self.name, "train_blocks", made.train_blocks, f"blocks up to {made.layer}, where states are steered")
        return made

    @property
    def state(self) -> "Layer":
        assert self.layer is not None, "placed() fills it in"
        return after(self.layer, self.model_depth)

    @property
    def layers(self) -> "tuple[Layer, ...]":
        return (self.state,)

    @property
    def ref_layers(self) -> "tuple[Layer, ...]":
        return (self.state,)

    def trains(self, model: nn.Module) -> list[str] | None:
        return weights_to_train(model, self.train_blocks or [], self.parameters)

    def heads(self, width: int) -> dict[str, nn.Module]:
        return {"control": Control(width, self.vector)}


def weights_to_train(model: nn.Module, which: Sequence[int], parameters: str) -> list[str] | None:
    """Names of what `parameters` means in blocks `which`; None for `all`: every weight, embeddings too.

    What a loss on states does not reach has no gradient, and stays as it is: blocks above the deepest state, the last norm.
    """
    return None if parameters == ALL else parameters_in(model, which, parameters)


class Control(nn.Module):
    """u, a unit vector `[d]` that was drawn once, and its scale c."""

    direction: torch.Tensor
    scale: torch.Tensor

    def __init__(self, width: int, vector: Literal["uniform", "gaussian"], scale: float = 1.0):
        super().__init__()
        drawn = torch.rand(width) if vector == "uniform" else torch.randn(width)
        self.register_buffer("direction", F.normalize(drawn, dim=0))
        self.register_buffer("scale", torch.tensor(scale))

    @property
    def target(self) -> torch.Tensor:
        """c u."""
        return self.scale * self.direction


@dataclass(kw_only=True)
class AtBlocks(Method):
    """Fields and places of a method that works at the outputs of several blocks."""

    family: ClassVar[str] = "representation"
    data: ClassVar[Literal["pairs", "any"]] = "any"

    blocks: list[int] | None = None
    """The blocks, from 0, at whose outputs it works; null: by depth."""

    def placed(self, depth: int):
        made = super().placed(depth)
        check_blocks(made.blocks or [], depth)
        if not made.blocks:
            raise ExpungeError("method.blocks=[]: at least one block is needed")
        return made

    @property
    def targets(self) -> "tuple[Layer, ...]":
        """The states that leave those blocks."""
        return states_after(self.blocks or [], self.model_depth)

    @property
    def ref_layers(self) -> "Sequence[Layer]":
        return self.layers
