"""Unpaired sets: texts to forget and texts to retain, which share no prompt, from named sets, files and the hub.

    data = load_unpaired("tofu-forget", "tofu-retain", limit=400)
    data = load_unpaired("bad.jsonl", "wikitext2-unk-train", tokenizer=tokenizer)
    data = load_unpaired("rated.jsonl", "rated.jsonl")        # {"prompt", "completion", "label"}: true is retained

A row is `{"text"}`, `{"prompt", "completion"}`, or a conversation (`messages`, or both fields as lists of messages), as in
TRL. Running text is cut into passages.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from expunge.data.chat import chat_text, say_unread, with_messages
from expunge.data.corpora import load_corpus, passages
from expunge.data.labelled import labelled_rows
from expunge.data.named import File, NamedSet, locate
from expunge.data.pairs import paradetox_texts, text_of
from expunge.data.records import Record, hub_records, named_records, read_records, selected
from expunge.errors import ExpungeError

Side = Literal["forget", "retain"]

PASSAGES = ("tokens", "raw")
"""Formats of running text that is cut into passages; a .txt is one text a line."""

LABELS = {"true": True, "false": False}


@dataclass(frozen=True)
class Text:
    """`completion` after `prompt`; of running text the prompt is empty. A completion brings its own leading space."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Unpaired:
    """What is to be forgotten and what retained. Its length is that of the forget set, one pass over which is an epoch.

    Raises ExpungeError for an empty side, and for a text that stands on both.
    """

    forget: Sequence[Text]
    retain: Sequence[Text]

    def __post_init__(self) -> None:
        for side in ("forget", "retain"):
            if not getattr(self, side):
                raise ExpungeError(f"no text to {side}")
        known = {text.prompt + text.completion for text in self.forget}
        shared = [text for text in self.retain if text.prompt + text.completion in known]
        if shared:
            first = shared[0].prompt + shared[0].completion
            shown = repr(first if len(first) <= 60 else first[:60] + "...")
            raise ExpungeError(f"{len(shared)} texts are to be retained and to be forgotten; the first is {shown}")

    def __len__(self) -> int:
        return len(self.forget)


def load_unpaired(
    forget: str | Path,
    retain: str | Path,
    limit: int | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    passage: int = 64,
) -> Unpaired:
    """Both sets; the arguments after them are those of `load_texts`, for each."""
    return Unpaired(
        load_texts(forget, "forget", limit, seed, tokenizer, passage),
        load_texts(retain, "retain", limit, seed, tokenizer, passage),
    )


def load_texts(
    source: str | Path,
    side: Side,
    limit: int | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    passage: int = 64,
) -> list[Text]:
    """The texts of one side, in the order of a named set, a file or a hub set's train split.

    side: which rows of a set that labels them. limit: so many, drawn at random with `seed`, order kept; all are checked.
    tokenizer: whose chat template renders conversations, and in whose tokens a passage of running text has its length.
    Raises ExpungeError, one line with file and line number, for a row that is no such text.
    """
    found = locate(source, "text", "labelled", "corpus")
    read = partial(_read, source, found, side, tokenizer, passage)
    if _is_running(found):  # in memory anyway, and slow to cut twice
        cut = list(read())
        read = lambda: cut  # noqa: E731
    texts = selected(read, limit, lambda n, few: random.Random(seed).sample(range(n), few), "text")
    if not texts:
        raise ExpungeError(f"{source}: no text to {side} in it")
    return texts


def _read(source: str | Path, found: NamedSet | File | str, side: Side, tokenizer: Any, passage: int) -> Iterator[Text]:
    if isinstance(found, str):
        return _parsed(hub_records(found), side, tokenizer)
    if _is_running(found):
        return _passages(source, tokenizer, passage)
    if isinstance(found, File):
        return _parsed(read_records(found), side, tokenizer)
    if found.kind == "labelled":
        return (Text("", text) for text, bad in labelled_rows(named_records(found)) if bad == (side == "forget"))
    if found.name == "paradetox-toxic":
        return (Text("", toxic) for toxic in dict.fromkeys(toxic for toxic, _ in paradetox_texts(named_records(found))))
    if found.name.startswith("tofu"):
        return (_question(row, where) for where, row in named_records(found))
    return _parsed(named_records(found), side, tokenizer)


def _is_running(found: NamedSet | File | str) -> bool:
    """Text that is cut into passages, not rows of text."""
    if isinstance(found, File):
        return found.format in PASSAGES
    return isinstance(found, NamedSet) and found.kind == "corpus"


def _passages(source: str | Path, tokenizer: Any, size: int) -> Iterator[Text]:
    if tokenizer is None:
        raise ExpungeError(f"{source}: running text is cut into passages of so many tokens: give the tokenizer")
    return (Text("", passage) for passage in passages(load_corpus(source), tokenizer, size))


def _question(row: dict[str, Any], where: str) -> Text:
    return Text(f"Question: {text_of(row, 'question', where)}\nAnswer:", f" {text_of(row, 'answer', where)}")


def _parsed(records: Iterator[Record], side: Side, tokenizer: Any) -> Iterator[Text]:
    """The texts of `side`: of rows with a label those whose it is. Either all rows have one, or none."""
    labelled = None
    for where, row in records:
        if labelled is None:
            labelled = "label" in row
        if ("label" in row) != labelled:
            raise ExpungeError(f"{where}: {'no label' if labelled else 'a label'}, unlike the rows before it")
        text = parse_text(row, where, tokenizer)
        if not labelled or _label(row, where) == (side == "retain"):
            yield text


def parse_text(row: dict[str, Any], where: str, tokenizer: Any = None) -> Text:
    """One row as a text; `where` names it in errors."""
    row = with_messages(row, where)
    if "messages" in row or isinstance(row.get("completion"), list):
        return Text(*chat_text(row, where, tokenizer))
    say_unread(row)
    if "completion" in row:
        prompt = row.get("prompt", "")
        if not isinstance(prompt, str):
            raise ExpungeError(f"{where}: field 'prompt' must be text, found {type(prompt).__name__}")
        return Text(prompt, text_of(row, "completion", where))
    if {"chosen", "rejected"} <= row.keys():
        raise ExpungeError(f"{where}: a preference pair; pairs are given as data.train (--pairs)")
    if "prompt" in row:
        raise ExpungeError(f"{where}: a prompt without a field 'completion' (found: {', '.join(map(str, row))})")
    return Text("", text_of(row, "text", where))


def _label(row: dict[str, Any], where: str) -> bool:
    """As in TRL: true is wanted, so retained. Not of a row `{"text", "label"}`, whose label mostly says the opposite."""
    if "completion" not in row:
        raise ExpungeError(
            f"{where}: a label says which of 'prompt' and 'completion' is retained (true); this row has neither, so give "
            "the two sets as two files"
        )
    label = row["label"]
    value = LABELS.get(str(label).lower()) if isinstance(label, (bool, str)) else None  # of a table it is text
    if value is None:
        raise ExpungeError(f"{where}: field 'label' must be true (retain) or false (forget), found {label!r}")
    return value
