"""Runs beside each other: a line is a run, or several that differ in their seed alone; a column is a figure.

    entries = read_folders([Path("runs/repo"), Path("runs/sweep")])
    print(to_markdown(compare(entries, headline_columns(entries))))

Reads `results.jsonl` of a run, or `sweep.jsonl` of a sweep and the results of its cells.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

from expunge.errors import ExpungeError
from expunge.report.files import checked_rows
from expunge.report.tables import Cell, Line, Table, cell, headline_rows
from expunge.rows import Row, read_lines

NULL_UNLESS_NAMED = ("side", "k", "attack", "draw", "over", "step")
NORMAL = 1.96  # half of a 95 % interval in standard errors
PAIRED = ("_ratio", "_difference")
NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?")


@dataclass(frozen=True)
class Wanted:
    """A figure by the fields of its rows. What is left out must not be in doubt: `scorer` is then the first that was used,
    `side`, `k`, `attack`, `draw`, `over` and `step` are null, and of the others there is one value."""

    metric: str
    """METRIC_ratio and METRIC_difference are those to the reference."""
    dataset: str | None = None
    decode: str | None = None
    side: str | None = None
    k: int | None = None
    mode: str | None = None
    scorer: str | None = None
    samples: int | None = None
    attack: str | None = None
    draw: int | None = None
    over: str | None = None
    step: int | None = None

    def __str__(self) -> str:
        conditions = (f"{key}={value}" for key, value in asdict(self).items() if value is not None and key != "metric")
        return " ".join([self.metric, *conditions])


FIELDS = tuple(field.name for field in fields(Wanted) if field.name != "metric")


@dataclass(frozen=True)
class Entry:
    """A line to be: the rows of one run, or of each seed."""

    name: str
    runs: Sequence[Sequence[Row]]


def find(rows: Iterable[Row], wanted: Wanted, subject: str = "unlearned") -> Row | None:
    """The one row that is meant, or None; ExpungeError where it could be several."""
    paired = wanted.metric.endswith(PAIRED)
    metric = wanted.metric.removesuffix("_difference")
    found = [row for row in rows if (row.metric, row.paired, row.subject) == (metric, paired, subject)]
    for name in FIELDS:
        value = getattr(wanted, name)
        if value is not None or name in NULL_UNLESS_NAMED:
            found = [row for row in found if getattr(row, name) == value]
    if wanted.scorer is None:
        found = [row for row in found if row.scorer == found[0].scorer]
    if len(found) > 1:
        open_ = {name: list(dict.fromkeys(getattr(row, name) for row in found)) for name in FIELDS}
        say = "; ".join(f"{name}: {' or '.join(map(str, values))}" for name, values in open_.items() if len(values) > 1)
        raise ExpungeError(
            f"{wanted}: {len(found)} figures may be meant; say which ({say or 'results.jsonl doubles a row'})"
        )
    return found[0] if found else None


def rows_behind(rows: Sequence[Row], figures: Iterable[Wanted]) -> list[Row]:
    """The rows that a table of these figures and its remarks read: each figure, its ratio, and the reference's."""
    found: dict[int, Row] = {}
    for figure in figures:
        reference = find(rows, figure, "reference") if not figure.metric.endswith(PAIRED) else None
        for row in (find(rows, figure), find(rows, _ratio_of(figure)), reference):
            if row:
                found[id(row)] = row
    return list(found.values())


def _ratio_of(figure: Wanted) -> Wanted:
    plain = figure.metric.removesuffix("_ratio").removesuffix("_difference")
    return Wanted(**{**asdict(figure), "metric": f"{plain}_ratio"})


