"""Where in a model a method works, by its depth, and where that comes from: the one place of such defaults.

    steered(12)                  # Default(value=3, source="scaled", why="7 of 32 blocks ...")

Block l is counted from 0; its output is the residual stream that enters block l + 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from expunge.models import Layer

Source = Literal["paper", "scaled", "ours"]


@dataclass(frozen=True)
class Default:
    """The value of a field that was left null; source: the paper's, the paper's scaled to the depth, or ours."""

    value: Any
    source: Source
    why: str


def steered(depth: int) -> Default:
    """The block at whose output RMU steers: 7 of 32 in Zephyr 7B (Li et al. 2024), the same share of any depth."""
    return Default((14 * depth + 32) // 64, "paper" if depth == 32 else "scaled", "block 7 of 32 in Zephyr 7B")


def three_up_to(block: int) -> Default:
    """The blocks whose weights RMU trains: the steered one and the two below it."""
    return Default(list(range(max(0, block - 2), block + 1)), "paper", "the steered block and the two below it")


def dispersed(depth: int, count: int = 9) -> Default:
    """Nine blocks, three in each third of the depth: floor((k + 1/2) L / 9); fewer where there are not nine."""
    count = min(count, depth)
    chosen = [(2 * k + 1) * depth // (2 * count) for k in range(count)]
    why = f"{count} blocks at even distances" + ("" if count == 9 else f", as there are only {depth}")
    return Default(chosen, "scaled", why + "; the paper says three early, three middle, three late")


def rerouted(depth: int) -> Default:
    """Circuit breakers' targets, which end the first two thirds of any depth: of 32, blocks 10 and 20.

    Zou et al. (2024) turn hidden states 10 and 20 of Llama 3 8B, which leave blocks 9 and 19.
    """
    third = [max(0, min(depth - 1, round(depth * part / 3) - 1)) for part in (1, 2)]
    return Default(sorted(set(third)), "scaled", "the outputs of blocks at one and two thirds of the depth")


def after(block: int, depth: int) -> "Layer":
    """The residual state that leaves `block`: the one that enters the next, or the last block's raw output."""
    return block + 1 if block + 1 < depth else "pre_norm"


def states_after(blocks: Sequence[int], depth: int) -> "tuple[Layer, ...]":
    return tuple(after(block, depth) for block in blocks)
