"""The hot path: run the trained model and its reference once on a batch, and hand a method what it may see of them.

    step = run_step(model, reference, batch, layers=("final",), ref_layers=("final",), heads={}, progress=0.5)
    losses = method.loss(step)

The rows of the forward are laid out by `expunge.layout`; methods never see how.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from expunge.errors import ExpungeError, is_out_of_memory
from expunge.layout import Packed, Region, Side, pack
from expunge.losses import chunked_sequence_logps, chunked_token_kl, masked_mean, sequence_logps, token_kl
from expunge.losses.chunked import PLAIN, Projection
from expunge.losses.likelihood import Direction
from expunge.models import (
    Layer,
    Reference,
    alike,
    head_form,
    head_logits,
    hidden_states,
    inner_model,
    original,
    output_layer,
    tolerance,
)


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


@dataclass(frozen=True)
class Whole:
    """All that one optimizer step reads: every row of its `parts`, the micro-batches of all processes, without the ids."""

    sides: Mapping[str, Side]
    parts: int

    @classmethod
    def of(cls, rows: Mapping[str, torch.Tensor], parts: int) -> "Whole":
        """rows: int64 `[R, 2]` for each side, the tokens of prompt and whole row; a row of no tokens is padding."""
        return cls({name: Side(found.new_zeros(len(found), 0), *found.T) for name, found in rows.items()}, parts)


@dataclass(frozen=True)
class Head:
    """Final states `[..., d]` to logits `[..., V]`; where that is one linear layer and a scale, its parts too."""

    logits: Callable[[torch.Tensor], torch.Tensor]
    linear: nn.Linear | None = None
    projection: Projection = PLAIN


class Step:
    """All that a method sees of a batch. `side` is "retain", "forget", or "anchor" (neutral text, if there is any)."""

    def __init__(
        self,
        sides: Mapping[str, Side],
        policy: "States",
        reference: "States | None",
        head: Head,
        ref_head: Head,
        heads: Mapping[str, nn.Module] | nn.ModuleDict,
        progress: float,
        whole: Whole | None = None,
    ):
        self._sides, self._policy, self._reference, self._whole = sides, policy, reference, whole
        self._head, self._ref_head = head, ref_head
        self.heads = heads
        self.progress = progress
        self.logged: dict[str, float] = {}

    @property
    def sides(self) -> list[str]:
        return list(self._sides)

    def hidden(self, side: str, layer: Layer = "final", ref: bool = False) -> torch.Tensor:
        """Residual states `[B, T, d]`."""
        if side not in self._sides:
            raise KeyError(f"no side {side!r} in this batch")
        states, names = (self._reference, "ref_") if ref else (self._policy, "")
        if states is None or layer not in states.layers:
            raise KeyError(f"no state {layer!r}: name it in the method's `{names}layers`")
        if side not in states.packed.places:
            raise KeyError(f"no reference of side {side!r}: name it in the method's `ref_sides`")
        return states.packed.side(side, states.layers[layer])

    def mask(self, side: str, region: Region = "all") -> torch.Tensor:
        """bool `[B, T]`."""
        return self._sides[side].mask(region)

    def ids(self, side: str) -> torch.Tensor:
        """int64 `[B, T]`, right-padded."""
        return self._sides[side].ids

    def mean(self, values: torch.Tensor, side: str, region: Region = "continuation", segment: int = 1) -> torch.Tensor:
        """Return the mean of `values` over the tokens of a region, a scalar.

        It is weighted so that the mean over all micro-batches and processes of an optimizer step is the mean over all their
        tokens, however many each of them has.

        values: `[B, T]`, of which only the region's tokens count; or `[N]`, one for each of those tokens, or for each window
        of `segment` of them (as in `segment_means`). With region "last" there is one a row, `[B]`.
        Raises ExpungeError where there are more or fewer.
        """
        share, mask = self._share(side, region, segment), self.mask(side, region)
        if values.dim() == 2 and values.shape == mask.shape and segment == 1:
            return share * masked_mean(values, mask.to(values.device))
        rows = self._sides[side].counts(region)
        count = len(rows) if region == "last" else int(_segments(rows, segment).sum())
        if values.shape != (count,):
            wanted = f"{list(mask.shape)} or [{count}]" if segment == 1 else f"[{count}]"
            raise ExpungeError(f"step.mean: expected values {wanted} for side {side!r}, found {list(values.shape)}")
        return share * values.sum() / max(1, count)

    def float32(self) -> AbstractContextManager:
        """Compute in the dtype of the tensors, whatever autocast says: a discriminator averages and decides in fp32."""
        return torch.autocast(self._policy.packed.ids.device.type, enabled=False)

    def _share(self, side: str, region: Region, segment: int = 1) -> torch.Tensor | float:
        """What multiplies a mean over this batch for `mean`; 1 where the optimizer step is this batch alone."""
        if self._whole is None:
            return 1.0
        own, everything = (
            _segments(sides[side].counts(region), segment).sum() for sides in (self._sides, self._whole.sides)
        )
        return own * self._whole.parts / everything.clamp(min=1)

    def logps(self, side: str, ref: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed log-probability of each continuation `[B]`, and its length in tokens `[B]`."""
        head = self._ref_head if ref else self._head
        states, mask = self.hidden(side, ref=ref), self.mask(side, "continuation")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not ref):
            if head.linear is None:
                return sequence_logps(head.logits(states), self.ids(side), mask)
            weight, bias = head.linear.weight, head.linear.bias
            return chunked_sequence_logps(states, weight, self.ids(side), mask, bias=bias, projection=head.projection)

    def token_nll(self, side: str) -> torch.Tensor:
        """Mean negative log-probability per continuation token, a scalar, weighted as `mean` is; no eos is scored."""
        logps, lengths = self.logps(side)
        return -self._share(side, "continuation") * logps.sum() / lengths.sum()

    def token_kl(self, side: str, region: Region = "all", direction: Direction = "forward") -> torch.Tensor:
        """Mean KL per token between reference and model at the positions of `region`, a scalar, weighted as `mean` is."""
        share = self._share(side, region)
        states, ref_states, mask = self.hidden(side), self.hidden(side, ref=True), self.mask(side, region)
        head, ref_head = self._head, self._ref_head
        if head.linear is None or ref_head.linear is None:
            logits = head.logits(states[mask])  # [N, V]: padding never reaches the head
            with torch.no_grad():
                ref_logits = ref_head.logits(ref_states[mask])
            return share * token_kl(logits, ref_logits, torch.ones_like(logits[:, 0], dtype=torch.bool), direction)
        return share * chunked_token_kl(
            states,
            head.linear.weight,
            ref_states,
            ref_head.linear.weight,
            mask,
            direction,
            bias=head.linear.bias,
            ref_bias=ref_head.linear.bias,
            projection=head.projection,
        )

    def log(self, name: str, value: torch.Tensor | float) -> None:
        """Record a figure of this step under `name`."""
        self.logged[name] = float(value)


