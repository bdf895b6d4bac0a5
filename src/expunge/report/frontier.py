"""What training bought and what it cost, checkpoint by checkpoint: toxicity and perplexity as ratios to the reference.

    frontier(read_rows(folder / "checkpoints.jsonl")).table.rows

A checkpoint is on the frontier if no other, nor the reference at (1, 1), is at least as low in both ratios and lower in
one. The first scorer (with its data set) is drawn; the table has them all.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from expunge.report.tables import Cell, Figure, Line, Table, by_figure, cell
from expunge.report.text import short
from expunge.rows import Row

LEFT, TOP, RIGHT, BOTTOM = 44, 26, 428, 262  # the plot's frame in a view of 440 x 300 user units
LETTER, TALL, DOT = 7, 13, 5  # a label's letters and a point, as far as they may not overlap
MOST, LABELLED = 200, 50  # points beyond the frontier that are drawn (the line goes through all), labels at most

Pair = tuple[float, float]
"""Perplexity ratio, toxicity ratio."""


class Label(NamedTuple):
    """Where the text starts, ends or is centred, by `anchor`."""

    x: float
    y: float
    anchor: str


@dataclass(frozen=True)
class Point:
    step: int
    ratios: Pair
    x: float
    y: float
    best: bool  # on the frontier
    label: Label | None  # None where there is no room for it


@dataclass(frozen=True)
class Drawing:
    name: str  # what judged, on what
    points: list[Point]
    line: str  # from the reference through the checkpoints in order, "x,y x,y ..."
    reference: Label
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    summary: str


@dataclass(frozen=True)
class Frontier:
    table: Table
    drawing: Drawing | None  # None where no checkpoint has both ratios


def frontier(rows: Iterable[Row]) -> Frontier | None:
    """Table and drawing of rows that name a step; None where there are none. Of two rows for one figure the later holds."""
    latest = {_identity(row): row for row in rows if row.step is not None and row.subject == "unlearned"}
    index = by_figure(latest.values())
    series = list(dict.fromkeys(f._replace(step=None) for f in index if f.metric == "toxicity"))
    costs = next((f._replace(step=None) for f in index if f.metric == "perplexity"), None)
    if not series:
        return None
    steps = sorted({f.step for f in index if f.step is not None})
    lines: list[Line] = []
    drawing = None
    for judged in series:
        found = {}
        for step in steps:
            toxicity = index.get(judged._replace(step=step), {})
            perplexity = index.get(costs._replace(step=step), {}) if costs else {}
            if toxicity:
                found[step] = [roles.get(role) for roles in (perplexity, toxicity) for role in ("unlearned", "ratio")]
        ratios = {
            step: (float(p.value), float(t.value))
            for step, (_, p, _, t) in found.items()
            if p and t and math.isfinite(p.value) and math.isfinite(t.value)
        }
        best = pareto(ratios.values())
        name = judged._replace(metric="").detail
        for step, measured in found.items():
            n = next((row.n for row in measured[2:] if row), None)
            flag = Cell(int(ratios[step] in best)) if step in ratios else Cell()
            lines.append(Line(name, str(step), "", (*map(cell, measured), flag, Cell(n))))
        if drawing is None and judged == series[0] and ratios:
            drawing = _draw(name, ratios, best)
    headers = ("step", "perplexity", "perplexity ratio", "toxicity", "toxicity ratio", "frontier", "n")
    return Frontier(Table(headers, tuple(lines), counts=2), drawing)


def pareto(pairs: Iterable[Pair]) -> set[Pair]:
    """Those that none of the others, nor (1, 1), is at least as low as in both and lower than in one."""
    best: set[Pair] = set()
    least = math.inf
    for x, y in sorted({*pairs, (1.0, 1.0)}):
        if y < least:
            best.add((x, y))
            least = y
    return best


def _identity(row: Row) -> tuple:
    return row.paired, *(getattr(row, name) for name in Figure._fields)


def _draw(name: str, ratios: dict[int, Pair], best: set[Pair]) -> Drawing:
    xs, ys = [x for x, _ in ratios.values()], [y for _, y in ratios.values()]
    low, high = min(1.0, *xs), max(1.0, *xs)
    pad = 0.06 * (high - low) or 0.01
    x_low, x_high, y_high = low - pad, high + pad, 1.08 * max(1.0, *ys)

    def place(pair: Pair) -> tuple[float, float]:
        x = LEFT + (RIGHT - LEFT) * (pair[0] - x_low) / (x_high - x_low)
        return round(x, 1), round(BOTTOM - (BOTTOM - TOP) * pair[1] / y_high, 1)

    every = math.ceil(len(ratios) / MOST)
    shown = [step for i, step in enumerate(ratios) if ratios[step] in best or i % every == 0]
    # room for labels goes to the frontier first, then to the last and the first checkpoint
    ranked = sorted(shown, key=lambda step: (ratios[step] not in best, step != shown[-1], step))
    origin = place((1.0, 1.0))
    places = {step: place(ratios[step]) for step in shown}
    labels = _labels([(str(step), places[step]) for step in ranked[:LABELLED]], [origin, *places.values()], origin)
    points = [Point(step, ratios[step], *places[step], ratios[step] in best, labels.get(str(step))) for step in shown]
    lowest = min(ratios, key=lambda step: ratios[step][1])
    path = [origin, *map(place, ratios.values())]
    return Drawing(
        name=name,
        points=points,
        line=" ".join(f"{x},{y}" for x, y in path),
        reference=Label(*origin, "start" if origin[0] < (LEFT + RIGHT) / 2 else "end"),
        x_ticks=[(place((value, 0.0))[0], text) for value, text in _ticks(x_low, x_high)],
        y_ticks=[(place((x_low, value))[1], text) for value, text in _ticks(0.0, y_high)],
        summary=f"{len(ratios)} checkpoints by perplexity ratio and toxicity ratio; the lowest toxicity ratio, "
        f"{short(ratios[lowest][1])}, is at step {lowest} with a perplexity ratio of {short(ratios[lowest][0])}",
    )


def _labels(
    wanted: Sequence[tuple[str, tuple[float, float]]], dots: Sequence[tuple[float, float]], origin: tuple[float, float]
) -> dict[str, Label]:
    """A place beside its point for each text, as long as it covers neither a point nor another label."""
    taken = [(x - DOT, y - DOT, x + DOT, y + DOT) for x, y in dots]
    taken.append((origin[0] - 70, origin[1] - 24, origin[0] + 70, origin[1] - DOT))  # the reference's own label
    found: dict[str, Label] = {}
    for text, (x, y) in wanted:
        for label, box in _beside(x, y, LETTER * len(text)):
            inside = box[0] >= LEFT and box[2] <= RIGHT and box[1] >= TOP and box[3] <= BOTTOM
            if inside and not any(_overlap(box, other) for other in taken):
                found[text] = label
                taken.append(box)
                break
    return found


def _beside(x: float, y: float, wide: float) -> Iterator[tuple[Label, tuple[float, float, float, float]]]:
    gap = DOT + 3
    yield Label(x + gap, y + 4, "start"), (x + gap, y - TALL / 2, x + gap + wide, y + TALL / 2)
    yield Label(x - gap, y + 4, "end"), (x - gap - wide, y - TALL / 2, x - gap, y + TALL / 2)
    yield Label(x, y - gap, "middle"), (x - wide / 2, y - gap - TALL, x + wide / 2, y - gap)
    yield Label(x, y + gap + 9, "middle"), (x - wide / 2, y + gap, x + wide / 2, y + gap + TALL)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Three to six round values from `low` to `high`."""
    size = 10.0 ** math.floor(math.log10(high - low))
    step = next(size * part for part in (0.2, 0.25, 0.5, 1.0, 2.0) if (high - low) / (size * part) <= 6)
    decimals = len(f"{step:.9f}".rstrip("0").partition(".")[2])
    values = [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [(value, f"{value:.{decimals}f}") for value in values]
