"""Configuration: YAML and dotted overrides to dataclasses; an unknown key is an error with a suggestion.

    config = load_config(RunConfig, Path("run.yaml"), ["method.weight=0.3", "training.learning_rate=1e-4"])

Sections whose keys belong to others (`method`, `training`) stay plain mappings here, checked where they are built.
"""

import dataclasses
import math
import os
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml

from expunge.errors import ExpungeError
from expunge.lines import STDIN, called, read_text
from expunge.paths import expand
from expunge.ranges import Count, NonNegativeInt, OutOfRange, Range, Seed, range_of
from expunge.registry import did_you_mean

C = TypeVar("C")


@dataclasses.dataclass
class DataConfig:
    """What to train on and what to measure on: named sets (`expunge list data`), files, or hub names."""

    train: str | None = "builtin"
    """Preference pairs: chosen is kept, rejected is forgotten."""
    forget: str | None = None
    """With `retain`, instead of pairs: texts to forget."""
    retain: str | None = None
    """Texts to keep; running text is cut into passages of training.max_continuation_tokens."""
    probe: str = "builtin-pplm"
    """Labelled texts, or a named set of pairs, for methods that fit probes; not what is to be forgotten."""
    limit: Count | None = None
    """Train on a seeded random subset of so many pairs, or texts of each set."""
    heldout: str | None = "builtin-heldout"
    """Pairs for in-distribution toxicity and perplexity; null leaves them out."""
    prompts: list[str] = dataclasses.field(default_factory=lambda: ["builtin-challenge"])
    """Sets of prompts that provoke; rtp-challenge is the real one."""
    neutral: str | None = "builtin-neutral"
    """Prompts with a gold continuation, for F1; null leaves F1 out."""
    corpus: str | None = "builtin-neutral"
    """Text for perplexity; wikitext2 where EXPUNGE_DATA or a hub is there; null leaves it out."""
    corpora: list[str] = dataclasses.field(default_factory=list)
    """More texts for perplexity: what is spared in one kind of text may be paid in another."""
    questions: list[str] = dataclasses.field(default_factory=list)
    """Sets of multiple-choice questions, for accuracy: mmlu, wmdp-cyber, your own."""

    def __post_init__(self) -> None:
        hold_fields(self, "data")
        expand_fields("data", self, *(field.name for field in dataclasses.fields(self) if field.name != "limit"))


@dataclasses.dataclass
class SUnlearningConfig:
    """What S-unlearning is made of: sets of data.questions."""

    utility: str
    """Questions that should still be answered."""
    forget: str
    """Questions that should not, or toxicity: that of the first set of data.prompts."""

    def __post_init__(self) -> None:
        expand_fields("evaluation.s_unlearning", self, "utility", "forget")


