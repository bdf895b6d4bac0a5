"""Rows of a file or a hub set, each with the place it came from, so that an error can name it.

    for where, row in read_records("pairs.jsonl"): ...            # ("pairs.jsonl:1", {"prompt": ...})
    for where, row in read_records("csv:-"): ...                  # ("standard input:2", {"prompt": ...})

JSON lines, CSV, TSV, Parquet and plain text (one row `{"text"}` per line that is not blank) are read row by row; a JSON
list is read whole. `expunge.lines` gives the lines.
"""

import io
import json
from collections.abc import Callable, Iterable, Iterator
from json.decoder import WHITESPACE  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any, TypeVar

from expunge.data import tables
from expunge.data.named import File, NamedSet, file_at, local_file
from expunge.errors import ExpungeError
from expunge.lines import called, read_lines, read_text, unpacked
from expunge.rows import STRICT, SURROGATE, check_text, parse_object

T = TypeVar("T")
Record = tuple[str, dict[str, Any]]

PARQUET_ROWS = 1024  # read at once


def read_records(source: File | Path | str, header: tuple[str, ...] | None = None) -> Iterator[Record]:
    """`(place, row)` of every row of a file or of standard input. header: of a table that has none of its own.

    Raises ExpungeError, with the place, for what is not of its format.
    """
    file = source if isinstance(source, File) else file_at(source)
    match file.format:
        case "jsonl":
            return _json_lines(file.path)
        case "json":
            first = next((line for _, line in read_lines(file.path) if line.strip()), "")
            return _json_list(file.path) if first.lstrip().startswith("[") else _json_lines(file.path)
        case "csv":
            return tables.read_csv(file.path, header)
        case "tsv":
            return tables.read_tsv(file.path, header)
        case "parquet":
            return _parquet(file.path)
        case "txt":
            return ((where, {"text": line.rstrip("\n")}) for where, line in read_lines(file.path) if line.strip())
    raise ExpungeError(f"{called(file.path)}: running text, which has no rows; for one row a line it is txt:{file.path}")


def _json_lines(path: Path) -> Iterator[Record]:
    return ((where, parse_object(line, where, strict=True)) for where, line in read_lines(path) if line.strip())


def _json_list(path: Path) -> Iterator[Record]:
    text, name = read_text(path), called(path)
    escaped = SURROGATE.search(text)
    at, number, separator = text.index("["), 0, ","
    while separator == ",":
        number += 1
        where = f"{name}: item {number}"
        at = _after_blanks(text, at + 1)
        if number == 1 and text.startswith("]", at):
            break
        try:
            row, at = STRICT.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise ExpungeError(f"{name}:{error.lineno}: not valid JSON ({error.msg}, column {error.colno})") from None
        except (ValueError, RecursionError) as error:
            raise ExpungeError(f"{where}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise ExpungeError(f"{where}: expected a JSON object, found {type(row).__name__}")
        if escaped:
            check_text(row, where)
        yield where, row
        at = _after_blanks(text, at)
        separator = text[at : at + 1]
    if not text.startswith("]", at) or text[at + 1 :].strip():
        line = text.count("\n", 0, at) + 1
        raise ExpungeError(f"{name}:{line}: not valid JSON (after item {number} there should be a comma or the list's end)")


def _after_blanks(text: str, at: int) -> int:
    return WHITESPACE.match(text, at).end()


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet

    number, name = 0, called(path)
    with unpacked(path) as opened:
        plain = opened.seekable() and isinstance(opened.raw, io.FileIO)
        place: Any = path if plain else io.BytesIO(opened.read())  # it is read from its end
    try:
        with pyarrow.parquet.ParquetFile(place) as file:
            for batch in file.iter_batches(PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}: row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise ExpungeError(f"{name}: not valid Parquet ({str(error).splitlines()[0]})") from None


def hub_records(name: str, split: str = "train", config: str | None = None) -> Iterator[Record]:
    """`(place, row)` of a hub set's split; ExpungeError where `datasets` is absent or no hub answers."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ExpungeError(
            f"{name}: no file of this name, and hub sets need the package 'datasets'; pip install datasets"
        ) from None
    try:
        rows = load_dataset(name, config, split=split)
    except Exception as error:  # the library raises its own, urllib's, httpx's and plain ones alike
        reason = str(error).strip().split("\n")[0]
        raise ExpungeError(
            f"{name}: no file of this name, and the hub did not give the split {split!r} ({reason})"
        ) from None
    return ((f"{name} {split}, row {number}", dict(row)) for number, row in enumerate(rows, 1))


def named_records(entry: NamedSet) -> Iterator[Record]:
    """`(place, row)` of a named set: from this machine where it lies here, else from the hub."""
    if path := local_file(entry):
        return read_records(path, entry.header)
    advice = f"set EXPUNGE_DATA to the folder that holds {entry.local}"
    if entry.hub is None:
        raise ExpungeError(f"{entry.name}: not on this machine; {advice}")
    try:
        return hub_records(entry.hub, entry.split, entry.config)
    except ExpungeError as error:
        raise ExpungeError(f"{entry.name}: not on this machine; {advice}, or connect ({error})") from None


def selected(
    read: Callable[[], Iterable[T]], limit: int | None, choose: Callable[[int, int], Iterable[int]], what: str
) -> list[T]:
    """Every `what` that `read()` gives; with a limit those of all `n` that `choose(n, limit)` names by index, in order.

    A limit reads twice, first to check and count all, then up to the last that is chosen; what is not chosen is never held.
    """
    if limit is None:
        return list(read())
    if limit < 1:
        raise ExpungeError(f"limit {limit}: at least one {what} is needed")
    n = sum(1 for _ in read())
    wanted = sorted(choose(n, min(limit, n)))
    found, source = [], enumerate(read())
    for index in wanted:
        found.append(next(item for at, item in source if at == index))
    return found
