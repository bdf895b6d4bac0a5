"""What stages leave in a run's folder, who may write there, and what tells that one is done."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from expunge.claim import claimed
from expunge.config import RunConfig
from expunge.errors import ExpungeError
from expunge.provenance import environment
from expunge.scorers import Scorer
from expunge.whole import write_text

MEASURED = (
    "evaluation",
    "data.prompts",
    "data.heldout",
    "data.neutral",
    "data.corpus",
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


def claim(folder: Path, config: RunConfig, **more: Any) -> contextlib.AbstractContextManager[None]:
    """Hold `folder` for this run inside a `with`: see `claimed`. more: what tells other commands' folders apart."""
    settings = dataclasses.asdict(config) | more
    return claimed(folder, settings, MEASURED) if is_main_process() else contextlib.nullcontext()


def origin_of(folder: Path) -> dict[str, Any]:
    """What the run in `folder` started from: `model`, `method`, and `loading`, how the model was loaded, but for code of its
    own, as the run may be another's. Empty where it holds no run."""
    path = folder / "config.yaml"
    if not path.is_file() or not (folder / "model").is_dir():
        return {}
    try:
        run = yaml.safe_load(path.read_text(encoding="utf-8"))
        how = {name: run.get(name) for name in ("revision", "dtype", "attn_implementation", "quantization")}
        loading = {name: value for name, value in how.items() if value}
        return {"model": run["model"], "method": run.get("method") or {}, "loading": loading}
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, KeyError):
        raise ExpungeError(f"{path}: not the configuration of a run: name its model's folder, and --reference") from None


def is_done(folder: Path, stage: str, key: str) -> bool:
    path = folder / "stages" / f"{stage}.json"
    return path.exists() and _record(path).get("key") == key


def finish(folder: Path, stage: str, key: str, facts: dict[str, Any]) -> None:
    """A stage is done: what it leaves of itself in stages/, for provenance.json."""
    write_text(folder / "stages" / f"{stage}.json", json.dumps({"key": key, **facts}, indent=2))


def write_provenance(folder: Path, config: RunConfig, scorers: Sequence[Scorer]) -> None:
    """provenance.json: versions, hashes, seeds, and what each stage took."""
    stages = {path.stem: _record(path) for path in sorted((folder / "stages").glob("*.json"))}
    facts = {
        "environment": environment(),
        "scorers": {scorer.name: scorer.digest for scorer in scorers},
        "seeds": {"training": config.seed, "evaluation": config.evaluation.seed},
        "stages": stages,
        "seconds": round(sum(stage.get("seconds", 0) for stage in stages.values()), 2),
        "peak_memory_bytes": max((stage.get("peak_memory_bytes", 0) for stage in stages.values()), default=0),
    }
    write_text(folder / "provenance.json", json.dumps(facts, indent=2))


def _record(path: Path) -> dict[str, Any]:
    """What a stage left of itself."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ExpungeError(f"{path}: not the JSON object that the stage left: remove it, and the stage runs again") from None