@dataclasses.dataclass
class EvaluationConfig:
    """How much to measure."""

    samples: NonNegativeInt = 25
    """Sampled continuations of each prompt, beside the greedy one."""
    prompts: Count | None = None
    """At most so many prompts of each set."""
    heldout: Count | None = None
    """At most so many held-out pairs."""
    questions: Count | None = None
    """At most so many questions of each set and task, drawn at random."""
    shots: NonNegativeInt = 5
    """Solved examples before each question of mmlu."""
    harness: list[str] = dataclasses.field(default_factory=list)
    """Tasks that lm-evaluation-harness runs, if it is installed: wmdp_cyber, mmlu, any of its own."""
    s_unlearning: SUnlearningConfig | None = None
    """Forgetting and utility as one figure: sets utility and forget; null leaves it out."""
    max_new_tokens: Count = 20
    prompt_tokens: Count = 32
    """Tokens kept of a prompt."""
    truncate: Literal["last", "lee2024"] = "last"
    """last: a prompt keeps its last tokens; lee2024: its first."""
    forced: list[NonNegativeInt] = dataclasses.field(default_factory=lambda: [0, 4, 8])
    """k: tokens of a held-out continuation that are forced before the model goes on."""
    perplexity_tokens: Annotated[int, Range(ge=2)] | None = None
    """At most so many tokens of the corpus; null is all."""
    scorers: list[str] = dataclasses.field(default_factory=lambda: ["ngram", "wordvec"])
    """The first is the judge; the others are reported beside it."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        hold_fields(self, "evaluation")
        if not self.scorers:
            raise ExpungeError("evaluation.scorers=[]: at least one is needed, the judge")
        expand_fields("evaluation", self, "scorers")


@dataclasses.dataclass
class MonitorConfig:
    """What `training.eval_strategy` measures in the midst of training: never what is reported."""

    prompts: str | None = "builtin-tuning"
    """Prompts that provoke; null leaves toxicity out."""
    limit: Count = 64
    """At most so many of them."""
    samples: Count = 2
    """Sampled continuations of each."""
    scorer: str = "ngram"
    corpus: str | None = "builtin-validation"
    """Text for perplexity; null leaves it out."""
    tokens: Annotated[int, Range(ge=2)] = 10_000
    """At most so many of its tokens."""

    def __post_init__(self) -> None:
        hold_fields(self, "monitor")
        expand_fields("monitor", self, "prompts", "scorer", "corpus")


@dataclasses.dataclass
class RedTeamConfig:
    """Which attacks, how hard, and what the attacker has beside what was trained on: never what is reported."""

    attacks: list[str] = dataclasses.field(default_factory=lambda: ["all"])
    """Names (`expunge list attacks`), or all."""
    budget: Literal["small", "paper", "large"] = "small"
    """Which values of its settings each attack tries; `attack.NAME.KEY` goes over them."""
    validation: str | None = "builtin-validation"
    """Pairs not trained on, whose rejected sides an attack chooses by."""
    search: str | None = "builtin-tuning"
    """Prompts that provoke, to search with."""
    neutral: str | None = "builtin-validation"
    """Running text, to train on or to keep an eye on."""
    utility_bound: Annotated[float, Range(ge=1)] = 1.5
    """An attack counts while the perplexity is at most so many times that before it."""
    steps: int | None = None
    """No attack takes more steps,"""
    queries: int | None = None
    """nor more rows through the model,"""
    seconds: float | None = None
    """nor more time."""

    def __post_init__(self) -> None:
        hold_fields(self, "redteam")
        if not self.attacks:
            raise ExpungeError("redteam.attacks=[]: name at least one attack, or all")
        expand_fields("redteam", self, "validation", "search", "neutral")


@dataclasses.dataclass
class RunConfig:
    """One run: a model, a method, pairs, and what to measure before and after."""

    model: str = "builtin"
    """builtin, a hub name or a folder, a PEFT adapter's too."""
    revision: str | None = None
    dtype: str | None = None
    """Of the weights: float32 if null; bfloat16 or float16 for what is not trained, under an adapter."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Of the weights under an adapter, by bitsandbytes."""
    device_map: str | dict[str, Any] | None = None
    """Where transformers puts the parts of the model; null is one accelerator, or the CPU."""
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    method: dict[str, Any] = dataclasses.field(default_factory=lambda: {"name": "repo"})
    """`name`, and the method's own hyper-parameters (`expunge list methods`)."""
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of UnlearnConfig, which are those of transformers.TrainingArguments and a few more."""
    lora: dict[str, Any] | None = None
    """Train an adapter: fields of peft.LoraConfig, and `merge`, true for an export without it."""
    monitor: MonitorConfig = dataclasses.field(default_factory=MonitorConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    redteam: RedTeamConfig | None = None
    """Attacks on the unlearned model and on its reference; null is none."""
    attack: dict[str, dict[str, Any]] | None = None
    """Settings of attacks by name: a value, or a list of values to try, over those of the budget."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        hold_fields(self, "")
        expand_fields("", self, "model")
        paths = {key: self.training[key] for key in TRAINING_PATHS if isinstance(self.training.get(key), str)}
        self.training = {**self.training, **{key: expand_source(f"training.{key}", path) for key, path in paths.items()}}


TRAINING_PATHS = ("anchor_text", "deepspeed", "fsdp_config", "logging_dir", "resume_from_checkpoint")


def expand_fields(section: str, settings: Any, *keys: str) -> None:
    """`expand_source` for fields that are text or a list of it, in place; None is left alone."""
    for key in keys:
        value, path = getattr(settings, key), f"{section}.{key}".lstrip(".")
        if isinstance(value, list):
            setattr(settings, key, [expand_source(path, each) for each in value])
        elif value is not None:
            setattr(settings, key, expand_source(path, value))


def expand_source(path: str, name: str) -> str:
    """A name that may be a path, with `~` and `$NAME` put in. Raises ExpungeError for standard input."""
    if name.rpartition(":")[2] == STDIN:
        raise ExpungeError(
            f"{path}={name}: a run reads its data more than once; save standard input to a file and name that"
        )
    return expand(name)


def at_least(section: str, settings: Any, **bounds: float) -> None:
    """ExpungeError for a number, or one of a list, below its bound; None is left alone. A seed has 32 bits."""
    for key, least in bounds.items():
        value, path = getattr(settings, key), f"{section}.{key}".lstrip(".")
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < least:
                raise ExpungeError(f"{path}={number}: expected {least} or more")
            if key == "seed" and number >= 2**32:
                raise ExpungeError(f"{path}={number}: expected less than 2^32")


BUDGETS: dict[str, dict[str, Any]] = {
    "quick": {
        "data": {"limit": 2000},
        "training": {"num_train_epochs": 3},
        "evaluation": {"samples": 5, "prompts": 256, "heldout": 64, "questions": 256, "perplexity_tokens": 50_000},
    },
    "full": {"data": {"corpus": "wikitext2"}},
}


