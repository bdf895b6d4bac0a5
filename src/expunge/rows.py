"""Result rows: one figure each, the single source of every table, plot and page (design: "What a run leaves behind").

rows = [Row(stage="evaluate", subject="reference", metric="toxicity", value=0.4, ci_low=0.38, ci_high=0.42, n=1199)]
write_rows(path, rows); read_rows(path)
"""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from expunge.errors import ExpungeError
from expunge.whole import whole

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass
class Row:
    """One measured figure with its 95 % interval; fields that do not apply are None."""

    stage: str  # train | evaluate | attack | analyze
    subject: str  # reference | unlearned
    metric: str  # toxicity | expected_max_toxicity | toxicity_probability | perplexity | f1 | accuracy | ...
    value: float
    ci_low: float | None = None
    ci_high: float | None = None
    n: int | None = None  # independent units: prompts, or windows of text
    run: str | None = None
    model: str | None = None
    method: str | None = None
    dataset: str | None = None
    decode: str | None = None  # greedy | sampled
    side: str | None = None  # chosen | rejected
    k: int | None = None  # tokens of that side that were forced
    mode: str | None = None  # exact | lee2024 | continuation | share | acc | acc_norm | harness
    scorer: str | None = None
    samples: int | None = None  # continuations per prompt
    paired: bool = False  # True: unlearned minus reference on the same prompts
    seed: int | None = None
    attack: str | None = None
    attack_config: dict[str, Any] | None = None
    draw: int | None = None
    over: str | None = None  # of an attack's settings: mean | worst | beyond, or those of one value: learning_rate=0.0002
    step: int | None = None  # optimizer steps before a measurement in the midst of training
    chance: float | None = None  # of an accuracy: what guessing gives


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines: the whole file or none."""
    with whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines as objects; `ExpungeError` names file and line of the first that is not a JSON object."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ExpungeError(f"{path}: no such file") from None
    except OSError as error:
        raise ExpungeError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ExpungeError(f"{path}: not UTF-8 text (byte {error.start}); convert the file to UTF-8") from None
    return parse_lines(text, str(path))


def parse_lines(text: str, source: str) -> list[dict[str, Any]]:
    """JSON lines of `text`; `source` is what messages call it."""
    lines = enumerate(text.split("\n"), 1)
    return [parse_object(line, f"{source}:{number}") for number, line in lines if line.strip()]


def parse_object(text: str, where: str, strict: bool = False) -> dict[str, Any]:
    """The JSON object that `text` is; strict: no NaN or Infinity, which Python writes, and no key that stands twice."""
    decoder = STRICT if strict else json.JSONDecoder()
    try:
        record = decoder.decode(text)
    except json.JSONDecodeError as error:
        raise ExpungeError(f"{where}: not valid JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ExpungeError(f"{where}: JSON nested too deep to be a record") from None
    except ValueError as error:
        raise ExpungeError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise ExpungeError(f"{where}: expected a JSON object, found {type(record).__name__}")
    if SURROGATE.search(text):
        check_text(record, where)
    return record


def _once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        keys = [key for key, _ in items]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in an object")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a value of JSON")


STRICT = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant)


def check_text(record: Any, where: str) -> None:
    """ExpungeError if a JSON escape left half a surrogate pair in a record, which no file or tokenizer takes."""
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("ascii", "backslashreplace").decode()
        raise ExpungeError(f"{where}: {half} is half of a surrogate pair and no text; replace it by \\ufffd") from None


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    write_lines(path, (asdict(row) for row in rows))


def read_rows(path: Path) -> list[Row]:
    known = {field.name for field in fields(Row)}
    return [Row(**{k: v for k, v in record.items() if k in known}) for record in read_lines(path)]
