"""Tables of result rows: the headline (one run, or several beside one reference) and the full table of one run.

    headline({"repo": read_rows(path_a), "dpo": read_rows(path_b)}).rows

A line is a figure: a metric on one dataset, decoded one way, seen by one scorer. Its columns are the roles that rows
play: the reference, the unlearned model, and paired rows (`METRIC_ratio`; any other is a difference).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from expunge.errors import ExpungeError
from expunge.rows import Row

WORDS = {
    "f1": "F1",
    "distinct_2": "distinct-2",
    "scorer_spearman": "rank correlation of the scorers",
    "s_unlearning": "S-unlearning",
}
ABSENT = "–"


class Figure(NamedTuple):
    """What a line is about: rows that agree on these fields differ in their role alone."""

    metric: str  # without `_ratio` or `_difference`
    stage: str
    dataset: str | None
    decode: str | None
    side: str | None
    k: int | None
    mode: str | None
    scorer: str | None
    attack: str | None
    draw: int | None
    over: str | None
    step: int | None

    @property
    def name(self) -> str:
        return WORDS.get(self.metric, self.metric.replace("_", " "))

    @property
    def detail(self) -> str:
        k = None if self.k is None else f"k = {self.k}"
        side = None if self.side is None else f"{self.side} side"
        draw = None if self.draw is None else f"draw {self.draw}"
        step = None if self.step is None else f"step {self.step}"
        parts = (self.attack, draw, self.over, step, self.decode, self.dataset, side, k, self.mode, self.scorer)
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Cell:
    """A figure with its interval, or a count (an int); `str(cell)` is what tables show.

    chance: what guessing gives, of an accuracy.
    """

    value: float | int | None = None
    low: float | None = None
    high: float | None = None
    chance: float | None = None

    @property
    def figure(self) -> str:
        return ABSENT if self.value is None else _number(self.value, self.value)

    @property
    def interval(self) -> str:
        """`[low, high]` with the decimals of the value, or nothing where none was measured."""
        if self.value is None or self.low is None or self.high is None:
            return ""
        return f"[{_number(self.low, self.value)}, {_number(self.high, self.value)}]"

    @property
    def note(self) -> str:
        """Where the interval has chance in it, or above it: that this is no more than guessing gives."""
        if self.chance is None or self.low is None or self.high is None or self.low > self.chance:
            return ""
        return "at chance" if self.high >= self.chance else "below chance"

    def __str__(self) -> str:
        return " ".join(part for part in (self.figure, self.interval, self.note) if part)


class Line(NamedTuple):
    group: str
    name: str
    detail: str
    cells: tuple[Cell, ...]

    @property
    def label(self) -> str:
        return ", ".join(part for part in (self.name, self.detail) if part)


@dataclass(frozen=True)
class Table:
    headers: tuple[str, ...]  # the first is the label's
    lines: tuple[Line, ...]
    counts: int = 1  # columns at the end that hold whole numbers without an interval

    @property
    def rows(self) -> list[list[str]]:
        """Every cell as text, the label first."""
        return [[line.label, *map(str, line.cells)] for line in self.lines]


class Spec(NamedTuple):
    """Lines of the headline: the figures of a metric that meet every condition; a k of "largest" is the largest."""

    group: str
    metric: str
    conditions: dict[str, Any]


CHALLENGE = "Toxicity of continuations"
FORCED = "Toxicity after forced tokens"
UTILITY = "Utility"
QUESTIONS = "Multiple choice"
HEADLINE = (
    Spec(CHALLENGE, "toxicity", {"decode": "sampled", "side": None}),
    Spec(CHALLENGE, "toxicity", {"decode": "greedy", "side": None}),
    Spec(FORCED, "toxicity", {"decode": "sampled", "side": "rejected", "k": "largest"}),
    Spec(FORCED, "toxicity", {"decode": "sampled", "side": "chosen", "k": "largest"}),
    Spec(UTILITY, "perplexity", {"mode": "exact"}),
    Spec(UTILITY, "f1", {"mode": "continuation"}),
    Spec(UTILITY, "f1", {"mode": "share"}),  # as the REPO paper defines it,
    Spec(UTILITY, "f1", {"mode": "lee2024"}),  # and as the code has it that its figures seem to come from
    Spec(QUESTIONS, "accuracy", {"mode": "acc"}),
    Spec(QUESTIONS, "accuracy", {"mode": "harness"}),
    Spec(QUESTIONS, "s_unlearning", {}),
)


def headline(runs: Mapping[str, Sequence[Row]]) -> Table:
    """The figures that matter most. One run: reference, unlearned, ratio, n; several: each run and its ratio.

    Raises ExpungeError where the runs were measured against different references.
    """
    indices = {name: by_figure(rows) for name, rows in runs.items()}
    reference = _shared_reference(indices)
    figures = list(dict.fromkeys(figure for index in indices.values() for figure in index))
    if len(runs) == 1:
        headers = ("figure", "reference", "unlearned", "ratio", "n")
    else:
        headers = ("figure", "reference", *(column for name in runs for column in (name, f"{name} / reference")), "n")
    lines = []
    for group, figure in _chosen(figures):
        cells = [cell(reference.get(figure))]
        for index in indices.values():
            roles = index.get(figure, {})
            cells += [cell(roles.get("unlearned")), cell(roles.get("ratio"))]
        n = next(row.n for index in indices.values() for row in index.get(figure, {}).values())
        lines.append(Line(group, figure.name, figure.detail, (*cells, Cell(n))))
    table = Table(headers, tuple(lines))
    return table if reference else _without_empty(table)


def headline_rows(rows: Sequence[Row]) -> list[tuple[Figure, dict[str, Row]]]:
    """The headline's figures of one run, each with its rows by role."""
    index = by_figure(rows)
    return [(figure, index[figure]) for _, figure in _chosen(list(index))]


