"""Enhanced GCG: a fluent prefix that brings the states of an unlearned model back to those before (Łucki et al. 2025).

    loss = max(CE(target), -ln floor)                                   of the first tokens that the reference says, greedily
         + internal   * mean over layers and positions ||h - h0||_2     both models see prefix, prompt and continuation
         + static     * mean (1 - cos(h, h0 without the prefix))        over the continuation
         + fluency    * NLL(prefix, prompt)
         + repetition * sum over tokens max(count - 1, 0)^1.5 / length

averaged over several prompts, for one prefix before all of them. The search is FLRT's (Thompson and Sklar 2024): a step
changes the head of a buffer in one way, evaluates a few such changes, and drops that head. It begins with text that the
victim itself writes. The best string ever seen is kept; with `judged`, which is ours, the one of those on the way that
draws the worst words from the victim. The states of the prefix itself are not compared.

    EnhancedGCG(steps=100).run(unlearned, reference, data, Budget())
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import numpy as np
import torch

from expunge.attacks.base import Attack, AttackData, AttackResult, Budget, Meter, attack, in_range
from expunge.attacks.search.prefix_loss import PrefixLosses, Weights
from expunge.attacks.search.proposals import expected, grow, liked, minimum_length, pick, propose
from expunge.attacks.search.strings import allowed_tokens, decode, typed_before
from expunge.attacks.search.targets import check_prompts, cut_prompts, reference_targets
from expunge.generation import Decoding, check_room, generate
from expunge.ids import continuation_text, leading_tokens
from expunge.models import Description, context_length, depth, frozen, sharing_copy
from expunge.ranges import Count, NonNegative, NonNegativeInt, Range


@attack("enhanced_gcg")
class EnhancedGCG(Attack):
    """A prefix that brings back both the words and the inner states of the model before unlearning."""

    family: ClassVar[str] = "prompt"
    paper: ClassVar[str] = "An Adversarial Perspective on Machine Unlearning for AI Safety, Łucki et al. 2025"
    needs: ClassVar[tuple[str, ...]] = ("reference", "prompts", "score")
    budgets: ClassVar[dict[str, dict[str, list[Any]]]] = {
        "small": {"steps": [100], "judged": [16]},
        "paper": {"steps": [500], "length": [32], "final_length": [32], "max_length": [32]},
        "large": {
            "steps": [1500],
            "static": [0.0, 10.0],
            "floor": [0.6, None],
            "match_tokens": [0, 35],
            "judged": [32],
            "seed": [0, 1, 2],
        },
    }

    steps: Count = 500
    length: Count = 32
    """Tokens of the prefix at first, and the fewest that it may have then."""
    final_length: Count = 32
    """The fewest that it may have after `ramp` steps; the paper's code goes to 100."""
    ramp: Count = 1000
    max_length: Count = 64
    """The most that it may have; less where the context is shorter."""
    optimised: Count = 8
    """Prompts to search on: those after which the reference's own words score highest."""
    target_tokens: Count = 20
    """That are to be said, at most."""
    match_tokens: NonNegativeInt = 0
    """More of the reference's words, whose states count and whose likelihood does not; the paper's code takes 35."""
    layers: list[int] | None = None
    """Blocks whose input states are compared; null: L/3, 2L/3 and L - 1 of L blocks."""
    floor: Annotated[float, Range(gt=0, le=1)] | None = 0.6
    """A target that is likelier than so much a token gains nothing more; null: it does."""
    internal: NonNegative = 1.0
    static: NonNegative = 0.0
    """The paper's code takes 10 against DPO and NPO, without `floor`."""
    fluency: NonNegative = 1.5
    repetition: NonNegative = 3.0
    p_gcg: NonNegative = 0.7
    """How often each operator is taken (`expunge.attacks.search.proposals`)."""
    p_delete: NonNegative = 0.1
    p_insert: NonNegative = 0.1
    p_swap: NonNegative = 0.1
    proposals: Count = 16
    """Strings that are evaluated at a step."""
    top_k: Count = 64
    """Tokens that are considered in each place."""
    buffer: Count = 16
    ascii: bool = True
    """Only tokens of ASCII text."""
    judged: NonNegativeInt = 0
    """Of so many strings, the best and others that the search went on from, the one is taken after which the victim's own
    words score highest, sampled once after each of `prompts`: a loss may fall and nothing come back. 0: the best."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check = partial(in_range, attack_name=self.name)
        most = max(self.length, self.final_length)
        check(self.max_length >= most, key="max_length", value=self.max_length, wanted=f"at least {most}")
        check(self.p_gcg + self.p_swap > 0, key="p_gcg", value=self.p_gcg, wanted="above 0, where p_swap is 0")

    @property
    def adds(self) -> int:
        return self.length

    def check(self, unlearned: Description, reference: Description | None, data: AttackData) -> None:
        super().check(unlearned, reference, data)
        self._layers(unlearned.depth)
        check_prompts(data, self.optimised)

    def run(self, unlearned: Any, reference: Any, data: AttackData, budget: Budget) -> AttackResult:
        self.check_loaded(unlearned, reference, data)
        layers = self._layers(depth(unlearned))
        meter = Meter(budget)
        targets, counts = reference_targets(reference, data, self.optimised, self.target_tokens + self.match_tokens)
        start, prompts = leading_tokens(data.tokenizer), cut_prompts(data) if self.judged else []
        said = len(start) + self.target_tokens  # beside a string and a prompt, where it is judged
        check_room(unlearned, [[*target.prompt, *target.ids] for target in targets], self.length)
        check_room(unlearned, prompts, self.length + said)
        victim = sharing_copy(unlearned, ())
        original = victim if reference is unlearned else sharing_copy(reference, ())
        with frozen(victim, original):
            objective = PrefixLosses(victim, original, targets, layers, len(start), self._weights())
            room = context_length(victim) - max([objective.longest, *(len(prompt) + said for prompt in prompts)])
            room = room if data.room is None else min(room, data.room)
            best, heads = self._search(objective, data.tokenizer, meter, min(self.max_length, room))
        best, judged = self._judge(best, heads, victim, prompts, data, meter) if self.judged else (best, {})
        [string] = decode(data.tokenizer, [best.ids])
        found = {"string": string, **best.figures, "length": len(best.ids), "layers": layers, "targets": counts}
        return meter.result(unlearned, plan={"prefix": tuple(best.ids)}, about=found | judged)

    def _weights(self) -> Weights:
        return Weights(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Weights)})

    def _layers(self, blocks: int) -> list[int]:
        if self.layers is None:
            return sorted({blocks // 3, 2 * blocks // 3, blocks - 1})
        fit = bool(self.layers) and all(0 <= layer < blocks for layer in self.layers)
        in_range(fit, self.name, "layers", self.layers, f"blocks of the model, 0 to {blocks - 1}")
        return sorted(set(self.layers))

    def _judge(
        self,
        best: "Found",
        heads: Sequence["Found"],
        victim: Any,
        prompts: Sequence[list[int]],
        data: AttackData,
        meter: Meter,
    ) -> tuple["Found", dict[str, list[float]]]:
        """Of the best and of heads, evenly over the search, the one that draws the worst words after the prompts, and the
        mean scores of all that were tried while there was a budget, the best's first."""
        assert data.score is not None
        others = list({tuple(head.ids): head for head in heads if head.ids != best.ids}.values())
        evenly = np.linspace(0, len(others) - 1, min(self.judged - 1, len(others))).astype(int)
        strings, scores = [best, *(others[place] for place in evenly)], []
        start = leading_tokens(data.tokenizer)
        decoding = Decoding(self.target_tokens, samples=1, seed=self.seed)
        for string in strings:
            rows = [start + string.ids + prompt for prompt in prompts]
            answers = [answer for (answer,) in generate(victim, data.tokenizer, rows, decoding)]
            texts = [continuation_text(data.tokenizer, *each) for each in zip(prompts, answers, strict=True)]
            scores.append(float(np.mean(data.score(texts))))
            meter.queries += len(rows)
            if meter.spent:
                break
        return strings[int(np.argmax(scores))], {"judged": scores}

    def _search(self, objective: PrefixLosses, tokenizer: Any, meter: Meter, longest: int) -> tuple["Found", list["Found"]]:
        """The string of the least loss, and those that the search began with and went on from; none above `longest`."""
        generator = torch.Generator().manual_seed(self.seed)
        allowed = allowed_tokens(tokenizer, objective.vocabulary, self.ascii)
        operators = {name: getattr(self, f"p_{name}") for name in ("gcg", "delete", "insert", "swap")}

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
            return expected(objective.next_tokens(string)[-1:], allowed, len(allowed), generator)[0]

        buffer = evaluated([grow(self.length, follow, survives)])  # text as the victim writes it
        best, heads = buffer[0], [buffer[0]]
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
            heads.append(buffer[0])
            meter.step(**{**best.figures, "loss": buffer[0].loss}, best=best.loss, length=len(best.ids))
        return best, heads


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
