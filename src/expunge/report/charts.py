"""Geometry of the page's drawings: loss curves and interval marks, as numbers that the template turns into SVG.

curves([{"step": 1, "anchor": 0.5}, {"step": 2, "anchor": 0.4}])
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expunge.report.tables import Cell, Table

WIDTH, HEIGHT = 320, 96  # of a curve, in user units
POINTS = 160  # a longer series is drawn as means and extremes of so many stretches of steps
NOT_SERIES = {"step", "epoch", "total_flos"}
FIRST = ("loss", "anchor", "erase", "discriminator_accuracy", "discriminator_bce", "grad_norm", "learning_rate")
MARK = 96  # width of an interval mark


@dataclass(frozen=True)
class Curve:
    """One logged series: the mean as a polyline, the extremes of each stretch as a band."""

    name: str
    line: str  # "x,y x,y ..." in user units, y downwards
    band: str
    low: float
    high: float
    first: float
    last: float
    steps: tuple[int, int]
    skipped: int  # points that were not finite


@dataclass(frozen=True)
class Mark:
    """A value with its interval on a shared axis from 0, in user units."""

    at: float
    low: float
    high: float


def curves(records: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """A curve for each numeric series of the training log that has two finite points or more, the losses first."""
    found = dict.fromkeys(key for record in records for key in record if key not in NOT_SERIES)
    names = [name for name in FIRST if name in found] + [name for name in found if name not in FIRST]
    return [curve for name in names if (curve := _curve(name, records))]


def _curve(name: str, records: Sequence[Mapping[str, Any]]) -> Curve | None:
    logged = [(r["step"], r[name]) for r in records if _is_number(r.get(name)) and _is_number(r.get("step"))]
    points = [(step, value) for step, value in logged if math.isfinite(value)]
    if len(points) < 2:
        return None
    size = math.ceil(len(points) / POINTS)
    stretches = [points[i : i + size] for i in range(0, len(points), size)]
    steps = (points[0][0], points[-1][0])
    low, high = min(v for _, v in points), max(v for _, v in points)

    def x(stretch: list[tuple[int, float]]) -> float:
        middle = (stretch[0][0] + stretch[-1][0]) / 2
        return WIDTH * (middle - steps[0]) / max(1, steps[1] - steps[0])

    def y(value: float) -> float:
        return HEIGHT / 2 if high == low else HEIGHT * (1 - (value - low) / (high - low))

    values = [[value for _, value in stretch] for stretch in stretches]
    xs = [x(stretch) for stretch in stretches]
    mean = [(at, y(sum(v) / len(v))) for at, v in zip(xs, values, strict=True)]
    upper = [(at, y(max(v))) for at, v in zip(xs, values, strict=True)]
    lower = [(at, y(min(v))) for at, v in zip(xs, values, strict=True)]
    return Curve(
        name=name.replace("_", " "),
        line=_path(mean),
        band=_path(upper + lower[::-1]) if size > 1 else "",
        low=low,
        high=high,
        first=points[0][1],
        last=points[-1][1],
        steps=steps,
        skipped=len(logged) - len(points),
    )


def marks(table: Table, group: str) -> dict[int, list[tuple[str, Mark]]]:
    """By line number, the reference's and the unlearned model's marks for the lines of `group`, all on one axis."""
    columns = [i for i, header in enumerate(table.headers[1:]) if header in ("reference", "unlearned")]
    lines = {i: line for i, line in enumerate(table.lines) if line.group == group}
    tops = [value for line in lines.values() for i in columns for value in (line.cells[i].value, line.cells[i].high)]
    top = max((value for value in tops if value is not None and math.isfinite(value)), default=0.0)
    if top <= 0:
        return {}
    return {
        number: [(table.headers[i + 1], mark) for i in columns if (mark := _mark(line.cells[i], top))]
        for number, line in lines.items()
    }


def _mark(cell: Cell, top: float) -> Mark | None:
    if cell.value is None or not math.isfinite(cell.value):
        return None
    ends = (cell.value, cell.value if cell.low is None else cell.low, cell.value if cell.high is None else cell.high)
    return Mark(*(round(4 + (MARK - 8) * max(0.0, value) / top, 1) for value in ends))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
