"""What a run folder holds, read and checked for the report; every complaint is one line that names the file.

run = read_run(Path("runs/first")); run.rows; run.samples
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from expunge.errors import ExpungeError
from expunge.rows import Row, read_lines, read_rows

NEEDED = ("config.yaml", "results.jsonl", "samples.jsonl", "provenance.json")


@dataclass(frozen=True)
class RunFiles:
    name: str  # the folder's
    subject: str  # "repo on builtin"
    rows: list[Row]
    samples: list[dict[str, Any]]
    training: list[dict[str, Any]]  # empty where a model was measured, not trained
    provenance: dict[str, Any]
    config: str


def read_run(folder: Path) -> RunFiles:
    """Raises ExpungeError for a folder without a run, a run that is not finished, or a file that cannot be used."""
    for name in NEEDED:
        if not (folder / name).is_file():
            raise ExpungeError(_missing(folder, name))
    training = folder / "training.jsonl"
    config = read_text(folder / "config.yaml")
    return RunFiles(
        name=folder.resolve().name,
        subject=_subject(config, folder / "config.yaml"),
        rows=_rows(folder / "results.jsonl"),
        samples=read_lines(folder / "samples.jsonl"),
        training=read_lines(training) if training.is_file() else [],
        provenance=_provenance(folder / "provenance.json"),
        config=config,
    )


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ExpungeError(f"{path}: not UTF-8 text (byte {error.start})") from None


def _missing(folder: Path, name: str) -> str:
    if name == "config.yaml":
        return f"{folder} holds no run ({name} is missing): give a folder that `expunge run --out` wrote"
    again = f"`expunge run --config {folder / 'config.yaml'} --out {folder}` finishes it"
    return f"{folder}: the run is not finished ({name} is missing): {again}"


def _rows(path: Path) -> list[Row]:
    try:
        rows = read_rows(path)
    except TypeError as error:  # Row's fields without a default
        raise ExpungeError(f"{path}: a row is incomplete, {str(error).split('() ')[-1]}: measure again") from None
    if not rows:
        raise ExpungeError(f"{path}: no rows: measure again")
    for number, row in enumerate(rows, 1):
        for value in (row.value, row.ci_low or 0.0, row.ci_high or 0.0):
            if not isinstance(value, (int, float)):
                raise ExpungeError(f"{path}: row {number} ({row.metric}) has {value!r} for a number: measure again")
    return rows


def _subject(config: str, path: Path) -> str:
    """The method and the model of a configuration."""
    try:
        values = yaml.safe_load(config)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ExpungeError(f"{path}{f':{mark.line + 1}' if mark else ''}: not valid YAML") from None
    if not isinstance(values, dict):
        raise ExpungeError(f"{path}: expected keys and values, found {type(values).__name__}")
    method = values.get("method")
    name = method.get("name") if isinstance(method, dict) else method
    return " on ".join(str(part) for part in (name, values.get("model")) if part)


def _provenance(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ExpungeError(f"{path}:{error.lineno}: not valid JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(facts, dict):
        raise ExpungeError(f"{path}: expected a JSON object, found {type(facts).__name__}")
    return facts
