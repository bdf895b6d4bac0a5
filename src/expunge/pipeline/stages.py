"""What stages leave in a run's folder, who may write there, and what tells that one is done."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from expunge.claim import BEGAN, began, begin, claimed
from expunge.config import RunConfig
from expunge.data import clock
from expunge.errors import ExpungeError
from expunge.pipeline.origin import read_record
from expunge.pipeline.paths import portable, restored
from expunge.provenance import environment
from expunge.scorers import Scorer
from expunge.whole import write_text

MEASURED = (
    "evaluation",
    "data.prompts",
    "data.heldout",
    "data.neutral",
    "data.corpus",
    "data.corpora",
    "data.questions",
    "redteam",
    "attack",
)
"""Keys that change what is measured, not what is trained: they may change under the same --out."""


def is_main_process() -> bool:
    """Of several that a launcher started, the one that writes and measures; all of them see the same folder."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def check_one_process(message: str) -> None:
    """Raise ExpungeError(message) where a launcher started several processes."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ExpungeError(message)


@contextlib.contextmanager
def claim(folder: Path, config: RunConfig, **more: Any) -> Iterator[None]:
    """Hold `folder` for this run inside a `with`: see `claimed`; templates are told the run's date (`dated`).

    more: what tells other commands' folders apart.
    """
    settings = portable(dataclasses.asdict(config) | more)
    held = claimed(folder, settings, MEASURED, lambda there: restored(there, folder))
    with dated(folder), held if is_main_process() else contextlib.nullcontext():
        if is_main_process() and not began(folder):
            keep_date(folder)
        yield
        if is_main_process():  # where it lies now, once that is a run
            keep_date(folder)


def keep_date(folder: Path) -> None:
    """Leave in `folder` the date that templates are told, where there is none yet, and where it lies."""
    begin(folder, clock.today().isoformat())


@contextlib.contextmanager
def dated(folder: Path, like: Path | None = None) -> Iterator[None]:
    """In the block chat templates are told the date on which the work in `folder` began, or, where it begins now, that of
    the run `like`, or that of the sweep that it is part of, or today's."""
    days = [_day_of(place) for place in (folder, like) if place]
    with clock.told(next(filter(None, days), clock.today())):
        yield


def _day_of(folder: Path) -> date | None:
    day = began(folder).get("day")
    try:
        return date.fromisoformat(day) if day else None
    except ValueError:
        raise ExpungeError(f"{folder / BEGAN}: {day!r} is no day such as 2026-12-01: remove the file for today's") from None


def is_done(folder: Path, stage: str, key: str) -> bool:
    path = folder / "stages" / f"{stage}.json"
    return path.exists() and read_record(path).get("key") == key


def finish(folder: Path, stage: str, key: str, facts: dict[str, Any]) -> None:
    """A stage is done: what it leaves of itself in stages/, for provenance.json."""
    write_text(folder / "stages" / f"{stage}.json", json.dumps({"key": key, **facts}, indent=2))


def write_provenance(folder: Path, config: RunConfig, scorers: Sequence[Scorer]) -> None:
    """provenance.json: versions, hashes, seeds, and what each stage took."""
    stages = {path.stem: read_record(path) for path in sorted((folder / "stages").glob("*.json"))}
    facts = {
        "environment": environment(),
        "scorers": {scorer.name: scorer.digest for scorer in scorers},
        "seeds": {"training": config.seed, "evaluation": config.evaluation.seed},
        "stages": stages,
        "seconds": round(sum(stage.get("seconds", 0) for stage in stages.values()), 2),
        "peak_memory_bytes": max((stage.get("peak_memory_bytes", 0) for stage in stages.values()), default=0),
    }
    write_text(folder / "provenance.json", json.dumps(facts, indent=2))