def _segments(tokens: torch.Tensor, size: int) -> torch.Tensor:
    """Windows of `size` that so many tokens of a row fill; 0: one for all of them."""
    return (tokens > 0).long() if size == 0 else (tokens + size - 1) // size


@dataclass(frozen=True)
class States:
    """What one model's forward left: residual states `[R, L, d]` by layer, and where each side lies in them."""

    packed: Packed
    layers: Mapping[Layer, torch.Tensor]


def run_step(
    model: nn.Module,
    reference: Reference | None,
    batch: Mapping[str, Mapping[str, torch.Tensor]],
    layers: Sequence[Layer],
    ref_layers: Sequence[Layer],
    heads: Mapping[str, nn.Module] | nn.ModuleDict,
    progress: float,
    ref_sides: Collection[str] | None = None,
    plain: bool = False,
    chunked: bool = True,
    whole: Whole | None = None,
) -> Step:
    """One forward of the model over all sides of `batch`, one of its reference over `ref_sides` (None: all), as a `Step`."""
    sides = {name: Side(**tensors) for name, tensors in batch.items()}
    policy = _states(model, sides, layers, plain)
    frozen_states = None
    if reference is not None and ref_layers:
        read = sides if ref_sides is None else {name: sides[name] for name in ref_sides if name in sides}
        if reference.stored is None:
            with reference.of(model) as frozen:
                frozen_states = _states(frozen, read, ref_layers, plain)
        else:
            packed = pack(read, plain=True)
            lengths = torch.cat([side.lengths for side in read.values()])
            frozen_states = States(packed, reference.stored.read(packed.ids, lengths, ref_layers))

    frozen_head = None if reference is None or reference.head is None else reference.head.to(policy.packed.ids.device)

    def ref_logits(hidden: torch.Tensor) -> torch.Tensor:
        if reference is not None and reference.copy is not None:
            with reference.of(model) as frozen:
                return head_logits(frozen, hidden)
        with original(model):
            return head_logits(model, hidden, frozen_head)

    head = _head(model, lambda states: head_logits(model, states), chunked)
    ref_head = _head(model, ref_logits, chunked, frozen_head)
    return Step(sides, policy, frozen_states, head, ref_head, heads, progress, whole)


