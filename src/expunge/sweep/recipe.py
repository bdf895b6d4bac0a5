"""What a sweep's YAML says, read and checked: a base, budgets, axes of a grid, how a trial is chosen, columns of the table.

    recipe = read_recipe(Path("recipes/repo/methods.yaml")); recipe.axes["method"]["repo"].patch

A patch is keys of a run's configuration; a key on its first level may be dotted (`training.learning_rate: 1e-4`).
"""

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from expunge.config import BUDGETS, build, load_config, merge
from expunge.errors import ExpungeError
from expunge.registry import did_you_mean
from expunge.report.compare import Wanted

SEED = "seed"
"""The axis whose values are repeats: the table has their mean, and a trial runs the first."""


@dataclass(frozen=True)
class Bound(Wanted):
    """A figure and what it may be."""

    at_most: float | None = None
    at_least: float | None = None

    def __post_init__(self) -> None:
        if self.at_most is None and self.at_least is None:
            raise ExpungeError(f"tune.keep: {self.metric} has no bound: give at_most or at_least")

    def __str__(self) -> str:
        limits = {"at most": self.at_most, "at least": self.at_least}
        return " ".join([str(self.figure), *(f"{word} {limit:g}" for word, limit in limits.items() if limit is not None)])

    @property
    def figure(self) -> Wanted:
        return _figure(self)

    def holds(self, value: float) -> bool:
        return (self.at_most is None or value <= self.at_most) and (self.at_least is None or value >= self.at_least)


@dataclass(frozen=True)
class Best(Wanted):
    """A figure and which end of it is wanted."""

    best: Literal["lowest", "highest"] = "lowest"

    @property
    def figure(self) -> Wanted:
        return _figure(self)


def _figure(more: Wanted) -> Wanted:
    return Wanted(**{field.name: getattr(more, field.name) for field in fields(Wanted)})


@dataclass
class Tuning:
    """How trials are measured, and one of them chosen: of those that keep the bounds, the best."""

    by: Best
    base: dict[str, Any] = field(default_factory=dict)
    """A patch over every trial: other sets than those reported, perhaps less of them."""
    keep: list[Bound] = field(default_factory=list)


class Value(NamedTuple):
    """One value of an axis; trials: settings to choose from, by dotted key, or None where there is nothing to tune."""

    patch: dict[str, Any]
    trials: list[dict[str, Any]] | None = None


@dataclass
class Recipe:
    """The YAML of a sweep; `axes` and `wanted` are made of `grid` and `columns`."""

    grid: dict[str, Any]
    """By axis: values by label, each a patch with `tune`, the trials; or a list of values of the key that names the axis."""
    description: str = ""
    base: dict[str, Any] = field(default_factory=dict)
    """What all cells share."""
    budgets: dict[str, Any] = field(default_factory=dict)
    """Patches over `base`, one of which --budget names; the first is the default. quick and full are there too, below it.
    `grid` and `tune` in a patch lie over the recipe's: null takes a value of an axis, or all trials, away. `columns` in a
    patch stand in the place of the recipe's."""
    tune: Tuning | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    """Figures of the table by the name of their column; the headline's unless given."""
    keep_models: bool = False
    axes: dict[str, dict[str, Value]] = field(init=False)
    wanted: dict[str, Wanted] = field(init=False)

    def __post_init__(self) -> None:
        self.wanted = {
            name: build(Wanted, mapping(f"columns.{name}", tree), f"columns.{name}.") for name, tree in self.columns.items()
        }
        if not self.grid:
            raise ExpungeError("grid: empty; give at least one axis, such as method, with a value")
        self.axes = {str(axis): _axis(str(axis), values) for axis, values in self.grid.items()}
        self._check_trials()

    def under(self, name: str | None) -> tuple[str, "Recipe"]:
        """A budget by name, None the first, and the recipe with it: its own lies over `base`, that of every run below."""
        name = name or next(iter(self.budgets or BUDGETS))
        if name in self.budgets:
            patch = expand(mapping(f"budgets.{name}", self.budgets[name]))
            grid, tune = self._changed(f"budgets.{name}.", patch)
            columns = mapping(f"budgets.{name}.columns", patch.pop("columns", None)) or self.columns
            return name, replace(self, grid=grid, tune=tune, columns=columns, base=merge(expand(self.base), patch))
        if name in BUDGETS:
            return name, replace(self, base=merge(BUDGETS[name], expand(self.base)))
        raise ExpungeError(f"unknown budget {name!r}{did_you_mean(name, {**BUDGETS, **self.budgets})}")

    def _changed(self, place: str, patch: dict[str, Any]) -> tuple[dict[str, Any], Tuning | None]:
        """`grid` and `tune` under a budget's patch, out of which they are taken."""
        grid, tune = dict(self.grid), self.tune
        for axis, values in mapping(f"{place}grid", patch.pop("grid", None)).items():
            if not isinstance(values, list):
                over = mapping(f"{place}grid.{axis}", values)
                values = merge(mapping(f"grid.{axis}", grid.get(axis)), over)
                values = {label: value for label, value in values.items() if over.get(label, {}) is not None}
            grid[axis] = values
        if "tune" in patch:
            over = patch.pop("tune")
            tree = merge(asdict(tune) if tune else {}, mapping(f"{place}tune", over))
            tune = None if over is None else build(Tuning, tree, f"{place}tune.")
        return (grid if tune else {axis: _untuned(values) for axis, values in grid.items()}), tune

    def as_written(self) -> dict[str, Any]:
        """Its keys, as mappings."""
        tree = asdict(self)
        return {key.name: tree[key.name] for key in fields(self) if key.init}

    def _check_trials(self) -> None:
        tuned = {axis: values for axis, values in self.axes.items() if any(value.trials for value in values.values())}
        if not tuned:
            if self.tune:
                raise ExpungeError("tune: no value of the grid has trials; give one `tune`, or leave this out")
            return
        if len(tuned) > 1 or SEED in tuned:
            raise ExpungeError(f"tune on the axes {' and '.join(tuned)}: trials belong to one axis, and not to {SEED}")
        [(axis, values)] = tuned.items()
        if not self.tune:
            raise ExpungeError(f"grid.{axis}: trials, and nothing says how one is chosen: give tune.by")
        counts = {label: len(value.trials) for label, value in values.items() if value.trials is not None}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{label} {count}" for label, count in counts.items())
            raise ExpungeError(
                f"grid.{axis}: not equally many trials ({told}); what has nothing to tune says so by `tune: null`"
            )


