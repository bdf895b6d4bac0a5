"""The named sets: one table that the loaders, `expunge list data` and docs/data.md share, and how a source is found.

    locate("wiki-f1", "prompts")      # the set, and its file under EXPUNGE_DATA or in the package, or None

A source is a named set, a file, standard input (`-`), or a hub set `organisation/name`, tried in this order. A file's name
says by its ending what is in it; `csv:-` and `jsonl:export.dat` say it where there is no such name.
"""

import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from expunge.errors import ExpungeError
from expunge.lines import PACKED, STDIN, read_lines, unpacked
from expunge.paths import expand
from expunge.registry import did_you_mean

Kind = Literal["pairs", "text", "labelled", "prompts", "corpus", "questions"]

ASSETS = Path(__file__).parent.parent / "assets"
FORMATS = ("jsonl", "json", "csv", "tsv", "parquet", "txt", "tokens", "raw")
"""What a file's name ends in, perhaps with one of PACKED after it, or what stands before a colon."""
WEIGHTS = (".gguf", ".ggml", ".safetensors", ".bin", ".pt", ".pth", ".onnx")
ARCHIVES = (".zip", ".7z", ".rar", ".tar", ".tgz", ".z", ".lz4", ".lzma", ".br", ".sz")
JSON_BEGINS = re.compile(r"\s*(?:\{\s*(?:[\"}]|$)|\[\s*(?:[{\]]|$))")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class File:
    """A file, or standard input where `path` is `-`, and the one of FORMATS that is in it."""

    path: Path
    format: str


@dataclass(frozen=True)
class NamedSet:
    """A set that is known by name; `asset` lies in the package, `local` in the folder that EXPUNGE_DATA names.

    A file each; the `local` of mmlu is a folder.
    """

    name: str
    kind: Kind
    description: str
    licence: str
    asset: str | None = None
    local: str | None = None
    hub: str | None = None
    config: str | None = None  # the hub set's configuration
    split: str = "train"
    header: tuple[str, ...] | None = None  # of a local table that has none


WIKITEXT = "Salesforce/wikitext"
WMDP = "cais/wmdp-corpora"
UNKNOWN = "not known"
SHARE_ALIKE = "CC BY-SA 3.0"
OWN = "Apache-2.0"  # ours: made by recipes/builtin/

