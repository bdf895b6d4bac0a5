"""Preference pairs: one prompt, a continuation to keep and one to forget, from named sets, files and the hub.

    pairs = load_pairs("builtin", limit=2000)
    pairs = load_pairs("mine.jsonl")          # {"prompt", "chosen", "rejected"}, or {"chosen", "rejected"}
    pairs = load_pairs("chats.jsonl", tokenizer=tokenizer)      # the same with lists of messages

Without a `prompt` field the prompt is what both texts begin with, as in TRL's `extract_prompt`.
"""

import hashlib
import logging
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.data.chat import chat_pair, say_unread, with_messages
from expunge.data.named import File, NamedSet, locate
from expunge.data.places import placed_pairs
from expunge.data.records import Record, hub_records, named_records, read_records, selected
from expunge.errors import ExpungeError

PAIR_TOXICITY = {"prompt": "prompt_text", "chosen": "unpert_gen_text", "rejected": "pert_gen_text"}
PARTS = {"pair-toxicity-train": (11, 100), "pair-toxicity-validation": (10, 11), "pair-toxicity-heldout": (0, 10)}
"""Named parts of Lee et al.'s file: which of a hundred shares of the prompts each has, from the first to before the last."""
PREFERENCE = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """`prompt + chosen` is to be kept, `prompt + rejected` forgotten; a continuation brings its own leading space."""

    prompt: str
    chosen: str
    rejected: str


def load_pairs(
    source: str | Path, split: str | None = None, limit: int | None = None, seed: int = 0, tokenizer: Any = None
) -> list[Pair]:
    """The pairs of a named set, a file (.jsonl, .json, .csv, .tsv, .parquet) or a hub set, in its order.

    split: of a hub set ("train" if None). limit: so many of them, drawn at random with `seed`, order kept; all are checked.
    tokenizer: whose chat template renders conversational rows; text needs none.
    Raises ExpungeError, one line with file and line number, for anything that is not a pair.
    """
    pairs = selected(
        lambda: _read(source, split, tokenizer), limit, lambda n, few: random.Random(seed).sample(range(n), few), "pair"
    )
    if not pairs:
        raise ExpungeError(f"{source}: no pair in it")
    return pairs


def _read(source: str | Path, split: str | None, tokenizer: Any) -> Iterable[Pair]:
    name, _, path = str(source).partition(":")
    if name == "pair-toxicity" or name in PARTS:
        if not path:
            raise ExpungeError(f"{name}: needs your copy of the file: {name}:PATH (JSON lines)")
        rows = (parse_pair(row, where, fields=PAIR_TOXICITY) for where, row in read_records(path))
        first, end = PARTS.get(name, (0, 100))
        return (pair for pair in rows if first <= share_of(pair.prompt) < end)
    found = locate(source, "pairs")
    if isinstance(found, str):
        return (parse_pair(row, where, tokenizer) for where, row in hub_records(found, split or "train"))
    if split is not None:
        raise ExpungeError(f"{source}: split {split!r} is for hub sets; name the file or the set that holds it")
    if isinstance(found, File):
        return (parse_pair(row, where, tokenizer) for where, row in read_records(found))
    if found.name == "paradetox":
        return paradetox_pairs(found)
    if found.name == "builtin-pplm-wikipedia":
        return (Pair(*texts) for texts in placed_pairs(named_records(found)))
    return (parse_pair(row, where) for where, row in named_records(found))


def share_of(prompt: str) -> int:
    """Which of a hundred shares a prompt belongs to, by its content: the same wherever it stands in whichever file."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % 100


def parse_pair(row: dict[str, Any], where: str, tokenizer: Any = None, fields: dict[str, str] = PREFERENCE) -> Pair:
    """One row as a pair; `where` names it in errors, `fields` gives the row's name of each part."""
    row = with_messages(row, where)
    if isinstance(row.get("chosen"), list):
        prompt, chosen, rejected = chat_pair(row, where, tokenizer)
    else:
        say_unread(row)
        prompt, chosen, rejected = None, text_of(row, fields["chosen"], where), text_of(row, fields["rejected"], where)
    if chosen == rejected:
        raise ExpungeError(f"{where}: chosen and rejected are equal; there is nothing to tell apart")
    if prompt is None and fields["prompt"] in row:
        prompt = text_of(row, fields["prompt"], where)
    if prompt is not None:
        return Pair(prompt, chosen, rejected)
    cut = common_prefix(chosen, rejected)
    return Pair(chosen[:cut], chosen[cut:], rejected[cut:])


def text_of(row: dict[str, Any], field: str, where: str) -> str:
    """A field of a row that must be text, and not blank."""
    if field not in row:
        raise ExpungeError(f"{where}: no field {field!r} (found: {', '.join(map(str, row)) or 'none'})")
    value = row[field]
    if not isinstance(value, str):
        raise ExpungeError(f"{where}: field {field!r} must be text, found {type(value).__name__}")
    if not value.strip():
        raise ExpungeError(f"{where}: field {field!r} is empty")
    return value


def common_prefix(chosen: str, rejected: str) -> int:
    """How many characters of two different texts are the prompt: what they share, less a space at its end.

    Where one text begins the other, its last character stays in the continuation, so that neither is empty.
    """
    shortest = min(len(chosen), len(rejected))
    cut = next((i for i in range(shortest) if chosen[i] != rejected[i]), shortest - 1)
    differs = chosen[cut] != rejected[cut]
    return cut - 1 if differs and cut > 0 and chosen[cut - 1] == " " else cut


def paradetox_pairs(entry: NamedSet) -> Iterator[Pair]:
    """Each toxic sentence with each of its rewrites; the prompt is the words that both begin with, whatever their case.

    It is spelled as in the toxic sentence. Pairs without such words, and equal ones, are left out.
    """
    total = kept = 0
    for toxic, neutral in paradetox_texts(named_records(entry)):
        total += 1
        forget, retain = toxic.split(), neutral.split()
        longest = min(len(forget), len(retain)) - 1  # each side keeps a word of its own
        shared = next((i for i in range(longest) if forget[i].lower() != retain[i].lower()), longest)
        chosen, rejected = " " + " ".join(retain[shared:]), " " + " ".join(forget[shared:])
        if shared > 0 and chosen != rejected:
            kept += 1
            yield Pair(" ".join(forget[:shared]), chosen, rejected)
    logger.warning("paradetox: %d of %d pairs used; the others do not begin with the same word", kept, total)


def paradetox_texts(records: Iterable[Record]) -> Iterator[tuple[str, str]]:
    """(toxic, neutral): the file has up to three rewrites in a row, the hub set one."""
    for where, row in records:
        if "en_toxic_comment" in row:
            yield row["en_toxic_comment"], row["en_neutral_comment"]
            continue
        toxic = text_of(row, "toxic", where)
        yield from ((toxic, row[column]) for column in ("neutral1", "neutral2", "neutral3") if row.get(column))
