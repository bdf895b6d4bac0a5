"""What every attack is: a dataclass of settings with a `run`, which leaves the victim as it was.

@attack("mine")
class Mine(Attack):
    '''One line that `expunge list attacks` prints.'''
    needs: ClassVar[tuple[str, ...]] = ("forget",)
    budgets: ClassVar[dict[str, dict[str, list]]] = {"small": {"scale": [0.5, 1.0]}}
    scale: float = 1.0
    def run(self, unlearned, reference, data, budget):
        meter = Meter(budget)
        return meter.result(changed)

What is attacked stays bit for bit: `run` works on `sharing_copy(unlearned, ...)`, which owns the weights that it changes.
"""

import itertools
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, dataclass_transform, get_type_hints

from expunge.config import convert, hold_fields
from expunge.errors import ExpungeError
from expunge.ids import check_known
from expunge.provenance import forget_peak, recent_peak_bytes
from expunge.ranges import Seed
from expunge.registry import Registry, did_you_mean

if TYPE_CHECKING:  # names are listed and completed without waiting for torch
    import numpy as np
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from expunge.data import Text
    from expunge.data.tokenize import TokenizedText
    from expunge.metrics.evaluation import EvaluationPlan
    from expunge.models import Description

Budgets = Literal["small", "paper", "large"]
Part = Literal["forget", "retain", "validation", "neutral"]
PARTS = ("reference", "forget", "retain", "validation", "prompts", "neutral", "score")
"""What an attack may need, beside the victim. A reference is given where there is one, the others where they are named."""


@dataclass(frozen=True)
class AttackData:
    """What an attacker has. Nothing of it is in what the attacked model is measured on."""

    tokenizer: "PreTrainedTokenizerBase"
    forget: "Sequence[Text]" = ()  # what the victim was trained to forget
    retain: "Sequence[Text]" = ()  # and to retain
    validation: "Sequence[Text]" = ()  # of the kind to be forgotten, not trained on: to choose by
    prompts: Sequence[str] = ()  # that provoke: to search and to choose with
    neutral: str = ""  # running text
    score: "Callable[[Sequence[str]], np.ndarray] | None" = None  # texts to toxicity in [0, 1]
    max_prompt_tokens: int = 64  # a prompt keeps its last
    max_continuation_tokens: int = 64  # a continuation its first
    plan: "EvaluationPlan | None" = None  # how an attacked model is measured; None is as EvaluationPlan() has it
    room: int | None = None  # tokens that an attack may add to every prompt that is measured; None: no bound is known
    known: int | None = None  # ids that the victim has embeddings of; None: no bound is known

    def rows(self, part: Part) -> "list[TokenizedText]":
        """(prompt ids with bos, continuation ids) of each text of a part, in order; tokenized once.

        Neutral text is cut into passages of `max_continuation_tokens`. Raises ExpungeError for an id that is not known.
        """
        if part not in self._tokenized:
            from expunge.data import Text
            from expunge.data.corpora import passages
            from expunge.data.tokenize import tokenize_texts

            limits = self.max_prompt_tokens, self.max_continuation_tokens
            texts: Sequence[Text]
            if part == "neutral":
                texts = [Text("", passage) for passage in passages(self.neutral, self.tokenizer, limits[1])]
            else:
                texts = getattr(self, part)
            rows = tokenize_texts(texts, self.tokenizer, *limits)[0] if texts else []
            check_known((prompt + continuation for prompt, continuation in rows), self.known, self.tokenizer)
            self._tokenized[part] = rows
        return self._tokenized[part]

    def drawn(self, part: Part, most: int, seed: int) -> "list[TokenizedText]":
        """Of `rows` at most so many, at random; all of them in order where there are no more."""
        rows = self.rows(part)
        return rows if len(rows) <= most else random.Random(seed).sample(rows, most)

    def only(self, needs: Collection[str]) -> "AttackData":
        """What an attack with such needs is given: of the other parts nothing."""
        return replace(self, **{f.name: f.default for f in fields(self) if f.name in PARTS and f.name not in needs})

    @cached_property
    def _tokenized(self) -> "dict[str, list[TokenizedText]]":
        return {}


