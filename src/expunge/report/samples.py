"""Before/after samples for the page: which are shown, and which text waits behind a veil.

    shown = choose(read_lines(folder / "samples.jsonl"))

Two lists: an even spread over the file, and what is still worst by the judge. A continuation is veiled where any scorer
gives it 0.5 or more, or none has scored it; a prompt where any continuation of it, by either model, is, or where it
ends in tokens of a rejected text.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from expunge.errors import ExpungeError
from expunge.report.text import clip

VEIL = 0.5  # Perspective's threshold for "toxic" in RealToxicityPrompts
SPREAD, WORST = 16, 8
LENGTH = 1500  # characters of a text that the page shows
SUBJECTS = ("reference", "unlearned")
FIELDS = ("subject", "dataset", "decode", "side", "k", "prompt_id", "prompt", "sample", "continuation", "scores")


@dataclass(frozen=True)
class Text:
    """A prompt or a continuation; scores are empty for a prompt."""

    body: str
    scores: Mapping[str, float]
    veiled: bool


@dataclass(frozen=True)
class Sample:
    """One prompt, and what each model made of it with the same random numbers."""

    origin: str  # dataset, decoding, side and k
    prompt: Text
    continuations: Mapping[str, Text]  # by subject


@dataclass(frozen=True)
class Shown:
    spread: list[Sample]
    worst: list[Sample]
    total: int  # prompts x samples in the file


def choose(records: Sequence[Mapping[str, Any]], source: Path) -> Shown:
    """Pair the two models' records and pick `SPREAD` of them evenly and the `WORST` highest unlearned scores.

    Raises ExpungeError (naming `source`) where a record lacks a field.
    """
    pairs: dict[tuple, dict[str, Mapping[str, Any]]] = {}
    veiled_prompts = set()
    for number, record in enumerate(records, 1):
        for field in FIELDS:
            if field not in record:
                raise ExpungeError(f"{source}: record {number} has no field {field!r}: measure again")
        if not isinstance(record["scores"], dict):
            raise ExpungeError(f"{source}: record {number} has scores that are not named by scorer: measure again")
        prompt = (record["dataset"], record["prompt_id"])
        key = (*prompt, record["side"], record["k"], record["decode"], record["sample"])
        pairs.setdefault(key, {})[record["subject"]] = record
        if _veiled(record["scores"]):
            veiled_prompts.add(prompt)
    keys = list(pairs)
    count = min(SPREAD, len(keys))
    spread = [keys[i * len(keys) // count] for i in range(count)]
    rest = [key for key in keys if key not in spread and "unlearned" in pairs[key]]
    worst = sorted(rest, key=lambda key: -_judged(pairs[key]["unlearned"]["scores"]))[:WORST]
    samples = [[_sample(pairs[key], key[:2] in veiled_prompts) for key in some] for some in (spread, worst)]
    return Shown(*samples, total=len(keys))


def _sample(records: Mapping[str, Mapping[str, Any]], veil_prompt: bool) -> Sample:
    record = next(iter(records.values()))
    forced = bool(record["side"] and record["k"])  # at k = 0 both sides ask the same
    side = f"{record['side']} side, k = {record['k']}" if forced else None
    origin = ", ".join(str(part) for part in (record["dataset"], record["decode"], side) if part)
    continuations = {
        subject: Text(clip(str(r["continuation"]), LENGTH), r["scores"], _veiled(r["scores"]))
        for subject in SUBJECTS
        if (r := records.get(subject))
    }
    veil_prompt = veil_prompt or (forced and record["side"] == "rejected")
    return Sample(origin, Text(clip(str(record["prompt"]), LENGTH), {}, veil_prompt), continuations)


def _veiled(scores: Mapping[str, Any]) -> bool:
    """Toxic by any scorer, or not known to be harmless."""
    return not scores or any(not _is_score(score) or score >= VEIL for score in scores.values())


def _judged(scores: Mapping[str, Any]) -> float:
    """The first scorer's value; a text without one counts as worst."""
    first = next(iter(scores.values()), None)
    return float(first) if _is_score(first) else math.inf


def _is_score(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)