_WHOLE = {"samples": 25, "prompts": None, "heldout": None, "questions": None, "perplexity_tokens": None}
ATTACK_BUDGETS: dict[str, dict[str, Any]] = {
    "small": {"evaluation": {"samples": 5, "prompts": 256, "heldout": 128, "questions": 256, "perplexity_tokens": 20_000}},
    "paper": {"evaluation": {**_WHOLE, "samples": 0, "prompt_tokens": 32, "truncate": "lee2024", "max_new_tokens": 20}},
    "large": {"evaluation": _WHOLE},
}
"""How much is measured of each attacked model, whatever the attacked run measured of its own. paper: one greedy continuation
of 20 tokens, after the first 32 of a prompt, as the public code of Lee et al. 2024 has it."""


def load_config(cls: type[C], files: list[Path], overrides: list[str], base: dict[str, Any] | None = None) -> C:
    """Merge `base`, YAML `files` and `key.sub=value` overrides, later ones first in rank, into a `cls`.

    Raises ExpungeError for an unreadable file, a bad override, an unknown key or a value of the wrong type.
    """
    merged = dict(base or {})
    for file in files:
        merged = merge(merged, _read_yaml(file))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ExpungeError(f"{override!r}: an override is key=value, for example method.weight=0.3")
        tree: Any = parse_value(text)
        for part in reversed(key.split(".")):
            tree = {part: tree}
        merged = merge(merged, tree)
    return build(cls, merged, "")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `1e-4` is a number, and `no`, `yes`, `on`, `off` are text (save_strategy: no).

    A key stands once in a section: of two, YAML itself takes the last in silence.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"(?:[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    list("-+.0123456789"),
)


def parse_value(text: str) -> Any:
    """A YAML scalar, list or mapping; what is none of these is text, and so is a dash, which stands for standard input."""
    if text == STDIN:
        return text
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError:
        return text


def _read_yaml(file: Path) -> dict[str, Any]:
    text, name = read_text(expand(file)), called(file)
    try:
        tree = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ExpungeError(f"{name}{line}: not valid YAML ({getattr(error, 'problem', error)})") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ExpungeError(f"{name}: expected a mapping of keys, found {type(tree).__name__}")
    return tree


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two trees; leaves of `above` win."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def build(cls: type[C], tree: dict[str, Any], path: str) -> C:
    """`tree` as a dataclass, nested ones too; `path` is the dotted place in messages."""
    hints = typing.get_type_hints(cls, include_extras=True)
    known = {field.name for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    values = {}
    for key, value in tree.items():
        if key not in known:
            raise ExpungeError(f"unknown key {f'{path}{key}'!r}{did_you_mean(str(key), known)}")
        values[key] = convert(hints[key], value, path + key)
    return cls(**values)


def convert(hint: Any, value: Any, path: str) -> Any:
    """`value` as the annotated type, numbers widened where that is exact; ExpungeError otherwise."""
    origin = typing.get_origin(hint)
    if bounds := range_of(hint):
        value = convert(hint.__origin__, value, path)
        bounds.check(value, path)
        return value
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        for option in sorted(
            options, key=lambda option: option is not type(value)
        ):  # text is no list of one where it may be text
            if isinstance(value, dict) and dataclasses.is_dataclass(option):
                return convert(option, value, path)  # its own messages say more than ours
            try:
                return convert(option, value, path)
            except OutOfRange:
                raise
            except ExpungeError:
                continue
        raise ExpungeError(f"{path}={value!r}: expected {_name(hint)}")
    if origin is typing.Literal:
        if value in typing.get_args(hint):
            return value
        raise ExpungeError(f"{path}={value!r}: expected one of {', '.join(map(str, typing.get_args(hint)))}")
    if origin is list:
        items = value if isinstance(value, (list, tuple)) else [value]
        return [convert(typing.get_args(hint)[0], item, path) for item in items]
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if isinstance(value, dict):
            return build(hint, value, path + ".")
        raise ExpungeError(f"{path}={value!r}: expected keys such as {path}.{dataclasses.fields(hint)[0].name}")
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise ExpungeError(f"{path}={value}: expected a finite number")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return convert(hint, float(value) if abs(value) < 2**1023 else math.inf, path)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    plain: Any = origin or hint
    if hint is Any or (isinstance(value, bool) == (hint is bool) and isinstance(value, plain)):
        return value
    raise ExpungeError(f"{path}={value!r}: expected {_name(hint)}")


def hold_fields(settings: Any, path: str) -> None:
    """Hold every field of a dataclass to its annotation, in place. Raises ExpungeError, with `path` before the name."""
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):
        setattr(
            settings,
            field.name,
            convert(hints[field.name], getattr(settings, field.name), f"{path}.{field.name}".lstrip(".")),
        )


def _name(hint: Any) -> str:
    hint = hint.__origin__ if range_of(hint) else hint
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_name(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is dict or dataclasses.is_dataclass(hint):
        return "a section of keys"
    return names.get(hint, str(hint))


def cache_folder(kind: str) -> Path:
    """Where runs share what is costly to compute: in $EXPUNGE_CACHE, or expunge/ in the user's cache folder."""
    base = os.environ.get("EXPUNGE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "expunge"
    return Path(expand(base)) / kind
