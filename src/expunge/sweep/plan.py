"""The cells of a recipe: configurations with labels, each with a folder's name that says what it is a hash of.

    for group in groups_of(recipe): group.trials, group.final("0", {"training.learning_rate": 1e-4})

A group is one value of each axis but `seed`: its trials share a choice, and its cells a line of the table.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from expunge import pipeline
from expunge.config import RunConfig, load_config, merge
from expunge.data.named import NAMED, local_file
from expunge.errors import ExpungeError
from expunge.harness import OURS
from expunge.models import identity_of, is_local
from expunge.pipeline.paths import name_parts, with_names
from expunge.plan import Plan
from expunge.provenance import digest
from expunge.registry import did_you_mean
from expunge.report.compare import name_of, words_of
from expunge.sweep.recipe import SEED, Recipe, Value, expand, text_of

ATTACKS = ("redteam", "attack")
"""Sections of a configuration that are no part of a cell which has none."""


@dataclass(frozen=True)
class Cell:
    """One run: labels by axis, the setting that a trial tries or that was chosen, and its plan, of which nothing is read."""

    labels: dict[str, str]
    setting: dict[str, Any]
    trial: bool
    plan: Plan

    @property
    def config(self) -> RunConfig:
        """Resolved."""
        return self.plan.config

    @cached_property
    def name(self) -> str:
        """Its folder's: the labels, and a hash of them, the configuration, the method's defaults, and the content of what
        it names."""
        config, method = self.config, self.plan.method
        told = {key: value for key, value in asdict(config).items() if value is not None or key not in ATTACKS}
        read = with_names(told, lambda name: _content(name, config.revision) or name)
        inputs = [self.labels, self.trial, read, asdict(method)]  # type: ignore[call-overload]
        words = [*words_of(self.labels), *(["trial"] if self.trial else [])]
        plain = re.sub(r"[^\w.=+-]+", "_", "-".join(words))[:80].strip(".")
        return f"{plain}-{digest(inputs)[:12]}"

    @property
    def title(self) -> str:
        """For people: the labels, and what a trial tries."""
        words = [*words_of(self.labels), *([f"trial {text_of(self.setting)}"] if self.trial else [])]
        return ", ".join(words) or "the only cell"


@dataclass(frozen=True)
class Group:
    name: str  # of its line in the table: labels of the axes that have a choice
    labels: dict[str, str]
    tree: dict[str, Any]  # the configuration below what follows
    seeds: dict[str, dict[str, Any]]  # patches by label; of a grid without this axis one, labelled ""
    settings: list[dict[str, Any]]  # to try; none where nothing is tuned
    trial_patch: dict[str, Any]
    made: dict[tuple[str, str], Cell] = field(default_factory=dict)

    @cached_property
    def trials(self) -> list[Cell]:
        """One for each setting, on the first seed."""
        seed = next(iter(self.seeds.values()))
        return [self._cell(self.labels, seed, setting, self.trial_patch) for setting in self.settings]

    def final(self, label: str, setting: dict[str, Any]) -> Cell:
        """With this seed, under the setting that was chosen."""
        key = (label, text_of(setting))
        if key not in self.made:
            labels = {**self.labels, **({SEED: label} if label else {})}
            self.made[key] = self._cell(labels, self.seeds[label], setting)
        return self.made[key]

    def _cell(
        self, labels: dict[str, str], seed: dict[str, Any], setting: dict[str, Any], trial: dict[str, Any] | None = None
    ) -> Cell:
        tree = self.tree
        for patch in (seed, setting, trial or {}):
            tree = merge(tree, expand(patch))
        try:
            plan = Plan.of(load_config(RunConfig, [], [], base=tree), Path("cell"), quiet=True)
            _ = plan.args
        except ExpungeError as error:
            raise ExpungeError(f"{', '.join(filter(None, [*words_of(labels), text_of(setting)]))}: {error}") from None
        return Cell(labels, setting, trial is not None, plan)


def groups_of(recipe: Recipe) -> list[Group]:
    """Every group of the grid, in the order of its axes. Raises ExpungeError for a configuration that is no run's, and where
    a trial is measured on what is reported."""
    seeds = {label: value.patch for label, value in recipe.axes.get(SEED, {"": Value({})}).items()}
    axes = {axis: values for axis, values in recipe.axes.items() if axis != SEED}
    found = []
    for chosen in itertools.product(*(values.items() for values in axes.values())):
        tree, settings = expand(recipe.base), []
        for _, value in chosen:
            tree = merge(tree, expand(value.patch))
            settings += value.trials or []
        labels = {axis: label for axis, (label, _) in zip(axes, chosen, strict=True)}
        told = {axis: label for axis, label in labels.items() if len(axes[axis]) > 1} or labels
        group = Group(name_of(told) or "run", labels, tree, seeds, settings, recipe.tune.base if recipe.tune else {})
        finals = [group.final(label, settings[0] if settings else {}) for label in seeds]
        _check_apart(group.trials, finals)
        found.append(group)
    return found


def narrowed(groups: Sequence[Group], recipe: Recipe, only: Iterable[str]) -> tuple[list[Group], list[str]]:
    """The groups and the labels of seeds that `AXIS=LABEL,LABEL` of each axis leave; ExpungeError for what is not there."""
    wanted: dict[str, list[str]] = {}
    for each in only:
        axis, equals, labels = each.partition("=")
        if not equals or axis not in recipe.axes:
            raise ExpungeError(f"--only {each}: expected AXIS=LABEL,LABEL{did_you_mean(axis, recipe.axes)}")
        for label in [labels] if labels in recipe.axes[axis] else labels.split(","):  # a label may hold commas
            if label not in recipe.axes[axis]:
                raise ExpungeError(f"--only {each}: {axis} has no {label!r}{did_you_mean(label, recipe.axes[axis])}")
            wanted.setdefault(axis, []).append(label)
    left = [
        group for group in groups if all(group.labels[axis] in labels for axis, labels in wanted.items() if axis != SEED)
    ]
    return left, [label for label in groups[0].seeds if label in wanted.get(SEED, groups[0].seeds)]


def _check_apart(trials: Sequence[Cell], finals: Sequence[Cell]) -> None:
    """What is chosen by a figure would flatter it."""
    for trial, final in itertools.product(trials, finals[:1]):
        if both := sorted(_measured_on(trial.config) & _measured_on(final.config)):
            raise ExpungeError(
                f"{trial.title}: trials are measured on {', '.join(both)}, which is reported too; name other sets, or null, "
                "in tune.base.data"
            )


def _measured_on(config: RunConfig) -> set[str]:
    """Names of sets and of a harness's tasks, and files by their whole path."""
    tree = asdict(config)
    named = [
        tree["data"][key] for section, _, key in (path.partition(".") for path in pipeline.MEASURED) if section == "data"
    ]
    asked = [OURS.get(task, task) for task in config.evaluation.harness]
    texts = _texts([*named, asked])
    return {str(Path(text).resolve()) if Path(text).is_file() else text for text in texts}


def _texts(tree: Any) -> Iterable[str]:
    """Every text among the leaves of a tree."""
    if isinstance(tree, str):
        yield tree
    elif not isinstance(tree, (int, float, type(None))):
        for each in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _texts(each)


def _content(name: str, revision: str | None) -> str | None:
    """The last part of the name of a model or of data, and a hash of what is behind it.

    None for what is not on this machine: that stands by its name, a model of the hub with its revision.
    """
    _, path, _ = name_parts(name)
    if is_local(path):
        return f"{Path(path).name} {identity_of(path, revision).key}"
    paths = [file for entry in NAMED if entry.name == name and (file := local_file(entry))] or [Path(path)]
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if file.is_file()]
    hashes = [_sha256(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{Path(path).name} {digest(hashes)}" if hashes else None


@cache
def _sha256(file: Path, size: int, changed: int) -> str:
    """Of its content, read once in the state that size and time of change tell."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
