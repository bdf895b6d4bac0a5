"""Prompts that are named by their place in public text, which is read from this machine or from the hub, never copied.

    {"source": "wikitext2-unk-train", "line": 1207, "start": 0, "end": 58, "check": "9f3a01c2",
     "chosen": " , and ...", "rejected": " ..."}

A place is a line of WikiText-2's train split by number, or a line of a Wikipedia article by the article's id and number.
`check` is a hash of the prompt: text of another edition is refused, never trained on in silence.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.data.named import local_file, named_sets
from expunge.data.records import Record, named_records, read_records
from expunge.errors import ExpungeError
from expunge.lines import read_lines
from expunge.paths import expand

WIKITEXT = "wikitext2-unk-train"
WIKIPEDIA = "wikipedia-2015"
SOURCES = (WIKITEXT, WIKIPEDIA)

Key = int | str
"""A line's number, or `article/number`."""


@dataclass(frozen=True)
class Place:
    """Characters `start` to `end` of a line of a source."""

    source: str
    line: Key
    start: int
    end: int

    def row(self) -> dict[str, Any]:
        return {"source": self.source, "line": self.line, "start": self.start, "end": self.end}


def lines_of(source: str) -> Iterator[tuple[Key, str]]:
    """Every line of a source with its key, without the blanks around it.

    Raises ExpungeError where the text is neither on this machine nor on the hub.
    """
    if source == WIKITEXT:
        entry = named_sets("corpus")[source]
        path = local_file(entry)
        lines = (line for _, line in read_lines(path)) if path else (row["text"] for _, row in named_records(entry))
        return ((number, line.strip()) for number, line in enumerate(lines))
    return (
        (f"{row['id']}/{number}", line.strip())
        for path in _wikipedia()
        for _, row in read_records(path)
        for number, line in enumerate(row["text"].split("\n"))
    )


def _wikipedia() -> list[Path]:
    folder = os.environ.get("EXPUNGE_DATA")
    paths = sorted((Path(expand(folder)) / "wikipedia_en_2015").glob("*.jsonl.xz")) if folder else []
    if not paths:
        raise ExpungeError(f"{WIKIPEDIA}: not on this machine; set EXPUNGE_DATA to the folder that holds wikipedia_en_2015")
    return paths


def check_digits(prompt: str) -> str:
    """Eight hexadecimal digits that tell a prompt from any other."""
    return hashlib.sha256(prompt.encode("utf-8")).hexdigest()[:8]


def placed_pairs(records: Iterable[Record]) -> list[tuple[str, str, str]]:
    """(prompt, chosen, rejected) of rows as above, in order; each source is read once, as far as its last place.

    Raises ExpungeError, with the row's place, where the text has no such prompt.
    """
    rows = list(records)
    wanted: dict[str, dict[Key, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, (_, row) in enumerate(rows):
        wanted[row["source"]][row["line"]].append(index)
    prompts: dict[int, str] = {}
    for source, places in wanted.items():
        for key, line in lines_of(source):
            for index in places.pop(key, ()):
                prompts[index] = line[rows[index][1]["start"] : rows[index][1]["end"]]
            if not places:
                break
    for index, (where, row) in enumerate(rows):
        if check_digits(prompts.get(index, "")) != row["check"]:
            raise ExpungeError(
                f"{where}: {row['source']} has another text at line {row['line']} than the pairs were made from; they need "
                "the edition that docs/data.md names"
            )
    return [(prompts[index], row["chosen"], row["rejected"]) for index, (_, row) in enumerate(rows)]
