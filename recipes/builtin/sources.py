"""The public text that the built-in assets are made from, read from the folder that `EXPUNGE_DATA` names.

Each reader yields plain strings; `labelled()` yields `(source, text, toxic)`. RealToxicityPrompts is read for scorers only,
and by `forbidden_texts`, so that it can be kept out of everything else.
"""

import csv
import html
import json
import lzma
import os
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

csv.field_size_limit(sys.maxsize)


def data_folder() -> Path:
    """The folder of real data; a clear line when the variable is not set."""
    folder = os.environ.get("EXPUNGE_DATA")
    if not folder or not Path(folder).is_dir():
        raise SystemExit("set EXPUNGE_DATA to the folder that holds wikitext-2/, imdb/, ... (see docs/data.md)")
    return Path(folder)


def wikitext_articles(name: str) -> list[str]:
    """Articles of a WikiText file, lines joined by a blank line as perplexity is measured (methods.md section 4)."""
    articles: list[list[str]] = []
    for line in (data_folder() / name).read_text(encoding="utf-8").split("\n"):
        title = re.fullmatch(r" = [^=].* = ", line)
        if title or not articles:
            articles.append([])
        articles[-1].append(line + "\n" if line.strip() else "")
    return ["\n\n".join(lines) for lines in articles]


def wikipedia() -> Iterator[str]:
    return (row["text"] for row in wikipedia_rows())


def wikipedia_rows() -> Iterator[dict[str, str]]:
    """`{"id", "title", "text"}` of every article."""
    for path in sorted((data_folder() / "wikipedia_en_2015").glob("*.jsonl.xz")):
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)


def unseen_articles(seed: int = 0, count: int = 200) -> list[dict[str, str]]:
    """The last articles in the order that corpus.py draws with its seed: far behind the 3,200 that were trained on."""
    rows = list(wikipedia_rows())
    random.Random(seed).shuffle(rows)
    return rows[-count:]


def imdb() -> Iterator[str]:
    with lzma.open(data_folder() / "imdb" / "imdb_train.jsonl.xz", "rt", encoding="utf-8") as lines:
        for line in lines:
            yield re.sub(r"(<br />)+", "\n", json.loads(line)["text"])


def clean(comment: str) -> str:
    """A comment without user names, links, retweet marks and HTML entities."""
    text = html.unescape(html.unescape(comment))
    text = re.sub(r"https?://\S+|\[?\bURL\b\]?|\[USER\]|@\w+:?|\bRT\b", " ", text)
    return re.sub(r"\s+", " ", text).strip(" \"'`")


def labelled() -> Iterator[tuple[str, str, bool]]:
    """Comments with a toxicity label as `(source, text, toxic)`; cleaned, the same text only once."""
    seen = set()
    for source, raw, toxic in _labelled_rows(data_folder()):
        text = clean(raw)
        if len(text.split()) >= 3 and text.lower() not in seen:
            seen.add(text.lower())
            yield source, text, toxic


def _labelled_rows(folder: Path) -> Iterator[tuple[str, str, bool]]:
    def rows(path: str, **options) -> Iterator[dict[str, str]]:
        with (folder / path).open(encoding="utf-8", newline="") as file:
            yield from csv.DictReader(file, **options)

    for row in rows("jigsaw_balanced_subset/test.csv", fieldnames=["text", "label"]):
        yield "jigsaw", row["text"], row["label"] == "1"
    for row in rows("davidson/labeled_data.csv"):
        yield "davidson", row["tweet"], row["class"] in "01"
    for row in rows("olid/olid.tsv", delimiter="\t", quoting=csv.QUOTE_NONE):
        yield "olid", row["tweet"], row["subtask_a"] == "OFF"
    for row in rows("toxigen_annotated/toxigen.csv"):
        yield (
            "toxigen",
            row["text"].removeprefix("b'").removeprefix('b"').rstrip("'\""),
            float(row["toxicity_human"]) >= 3,
        )
    for row in rows("toxic_spans/comments.csv"):
        yield "toxic_spans", row["comment_text"], True
    for row in rows("edos/edos_labelled_aggregated.csv"):
        yield "edos", row["text"], row["label_sexist"] == "sexist"
    for row in rows("paradetox/paradetox.tsv", delimiter="\t"):
        yield "paradetox", row["toxic"], True
        for column in ("neutral1", "neutral2", "neutral3"):
            if row[column]:
                yield "paradetox", row[column], False
    for name in ("gc", "gn"):
        for row in rows(f"context_toxicity/{name}.csv"):
            yield "context_toxicity", row["text"], row["label"] == "1"


def rtp_rows() -> list[dict]:
    """RealToxicityPrompts rows with Perspective scores: for calibrating scorers only, never for training the model."""
    rows = {}
    for name in ("toxic", "nontoxic"):
        for line in (data_folder() / "rtp_decodingtrust" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows[row["prompt"]["text"]] = row
    return list(rows.values())


def forbidden_texts() -> list[str]:
    """Text that must stay out of pre-training, pairs and tuning: RealToxicityPrompts, WikiText-2 test and validation."""
    folder = data_folder()
    texts = [row["prompt"]["text"] + row["continuation"]["text"] for row in rtp_rows()]
    texts += [row["prompt"]["text"] for row in rtp_rows()] + [row["continuation"]["text"] for row in rtp_rows()]
    challenge = folder / "dpo_toxic_eval_prompts" / "challenge_prompts.jsonl"
    texts += [json.loads(line)["prompt"] for line in challenge.read_text(encoding="utf-8").splitlines()]
    for name in (
        "wikitext-2/wiki.test.tokens",
        "wikitext-2/wiki.valid.tokens",
        "wikitext-103-valtest/wiki.test.tokens",
        "wikitext-103-valtest/wiki.valid.tokens",
    ):
        texts += (folder / name).read_text(encoding="utf-8").split("\n")
    return texts
