"""Running text for perplexity and for neutral training: WikiText-2 by name, or a file.

    text = load_corpus("wikitext2")
    text = load_corpus("mine.txt.gz")           # as it is
    text = load_corpus("mine.jsonl")            # the `text` of each row on lines of its own: as of the same texts in a .txt

A WikiText split is one text as perplexity is published on it (methods section 4): the rows of the hub set joined by a
blank line. A row keeps its line end, and a blank line is an empty row.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from expunge.data.named import File, NamedSet, local_file, locate
from expunge.data.pairs import load_pairs
from expunge.data.prompts import load_prompts
from expunge.data.records import Record, hub_records, named_records, read_records
from expunge.errors import ExpungeError
from expunge.ids import encode, split
from expunge.lines import read_text

RUNNING = ("txt", "tokens", "raw")
"""Formats of files that are text as they are; the others have rows."""

WORD = re.compile(r"\s*\S+")


def load_corpus(source: str | Path) -> str:
    """The text of a named corpus, of a file or standard input, or of a hub set's train rows joined by a blank line.

    A text file is taken as it is, each line end as `\\n`. Of a file with rows each `text` is a line, or several.
    Raises ExpungeError for a row without `text`, with its place, and where there is nothing but blanks.
    """
    found = locate(source, "corpus")
    if isinstance(found, File):
        text = (
            read_text(found.path) if found.format in RUNNING else "".join(f"{row}\n" for row in _texts(read_records(found)))
        )
    elif isinstance(found, str):
        text = "\n\n".join(_texts(hub_records(found)))
    elif found.name == "builtin-neutral":
        text = "\n\n".join(prompt.text + prompt.gold for prompt in load_prompts(found.name))
    elif found.name == "builtin-anchor":
        text = "\n\n".join(_texts(named_records(found)))
    elif found.name == "builtin-validation":
        text = "\n\n".join(pair.prompt + pair.chosen for pair in load_pairs(found.name))
    else:
        text = _wikitext(found)
    if not text.strip():
        raise ExpungeError(f"{source}: no text in it")
    return text


def _wikitext(entry: NamedSet) -> str:
    if path := local_file(entry):
        lines = read_text(path).removesuffix("\n").split("\n")
        return "\n\n".join(line + "\n" if line.strip() else "" for line in lines)
    return "\n\n".join(_texts(named_records(entry)))


def _texts(records: Iterable[Record]) -> Iterator[str]:
    for where, row in records:
        if not isinstance(row.get("text"), str):
            raise ExpungeError(f"{where}: no field 'text' with text in it (found: {', '.join(map(str, row)) or 'none'})")
        yield row["text"]


def passages(text: str, tokenizer: Any, size: int) -> Iterator[str]:
    """`text` in order as runs of whole words of at most `size` tokens, without the blanks around them.

    Words are counted apart, those with a blank before them as after a letter. One of more than `size` tokens is a passage of
    its own.
    """
    later = list({match[0] for match in WORD.finditer(text)})
    first = list({word.strip() for word in later})
    tokens = dict(zip(first, map(len, encode(tokenizer, first)), strict=True)) if first else {}
    tokens |= {
        word: len(side)
        for word, (_, (side,), _) in zip(later, split(tokenizer, ["a"] * len(later), later), strict=True)
        if word not in tokens
    }
    start = end = count = 0
    for match in WORD.finditer(text):
        if count and count + tokens[match[0]] > size:
            yield text[start:end].strip()
            start, count = end, 0
        count += tokens[match[0] if count else match[0].strip()]
        end = match.end()
    if count:
        yield text[start:end].strip()
