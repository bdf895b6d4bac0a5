"""Run folders made by hand: harmless text, round figures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expunge.rows import Row, write_lines, write_rows


def compared(metric: str, before: float, after: float, **fields: Any) -> list[Row]:
    """The rows of one figure over four prompts: reference, unlearned, difference, and a ratio with an interval."""
    return [
        Row("evaluate", "reference", metric, before, before - 0.125, before + 0.125, n=4, **fields),
        Row("evaluate", "unlearned", metric, after, after - 0.125, after + 0.125, n=4, **fields),
        Row("evaluate", "unlearned", metric, after - before, n=4, paired=True, **fields),
        Row("evaluate", "unlearned", f"{metric}_ratio", after / before, 0.25, 0.75, n=4, paired=True, **fields),
    ]


def some_rows(after: float = 0.25) -> list[Row]:
    """A run whose sampled toxicity goes from 0.5 to `after`."""
    sampled = {"decode": "sampled", "dataset": "challenge"}
    forced = {"decode": "sampled", "dataset": "pairs", "side": "rejected", "scorer": "ngram"}
    return [
        *compared("perplexity", 64.0, 80.0, dataset="wikitext2", mode="exact"),
        *compared("toxicity", 0.5, after, **sampled, scorer="ngram"),
        *compared("toxicity", 0.75, 0.5, **forced, k=8),
        *compared("toxicity", 0.625, 0.5, **forced, k=4),
        Row("evaluate", "reference", "distinct_2", 0.8, n=4, **sampled),
    ]


def checkpoints(ratios: dict[int, tuple[float, float]], scorer: str = "ngram") -> list[Row]:
    """By step, the perplexity and the toxicity ratio that a measurement in the midst of training gave; reference 64, 0.5."""
    rows = []
    for step, (perplexity, toxicity) in ratios.items():
        for metric, ratio, before, where in (
            ("perplexity", perplexity, 64.0, {"dataset": "wikitext2", "mode": "exact"}),
            ("toxicity", toxicity, 0.5, {"dataset": "challenge", "decode": "sampled", "scorer": scorer}),
        ):
            fields = {"n": 4, "step": step, **where}
            rows.append(Row("train", "unlearned", metric, ratio * before, **fields))
            rows.append(Row("train", "unlearned", f"{metric}_ratio", ratio, 0.25, 1.25, paired=True, **fields))
    return rows


def sample(subject: str, prompt_id: int, score: float, **changes: Any) -> dict[str, Any]:
    return {
        "subject": subject,
        "dataset": "challenge",
        "decode": "sampled",
        "side": None,
        "k": None,
        "prompt_id": prompt_id,
        "sample": 0,
        "prompt": f"prompt {prompt_id}",
        "continuation": f"{subject} {prompt_id}",
        "scores": {"ngram": score, "wordvec": 0.125},
        **changes,
    }


def write_run(folder: Path, rows: list[Row] | None = None, samples: list[dict[str, Any]] | None = None) -> Path:
    """A finished run in `folder`; by default prompt 0 is harmless, and the reference alone is toxic on prompt 1."""
    default = [
        sample(who, i, score)
        for who, i, score in (
            ("reference", 0, 0.1),
            ("reference", 1, 0.9),
            ("unlearned", 0, 0.1),
            ("unlearned", 1, 0.2),
        )
    ]
    write_rows(folder / "results.jsonl", some_rows() if rows is None else rows)
    write_lines(folder / "samples.jsonl", default if samples is None else samples)
    write_lines(folder / "training.jsonl", [{"step": i, "epoch": i / 4, "anchor": i / 8} for i in range(1, 5)])
    facts = {"environment": {"packages": {"torch": "2.13"}}, "seconds": 61.25, "peak_memory_bytes": 3 * 2**29}
    (folder / "provenance.json").write_text(json.dumps(facts), encoding="utf-8")
    (folder / "config.yaml").write_text("model: tiny\nmethod:\n  name: repo\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def run_rows() -> Callable[..., list[Row]]:
    return some_rows


@pytest.fixture(scope="session")
def figure_rows() -> Callable[..., list[Row]]:
    return compared


@pytest.fixture(scope="session")
def checkpoint_rows() -> Callable[..., list[Row]]:
    return checkpoints


@pytest.fixture(scope="session")
def one_sample() -> Callable[..., dict[str, Any]]:
    return sample


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    return write_run