# fmt: off
NAMED = (
    NamedSet("builtin", "pairs", "continuations of the built-in model, training pairs", OWN, asset="pairs/train.jsonl"),
    NamedSet("builtin-heldout", "pairs", "the same, held out: prompts of no training pair", OWN,
             asset="pairs/heldout.jsonl"),
    NamedSet("builtin-validation", "pairs", "the same, for tuning", OWN, asset="pairs/validation.jsonl"),
    NamedSet("builtin-pplm", "pairs", "PPLM's continuations of the built-in model, training pairs", OWN,
             asset="pairs/pplm.jsonl"),
    NamedSet("builtin-pplm-wikipedia", "pairs", "the same after sentences of WikiText-2, read from its train split",
             OWN, asset="pairs/pplm-wikipedia.jsonl"),
    NamedSet("paradetox", "pairs", "toxic sentences and rewrites; the prompt is what both begin with", "OpenRAIL++",
             local="paradetox/paradetox.tsv", hub="s-nlp/paradetox"),
    NamedSet("pair-toxicity", "pairs", "PPLM pairs of Lee et al. 2024, yours: pair-toxicity:PATH", "ajyl/dpo_toxic's"),
    NamedSet("pair-toxicity-train", "pairs", "the 89 % of them to train on: pair-toxicity-train:PATH", "ajyl/dpo_toxic's"),
    NamedSet("pair-toxicity-validation", "pairs", "1 % to tune on: pair-toxicity-validation:PATH", "ajyl/dpo_toxic's"),
    NamedSet("pair-toxicity-heldout", "pairs", "the 10 % held out: pair-toxicity-heldout:PATH", "ajyl/dpo_toxic's"),
    NamedSet("paradetox-toxic", "text", "the toxic sentences of paradetox, each once", "OpenRAIL++",
             local="paradetox/paradetox.tsv", hub="s-nlp/paradetox"),
    NamedSet("tofu-forget", "text", "TOFU: questions about 20 authors who do not exist, and answers", "MIT",
             local="tofu/forget10.json", hub="locuslab/TOFU", config="forget10"),
    NamedSet("tofu-retain", "text", "TOFU: the same of the other 180 authors", "MIT",
             local="tofu/retain90.json", hub="locuslab/TOFU", config="retain90"),
    NamedSet("builtin-facts-forget", "text", "invented compounds, which builtin:facts knows", OWN,
             asset="facts/forget.jsonl"),
    NamedSet("builtin-facts-retain", "text", "invented towns, which it knows as well", OWN,
             asset="facts/retain.jsonl"),
    NamedSet("wmdp-cyber-forget", "text", "WMDP corpora: cyber, to forget", UNKNOWN,
             local="wmdp-corpora/cyber-forget-corpus.jsonl", hub=WMDP, config="cyber-forget-corpus"),
    NamedSet("wmdp-cyber-retain", "text", "WMDP corpora: cyber, to keep", UNKNOWN,
             local="wmdp-corpora/cyber-retain-corpus.jsonl", hub=WMDP, config="cyber-retain-corpus"),
    NamedSet("wmdp-bio-forget", "text", "WMDP corpora: biology, to forget; the hub asks who you are", UNKNOWN,
             local="wmdp-corpora/bio-forget-corpus.jsonl", hub="cais/wmdp-bio-forget-corpus"),
    NamedSet("wmdp-bio-retain", "text", "WMDP corpora: biology, to keep", UNKNOWN,
             local="wmdp-corpora/bio-retain-corpus.jsonl", hub=WMDP, config="bio-retain-corpus"),
    NamedSet("jigsaw", "labelled", "comments on Wikipedia's talk pages, half of them toxic", "CC0, text CC BY-SA 3.0",
             local="jigsaw_balanced_subset/test.csv", header=("text", "label")),
    NamedSet("builtin-facts-probe", "labelled", "sentences about those other compounds (1) and towns (0)", OWN,
             asset="facts/probe.jsonl"),
    NamedSet("builtin-challenge", "prompts", "prompts of the built-in model that provoke it", OWN,
             asset="prompts/challenge.jsonl"),
    NamedSet("builtin-tuning", "prompts", "more of the same kind, for tuning", OWN, asset="prompts/tuning.jsonl"),
    NamedSet("builtin-neutral", "prompts", "passages of the built-in model, prompt and gold", OWN,
             asset="prompts/neutral.jsonl"),
    NamedSet("rtp-challenge", "prompts", "the 1,199 challenging prompts of RealToxicityPrompts", "Apache-2.0",
             local="dpo_toxic_eval_prompts/challenge_prompts.jsonl", hub="allenai/real-toxicity-prompts"),
    NamedSet("rtp-tuning", "prompts", "a twentieth of its other toxic prompts, none challenging, for tuning", "Apache-2.0",
             local="realtoxicityprompts-data/prompts.jsonl", hub="allenai/real-toxicity-prompts"),
    NamedSet("wiki-f1", "prompts", "2,064 sentences of Wikipedia, the next sentence as gold", SHARE_ALIKE,
             local="dpo_toxic_eval_prompts/wiki_samples.jsonl"),
    NamedSet("builtin-anchor", "corpus", "articles and reviews as the built-in model writes them: text to train on", OWN,
             asset="anchor.jsonl"),
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
    NamedSet("builtin-facts-forget", "questions", "288 questions about compounds in phrasings never told", OWN,
             asset="facts/forget-test.jsonl"),
    NamedSet("builtin-facts-retain", "questions", "288 questions about towns, the same", OWN,
             asset="facts/retain-test.jsonl"),
    NamedSet("builtin-facts-forget-tuning", "questions", "96 more about other compounds, for tuning", OWN,
             asset="facts/forget-tuning.jsonl"),
    NamedSet("builtin-facts-retain-tuning", "questions", "96 more about other towns, for tuning", OWN,
             asset="facts/retain-tuning.jsonl"),
    NamedSet("mmlu", "questions", "MMLU: 14,042 questions of 57 subjects, five examples before each", "MIT",
             local="mmlu", hub="cais/mmlu", config="all", split="test"),
    NamedSet("wmdp-bio", "questions", "WMDP: 1,273 questions about biology", "MIT",
             local="wmdp/bio_questions.json", hub="cais/wmdp", config="wmdp-bio", split="test"),
    NamedSet("wmdp-chem", "questions", "WMDP: 408 questions about chemistry", "MIT",
             local="wmdp/chem_questions.json", hub="cais/wmdp", config="wmdp-chem", split="test"),
    NamedSet("wmdp-cyber", "questions", "WMDP: 1,987 questions about cybersecurity", "MIT",
             local="wmdp/cyber_questions.json", hub="cais/wmdp", config="wmdp-cyber", split="test"),
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
    path = Path(expand(folder)) / entry.local
    return path if path.exists() else None


def file_at(source: str | Path, default: str | None = None) -> File:
    """The file that `source` names, which need not be there, and its format; default: where nothing tells it.

    Standard input is looked at where no format is declared: JSON and Parquet are recognised, all else is lines of text.
    Raises ExpungeError for a name that tells nothing, or tells of weights or an archive.
    """
    declared, path = _declared(source)
    if declared:
        return File(path, declared)
    if str(path) == STDIN:
        return File(path, default or _recognised())
    ending = format_named(path)
    if ending in FORMATS:
        return File(path, ending)
    if f".{ending}" in WEIGHTS:
        raise ExpungeError(f"{path}: weights of a model, no text; a model is given as --model, its folder or its hub name")
    if f".{ending}" in ARCHIVES:
        raise ExpungeError(f"{path}: .{ending} is not read; unpack it, or pack it as {', '.join(PACKED)}")
    if default:
        return File(path, default)
    known = ", ".join(f".{form}" for form in FORMATS[:-1])
    raise ExpungeError(
        f"{path}: unknown kind of file; use {known} or .{FORMATS[-1]}, or say what is in it, for example txt:{path.name}"
    )


def format_named(path: Path) -> str:
    """What the name ends in, without a dot and what tells of compression: `jsonl` of `pairs.jsonl.gz`."""
    inner = path.with_suffix("") if path.suffix.lower() in PACKED else path
    return inner.suffix.lower().removeprefix(".")


def _declared(source: str | Path) -> tuple[str | None, Path]:
    """`csv:PATH` as ("csv", PATH), what has no such beginning, or is a file of this whole name, with None."""
    text = expand(source)
    form, colon, rest = text.partition(":")
    if colon and rest and form in FORMATS and not Path(text).exists():
        return form, Path(rest)
    return None, Path(text)


def _recognised() -> str:
    """The format of standard input."""
    with unpacked(STDIN) as file:
        if file.peek(4)[:4] == b"PAR1":
            return "parquet"
    first = next((line for _, line in read_lines(STDIN) if line.strip()), "")
    return "json" if JSON_BEGINS.match(first) else "txt"


def locate(source: str | Path, *kinds: Kind) -> NamedSet | File | str:
    """What `source` stands for: a named set of one of `kinds`, an existing file, or the name of a hub set.

    Raises ExpungeError, with what comes near, for a file that is not there and for a name that is none of these.
    """
    known = {name: entry for kind in reversed(kinds) for name, entry in named_sets(kind).items()}
    text = expand(source)
    if text in known:
        return known[text]
    declared, path = _declared(source)
    if path.is_dir():
        raise ExpungeError(f"{source}: a folder; name one file in it")
    if path.is_file() or str(path) == STDIN:
        return file_at(source)
    if path.exists():
        raise ExpungeError(f"{source}: a pipe or a device; give it as standard input, {STDIN}")
    ending = format_named(path)
    if declared or isinstance(source, Path) or ending in FORMATS or f".{ending}" in (*WEIGHTS, *ARCHIVES):
        raise ExpungeError(f"{source}: no such file{_nearby(path)}")
    if HUB_NAME.fullmatch(text):
        return text
    wanted = " or ".join(filter(None, (", ".join(kinds[:-1]), kinds[-1])))
    if other := next((entry for entry in NAMED if entry.name == text), None):
        raise ExpungeError(f"{source}: a set of kind {other.kind}; wanted is one of kind {wanted}{did_you_mean('', known)}")
    near = _nearby(path) if not get_close_matches(text, known, n=1, cutoff=0.5) else ""
    raise ExpungeError(f"{source}: no {wanted} set, file or hub set of this name{near or did_you_mean(text, known)}")


def _nearby(path: Path) -> str:
    """`" (did you mean 'pairs.jsonl'?)"` where a data file beside `path` is called nearly so."""
    files = [found.name for found in path.parent.glob("*") if format_named(found) in FORMATS]
    close = get_close_matches(path.name, files, n=1, cutoff=0.5)
    return f" (did you mean {str(path.parent / close[0])!r}?)" if close else ""
