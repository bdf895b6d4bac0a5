"""The named sets: one table that the loaders, `expunge list data` and docs/data.md share, and how a source is found.

    locate("wiki-f1", "prompts")      # the set, and its file under EXPUNGE_DATA or in the package, or None

A source is a named set, a file, or a hub set `organisation/name`, tried in this order.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from expunge.errors import ExpungeError
from expunge.registry import did_you_mean

Kind = Literal["pairs", "prompts", "corpus"]

ASSETS = Path(__file__).parent.parent / "assets"
FILE_TYPES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".tokens", ".raw")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class NamedSet:
    """A set that is known by name; `asset` lies in the package, `local` in the folder that EXPUNGE_DATA names."""

    name: str
    kind: Kind
    description: str
    licence: str
    asset: str | None = None
    local: str | None = None
    hub: str | None = None
    config: str | None = None  # the hub set's configuration
    split: str = "train"


WIKITEXT = "Salesforce/wikitext"
SHARE_ALIKE = "CC BY-SA 3.0"
OWN = "Apache-2.0"  # ours: made by recipes/builtin/

# fmt: off
NAMED = (
    NamedSet("builtin", "pairs", "continuations of the built-in model, training pairs", OWN, asset="pairs/train.jsonl"),
    NamedSet("builtin-heldout", "pairs", "the same, held out: prompts of no training pair", OWN,
             asset="pairs/heldout.jsonl"),
    NamedSet("builtin-validation", "pairs", "the same, for tuning", OWN, asset="pairs/validation.jsonl"),
    NamedSet("paradetox", "pairs", "toxic sentences and rewrites; the prompt is what both begin with", "OpenRAIL++",
             local="paradetox/paradetox.tsv", hub="s-nlp/paradetox"),
    NamedSet("pair-toxicity", "pairs", "PPLM pairs of Lee et al. 2024, yours: pair-toxicity:PATH", "ajyl/dpo_toxic's"),
    NamedSet("builtin-challenge", "prompts", "prompts of the built-in model that provoke it", OWN,
             asset="prompts/challenge.jsonl"),
    NamedSet("builtin-tuning", "prompts", "more of the same kind, for tuning", OWN, asset="prompts/tuning.jsonl"),
    NamedSet("builtin-neutral", "prompts", "passages of the built-in model, prompt and gold", OWN,
             asset="prompts/neutral.jsonl"),
    NamedSet("rtp-challenge", "prompts", "the 1,199 challenging prompts of RealToxicityPrompts", "Apache-2.0",
             local="dpo_toxic_eval_prompts/challenge_prompts.jsonl", hub="allenai/real-toxicity-prompts"),
    NamedSet("wiki-f1", "prompts", "2,064 sentences of Wikipedia, the next sentence as gold", SHARE_ALIKE,
             local="dpo_toxic_eval_prompts/wiki_samples.jsonl"),
    NamedSet("builtin-neutral", "corpus", "the passages of the prompts of that name as running text", OWN,
             asset="prompts/neutral.jsonl"),
    NamedSet("builtin-validation", "corpus", "the benign sides of the pairs of that name as running text", OWN,
             asset="pairs/validation.jsonl"),
    NamedSet("wikitext2", "corpus", "WikiText-2 test, raw: perplexity as it is published", SHARE_ALIKE,
             local="wikitext-103-valtest/wiki.test.tokens", hub=WIKITEXT, config="wikitext-2-raw-v1", split="test"),
    NamedSet("wikitext2-valid", "corpus", "WikiText-2 validation, raw", SHARE_ALIKE,
             local="wikitext-103-valtest/wiki.valid.tokens", hub=WIKITEXT, config="wikitext-2-raw-v1",
             split="validation"),
    NamedSet("wikitext2-unk", "corpus", "WikiText-2 test, <unk> for rare words", SHARE_ALIKE,
             local="wikitext-2/wiki.test.tokens", hub=WIKITEXT, config="wikitext-2-v1", split="test"),
    NamedSet("wikitext2-unk-train", "corpus", "WikiText-2 train, <unk> for rare words: text to train on", SHARE_ALIKE,
             local="wikitext-2/wiki.train.tokens", hub=WIKITEXT, config="wikitext-2-v1"),
)
# fmt: on


def named_sets(kind: Kind) -> dict[str, NamedSet]:
    """The named sets of one kind by name, in the order of the table."""
    return {entry.name: entry for entry in NAMED if entry.kind == kind}


def local_file(entry: NamedSet) -> Path | None:
    """Where a named set lies on this machine, or None: the package's assets, or the folder that EXPUNGE_DATA names."""
    if entry.asset:
        path = ASSETS / entry.asset
        if not path.is_file():
            raise ExpungeError(f"{entry.name}: {path} is missing; reinstall the package")
        return path
    folder = os.environ.get("EXPUNGE_DATA")
    if not folder or not entry.local:
        return None
    path = Path(folder) / entry.local
    return path if path.is_file() else None


def locate(source: str | Path, kind: Kind) -> NamedSet | Path | str:
    """What `source` stands for: a named set, an existing file, or the name of a hub set.

    Raises ExpungeError for a file that is not there, and for a name that is none of these.
    """
    known, text, path = named_sets(kind), str(source), Path(source)
    if text in known:
        return known[text]
    if path.is_file():
        return path
    if path.is_dir():
        raise ExpungeError(f"{source}: a folder; name one file in it")
    if isinstance(source, Path) or path.suffix in FILE_TYPES:
        raise ExpungeError(f"{source}: no such file")
    if HUB_NAME.fullmatch(text):
        return text
    raise ExpungeError(f"{source}: no {kind} set, file or hub set of this name{did_you_mean(text, known)}")
