"""Tables of text: CSV by RFC 4180, TSV as it is mostly written, without quoting.

    for where, row in read_tsv("pairs.tsv"): ...                  # ("pairs.tsv:2", {"prompt": ...})

In a TSV a quotation mark is text, and a row is a line. It is read as quoted, by CSV's rules, where only that makes sense:

1. every line has as many fields as the header names, and so it is quoted only if every field of the header stands in quotes,
   or some field has its quotation marks doubled and no field has one that is not in such form;
2. some line has not as many, and by CSV's rules every row has.

The second is said in a warning, as are fields that look quoted in a table that is read as it is.
"""

import csv
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from expunge.errors import ExpungeError
from expunge.lines import called, read_lines

Rows = Iterator[tuple[str, list[str]]]

QUOTED = re.compile(r'"(?:[^"]|"")*"')

csv.field_size_limit(sys.maxsize)
log = logging.getLogger("expunge")


def read_csv(path: str | Path, header: Sequence[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """`(place, row)` of a table with commas; with semicolons where its first line has some and no comma.

    header: of a table that has none of its own. Raises ExpungeError, with the line, for rows that are not as long as it.
    """
    first = next((line for _, line in read_lines(path) if line.strip()), "")
    return _named(path, _quoted(path, ";" if ";" in first and "," not in first else ","), header)


def read_tsv(path: str | Path, header: Sequence[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same of a table with tabs; whether it is quoted is found by reading it once before."""
    return _named(path, _quoted(path, "\t") if _is_quoted(path, header) else _unquoted(path), header)


def _named(path: str | Path, rows: Rows, header: Sequence[str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    names = list(header or ())
    for where, fields in rows:
        if not names:
            names = fields
            if twice := [name for name in names if names.count(name) > 1]:
                raise ExpungeError(f"{where}: the header names {twice[0]!r} twice")
        elif len(fields) != len(names):
            raise ExpungeError(f"{where}: not as many fields as the header names ({len(fields)} instead of {len(names)})")
        else:
            yield where, dict(zip(names, fields, strict=True))


def _quoted(path: str | Path, separator: str) -> Rows:
    reader = csv.reader((line for _, line in read_lines(path)), delimiter=separator, strict=True)
    try:
        yield from ((f"{called(path)}:{reader.line_num}", fields) for fields in reader if fields)
    except csv.Error as error:
        raise ExpungeError(f"{called(path)}:{reader.line_num}: not valid CSV ({error})") from None


def _unquoted(path: str | Path) -> Rows:
    return ((where, line.rstrip("\n").split("\t")) for where, line in read_lines(path) if line.rstrip("\n"))


def _is_quoted(path: str | Path, header: Sequence[str] | None) -> bool:
    """By the rule of this module; says so where quotation marks are not plainly one thing or the other."""
    width, even, alike, doubled, named = len(header or ()), True, True, 0, False
    rows, quoted = 0, Counter[int]()  # by column
    for _, fields in _unquoted(path):
        if not width:
            width, named = len(fields), all(QUOTED.fullmatch(name) for name in fields)
            continue
        rows += 1
        even &= len(fields) == width
        for column, field in enumerate(fields):
            if '"' in field:
                well = QUOTED.fullmatch(field) is not None
                quoted[column] += well
                alike &= well
                doubled += well and '""' in field[1:-1]
    if even and not (named or (alike and doubled)):
        if doubled:
            _say(f"{called(path)}: {doubled} fields look quoted, others do not: quotation marks are kept as text")
        elif rows > 1 and rows in quoted.values():
            _say(f"{called(path)}: every field of a column stands in quotation marks, which are kept as text")
        return False
    found = _all_as_wide(path, width) - (header is None)
    if found > 0 and not even:
        _say(f"{called(path)}: quoted fields with tabs or line ends in them, read by the rules of CSV: {found} rows")
    return found > 0


def _all_as_wide(path: str | Path, width: int) -> int:
    """How many rows there are by CSV's rules; 0 where these do not hold."""
    try:
        lengths = [len(fields) for _, fields in _quoted(path, "\t")]
    except ExpungeError:
        return 0
    return len(lengths) if set(lengths) == {width} else 0


@cache
def _say(warning: str) -> None:
    """Once: a table is read more than once."""
    log.warning("%s", warning)