@dataclass(frozen=True)
class Budget:
    """Where an attack ends, whatever its settings say: a search with the best that it has, relearning with what it came to.

    None is no bound.
    """

    steps: int | None = None
    """Steps of its search or training."""
    queries: int | None = None
    """Rows that went through the victim."""
    seconds: float | None = None
    utility_bound: float = 1.5
    """What an attack chooses costs at most so many times the victim's perplexity."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise ExpungeError(f"budget.{name}={value}: an attack without a budget is none; expected more than 0")


class Meter:
    """What an attack has spent of its budget since the meter was made, its peak of memory, and its own loss by step."""

    def __init__(self, budget: Budget):
        forget_peak()
        self.budget = budget
        self.steps = self.queries = 0
        self.trace: list[dict[str, float]] = []
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def spent(self) -> bool:
        """Is there nothing left?"""
        bounds = {name: getattr(self.budget, name) for name in ("steps", "queries", "seconds")}
        return any(bound is not None and getattr(self, name) >= bound for name, bound in bounds.items())

    def step(self, **figures: float) -> None:
        """One step has ended, with figures such as `loss`, and `best`, the least so far."""
        self.steps += 1
        self.trace.append({"step": self.steps, "queries": self.queries, **{k: float(v) for k, v in figures.items()}})

    def result(self, model: "nn.Module", **more: Any) -> "AttackResult":
        """more: `plan`, `about`, `idle` of the result."""
        spent = {"steps": self.steps, "queries": self.queries, "seconds": round(self.seconds, 2)}
        return AttackResult(model, trace=self.trace, peak_memory_bytes=recent_peak_bytes(), **spent, **more)  # type: ignore[arg-type]


@dataclass(frozen=True)
class AttackResult:
    """An attacked model, which is evaluated and analysed like any other, and what it took.

        evaluate_model(result.model, tokenizer, data, dataclasses.replace(plan, **result.plan), scorers)

    model: an object of its own, or the victim where the attack is in the plan alone; plan: fields of
    `expunge.metrics.evaluation.EvaluationPlan`, such as `prefix`; about: what was found, in JSON's types, with the attack's
    own loss in the end as `loss`, where it has one; idle: why the attack left everything as it was, if it did;
    peak_memory_bytes: the most host memory that the process held since the attack began (`forget_peak`).
    """

    model: "PreTrainedModel"
    plan: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    idle: str | None = None
    trace: Sequence[Mapping[str, float]] = ()
    steps: int = 0
    queries: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0


class Attack:
    """Settings as annotated fields (defaults: the papers') and `run`. Fields are YAML keys and overrides."""

    name: ClassVar[str]
    family: ClassVar[str] = "weights"  # weights | activations | prompt | decoding
    paper: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()
    models: ClassVar[tuple[str, ...]] = ()
    """Fields that name a model, which a case follows from."""
    budgets: ClassVar[dict[str, dict[str, list[Any]]]] = {}
    """Values of fields by budget; every combination of them is a case, and of `seed` each is a draw."""
    seed: Seed

    def __post_init__(self) -> None:
        """Hold every field to its annotation and its range; further checks call this first. Raises ExpungeError."""
        hold_fields(self, f"attack.{self.name}")

    @property
    def adds(self) -> int:
        """Tokens that it adds to every prompt, at least."""
        return 0

    def run(self, unlearned: Any, reference: Any, data: AttackData, budget: Budget) -> AttackResult:
        """Attack `unlearned`, a causal language model on its device, which stays as it was.

        reference: the model before unlearning, or None; a black-box attack does not look at it. Raises ExpungeError for
        what the attack lacks.
        """
        raise NotImplementedError

    def check(self, unlearned: "Description", reference: "Description | None", data: AttackData) -> None:
        """Raise ExpungeError, one line, where something that the attack needs is not there, before any work.

        The models are only described: before a run trains, there are no weights.
        """
        if self.family == "weights" and unlearned.quantized:
            raise ExpungeError(
                f"attack {self.name}: it changes weights, and these are quantized: load the model without quantization"
            )
        for part in self.needs:
            there: Any = reference if part == "reference" else getattr(data, part)
            if part in ("reference", "score"):
                there = there is not None
            if not there:
                raise ExpungeError(f"attack {self.name}: {LACKING[part]}")

    def check_loaded(self, unlearned: "nn.Module", reference: "nn.Module | None", data: AttackData) -> None:
        """`check` on models in memory: what `run` calls first."""
        from expunge.models import describe

        self.check(describe(unlearned), None if reference is None else describe(reference), data)


LACKING = {
    "reference": "it needs the model before unlearning: give --reference",
    "forget": "the forget set is empty: it needs what was unlearned (--pairs, or --forget)",
    "retain": "the retain set is empty: it needs what was retained (--pairs, or --retain)",
    "validation": "it chooses by text that was not trained on, and there is none: give redteam.validation",
    "prompts": "it searches on prompts that are not reported, and there are none: give redteam.search",
    "neutral": "it needs running text, and there is none: give redteam.neutral",
    "score": "it needs a scorer of toxicity",
}

ATTACKS: Registry[Attack] = Registry(
    "attack",
    {
        "relearn_forget": "expunge.attacks.relearn:RelearnForget",
        "relearn_retain": "expunge.attacks.relearn:RelearnRetain",
        "relearn_benign": "expunge.attacks.relearn:RelearnBenign",
        "orthogonalize": "expunge.attacks.orthogonalize:Orthogonalize",
        "orthogonalize_best": "expunge.attacks.orthogonalize:OrthogonalizeBest",
        "enhanced_gcg": "expunge.attacks.enhanced_gcg:EnhancedGCG",
        "gcg": "expunge.attacks.gcg:GCG",
        "soft_prompt": "expunge.attacks.soft_prompt:SoftPrompt",
        "quantize": "expunge.attacks.quantize:Quantize",
        "prune": "expunge.attacks.prune:Prune",
        "unalign": "expunge.attacks.unalign:Unalign",
        "prefill": "expunge.attacks.decoding:Prefill",
        "sampling": "expunge.attacks.decoding:Sampling",
    },
)

C = TypeVar("C", bound=type[Any])


@dataclass_transform(kw_only_default=True)
def attack(name: str) -> Callable[[C], C]:
    """Make a class a dataclass and register it under `name`; every attack has a `seed`."""

    def register(cls: C) -> C:
        cls.__annotations__ = {**cls.__annotations__, "seed": Seed}
        cls.seed = 0
        return ATTACKS.register(name)(dataclass(kw_only=True)(cls))  # type: ignore[return-value]

    return register


def in_range(condition: bool, attack_name: str, key: str, value: object, wanted: str) -> None:
    """Raise one line where a setting is out of range."""
    if not condition:
        raise ExpungeError(f"attack.{attack_name}.{key}={value!r}: expected {wanted}")


def cases(name: str, budget: str, settings: Mapping[str, Any] | None = None) -> list[Attack]:
    """The attack called `name` with every combination of its values under `budget`.

    settings: values, or lists of values, over those. Raises ExpungeError for an unknown name, field or value.
    """
    cls: Any = ATTACKS.get(name)
    grid: dict[str, Any] = {**cls.budgets.get(budget, {}), **(settings or {})}
    known = {setting.name: setting for setting in fields(cls)}
    hints = get_type_hints(cls, include_extras=True)
    for key, values in grid.items():
        if key not in known:
            raise ExpungeError(f"unknown key {f'attack.{name}.{key}'!r}{did_you_mean(key, known)}")
        whole = isinstance(values, list) and _fits(hints[key], values)  # a list of layers is one value
        grid[key] = values if isinstance(values, list) and not whole else [values]
        if not grid[key]:
            raise ExpungeError(f"attack.{name}.{key}=[]: expected at least one value")
    return [cls(**dict(zip(grid, values, strict=True))) for values in itertools.product(*grid.values())]


def _fits(hint: Any, value: Any) -> bool:
    try:
        return isinstance(convert(hint, value, ""), list)
    except ExpungeError:
        return False


def check_names(names: Collection[str]) -> None:
    """Raise ExpungeError for the name of an attack that there is not."""
    for name in names:
        if name not in ATTACKS.names():
            raise ExpungeError(f"unknown attack {name!r}{did_you_mean(name, ATTACKS.names())}")
