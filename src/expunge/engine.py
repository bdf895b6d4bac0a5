"""The hot path: run the trained model and its reference once on a batch, and hand a method what it may see of them.

    step = run_step(model, reference, batch, method, progress=0.5)
    losses = method.loss(step)

The plain layout: all sides of the batch are rows of one right-padded forward. Methods never see the layout.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from expunge.losses import sequence_logps, token_kl
from expunge.losses.likelihood import Direction
from expunge.models import Layer, Reference, head_logits, hidden_states

Region = Literal["all", "prompt", "continuation", "last"]


@dataclasses.dataclass(frozen=True)
class Side:
    """One kind of sequence in a batch: `ids` `[B, T]` right-padded, `prompts` and `lengths` `[B]` in tokens."""

    ids: torch.Tensor
    prompts: torch.Tensor
    lengths: torch.Tensor

    def mask(self, region: Region) -> torch.Tensor:
        """bool `[B, T]`; masks come from lengths, never from the pad id, which may be a real token."""
        position = torch.arange(self.ids.shape[1], device=self.ids.device)[None]
        prompts, lengths = self.prompts[:, None], self.lengths[:, None]
        if region == "all":
            return position < lengths
        if region == "prompt":
            return position < prompts
        if region == "continuation":
            return (position >= prompts) & (position < lengths)
        return position == lengths - 1


def collate(features: Sequence[Mapping[str, tuple[list[int], list[int]]]]) -> dict[str, dict[str, torch.Tensor]]:
    """Rows of `{side: (prompt ids, continuation ids)}` to padded tensors, a dict that accelerate can move.

    Every side is padded to the longest row of the batch, so that all of them stack.
    """
    longest = max(len(prompt) + len(continuation) for row in features for prompt, continuation in row.values())
    batch = {}
    for side in features[0]:
        ids = torch.zeros(len(features), longest, dtype=torch.long)
        for i, row in enumerate(features):
            tokens = row[side][0] + row[side][1]
            ids[i, : len(tokens)] = torch.tensor(tokens)
        prompts = torch.tensor([len(row[side][0]) for row in features])
        lengths = torch.tensor([len(row[side][0]) + len(row[side][1]) for row in features])
        batch[side] = {"ids": ids, "prompts": prompts, "lengths": lengths}
    return batch


class Step:
    """All that a method sees of a batch. `side` is "retain", "forget", or "anchor" (neutral text, if there is any)."""

    def __init__(
        self,
        sides: Mapping[str, Side],
        policy: Mapping[Layer, torch.Tensor],
        reference: Mapping[Layer, torch.Tensor],
        head: Callable[[torch.Tensor], torch.Tensor],
        ref_head: Callable[[torch.Tensor], torch.Tensor],
        heads: Mapping[str, nn.Module] | nn.ModuleDict,
        progress: float,
    ):
        self._sides, self._policy, self._reference = sides, policy, reference
        self._head, self._ref_head = head, ref_head
        self.heads = heads
        self.progress = progress
        self.logged: dict[str, float] = {}

    @property
    def sides(self) -> list[str]:
        return list(self._sides)

    def hidden(self, side: str, layer: Layer = "final", ref: bool = False) -> torch.Tensor:
        """Residual states `[B, T, d]`."""
        states = self._reference if ref else self._policy
        if layer not in states:
            raise KeyError(f"no state {layer!r}: name it in the method's `{'ref_layers' if ref else 'layers'}`")
        start = 0
        for name, other in self._sides.items():
            if name == side:
                return states[layer][start : start + len(other.ids)]
            start += len(other.ids)
        raise KeyError(f"no side {side!r} in this batch")

    def mask(self, side: str, region: Region = "all") -> torch.Tensor:
        """bool `[B, T]`."""
        return self._sides[side].mask(region)

    def ids(self, side: str) -> torch.Tensor:
        """int64 `[B, T]`, right-padded."""
        return self._sides[side].ids

    def logps(self, side: str, ref: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed log-probability of each continuation `[B]`, and its length in tokens `[B]`."""
        head = self._ref_head if ref else self._head
        with torch.set_grad_enabled(torch.is_grad_enabled() and not ref):
            return sequence_logps(head(self.hidden(side, ref=ref)), self.ids(side), self.mask(side, "continuation"))

    def token_kl(self, side: str, region: Region = "all", direction: Direction = "forward") -> torch.Tensor:
        """Mean KL per token between reference and model at the positions of `region`, a scalar."""
        mask = self.mask(side, region)
        logits = self._head(self.hidden(side)[mask])  # [N, V]: padding never reaches the head
        with torch.no_grad():
            ref_logits = self._ref_head(self.hidden(side, ref=True)[mask])
        return token_kl(logits, ref_logits, torch.ones_like(logits[:, 0], dtype=torch.bool), direction)

    def log(self, name: str, value: torch.Tensor | float) -> None:
        """Record a figure of this step under `name`."""
        self.logged[name] = float(value)


def run_step(
    model: nn.Module,
    reference: Reference | None,
    batch: Mapping[str, Mapping[str, torch.Tensor]],
    layers: Sequence[Layer],
    ref_layers: Sequence[Layer],
    heads: Mapping[str, nn.Module] | nn.ModuleDict,
    progress: float,
) -> Step:
    """One forward of the model and one of its reference over all sides of `batch`, as a `Step`."""
    sides = {name: Side(**tensors) for name, tensors in batch.items()}
    ids = torch.cat([side.ids for side in sides.values()])
    mask = torch.cat([side.mask("all") for side in sides.values()]).long()
    policy = hidden_states(model, ids, mask, layers)
    frozen_states: dict[Layer, torch.Tensor] = {}
    if reference is not None and ref_layers:
        with reference.of(model) as frozen:
            frozen_states = hidden_states(frozen, ids, mask, ref_layers)

    def ref_head(hidden: torch.Tensor) -> torch.Tensor:
        assert reference is not None  # without one there are no states to project
        with reference.of(model) as frozen:
            return head_logits(frozen, hidden)

    return Step(sides, policy, frozen_states, lambda h: head_logits(model, h), ref_head, heads, progress)


def inside_forward(wrapped: nn.Module, inner: nn.Module, fn: Callable[..., Any], *args: Any) -> Any:
    """Run `fn(inner, *args)` inside `wrapped`'s forward, so that DDP and FSDP2 see the parameters that a loss uses.

    `fn` calls `inner.forward(...)` or parts of it, never `wrapped`.
    """
    patched = vars(inner).get("forward")  # accelerate's autocast, where there is one: it lies on the instance

    def restore() -> None:
        vars(inner).pop("forward", None)
        if patched is not None:
            inner.forward = patched

    def once(*inputs: Any) -> Any:
        restore()
        return fn(inner, *inputs)

    inner.forward = once
    try:
        return wrapped(*args)
    finally:
        restore()
