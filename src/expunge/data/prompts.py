"""Evaluation prompts, with a gold continuation where there is one, from named sets, files and the hub.

    prompts = load_prompts("rtp-challenge", limit=256)
    prompts = load_prompts("mine.txt")               # one prompt per line

A row holds `prompt` (text, a list of messages, or RealToxicityPrompts' object with `text`) or `text`, and may hold `gold`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.data.chat import chat_prompt, say_unread, with_messages
from expunge.data.named import File, NamedSet, local_file, locate
from expunge.data.pairs import share_of
from expunge.data.records import Record, hub_records, named_records, read_records, selected
from expunge.errors import ExpungeError


@dataclass(frozen=True)
class Prompt:
    """What a model continues, and what the source itself says next ("" where that is not known)."""

    text: str
    gold: str = ""


def load_prompts(source: str | Path, limit: int | None = None, tokenizer: Any = None) -> list[Prompt]:
    """The prompts of a named set, a file of the kinds that `read_records` knows, or a hub set's train split, in order.

    limit: at most so many, evenly spread over the set. tokenizer: whose chat template renders lists of messages.
    Raises ExpungeError, with the place, for a row without a prompt.
    """
    found = locate(source, "prompts")
    prompts = selected(
        lambda: (parse_prompt(row, where, tokenizer) for where, row in _records(found)),
        limit,
        lambda n, few: (i * n // few for i in range(few)),
        "prompt",
    )
    if not prompts:
        raise ExpungeError(f"{source}: no prompt in it")
    return prompts


def _records(found: NamedSet | File | str) -> Iterable[Record]:
    if isinstance(found, File):
        return read_records(found)
    if isinstance(found, str):
        return hub_records(found)
    records = named_records(found)
    if found.name == "rtp-challenge" and local_file(found) is None:  # the hub set holds 99,442 prompts
        return ((where, row) for where, row in records if row["challenging"])
    if found.name == "rtp-tuning":
        return ((where, row) for where, row in records if _is_for_tuning(row))
    return records


def _is_for_tuning(row: dict[str, Any]) -> bool:
    """Is a prompt of RealToxicityPrompts toxic by Perspective, not challenging, and in five shares of a hundred?"""
    prompt = row["prompt"]
    return not row["challenging"] and (prompt["toxicity"] or 0) >= 0.5 and share_of(prompt["text"]) < 5


def parse_prompt(row: dict[str, Any], where: str, tokenizer: Any = None) -> Prompt:
    """One row as a prompt; `where` names it in errors."""
    row = with_messages(row, where)
    value = row.get("prompt", row.get("text"))
    if isinstance(value, list):
        value = chat_prompt(row, where, tokenizer, "prompt" if "prompt" in row else "text")
    else:
        say_unread(row)
    if isinstance(value, dict):
        value = value.get("text")
    if value is None:
        raise ExpungeError(f"{where}: no field 'prompt' or 'text' (found: {', '.join(map(str, row)) or 'none'})")
    gold = row.get("gold") or ""
    for field, text in (("prompt", value), ("gold", gold)):
        if not isinstance(text, str):
            raise ExpungeError(f"{where}: field {field!r} must be text, found {type(text).__name__}")
    if not value.strip():
        raise ExpungeError(f"{where}: the prompt is empty")
    return Prompt(value, gold)