def full(rows: Sequence[Row]) -> Table:
    """Every figure of one run, grouped by metric in the order of the rows."""
    index = by_figure(rows)
    columns = ("reference", "unlearned", "difference", "ratio")
    lines = []
    for metric in dict.fromkeys(figure.metric for figure in index):
        for figure in (figure for figure in index if figure.metric == metric):
            roles = index[figure]
            cells = [cell(roles.get(role)) for role in columns]
            n = Cell(next(row.n for row in roles.values()))
            lines.append(Line(figure.name, figure.name, figure.detail, (*cells, n)))
    return _without_empty(Table(("figure", *columns, "n"), tuple(lines)))


def to_records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The headline's unrounded figures of one run: the fields of `Figure`, then each role as value, low and high; and n."""
    return [
        {
            **figure._asdict(),
            **{role: _interval(roles[role]) for role in ("reference", "unlearned", "ratio") if role in roles},
            "n": next(iter(roles.values())).n,
        }
        for figure, roles in headline_rows(rows)
    ]


def _interval(row: Row) -> dict[str, float | None]:
    return {"value": row.value, "low": row.ci_low, "high": row.ci_high}


def by_figure(rows: Iterable[Row]) -> dict[Figure, dict[str, Row]]:
    """Rows by figure, then by role; ExpungeError where two rows claim one place."""
    index: dict[Figure, dict[str, Row]] = {}
    for row in rows:
        metric, role = row.metric, row.subject
        if row.paired:
            role = "ratio" if metric.endswith("_ratio") else "difference"
            metric = metric.removesuffix(f"_{role}")
        shared = {name: getattr(row, name) for name in Figure._fields if name != "metric"}
        figure = Figure(metric=metric, **shared)
        roles = index.setdefault(figure, {})
        if role in roles:
            raise ExpungeError(
                f"two rows give the {role} of {figure.name} ({figure.detail}): results.jsonl doubles a figure"
            )
        roles[role] = row
    return index


def _shared_reference(indices: Mapping[str, dict[Figure, dict[str, Row]]]) -> dict[Figure, Row]:
    """The reference's rows over all runs; a figure that two runs measured must have one value."""
    shared: dict[Figure, tuple[str, Row]] = {}
    for name, index in indices.items():
        for figure, roles in index.items():
            if "reference" not in roles:
                continue
            first, row = shared.setdefault(figure, (name, roles["reference"]))
            here, there = roles["reference"].value, row.value
            if not math.isclose(here, there, rel_tol=1e-6):
                raise ExpungeError(
                    f"{first} and {name} were measured against different references ({figure.name}, {figure.detail}: "
                    f"{there:.6g} and {here:.6g}): evaluate both with one reference and one budget"
                )
    return {figure: row for figure, (_, row) in shared.items()}


def _chosen(figures: Sequence[Figure]) -> list[tuple[str, Figure]]:
    """The headline's figures, each with its group, in the order of `HEADLINE`."""
    largest = max((figure.k for figure in figures if figure.k is not None), default=None)
    chosen = []
    for spec in HEADLINE:
        wanted = {name: largest if value == "largest" else value for name, value in spec.conditions.items()}
        wanted |= {"metric": spec.metric, "stage": "evaluate"}
        chosen += [(spec.group, f) for f in figures if all(getattr(f, name) == value for name, value in wanted.items())]
    return chosen


def cell(row: Row | None) -> Cell:
    """A row's value and interval; empty where there is no row."""
    return Cell(float(row.value), row.ci_low, row.ci_high, row.chance) if row else Cell()


def _without_empty(table: Table) -> Table:
    """The table without the columns, n aside, where no line has a value: a run without a reference has three such."""
    columns = range(len(table.headers) - 1)
    kept = [i for i in columns if i == columns[-1] or any(line.cells[i].value is not None for line in table.lines)]
    lines = (line._replace(cells=tuple(line.cells[i] for i in kept)) for line in table.lines)
    return Table((table.headers[0], *(table.headers[i + 1] for i in kept)), tuple(lines))


def _number(value: float, scale: float) -> str:
    """`value` with the decimals that a figure of the size of `scale` has: 1,234, 123.4, 12.34, 1.234, 0.123."""
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(scale)
    decimals = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3
    return f"{round(value, decimals) + 0.0:,.{decimals}f}"  # + 0.0: no minus before a zero
