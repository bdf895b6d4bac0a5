"""Rows of a file or a hub set, each with the place it came from, so that an error can name it.

    for where, row in read_records(Path("pairs.jsonl")): ...      # ("pairs.jsonl:1", {"prompt": ...})

JSON lines, a JSON list, CSV, TSV, Parquet, and plain text (one row `{"text"}` per line that is not blank).
"""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from expunge.data.named import NamedSet, local_file
from expunge.errors import ExpungeError
from expunge.rows import SURROGATE, check_text, read_lines

Record = tuple[str, dict[str, Any]]

csv.field_size_limit(sys.maxsize)


def read_text(path: Path) -> str:
    """The whole file as UTF-8 text, line ends as they are; ExpungeError where it is not there or not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ExpungeError(f"{path}: no such file") from None
    except OSError as error:
        raise ExpungeError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ExpungeError(f"{path}: not UTF-8 text (byte {error.start}); convert the file to UTF-8") from None


def read_records(path: Path) -> Iterator[Record]:
    """`(place, row)` of every row of a file, read by what its name ends in."""
    match path.suffix.lower():
        case ".jsonl":
            return _json_lines(path)
        case ".json":
            return _json_list(path) if read_text(path).lstrip().startswith("[") else _json_lines(path)
        case ".csv":
            return _table(path, ",")
        case ".tsv":
            return _table(path, "\t")
        case ".parquet":
            return _parquet(path)
        case ".txt":
            lines = enumerate(read_text(path).splitlines(), 1)
            return ((f"{path}:{number}", {"text": line}) for number, line in lines if line.strip())
    raise ExpungeError(f"{path}: unknown kind of file; use .jsonl, .json, .csv, .tsv, .parquet or .txt")


def _json_lines(path: Path) -> Iterator[Record]:
    rows = read_lines(path)
    numbers = [number for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    return ((f"{path}:{number}", row) for number, row in zip(numbers, rows, strict=True))


def _json_list(path: Path) -> Iterator[Record]:
    text = read_text(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ExpungeError(f"{path}:{error.lineno}: not valid JSON ({error.msg}, column {error.colno})") from None
    escaped = SURROGATE.search(text)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ExpungeError(f"{path}: item {number}: expected a JSON object, found {type(row).__name__}")
        if escaped:
            check_text(row, f"{path}: item {number}")
        yield f"{path}: item {number}", row


def _table(path: Path, delimiter: str) -> Iterator[Record]:
    reader = csv.DictReader(read_text(path).splitlines(keepends=True), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise ExpungeError(f"{path}:{reader.line_num}: not as many fields as the header names")
            yield f"{path}:{reader.line_num}", row
    except csv.Error as error:
        raise ExpungeError(f"{path}:{reader.line_num}: not valid CSV ({error})") from None


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ExpungeError(f"{path}: not valid Parquet ({str(error).splitlines()[0]})") from None
    yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))


def hub_records(name: str, split: str = "train", config: str | None = None) -> Iterator[Record]:
    """`(place, row)` of a hub set's split; ExpungeError where `datasets` is absent or no hub answers."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ExpungeError(f"{name}: hub sets need the package 'datasets'; pip install datasets") from None
    try:
        rows = load_dataset(name, config, split=split)
    except Exception as error:  # the library raises its own, urllib's, httpx's and plain ones alike
        reason = str(error).strip().split("\n")[0]
        raise ExpungeError(f"{name}: the hub did not give the split {split!r} ({reason})") from None
    return ((f"{name} {split}, row {number}", dict(row)) for number, row in enumerate(rows, 1))


def named_records(entry: NamedSet) -> Iterator[Record]:
    """`(place, row)` of a named set: from this machine where it lies here, else from the hub."""
    if path := local_file(entry):
        return read_records(path)
    advice = f"set EXPUNGE_DATA to the folder that holds {entry.local}"
    if entry.hub is None:
        raise ExpungeError(f"{entry.name}: not on this machine; {advice}")
    try:
        return hub_records(entry.hub, entry.split, entry.config)
    except ExpungeError as error:
        raise ExpungeError(f"{entry.name}: not on this machine; {advice}, or connect ({error})") from None
