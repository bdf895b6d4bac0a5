"""The evaluation of one model as figures that can be paired with a reference's, and kept on disk.

A figure keeps a row of numbers per unit (prompt, window of text), and is a function of their column sums:

    mean         sum c0 / sum c1               perplexity   exp(sum c0 / sum c1)
    correlation  from the sums of 1, x, y, xx, yy, xy

so that its interval, and that of the difference or ratio to a reference, come from resampling the same units.

    rows(evaluation, reference=Evaluation.load(path), subject="unlearned", run="first")
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from expunge.errors import ExpungeError
from expunge.metrics.stats import Interval, bootstrap, correlation_of_sums, ratio_of_sums
from expunge.rows import Row, read_lines, write_lines

STATISTICS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": ratio_of_sums,
    "perplexity": lambda sums: np.exp(ratio_of_sums(sums)),
    "correlation": correlation_of_sums,
}


@dataclass(frozen=True)
class Key:
    """What a figure is about; the fields are those of a Row."""

    metric: str
    dataset: str | None = None
    decode: str | None = None
    side: str | None = None
    k: int | None = None
    mode: str | None = None
    scorer: str | None = None
    samples: int | None = None


KEY_FIELDS = [field.name for field in fields(Key)]


@dataclass(frozen=True)
class Figure:
    """columns: float64 `[N, C]`, a row per unit; kind: the statistic of their sums that is the figure."""

    key: Key
    kind: str
    columns: np.ndarray

    @classmethod
    def mean(cls, key: Key, values: np.ndarray) -> "Figure":
        """The mean of a value per unit `[N]`."""
        return cls(key, "mean", np.stack([values, np.ones(len(values))], axis=1))

    def interval(self, seed: int = 0) -> Interval:
        return bootstrap(self.columns, STATISTICS[self.kind], seed)


@dataclass
class Evaluation:
    """All figures of one model, and every continuation with its scores.

    A sample is {dataset, decode, side, k, prompt_id, prompt, sample, continuation, scores: {scorer: value}}.
    """

    figures: list[Figure] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def __getitem__(self, key: Key) -> Figure:
        for figure in self.figures:
            if figure.key == key:
                return figure
        raise KeyError(key)

    def save(self, path: Path) -> None:
        """Write the folder `path` (safetensors and JSON lines) under a temporary name, then rename it."""
        temporary = path.with_name(path.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_lines(temporary / "figures.jsonl", ({"kind": f.kind, **asdict(f.key)} for f in self.figures))
        columns = {str(i): np.ascontiguousarray(f.columns, dtype=np.float64) for i, f in enumerate(self.figures)}
        save_file(columns, temporary / "columns.safetensors")
        write_lines(temporary / "samples.jsonl", self.samples)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> "Evaluation":
        records = read_lines(path / "figures.jsonl")
        columns = load_file(path / "columns.safetensors")
        figures = [
            Figure(Key(**{name: r[name] for name in KEY_FIELDS}), r["kind"], columns[str(i)])
            for i, r in enumerate(records)
        ]
        return cls(figures, read_lines(path / "samples.jsonl"))


def rows(evaluation: Evaluation, reference: Evaluation | None = None, **common: Any) -> list[Row]:
    """One row per figure; with a reference also paired rows: difference of means, ratio ("METRIC_ratio").

    A ratio whose denominator is 0 is undefined and has no row. common: fields of every row; `seed` draws the resamples.
    Raises ExpungeError where the reference was measured on other prompts or text.
    """
    seed = common.get("seed") or 0
    base = {"stage": "evaluate", "subject": "unlearned", **common}
    before = {figure.key: figure for figure in reference.figures} if reference else {}
    found = []
    for figure in evaluation.figures:
        found.append(_row(figure.key, figure.interval(seed), base))
        if reference and figure.kind != "correlation":
            found += _paired(figure, before.get(figure.key), base, seed)
    return found


def _paired(after: Figure, before: Figure | None, base: dict[str, Any], seed: int) -> list[Row]:
    if before is None or len(before.columns) != len(after.columns):
        raise ExpungeError(
            f"{after.key.metric} ({after.key.dataset}): the reference was not measured on the same units; "
            "evaluate both with one plan, the same data and one tokenizer"
        )
    statistic, width = STATISTICS[after.kind], after.columns.shape[1]
    both = np.concatenate([after.columns, before.columns], axis=1)
    found = []
    if after.kind == "mean":
        difference = bootstrap(both, lambda s: statistic(s[:, :width]) - statistic(s[:, width:]), seed)
        found.append(_row(after.key, difference, base, paired=True))
    if statistic(before.columns.sum(0)[None])[0] > 0:
        ratio = bootstrap(both, lambda s: statistic(s[:, :width]) / statistic(s[:, width:]), seed)
        found.append(_row(after.key, ratio, base, paired=True, metric=f"{after.key.metric}_ratio"))
    return found


def _row(key: Key, interval: Interval, base: dict[str, Any], **more: Any) -> Row:
    value, low, high, n = interval
    return Row(**{**base, **asdict(key), "value": value, "ci_low": low, "ci_high": high, "n": n, **more})