def combined(rows: Sequence[Row]) -> Cell:
    """The mean of one figure over S seeds, with a 95 % interval over prompts and seeds; a single run keeps its own.

    Its variance is  W + B / S:  W, the mean over the runs of ((high - low) / 3.92)^2, is that of drawing other prompts,
    which all seeds share, so that no number of seeds lowers it; B is the variance of the values between seeds, over S - 1.
    The interval is Student's, with Satterthwaite's degrees of freedom  (W + B/S)^2 / (W^2 / (n - 1) + (B/S)^2 / (S - 1))
    over n prompts: few seeds that differ make it wide.
    """
    if len(rows) < 2:
        return cell(rows[0] if rows else None)
    values = np.array([row.value for row in rows], dtype=np.float64)
    ends = [(row.ci_low, row.ci_high) for row in rows if row.ci_low is not None and row.ci_high is not None]
    prompts = float(np.mean([((high - low) / (2 * NORMAL)) ** 2 for low, high in ends])) if ends else 0.0
    seeds = float(values.var(ddof=1)) / len(values)
    mean, variance = float(values.mean()), prompts + seeds
    if not math.isfinite(variance):
        return Cell(mean, chance=rows[0].chance)
    units = min((row.n for row in rows if row.n), default=0)
    spread = seeds**2 / (len(values) - 1) + (prompts**2 / (units - 1) if units > 1 else 0.0)
    half = float(t.ppf(0.975, variance**2 / spread)) * math.sqrt(variance) if spread else 0.0
    return Cell(mean, mean - half, mean + half, rows[0].chance)


def compare(entries: Sequence[Entry], columns: Mapping[str, Wanted], head: str = "run") -> Table:
    """Entries as lines below the reference that they were measured against. Figures that an entry lacks are left empty."""
    groups: list[tuple[dict[str, Cell], list[Entry]]] = []
    for entry in entries:
        reference = _reference(entry, columns)
        for shared, members in groups:
            if all(_same(own, shared[name]) for name, own in reference.items() if name in shared):
                shared |= reference
                members.append(entry)
                break
        else:
            groups.append((reference, [entry]))
    lines = []
    for reference, members in groups:
        rows = (row for entry in members for run in entry.runs for row in run if reference and row.subject == "reference")
        group = next((row.model for row in rows if row.model), "runs")
        if reference:
            cells = [reference.get(name, Cell()) for name in columns]
            lines.append(Line(group, "reference" if len(groups) == 1 else f"reference ({group})", "", (*cells, Cell())))
        for entry in members:
            found = [combined(_found(entry, wanted)) for wanted in columns.values()]
            lines.append(Line(group, entry.name, "", (*found, Cell(len(entry.runs)))))
    return Table((head, *columns, "runs"), tuple(lines))


def headline_columns(entries: Sequence[Entry], ratio: bool = False) -> dict[str, Wanted]:
    """The headline's figures of all runs by name and detail; ratio: their ratios to the reference."""
    figures = dict.fromkeys(figure for entry in entries for rows in entry.runs for figure, _ in headline_rows(rows))
    ending = "_ratio" if ratio else ""
    return {
        ", ".join(filter(None, (figure.name, figure.detail))): Wanted(
            metric=figure.metric + ending, **{name: getattr(figure, name) for name in FIELDS if hasattr(figure, name)}
        )
        for figure in figures
    }


def remarks(entries: Sequence[Entry], columns: Mapping[str, Wanted]) -> list[str]:
    """By column, figures that some runs of a line lack, and those that may be chance, their ratio's interval holding 1."""
    found = []
    for name, wanted in columns.items():
        counts = [(entry.name, len(_found(entry, wanted)), len(entry.runs)) for entry in entries]
        if fewer := [f"{entry} ({have} of {runs})" for entry, have, runs in counts if 0 < have < runs]:
            found.append(f"{name}: some runs lack this figure, and the mean is of the others: {', '.join(fewer)}")
        cells = {entry.name: combined(_found(entry, _ratio_of(wanted))) for entry in entries}
        same = [entry for entry, c in cells.items() if c.low is not None and c.high is not None and c.low <= 1 <= c.high]
        if same:
            found.append(
                f"{name}: the change may be chance (1 lies in the interval of the ratio to the reference): {', '.join(same)}"
            )
    return found


