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
from torch.nn.functional import pad

PAIR = ("retain", "forget")
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


@dataclasses.dataclass(frozen=True)
class Packed:
    """Rows of one forward. `ids` `[R, L]`; `mask` `[R, L]`, or bool `[R, 1, L, L]` with `positions` `[R, L]`."""

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor | None
    places: Mapping[str, tuple[slice, torch.Tensor | None]]  # side -> its rows, and where in them each token is [B, T]

    def side(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """The `[B, T, d]` of one side out of `[R, L, d]`."""
        rows, index = self.places[name]
        if index is None:
            return states[rows]
        return states[rows].gather(1, index[..., None].expand(-1, -1, states.shape[-1]))


def pack(sides: Mapping[str, Side], plain: bool) -> Packed:
    """`sides` as rows; without both sides of a pair there is nothing to share, and the layout is plain."""
    if plain or not set(PAIR) <= set(sides):
        return _plain(sides)
    return _shared(sides)


def _plain(sides: Mapping[str, Side]) -> Packed:
    places, start = {}, 0
    for name, side in sides.items():
        places[name] = (slice(start, start + len(side.ids)), None)
        start += len(side.ids)
    ids = torch.cat([side.ids for side in sides.values()])
    return Packed(ids, torch.cat([side.mask("all") for side in sides.values()]).long(), None, places)


def _shared(sides: Mapping[str, Side]) -> Packed:
    retain, forget = (sides[name] for name in PAIR)
    others = {name: side for name, side in sides.items() if name not in PAIR}
    chosen, rejected = retain.lengths - retain.prompts, forget.lengths - forget.prompts
    ends = retain.lengths + rejected
    length = max([int(ends.max()), *(side.ids.shape[1] for side in others.values())])
    at = torch.arange(length, device=retain.ids.device)[None]  # [1, L]
    in_rejected = (at >= retain.lengths[:, None]) & (at < ends[:, None])
    positions = torch.where(in_rejected, at - chosen[:, None], at.expand(len(retain.ids), -1))
    ids = torch.where(in_rejected, _take(forget.ids, positions), _take(retain.ids, positions))
    in_chosen = (at >= retain.prompts[:, None]) & (at < retain.lengths[:, None])
    hidden = in_rejected[:, :, None] & in_chosen[:, None, :]  # [B, L, L] query, key
    valid = at < ends[:, None]
    rows = slice(0, len(ids))
    places: dict[str, tuple[slice, torch.Tensor | None]] = {
        "retain": (rows, _offsets(retain, torch.zeros_like(chosen), length)),
        "forget": (rows, _offsets(forget, chosen, length)),
    }
    all_ids, all_positions, all_valid, all_hidden = [ids], [positions], [valid], [hidden]
    start = len(ids)
    for name, side in others.items():
        spare = length - side.ids.shape[1]
        places[name] = (slice(start, start + len(side.ids)), at[:, : side.ids.shape[1]].expand(len(side.ids), -1))
        all_ids.append(pad(side.ids, (0, spare)))
        all_positions.append(at.expand(len(side.ids), -1))
        all_valid.append(pad(side.mask("all"), (0, spare)))
        all_hidden.append(torch.zeros(len(side.ids), length, length, dtype=torch.bool, device=at.device))
        start += len(side.ids)
    real = torch.cat(all_valid)
    causal = torch.ones(length, length, dtype=torch.bool, device=at.device).tril()
    mask = causal & real[:, None, :] & ~torch.cat(all_hidden)
    mask = mask | torch.eye(length, dtype=torch.bool, device=at.device)  # padding sees itself: no row of softmax is empty
    within = torch.where(real, torch.cat(all_positions), 0)  # a shared row may be longer than the model's context
    return Packed(torch.cat(all_ids), mask[:, None], within, places)


def _offsets(side: Side, skipped: torch.Tensor, length: int) -> torch.Tensor:
    """Where each token `[B, T]` of a side lies in its row of `length`: past its prompt, `skipped` `[B]` further on."""
    at = torch.arange(side.ids.shape[1], device=side.ids.device)[None]
    return torch.where(at >= side.prompts[:, None], at + skipped[:, None], at).clamp(max=length - 1)


def _take(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`ids` `[B, T]` at `positions` `[B, L]`, clamped to what there is."""
    return ids.gather(1, positions.clamp(max=ids.shape[1] - 1))
