"""Labelled texts, harmless or not: for probes and scorers, and as a forget and a retain set in one.

    texts = load_labelled("jigsaw", limit=2000)           # [("...", False), ("...", True), ...]

A row is `{"text", "label"}`; the label 1 or true says that the text is of the kind to be rid of.
"""

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from expunge.data.named import locate
from expunge.data.records import Record, hub_records, named_records, read_records, selected
from expunge.errors import ExpungeError

LABELS = {"0": False, "false": False, "1": True, "true": True}


def load_labelled(source: str | Path, limit: int | None = None, seed: int = 0) -> list[tuple[str, bool]]:
    """`(text, is it bad)` of a named set, a file or a hub set's train split, in its order.

    limit: so many, drawn at random with `seed`, order kept; all are checked. Raises ExpungeError, with file and line.
    """
    found = locate(source, "labelled")

    def read() -> Iterator[tuple[str, bool]]:
        if isinstance(found, str):
            return labelled_rows(hub_records(found))
        return labelled_rows(read_records(found) if isinstance(found, Path) else named_records(found))

    rows = selected(read, limit, lambda n, few: random.Random(seed).sample(range(n), few), "text")
    if not rows:
        raise ExpungeError(f"{source}: no text in it")
    return rows


def labelled_rows(records: Iterable[Record]) -> Iterator[tuple[str, bool]]:
    """Rows of `{"text", "label"}`, checked."""
    for where, row in records:
        text, label = row.get("text"), str(row.get("label")).lower()
        if not isinstance(text, str) or not text.strip():
            raise ExpungeError(f"{where}: no field 'text' with text in it (found: {', '.join(map(str, row)) or 'none'})")
        if label not in LABELS:
            raise ExpungeError(f"{where}: field 'label' must be 0 or 1, found {row.get('label')!r}")
        yield text, LABELS[label]
