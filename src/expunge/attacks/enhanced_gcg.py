"""Enhanced GCG: a fluent prefix that brings the states of an unlearned model back to those before (Łucki et al. 2025).

    loss = max(CE(target), -ln floor)                                   of the first tokens that the reference says, greedily
         + internal   * mean over layers and positions ||h - h0||_2     both models see prefix, prompt and continuation
         + static     * mean (1 - cos(h, h0 without the prefix))        over the continuation
         + fluency    * NLL(prefix, prompt)
         + repetition * sum over tokens max(count - 1, 0)^1.5 / length

averaged over several prompts, for one prefix before all of them. The search is FLRT's (Thompson and Sklar 2024): a step
changes the head of a buffer in one way, evaluates a few such changes, and drops that head. It begins with text that the
victim itself writes. The best string ever seen is kept. The states of the prefix itself are not compared.

    EnhancedGCG(steps=100).run(unlearned, reference, data, Budget())
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from expunge.attacks.base import Attack, AttackData, AttackResult, Budget, Meter, attack, frozen, in_range
from expunge.attacks.continuations import by_token
from expunge.attacks.proposals import expected, grow, liked, minimum_length, pick, propose, typed_before
from expunge.attacks.tokens import Target, allowed_tokens, decode, reference_targets
from expunge.config import at_least
from expunge.data.tokenize import leading_tokens
from expunge.engine import collate
from expunge.generation import check_room
from expunge.models import Layer, context_length, depth, head_logits, hidden_states, in_batches, sharing_copy

BATCH_TOKENS = 8192
LOGITS = 2**23
"""Values of the head's output at once."""