def _head(
    model: nn.Module,
    logits: Callable[[torch.Tensor], torch.Tensor],
    chunked: bool,
    layer: nn.Module | None = None,
) -> Head:
    """In parts where they may be chunked and it is proved to be a linear layer: no adapter on it, not quantized."""
    layer = layer or output_layer(model)
    form = head_form(model) if chunked and type(layer) is nn.Linear else None
    if form is None or type(layer) is not nn.Linear:
        return Head(logits)
    return Head(logits, layer, Projection(form.scale, form.cap))


def _states(model: nn.Module, sides: Mapping[str, Side], layers: Sequence[Layer], plain: bool) -> States:
    window = getattr(inner_model(model).config.get_text_config(), "sliding_window", None)
    if window is not None and not plain:  # a mask of ours takes the place of its own
        plain = any(int(side.lengths.max()) > window for side in sides.values())
    packed = pack(sides, plain)
    return States(packed, hidden_states(model, packed.ids, packed.mask, layers, packed.positions))


@torch.no_grad()
def shares_prefix(model: nn.Module, batch: Mapping[str, Mapping[str, torch.Tensor]], layers: Sequence[Layer]) -> bool:
    """Does this architecture give the plain layout's states in the shared one? Compared on `batch`, at the real tokens."""
    sides = {name: Side(**tensors) for name, tensors in batch.items()}
    with torch.autocast(sides["retain"].ids.device.type, enabled=False):
        plain = _states(model, sides, layers, plain=True)
        try:
            shared = _states(model, sides, layers, plain=False)
        except Exception as error:  # it takes no position ids, or no mask of ours
            if is_out_of_memory(error):
                raise
            return False
    near = tolerance(model)
    for name, side in sides.items():
        real = side.mask("all")
        for layer in layers:
            a, b = (states.packed.side(name, states.layers[layer])[real].float() for states in (shared, plain))
            if not (a - b).abs().mean() <= near * b.abs().mean():
                return False
    return True


@torch.no_grad()
def check_head(model: nn.Module, batch: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """ExpungeError if the logits that losses see are not those of the model's own forward. Compared on one row."""
    side = Side(**batch["retain"])
    ids = side.ids[:1, : int(side.lengths[0])]
    inner = inner_model(model)
    with torch.autocast(ids.device.type, enabled=False):
        states = hidden_states(model, ids, torch.ones_like(ids), ["final"])["final"]
        ours = head_logits(model, states)
        # without accelerate's autocast
        own, again = (type(inner).forward(inner, input_ids=ids, use_cache=False).logits for _ in range(2))
    near = tolerance(inner)
    if not alike(again, own, near):
        raise ExpungeError(
            f"{type(inner).__name__}: its forward is random in training, beyond its dropout, so that it cannot be "
            "compared with a reference; set what its configuration calls noise or jitter to 0"
        )
    if not alike(ours, own, near):
        raise ExpungeError(
            f"{type(inner).__name__}: its logits do not follow from the final states of its body; expunge cannot train an "
            "architecture whose logits it does not know"
        )


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
