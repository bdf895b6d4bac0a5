"""How the sides of a batch become rows of one forward: the shared-prefix layout, and the plain one as its oracle.

    plain     prompt chosen              shared    prompt chosen rejected
              prompt rejected

In a shared row the position ids start again for `rejected` after the prompt, and a mask hides `chosen` from it, so the
prompt is computed once and every state is the plain one. Methods never see which layout ran.

    packed = pack(sides, plain=False)
    states = body(packed.ids, packed.mask, packed.positions)      # [R, L, d]
    packed.side("forget", states)                                 # [B, T, d]
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch

Region = Literal["all", "prompt", "continuation", "last"]
Place = tuple[slice, torch.Tensor | None]
"""The rows of a side; and `[B, T]`, where in them each of its tokens lies, or None if they begin the row."""


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

    def counts(self, region: Region) -> torch.Tensor:
        """int64 `[B]`: how many tokens of each row `mask` is true at."""
        if region == "last":
            return (self.lengths > 0).long()
        return {"all": self.lengths, "prompt": self.prompts, "continuation": self.lengths - self.prompts}[region]


@dataclasses.dataclass(frozen=True)
class Packed:
    """Rows of one forward. `ids` `[R, L]`; `mask` `[R, L]`, or bool `[R, 1, L, L]` with `positions` `[R, L]`."""

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor | None
    places: Mapping[str, Place]  # by side
    width: int  # T

    def side(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """The `[B, T, d]` of one side out of `[R, L, d]`."""
        rows, index = self.places[name]
        if index is None:
            return states[rows, : self.width]
        return states[rows].gather(1, index[..., None].expand(-1, -1, states.shape[-1]))


def pack(sides: Mapping[str, Side], plain: bool) -> Packed:
    """`sides`, all of one width, as rows; without both sides of a pair there is nothing to share: then plain."""
    if plain or not {"retain", "forget"} <= sides.keys():
        return _plain(sides)
    return _shared(sides)


def _plain(sides: Mapping[str, Side]) -> Packed:
    rows, places = _stacked(sides)
    return Packed(rows.ids, rows.mask("all").long(), None, places, rows.ids.shape[1])


def _shared(sides: Mapping[str, Side]) -> Packed:
    forget = sides["forget"]
    rows, places = _stacked({name: side for name, side in sides.items() if name != "forget"})
    prompts, lengths = rows.prompts[:, None], rows.lengths[:, None]
    pairs, _ = places["retain"]
    rejected = torch.zeros_like(lengths)  # neutral text has no other side
    rejected[pairs, 0] = forget.lengths - forget.prompts
    second = torch.zeros_like(rows.ids)
    second[pairs] = forget.ids
    ends = lengths + rejected
    length = max(rows.ids.shape[1], int(ends.max()))
    at = torch.arange(length, device=rows.ids.device)[None]  # [1, L]
    in_chosen = (at >= prompts) & (at < lengths)
    in_rejected = (at >= lengths) & (at < ends)
    chosen = lengths - prompts
    # padding is at 0: a shared row may be longer than the model's context
    positions = torch.where(in_rejected, at - chosen, torch.where(at < lengths, at, 0))
    ids = torch.where(in_rejected, _take(second, positions), _take(rows.ids, at.expand_as(positions)))
    causal = at.mT >= at  # [L, L] query, key
    seen = causal & (at < ends)[:, None, :] & ~(in_rejected[:, :, None] & in_chosen[:, None, :])
    seen = seen | (at.mT == at)  # padding sees itself: no row of softmax is empty
    index = torch.arange(forget.ids.shape[1], device=at.device)[None]
    index = torch.where(index >= forget.prompts[:, None], index + chosen[pairs], index).clamp(max=length - 1)
    return Packed(ids, seen[:, None], positions, {**places, "forget": (pairs, index)}, rows.ids.shape[1])


def _stacked(sides: Mapping[str, Side]) -> tuple[Side, dict[str, Place]]:
    """All sides under one another, and where each lies."""
    places: dict[str, Place] = {}
    start = 0
    for name, side in sides.items():
        places[name] = (slice(start, start + len(side.ids)), None)
        start += len(side.ids)
    fields = ("ids", "prompts", "lengths")
    return Side(*(torch.cat([getattr(side, field) for side in sides.values()]) for field in fields)), places


def _take(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`ids` `[B, T]` at `positions` `[B, L]`, clamped to what there is."""
    return ids.gather(1, positions.clamp(max=ids.shape[1] - 1))
