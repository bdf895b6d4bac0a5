"""How well a prefix brings back what a model said and thought before: the hot path of enhanced GCG.

    row = bos | prefix | prompt | target,    the loss of a prefix is the mean over rows

    with frozen(victim, reference):
        objective = PrefixLosses(victim, reference, targets, layers, start, Weights())
        parts = objective.parts(prefixes)            # {part: [N]} of prefixes of one length
        slope = objective.slope(prefix)              # d loss / d one-hot [n, V]

No prefix shares what another has computed, but all rows of one prefix share what is computed of it: its keys and values in
both models, and how likely it is.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache

from expunge.attacks.search.shared_keys import KeysValues, block_bytes, free_bytes, keys_and_values, shared_cache
from expunge.attacks.search.suffix_loss import by_token
from expunge.attacks.search.targets import Target
from expunge.engine import collate
from expunge.models import (
    Layer,
    check_model,
    depth,
    head_logits,
    hidden_states,
    in_batches,
    inner_model,
    vocabulary,
    width,
)

BATCH_TOKENS = 8192
LOGITS = 2**23
"""Values of the head's output at once."""


@dataclass(frozen=True)
class Weights:
    """What each part of the loss counts. A part of weight 0 is not computed; that of the target counts 1."""

    internal: float = 1.0
    static: float = 0.0
    fluency: float = 1.5
    repetition: float = 3.0
    floor: float | None = 0.6
    """A target that is likelier than this a token gains nothing more; None: it does."""
    target_tokens: int = 20
    """The tokens of a target whose likelihood counts."""


@dataclass(frozen=True)
class Begun:
    """What a model makes of the beginnings `[R, P]` of rows. losses: -log p of their tokens, 0 where not scored."""

    states: Mapping[Layer, torch.Tensor]
    keys: KeysValues
    losses: torch.Tensor

    def of(self, rows: Sequence[int]) -> "Begun":
        """The same of some rows, in that order."""
        states: dict[Layer, torch.Tensor] = {layer: states[rows] for layer, states in self.states.items()}
        return Begun(states, [(keys[rows], values[rows]) for keys, values in self.keys], self.losses[rows])


