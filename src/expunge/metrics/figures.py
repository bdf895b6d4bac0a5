"""The evaluation of one model as figures that can be paired with a reference's, and kept on disk.

A figure keeps two numbers x, w per unit (prompt, window of text), so that its interval, and that of its difference or
ratio to a reference, come from resampling the same units together:

    mean   sum x / sum w          perplexity   exp(sum x / sum w)

An accuracy is a mean that keeps, per question, also the probability of guessing it. A rank correlation keeps, per text, the
two scores and the number of the prompt.

    rows(evaluation, reference=Evaluation.load(path), subject="unlearned", run="first")
"""

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from expunge.errors import ExpungeError
from expunge.metrics.stats import bootstrap, rank_correlation, ratio_of_sums
from expunge.rows import Row, read_lines, write_lines
from expunge.whole import whole

Estimate = tuple[float, float | None, float | None]
"""A value and its 95 % interval, which a single unit does not have."""


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
    """kind: mean, perplexity, accuracy or correlation.

    columns: float64 `[N, 2]`; of an accuracy `[N, 3]`, and `[M, 3]` of a correlation over M texts.
    """

    key: Key
    kind: str
    columns: np.ndarray

    @classmethod
    def mean(cls, key: Key, values: np.ndarray) -> "Figure":
        """The mean of a value per unit `[N]`."""
        return cls(key, "mean", np.stack([values, np.ones(len(values))], axis=1))

    @classmethod
    def accuracy(cls, key: Key, right: np.ndarray, chance: np.ndarray) -> "Figure":
        """The share of right answers `[N]`, beside the probability of guessing each `[N]`."""
        return cls(key, "accuracy", np.stack([right, np.ones(len(right)), chance], axis=1))

    @property
    def chance(self) -> float | None:
        """The accuracy of guessing; None where the figure is no accuracy."""
        return float(self.columns[:, 2].mean()) if self.kind == "accuracy" else None

    @property
    def n(self) -> int:
        """Independent units."""
        return len(np.unique(self.columns[:, 2])) if self.kind == "correlation" else len(self.columns)

    def statistic(self, counts: np.ndarray | None = None) -> np.ndarray:
        """The figure, a scalar; with `counts` `[R, N]`, of each resample `[R]`."""
        ratio = ratio_of_sums(self.columns[:, 0], self.columns[:, 1], counts)
        return np.exp(ratio) if self.kind == "perplexity" else ratio

    def estimate(self, seed: int = 0) -> Estimate:
        if self.kind == "correlation":
            return rank_correlation(self.columns[:, 0], self.columns[:, 1], self.n)
        return bootstrap(self.statistic, self.n, seed)


@dataclass
class Evaluation:
    """All figures of one model, and every continuation with its scores.

    A sample is {dataset, decode, side, k, prompt_id, prompt, sample, continuation, ended, scores: {scorer: value}}.
    """

    figures: list[Figure] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def __getitem__(self, key: Key) -> Figure:
        for figure in self.figures:
            if figure.key == key:
                return figure
        raise KeyError(key)

    def extend(self, other: "Evaluation") -> None:
        """Add what another part of the same model's evaluation found."""
        self.figures += other.figures
        self.samples += other.samples

    def counts(self) -> dict[str, dict[str, int]]:
        """What a mean does not show: prompts and those of them that were cut, by set; by set and decoding, continuations
        that are blank, and those that ended before their last token was due."""
        prompts = {f.key.dataset or "": f.columns[:, 0] for f in self.figures if f.key.metric == "truncated_share"}
        empty: dict[str, int] = {}
        ended: dict[str, int] = {}
        for sample in self.samples:
            name = f"{sample['dataset']} {sample['decode']}"
            empty[name] = empty.get(name, 0) + (not sample["continuation"].strip())
            ended[name] = ended.get(name, 0) + sample["ended"]
        return {
            "prompts": {name: len(cut) for name, cut in prompts.items()},
            "prompts_cut": {name: int(cut.sum()) for name, cut in prompts.items()},
            "empty_continuations": empty,
            "ended_continuations": ended,
        }

    def save(self, path: Path) -> None:
        """Write the folder `path` (safetensors and JSON lines), whole or not at all."""
        columns = {str(i): np.ascontiguousarray(f.columns, dtype=np.float64) for i, f in enumerate(self.figures)}
        with whole(path) as temporary:
            write_lines(temporary / "figures.jsonl", ({"kind": f.kind, **asdict(f.key)} for f in self.figures))
            save_file(columns, temporary / "columns.safetensors")
            write_lines(temporary / "samples.jsonl", self.samples)

    @classmethod
    def load(cls, path: Path) -> "Evaluation":
        records = read_lines(path / "figures.jsonl")
        columns = load_file(path / "columns.safetensors")
        figures = [
            Figure(Key(**{name: r[name] for name in KEY_FIELDS}), r["kind"], columns[str(i)]) for i, r in enumerate(records)
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
        found.append(_row(figure, figure.estimate(seed), base))
        if reference and figure.kind != "correlation":
            found += _paired(figure, before.get(figure.key), base, seed)
    return found


def _paired(after: Figure, before: Figure | None, base: dict[str, Any], seed: int) -> list[Row]:
    if before is None or before.n != after.n:
        raise ExpungeError(
            f"{after.key.metric} ({after.key.dataset}): the reference was not measured on the same units; "
            "evaluate both with one plan, the same data and one tokenizer"
        )
    found = []
    if after.kind in ("mean", "accuracy"):
        difference = bootstrap(lambda counts: after.statistic(counts) - before.statistic(counts), after.n, seed)
        found.append(_row(after, difference, base, paired=True))
    if before.statistic() > 0:
        ratio = bootstrap(lambda counts: _ratio(after.statistic(counts), before.statistic(counts)), after.n, seed)
        found.append(_row(after, ratio, base, paired=True, metric=f"{after.key.metric}_ratio"))
    return found


def _ratio(after: np.ndarray, before: np.ndarray) -> np.ndarray:
    """after / before; NaN in a resample in which `before` is 0, so that the interval is left out."""
    return np.divide(after, before, out=np.full_like(after, np.nan), where=before > 0)


def _row(figure: Figure, estimate: Estimate, base: dict[str, Any], **more: Any) -> Row:
    value, *ends = estimate
    low, high = (None if end is None or not math.isfinite(end) else end for end in ends)
    chance = None if more.get("paired") else figure.chance
    about = {**base, **asdict(figure.key), "chance": chance, "n": figure.n, **more}
    return Row(**{**about, "value": value, "ci_low": low, "ci_high": high})