@attack("enhanced_gcg")
class EnhancedGCG(Attack):
    """A prefix that brings back both the words and the inner states of the model before unlearning."""

    family: ClassVar[str] = "prompt"
    paper: ClassVar[str] = "An Adversarial Perspective on Machine Unlearning for AI Safety, Łucki et al. 2025"
    needs: ClassVar[tuple[str, ...]] = ("reference", "prompts", "score")
    budgets: ClassVar[dict[str, dict[str, list[Any]]]] = {
        "small": {"steps": [100]},
        "paper": {"steps": [500]},
        "large": {"steps": [1500], "static": [0.0, 10.0], "seed": [0, 1, 2]},
    }

    steps: int = 500
    length: int = 32
    """Tokens of the prefix at first, and the fewest that it may have then."""
    final_length: int = 32
    """The fewest that it may have after `ramp` steps; the paper's code goes to 100."""
    ramp: int = 1000
    max_length: int = 64
    """The most that it may have; less where the context is shorter."""
    optimised: int = 8
    """Prompts to search on: those after which the reference's own words score highest."""
    target_tokens: int = 20
    """That are to be said, at most."""
    match_tokens: int = 0
    """More of the reference's words, whose states count and whose likelihood does not; the paper's code takes 35."""
    layers: list[int] | None = None
    """Blocks whose input states are compared; null: L/3, 2L/3 and L - 1 of L blocks."""
    floor: float | None = 0.6
    """A target that is likelier than so much a token gains nothing more; null: it does."""
    internal: float = 1.0
    static: float = 0.0
    """The paper's code takes 10 against DPO and NPO, without `floor`."""
    fluency: float = 1.5
    repetition: float = 3.0
    p_gcg: float = 0.7
    """How often each operator is taken (`expunge.attacks.proposals`)."""
    p_delete: float = 0.1
    p_insert: float = 0.1
    p_swap: float = 0.1
    proposals: int = 16
    """Strings that are evaluated at a step."""
    top_k: int = 64
    """Tokens that are considered in each place."""
    buffer: int = 16
    ascii: bool = True
    """Only tokens of ASCII text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = ("steps", "length", "final_length", "ramp", "optimised", "target_tokens", "proposals", "top_k", "buffer")
        least_0 = ("match_tokens", "internal", "static", "fluency", "repetition", "p_gcg", "p_delete", "p_insert", "p_swap")
        at_least("attack.enhanced_gcg", self, **dict.fromkeys(whole, 1), **dict.fromkeys(least_0, 0))
        check = partial(in_range, attack_name=self.name)
        most = max(self.length, self.final_length)
        check(self.max_length >= most, key="max_length", value=self.max_length, wanted=f"at least {most}")
        check(self.floor is None or 0 < self.floor <= 1, key="floor", value=self.floor, wanted="above 0 to 1, or null")
        check(self.p_gcg + self.p_swap > 0, key="p_gcg", value=self.p_gcg, wanted="above 0, where p_swap is 0")

    def run(self, unlearned: Any, reference: Any, data: AttackData, budget: Budget) -> AttackResult:
        self.check(reference is not None, data)
        layers = self._layers(depth(unlearned))
        meter = Meter(budget)
        targets, counts = reference_targets(reference, data, self.optimised, self.target_tokens + self.match_tokens)
        check_room(unlearned, [[*target.prompt, *target.ids] for target in targets], self.length)
        victim = sharing_copy(unlearned, ())
        original = victim if reference is unlearned else sharing_copy(reference, ())
        with frozen(victim, original):
            start = len(leading_tokens(data.tokenizer))
            objective = Objective(victim, original, targets, layers, start, self)
            best = self._search(objective, data.tokenizer, meter)
        [string] = decode(data.tokenizer, [best.ids])
        found = {"string": string, **best.figures, "length": len(best.ids), "layers": layers, "targets": counts}
        return meter.result(unlearned, plan={"prefix": tuple(best.ids)}, about=found)

    def _layers(self, blocks: int) -> list[int]:
        if self.layers is None:
            return sorted({blocks // 3, 2 * blocks // 3, blocks - 1})
        fit = bool(self.layers) and all(0 <= layer < blocks for layer in self.layers)
        in_range(fit, self.name, "layers", self.layers, f"blocks of the model, 0 to {blocks - 1}")
        return sorted(set(self.layers))

    def _search(self, objective: "Objective", tokenizer: Any, meter: Meter) -> "Found":
        """The string of the least loss."""
        generator = torch.Generator().manual_seed(self.seed)
        allowed = allowed_tokens(tokenizer, objective.vocabulary, self.ascii)
        operators = {name: getattr(self, f"p_{name}") for name in ("gcg", "delete", "insert", "swap")}
        longest = min(self.max_length, context_length(objective.victim) - objective.longest)

        def evaluated(strings: Sequence[list[int]]) -> list[Found]:
            """Best first."""
            meter.queries += len(strings) * len(objective.targets)
            parts = objective.parts(strings)
            columns = {"loss": objective.total(parts), **parts}
            figures = zip(*(column.tolist() for column in columns.values()), strict=True)
            return sorted(
                Found(string, dict(zip(columns, of, strict=True))) for string, of in zip(strings, figures, strict=True)
            )

        survives = partial(typed_before, tokenizer, [target.prompt[objective.start :] for target in objective.targets])

        def follow(string: list[int]) -> torch.Tensor:
            meter.queries += 1
            return expected(objective.next_tokens(string)[-1:], allowed, self.top_k, generator)[0]

        buffer = evaluated([grow(self.length, follow, survives)])  # text as the victim writes it
        best = buffer[0]
        for step in range(self.steps):
            if meter.spent:
                break
            string = buffer[0].ids
            minimum = minimum_length(step, self.length, self.final_length, self.ramp)
            operator = pick(operators, len(string), minimum, longest, generator)
            candidates = None
            if operator == "gcg":
                candidates = liked(objective.slope(string), allowed.to(objective.victim.device), self.top_k)
                meter.queries += len(objective.targets)
            elif operator != "delete":
                places = len(string) + (operator == "insert")
                candidates = expected(objective.next_tokens(string)[:places], allowed, self.top_k, generator)
                meter.queries += 1
            found = propose(operator, string, candidates, self.proposals, survives, generator)
            new = evaluated(found) if found else []
            best = min([best, *new])
            buffer = sorted([*buffer[1:], *new])[: self.buffer] or buffer
            meter.step(**{**best.figures, "loss": buffer[0].loss}, best=best.loss, length=len(best.ids))
        return best


@dataclass(frozen=True)
class Found:
    """A string, its loss and the parts of it."""

    ids: list[int]
    figures: Mapping[str, float]

    @property
    def loss(self) -> float:
        loss = self.figures["loss"]
        return math.inf if math.isnan(loss) else loss

    def __lt__(self, other: "Found") -> bool:
        return self.loss < other.loss


class Objective:
    """The loss of prefixes and its parts, over all targets. Use inside `frozen(victim, reference)`.

    layers: as in `hidden_states`; start: tokens of bos. A part whose weight in `settings` is 0 is not computed.
    """

    def __init__(
        self,
        victim: Any,
        reference: Any,
        targets: Sequence[Target],
        layers: Sequence[int],
        start: int,
        settings: EnhancedGCG,
    ):
        self.victim, self.reference, self.start, self.settings = victim, reference, start, settings
        self.targets = sorted(targets, key=lambda target: len(target.prompt) + len(target.ids))
        self.layers: list[Layer] = list(layers)
        self.least = 0.0 if settings.floor is None else -math.log(settings.floor)
        self.static = [self._states_without_prefix(target) for target in self.targets] if settings.static else []

    @property
    def longest(self) -> int:
        """Tokens of the longest row, without the prefix."""
        return len(self.targets[-1].prompt) + len(self.targets[-1].ids)

    @property
    def vocabulary(self) -> int:
        """Ids that both models know, in and out."""
        models = (self.victim, self.reference)
        return min(len(m.weight) for model in models for m in (model.get_input_embeddings(), model.get_output_embeddings()))

    def total(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Of the parts, by their weights, `[N]`."""
        weights = {"force": 1.0, **vars(self.settings)}
        return torch.stack([weights[name] * part for name, part in parts.items()]).sum(0)

    @torch.no_grad()
    def parts(self, strings: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Each part of the loss of each string, unweighted, `[N]`, on the CPU."""
        rows = [(number, which) for number in range(len(self.targets)) for which in range(len(strings))]
        found: list[dict[str, torch.Tensor]] = []

        def work(batch: Sequence[tuple[int, int]]) -> None:
            parts = self._parts([strings[which] for _, which in batch], [number for number, _ in batch])
            found.append({name: part.cpu() for name, part in parts.items()})

        tokens = self.longest + max(map(len, strings))
        in_batches(rows, lambda _: BATCH_TOKENS // tokens, work)
        whole = {name: torch.cat([one[name] for one in found]) for name in found[0]}
        return {name: values.view(len(self.targets), len(strings)).mean(0) for name, values in whole.items()}

    def slope(self, string: Sequence[int]) -> torch.Tensor:
        """d loss / d one-hot rows of the string, `[n, V]`: through both models, as both see it."""
        models = list(dict.fromkeys([self.victim, self.reference] if self.settings.internal else [self.victim]))
        slopes: dict[Any, torch.Tensor] = {}

        def add(batch: Sequence[int]) -> None:
            with torch.enable_grad(), nudged(models, len(string), self.start) as nudges:
                loss = self.total(self._parts([string] * len(batch), batch)).sum() / len(self.targets)
                for model, slope in zip(models, torch.autograd.grad(loss, nudges), strict=True):
                    slopes[model] = slopes.get(model, 0) + slope

        in_batches(range(len(self.targets)), lambda _: max(1, BATCH_TOKENS // (self.longest + len(string)) // 8), add)
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

    def _parts(self, strings: Sequence[Sequence[int]], numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        """Of the row of each string and the number of its target, `[R]`."""
        targets, start, settings = [self.targets[number] for number in numbers], self.start, self.settings
        pairs = [
            (t.prompt[:start] + list(string) + t.prompt[start:], t.ids) for string, t in zip(strings, targets, strict=True)
        ]
        batch = {name: tensor.to(self.victim.device) for name, tensor in collate([{"": pair} for pair in pairs])[""].items()}
        ids, ends, lengths = batch["ids"], batch["prompts"][:, None], batch["lengths"][:, None]
        place = torch.arange(ids.shape[1], device=self.victim.device)
        real, said = place < lengths, (place >= ends) & (place < lengths)
        forced, text = said & (place < ends + settings.target_tokens), (place >= max(1, start)) & (place < ends)
        after = (place >= start + torch.tensor([[len(s)] for s in strings], device=self.victim.device)) & real
        inner = self.layers if settings.internal or self.static else []
        states = hidden_states(self.victim, ids, real.long(), [*inner, "final"])
        scored = forced | text if settings.fluency else forced
        losses = on_grid(token_losses(self.victim, states["final"], ids, scored), scored)
        parts = {"force": masked_means(losses, forced).clamp(min=self.least)}
        if settings.internal:
            before = hidden_states(self.reference, ids, real.long(), inner)
            gaps = [_wide(states[layer] - before[layer]).norm(dim=-1) for layer in inner]
            parts["internal"] = masked_means(torch.stack(gaps).mean(0), after)
        if self.static:
            known = torch.cat([self.static[number] for number in numbers])  # [N, layers, d]
            own = torch.stack([_wide(states[layer][said]) for layer in inner], dim=1)
            parts["static"] = masked_means(on_grid(1 - F.cosine_similarity(own, known, dim=-1).mean(1), said), said)
        if settings.fluency:
            parts["fluency"] = masked_means(losses, text)
        if settings.repetition:
            repeated = [repetition(prompt[start:]) for prompt, _ in pairs]
            parts["repetition"] = torch.tensor(repeated, dtype=losses.dtype, device=losses.device)
        return parts

    @torch.no_grad()
    def _states_without_prefix(self, target: Target) -> torch.Tensor:
        """The reference's over the continuation, `[n, layers, d]`."""
        ids = torch.tensor([[*target.prompt, *target.ids]], device=self.victim.device)
        states = hidden_states(self.reference, ids, torch.ones_like(ids), self.layers)
        return torch.stack([_wide(states[layer][0, len(target.prompt) :]) for layer in self.layers], dim=1)


def token_losses(model: Any, states: torch.Tensor, ids: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """-log p `[n]` of the `scored` ids, bool `[R, T]`, after final states `[R, T, d]`; some logits at a time."""
    predicting, wanted = states[:, :-1][scored[:, 1:]], ids[scored]
    chunk = max(1, LOGITS // len(model.get_output_embeddings().weight))
    parts = zip(predicting.split(chunk), wanted.split(chunk), strict=True)
    return torch.cat([F.cross_entropy(_wide(head_logits(model, some)), of, reduction="none") for some, of in parts])


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