def to_records(table: Table) -> list[dict[str, Any]]:
    """The lines unrounded: name, group, runs (null: the reference), and figures by column, null where there is none."""
    return [
        {
            "name": line.name,
            "group": line.group,
            "runs": line.cells[-1].value,
            "figures": {
                header: None
                if c.value is None
                else {name: v for name, v in asdict(c).items() if name != "chance" or v is not None}
                for header, c in zip(table.headers[1:-1], line.cells[:-1], strict=True)
            },
        }
        for line in table.lines
    ]


def read_folder(folder: Path) -> list[Entry]:
    """The run in a folder, or the finished cells of a sweep: one entry for those that differ in their seed alone.

    Raises ExpungeError for a folder that holds neither, or nothing finished.
    """
    if (folder / "sweep.jsonl").is_file():
        groups: dict[str, list[Sequence[Row]]] = {}
        for number, record in enumerate(read_lines(folder / "sweep.jsonl"), 1):
            if missing := [key for key in ("cell", "labels", "trial", "status") if key not in record]:
                raise ExpungeError(
                    f"{folder}/sweep.jsonl:{number}: no field {missing[0]!r}: run the sweep again to write it"
                )
            if record["status"] == "done" and record["trial"] is None:
                results = folder / "cells" / record["cell"] / "results.jsonl"
                rows = checked_rows(results) if results.is_file() else [Row(**row) for row in record.get("rows", [])]
                groups.setdefault(name_of(record["labels"]), []).append(rows)
        if not groups:
            raise ExpungeError(f"{folder}: no cell of this sweep has finished: the command that began it goes on")
        sweep = folder.resolve().name
        return [Entry(": ".join(filter(None, (sweep, name))), runs) for name, runs in groups.items()]
    if not (folder / "results.jsonl").is_file():
        raise ExpungeError(
            f"{folder} holds no results of a run or a sweep: give folders that `expunge run` or `sweep` wrote"
        )
    return [Entry(folder.resolve().name, [checked_rows(folder / "results.jsonl")])]


def read_folders(folders: Sequence[Path]) -> list[Entry]:
    """All of them, with names that differ: a folder's, its path where two are called the same."""
    entries = [(folder, entry) for folder in folders for entry in read_folder(folder)]
    names = [entry.name for _, entry in entries]
    return [
        Entry(f"{folder}{entry.name.removeprefix(folder.resolve().name)}", entry.runs)
        if names.count(entry.name) > 1
        else entry
        for folder, entry in entries
    ]


def words_of(labels: Mapping[str, str]) -> list[str]:
    """A cell's labels; a number with the last part of its axis."""
    return [f"{axis.rpartition('.')[2]} {label}" if NUMBER.fullmatch(label) else label for axis, label in labels.items()]


def name_of(labels: Mapping[str, str]) -> str:
    """The labels of cells that share a line: the seed aside."""
    return ", ".join(words_of({axis: label for axis, label in labels.items() if axis != "seed"}))


def _found(entry: Entry, wanted: Wanted) -> list[Row]:
    return [row for rows in entry.runs if (row := find(rows, wanted))]


def _reference(entry: Entry, columns: Mapping[str, Wanted]) -> dict[str, Cell]:
    """The reference's figures by column; a ratio has none. Under attacks it has others for each seed."""
    found = {
        name: [row for rows in entry.runs if (row := find(rows, wanted, "reference"))] for name, wanted in columns.items()
    }
    return {
        name: combined(rows) if len({row.value for row in rows}) > 1 else cell(rows[0])
        for name, rows in found.items()
        if rows
    }


def _same(one: Cell, other: Cell) -> bool:
    assert one.value is not None and other.value is not None  # of rows, which have one
    return math.isclose(one.value, other.value, rel_tol=1e-6)