PLACES = {"Tuning": "tune: ", "Best": "tune.by: ", "Bound": "tune.keep: ", "Wanted": "columns: "}


def read_recipe(file: Path) -> Recipe:
    """Raises ExpungeError, with the file, for unknown keys, an empty grid, and all else that is wrong with it."""
    try:
        return load_config(Recipe, [file], [])
    except TypeError as error:  # a field without a default
        place = next((place for name, place in PLACES.items() if str(error).startswith(name)), "")
        raise ExpungeError(f"{file}: {place}{str(error).rpartition(': ')[2]} is missing") from None
    except ExpungeError as error:
        raise error if str(error).startswith(str(file)) else ExpungeError(f"{file}: {error}") from None


def expand(patch: Mapping[str, Any]) -> dict[str, Any]:
    """A patch with its dotted keys as trees."""
    merged: dict[str, Any] = {}
    for key, value in patch.items():
        tree: Any = value
        for part in reversed(str(key).split(".")):
            tree = {part: tree}
        merged = merge(merged, tree)
    return merged


def mapping(place: str, tree: Any) -> dict[str, Any]:
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ExpungeError(f"{place}={tree!r}: expected keys and values")
    return tree


def text_of(setting: Mapping[str, Any]) -> str:
    """`training.learning_rate=0.0001 method.weight=2`"""
    return " ".join(f"{key}={_label(value)}" for key, value in setting.items())


def _axis(axis: str, values: Any) -> dict[str, Value]:
    if not values:
        raise ExpungeError(f"grid.{axis}: empty; give it values, or leave it out")
    if isinstance(values, list):
        found = {_label(value): Value({axis: value}) for value in values}
        if len(found) < len(values):
            raise ExpungeError(f"grid.{axis}: a value stands twice in it")
        return found
    found = {}
    for label, tree in mapping(f"grid.{axis}", values).items():
        place = f"grid.{axis}.{label}"
        patch = dict(mapping(place, tree))
        tuned, trials = "tune" in patch, patch.pop("tune", None)
        found[str(label)] = Value(
            patch, None if tuned and trials is None else _trials(f"{place}.tune", trials) if tuned else []
        )
    return found


def _untuned(values: Any) -> Any:
    """An axis without its trials."""
    if not isinstance(values, dict):
        return values
    return {label: {key: v for key, v in (value or {}).items() if key != "tune"} for label, value in values.items()}


def _trials(place: str, trials: Any) -> list[dict[str, Any]]:
    """Settings as they are listed, or all combinations of the values of each key, the last key's changing first."""
    if isinstance(trials, list):
        found = [mapping(place, each) for each in trials]
    else:
        tree = mapping(place, trials)
        lists = [values if isinstance(values, list) else [values] for values in tree.values()]
        found = [dict(zip(tree, values, strict=True)) for values in itertools.product(*lists)]
    if not all(found) or not found:
        raise ExpungeError(f"{place}: a trial without a setting; give keys with the values to try")
    told = [expand(each) for each in found]
    if twice := [text_of(each) for each, tree in zip(found, told, strict=True) if told.count(tree) > 1]:
        raise ExpungeError(f"{place}: the trial {twice[0]} stands twice in it")
    return found


def _label(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
