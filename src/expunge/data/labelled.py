"""Labelled texts, harmless or not: for probes and scorers, and as a forget and a retain set in one.

    texts = load_labelled("jigsaw", limit=2000)           # [("...", False), ("...", True), ...]
    texts = load_probe_data("builtin-validation", forget=texts_to_forget)

A row is `{"text", "label"}`; the label 1 or true says that the text is of the kind to be rid of.
"""

import logging
import random
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from expunge.data.named import File, locate, named_sets
from expunge.data.pairs import load_pairs
from expunge.data.records import Record, hub_records, named_records, read_records, selected
from expunge.errors import ExpungeError

log = logging.getLogger("expunge")

LABELS = {"0": False, "false": False, "1": True, "true": True}


def load_labelled(source: str | Path, limit: int | None = None, seed: int = 0) -> list[tuple[str, bool]]:
    """`(text, is it bad)` of a named set, a file or a hub set's train split, in its order.

    limit: so many, drawn at random with `seed`, order kept; all are checked. Raises ExpungeError, with file and line.
    """
    found = locate(source, "labelled")

    def read() -> Iterator[tuple[str, bool]]:
        if isinstance(found, str):
            return labelled_rows(hub_records(found))
        return labelled_rows(read_records(found) if isinstance(found, File) else named_records(found))

    rows = selected(read, limit, lambda n, few: random.Random(seed).sample(range(n), few), "text")
    if not rows:
        raise ExpungeError(f"{source}: no text in it")
    return rows


def load_probe_data(
    source: str | Path, limit: int | None = None, seed: int = 0, forget: Collection[str] = ()
) -> list[tuple[str, bool]]:
    """Texts and labels for a probe, of a labelled set, or of the two sides of a named set of pairs, prompts before them.

    limit: so many texts, or pairs. forget: texts that are to be forgotten; those are left out, so that a probe is fitted on
    others. Raises ExpungeError as `load_labelled`, and where nothing or a single label is left.
    """
    if source in named_sets("pairs"):
        pairs = load_pairs(source, limit=limit, seed=seed)
        texts = [(pair.prompt + side, bad) for pair in pairs for side, bad in ((pair.chosen, False), (pair.rejected, True))]
    else:
        texts = load_labelled(source, limit, seed)
    known = set(forget)
    kept = [(text, bad) for text, bad in texts if text not in known]
    if len(kept) < len(texts):
        log.info(
            "%s: %d of %d texts are to be forgotten, and left out of the probe", source, len(texts) - len(kept), len(texts)
        )
    if len({bad for _, bad in kept}) < 2:
        alone = f"only texts with label {int(kept[0][1])}" if kept else "no text"
        raise ExpungeError(
            f"{source}: {alone} to fit a probe on; it takes texts of both labels that are not to be forgotten"
        )
    return kept


def labelled_rows(records: Iterable[Record]) -> Iterator[tuple[str, bool]]:
    """Rows of `{"text", "label"}`, checked."""
    for where, row in records:
        text, label = row.get("text"), str(row.get("label")).lower()
        if not isinstance(text, str) or not text.strip():
            raise ExpungeError(f"{where}: no field 'text' with text in it (found: {', '.join(map(str, row)) or 'none'})")
        if label not in LABELS:
            raise ExpungeError(f"{where}: field 'label' must be 0 or 1, found {row.get('label')!r}")
        yield text, LABELS[label]