class PrefixLosses:
    """The loss of prefixes and its parts, over all targets. Use inside `frozen(victim, reference)`.

    layers: as in `hidden_states`; start: tokens of bos.
    """

    def __init__(
        self,
        victim: Any,
        reference: Any,
        targets: Sequence[Target],
        layers: Sequence[int],
        start: int,
        weights: Weights,
    ):
        for model in (victim, reference):
            check_model(model)
        self.victim, self.reference, self.start, self.weights = victim, reference, start, weights
        self.targets = sorted(targets, key=lambda target: len(target.prompt) + len(target.ids))
        self.layers: list[Layer] = list(layers)
        self.least = 0.0 if weights.floor is None else -math.log(weights.floor)
        self.static = [self._states_without_prefix(target) for target in self.targets] if weights.static else []
        self.shares = self._keep_keys()

    @property
    def longest(self) -> int:
        """Tokens of the longest row, without the prefix."""
        return len(self.targets[-1].prompt) + len(self.targets[-1].ids)

    @property
    def vocabulary(self) -> int:
        """Ids that both models know, in and out."""
        models = (self.victim, self.reference)
        return min(size for model in models for size in (len(model.get_input_embeddings().weight), vocabulary(model)))

    def total(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Of the parts, by their weights, `[N]`."""
        weights = {"force": 1.0, **vars(self.weights)}
        return torch.stack([weights[name] * part for name, part in parts.items()]).sum(0)

    @torch.no_grad()
    def parts(self, strings: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Each part of the loss of each string, unweighted, `[N]`, on the CPU. All of `strings` have one length."""
        found: list[dict[str, torch.Tensor]] = []
        size = self._rows_that_fit(len(strings[0]), kept=1, begun=self.shares)

        def some_strings(some: Sequence[Sequence[int]]) -> None:
            begun = self._begun(some) if self.shares else {}
            rows = [(number, which) for number in range(len(self.targets)) for which in range(len(some))]
            values: list[dict[str, torch.Tensor]] = []

            def some_rows(batch: Sequence[tuple[int, int]]) -> None:
                numbers, which = map(list, zip(*batch, strict=True))
                of = {model: known.of(which) for model, known in begun.items()}
                parts = self._parts([some[one] for one in which], numbers, of)
                values.append({name: part.cpu() for name, part in parts.items()})

            in_batches(rows, lambda _: size, some_rows)
            whole = {name: torch.cat([one[name] for one in values]) for name in values[0]}
            found.append({name: part.view(len(self.targets), len(some)).mean(0) for name, part in whole.items()})

        in_batches(strings, lambda _: size, some_strings)
        return {name: torch.cat([one[name] for one in found]) for name in found[0]}

    def slope(self, string: Sequence[int]) -> torch.Tensor:
        """d loss / d one-hot rows of the string, `[n, V]`: through both models, as both see it."""
        models = self._models
        slopes: dict[Any, torch.Tensor] = {}

        def add(batch: Sequence[int]) -> None:
            with torch.enable_grad(), nudged(models, len(string), self.start) as nudges:
                loss = self.total(self._parts([string] * len(batch), batch, {})).sum() / len(self.targets)
                for model, slope in zip(models, torch.autograd.grad(loss, nudges), strict=True):
                    slopes[model] = slopes.get(model, 0) + slope

        size = self._rows_that_fit(len(string), kept=max(map(depth, models)))
        in_batches(range(len(self.targets)), lambda _: size, add)
        return sum(by_token(model, slope, self.vocabulary) for model, slope in slopes.items())  # type: ignore[return-value]

    @torch.no_grad()
    def next_tokens(self, string: Sequence[int]) -> torch.Tensor:
        """Logits `[n + 1, V]` of what the victim expects at each place of the string, and after it; 0 after nothing."""
        ids = torch.tensor([[*self.targets[0].prompt[: self.start], *string]], device=self.victim.device)
        if not ids.numel():
            return torch.zeros(1, self.vocabulary)
        states = hidden_states(self.victim, ids, torch.ones_like(ids), ["final"])["final"][0, max(0, self.start - 1) :]
        logits = head_logits(self.victim, states)[:, : self.vocabulary].float().cpu()
        return logits if self.start else F.pad(logits, (0, 0, 1, 0))

    def _parts(
        self, strings: Sequence[Sequence[int]], numbers: Sequence[int], begun: Mapping[Any, Begun]
    ) -> dict[str, torch.Tensor]:
        """Of the row of each string and the number of its target, `[R]`. begun: of each model, or empty."""
        targets, start, weights = [self.targets[number] for number in numbers], self.start, self.weights
        pairs = [
            (t.prompt[:start] + list(string) + t.prompt[start:], t.ids) for string, t in zip(strings, targets, strict=True)
        ]
        batch = {name: tensor.to(self.victim.device) for name, tensor in collate([{"": pair} for pair in pairs])[""].items()}
        ids, ends, lengths = batch["ids"], batch["prompts"][:, None], batch["lengths"][:, None]
        place = torch.arange(ids.shape[1], device=self.victim.device)
        real, said = place < lengths, (place >= ends) & (place < lengths)
        forced, text = said & (place < ends + weights.target_tokens), (place >= max(1, start)) & (place < ends)
        after = (place >= start + torch.tensor([[len(s)] for s in strings], device=self.victim.device)) & real
        inner = self._inner
        states = _states(self.victim, ids, real, [*inner, "final"], begun)
        scored = forced | text if weights.fluency else forced
        losses = self._losses(states["final"], ids, scored, begun)
        parts = {"force": masked_means(losses, forced).clamp(min=self.least)}
        if weights.internal:
            before = _states(self.reference, ids, real, inner, begun)
            gaps = [_wide(states[layer] - before[layer]).norm(dim=-1) for layer in inner]
            parts["internal"] = masked_means(torch.stack(gaps).mean(0), after)
        if self.static:
            known = torch.cat([self.static[number] for number in numbers])  # [N, layers, d]
            own = torch.stack([_wide(states[layer][said]) for layer in inner], dim=1)
            parts["static"] = masked_means(on_grid(1 - F.cosine_similarity(own, known, dim=-1).mean(1), said), said)
        if weights.fluency:
            parts["fluency"] = masked_means(losses, text)
        if weights.repetition:
            repeated = [repetition(prompt[start:]) for prompt, _ in pairs]
            parts["repetition"] = torch.tensor(repeated, dtype=losses.dtype, device=losses.device)
        return parts

    def _rows_that_fit(self, length: int, kept: int, begun: bool = False) -> int:
        """Rows with a string of such a length, where what so many blocks of each model make of a row is kept.

        begun: keys and values of the string, of all blocks, are held twice: for each string, and for each row.
        """
        whole = length + self.longest
        row = sum(kept * block_bytes(inner_model(model), whole, whole) for model in self._models)
        if begun:
            row += sum(2 * 2 * depth(m) * (self.start + length) * width(m) * m.dtype.itemsize for m in self._models)
        return max(1, min(BATCH_TOKENS // whole, free_bytes(self.victim.device) // row))

    @property
    def _models(self) -> list[Any]:
        """Those whose states the prefix changes and the loss reads, each once."""
        return list(dict.fromkeys([self.victim, self.reference] if self.weights.internal else [self.victim]))

    @property
    def _inner(self) -> list[Layer]:
        return self.layers if self.weights.internal or self.static else []

    def _begun(self, strings: Sequence[Sequence[int]]) -> dict[Any, Begun]:
        """Of both models, before any prompt."""
        ids = torch.tensor([[*self.targets[0].prompt[: self.start], *string] for string in strings]).to(self.victim.device)
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        text = (places >= max(1, self.start)) & bool(self.weights.fluency)
        found = {}
        for model in self._models:
            cache, losses = DynamicCache(), torch.zeros(ids.shape, device=ids.device)
            layers = [*self._inner, "final"] if model is self.victim else self._inner
            states = hidden_states(model, ids, torch.ones_like(ids), layers, cache=cache)
            states = {layer: own.to(ids.device) for layer, own in states.items()}
            if model is self.victim:
                losses = self._losses(states["final"], ids, text, {})
            found[model] = Begun(states, [(layer.keys, layer.values) for layer in cache.layers], losses)  # type: ignore[misc]
        return found

    def _losses(
        self, states: torch.Tensor, ids: torch.Tensor, scored: torch.Tensor, begun: Mapping[Any, Begun]
    ) -> torch.Tensor:
        """-log p `[R, T]` of the `scored` ids by the victim's final states, 0 of the others."""
        if not begun:
            return on_grid(token_losses(self.victim, states, ids, scored), scored)
        known = begun[self.victim].losses
        rest = scored & (torch.arange(ids.shape[1], device=ids.device) >= known.shape[1])
        losses = on_grid(token_losses(self.victim, states, ids, rest), rest)
        losses[:, : known.shape[1]] = known
        return losses

    def _keep_keys(self) -> bool:
        """Do all layers of both models? The states that enter the first block need none, and so there are none to share."""
        if self._inner == [0]:
            return False
        ids = torch.tensor(self.targets[-1].prompt + self.targets[-1].ids, device=self.victim.device)
        return all(keys_and_values(model, ids) is not None for model in (self.victim, self.reference))

    @torch.no_grad()
    def _states_without_prefix(self, target: Target) -> torch.Tensor:
        """The reference's over the continuation, `[n, layers, d]`."""
        ids = torch.tensor([[*target.prompt, *target.ids]], device=self.victim.device)
        states = hidden_states(self.reference, ids, torch.ones_like(ids), self.layers)
        return torch.stack([_wide(states[layer][0, len(target.prompt) :]) for layer in self.layers], dim=1)


def _states(
    model: Any, ids: torch.Tensor, real: torch.Tensor, layers: Sequence[Layer], begun: Mapping[Any, Begun]
) -> dict[Layer, torch.Tensor]:
    """`hidden_states` of whole rows, of which those of the beginning may be known."""
    if not begun:
        found = hidden_states(model, ids, real.long(), layers)
        return {layer: states.to(ids.device) for layer, states in found.items()}  # a device map may end elsewhere
    known = begun[model]
    rest = hidden_states(model, ids[:, known.losses.shape[1] :], real.long(), layers, cache=shared_cache(known.keys))
    return {layer: torch.cat([known.states[layer], rest[layer].to(ids.device)], dim=1) for layer in layers}


def token_losses(model: Any, states: torch.Tensor, ids: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """-log p `[n]` of the `scored` ids, bool `[R, T]`, after final states `[R, T, d]`; some logits at a time."""
    predicting, wanted = states[:, :-1][scored[:, 1:]], ids[scored]
    chunk = max(1, LOGITS // vocabulary(model))
    parts = zip(predicting.split(chunk), wanted.split(chunk), strict=True)
    logits = ((_wide(head_logits(model, some)).to(of.device), of) for some, of in parts)
    return torch.cat([F.cross_entropy(found, of, reduction="none") for found, of in logits])


def on_grid(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`[R, T]` with values `[n]` where mask is true, and 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def masked_means(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`[R]`: the mean of each row of values `[R, T]` where mask is true."""
    return torch.where(mask, values, 0.0).sum(1) / mask.sum(1).clamp(min=1)


def repetition(ids: Sequence[int]) -> float:
    """sum over tokens of max(count - 1, 0)^1.5, over the number of ids (FLRT)."""
    return sum((count - 1) ** 1.5 for count in Counter(ids).values()) / len(ids)


@contextmanager
def nudged(models: Sequence[Any], length: int, start: int) -> Iterator[list[torch.Tensor]]:
    """Zeros `[length, d]` for each model, which are added to what its embedding gives out from place `start` on."""
    nudges, handles = [], []
    try:
        for model in models:
            embedding: nn.Module = model.get_input_embeddings()
            weight: Any = embedding.weight
            nudge = torch.zeros(length, weight.shape[1], dtype=weight.dtype, device=weight.device, requires_grad=True)

            def add(module: nn.Module, args: tuple, output: torch.Tensor, nudge: torch.Tensor = nudge) -> torch.Tensor:
                return output + F.pad(nudge, (0, 0, start, output.shape[1] - start - length))

            nudges.append(nudge)
            handles.append(embedding.register_forward_hook(add))
        yield nudges
    finally:
        for handle in handles:
            handle.remove()


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
