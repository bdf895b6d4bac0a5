"""Pairs and unpaired texts as token ids, and what of them did not fit.

    rows, truncation = tokenize_pairs(pairs, tokenizer)      # rows[0].prompt + rows[0].chosen is one sequence
    sides, truncation = tokenize_unpaired(data, tokenizer)   # sides["forget"][0] is (prompt ids, continuation ids)

Both sides of a pair share the very same prompt ids. Where a token straddles the boundary, `expunge.ids.split` says whose it
is, and the row is counted: in text that brings its own spaces there is none.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from expunge.errors import ExpungeError
from expunge.ids import Split, encode, leading_tokens, opened, split

if TYPE_CHECKING:
    from expunge.data.pairs import Pair
    from expunge.data.texts import Text, Unpaired

TokenizedText = tuple[list[int], list[int]]
"""Prompt ids, with the tokenizer's bos where it adds one, and continuation ids."""


@dataclass(frozen=True)
class TokenizedPair:
    """Token ids of one pair; the prompt includes the tokenizer's bos where it adds one."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass
class Truncation:
    """What did not fit, in pairs; `dropped` ones are in none of the rows."""

    pairs: int = 0
    prompts_cut: int = 0
    chosen_cut: int = 0
    rejected_cut: int = 0
    boundaries_moved: int = 0  # the prompt ends some tokens earlier, as they merge with a continuation
    dropped_equal: int = 0  # both sides the same once they are cut
    dropped_empty: int = 0  # a side of which the tokenizer makes nothing

    def __str__(self) -> str:
        return _counted(self, "pairs")


@dataclass
class TextTruncation:
    """What did not fit, in texts of one side; `dropped` ones are in none of the rows."""

    texts: int = 0
    prompts_cut: int = 0
    continuations_cut: int = 0
    boundaries_moved: int = 0  # as of pairs
    dropped_empty: int = 0  # of which the tokenizer makes nothing
    dropped_equal: int = 0  # to be retained, but once it is cut the same as one that is to be forgotten

    def __str__(self) -> str:
        return _counted(self, "texts")


def _counted(counts: Truncation | TextTruncation, unit: str) -> str:
    """`"2,000 pairs: 3 prompts cut, 1 dropped equal"`: the counts that are not zero."""
    found = asdict(counts)
    total = found.pop(unit)
    named = [f"{n:,} {name.replace('_', ' ')}" for name, n in found.items() if n]
    return f"{total:,} {unit}: {', '.join(named) or 'nothing cut'}"


def tokenize_pairs(
    pairs: "Sequence[Pair]", tokenizer: Any, max_prompt: int = 64, max_continuation: int = 64
) -> tuple[list[TokenizedPair], Truncation]:
    """Token ids of each pair, in order, and what was cut or dropped.

    max_prompt: a prompt keeps its last so many tokens, bos apart. max_continuation: a side keeps its first so many.
    Raises ExpungeError if a limit is below 1, if no pair is left, or for an empty prompt without a bos or eos.
    """
    _check_limits(max_prompt, max_continuation)
    start = leading_tokens(tokenizer)
    rows, counts = [], Truncation(pairs=len(pairs))
    for prompt, sides, moved in split_pairs(tokenizer, pairs):
        opening, chosen, rejected = opened(tokenizer, start + prompt[-max_prompt:], *sides)
        if not chosen or not rejected:
            counts.dropped_empty += 1
            continue
        row = TokenizedPair(opening, chosen[:max_continuation], rejected[:max_continuation])
        if row.chosen == row.rejected:
            counts.dropped_equal += 1
            continue
        counts.boundaries_moved += moved
        counts.prompts_cut += len(prompt) > max_prompt
        counts.chosen_cut += len(chosen) > max_continuation
        counts.rejected_cut += len(rejected) > max_continuation
        rows.append(row)
    if not rows:
        raise ExpungeError(f"no pair is left to train on ({counts})")
    return rows, counts


def split_pairs(tokenizer: Any, pairs: "Sequence[Pair]") -> list[Split]:
    """Each pair's prompt and its two sides, chosen first, as ids without bos; nothing is cut."""
    return split(
        tokenizer,
        [pair.prompt for pair in pairs],
        [pair.chosen for pair in pairs],
        [pair.rejected for pair in pairs],
    )


def tokenize_unpaired(
    data: "Unpaired", tokenizer: Any, max_prompt: int = 64, max_continuation: int = 64
) -> tuple[dict[str, list[TokenizedText]], dict[str, TextTruncation]]:
    """Token ids of the texts of each side, in order, and what was cut or dropped; limits and errors as of pairs."""
    sides, counts = {}, {}
    for side, texts in (("retain", data.retain), ("forget", data.forget)):
        sides[side], counts[side] = tokenize_texts(texts, tokenizer, max_prompt, max_continuation)
    bad = {(tuple(prompt), tuple(continuation)) for prompt, continuation in sides["forget"]}
    kept = [row for row in sides["retain"] if (tuple(row[0]), tuple(row[1])) not in bad]
    counts["retain"].dropped_equal = len(sides["retain"]) - len(kept)
    sides["retain"] = kept
    for side, rows in sides.items():
        if not rows:
            raise ExpungeError(f"no text to {side} is left to train on ({counts[side]})")
    return sides, counts


def tokenize_texts(
    texts: "Sequence[Text]", tokenizer: Any, max_prompt: int = 64, max_continuation: int = 64
) -> tuple[list[TokenizedText], TextTruncation]:
    """Token ids of each text, in order, and what was cut or dropped. A text without a prompt starts from bos, else eos."""
    _check_limits(max_prompt, max_continuation)
    start, counts = leading_tokens(tokenizer), TextTruncation(texts=len(texts))
    rows = []
    for prompt, sides, moved in split(tokenizer, [text.prompt for text in texts], [text.completion for text in texts]):
        opening, completion = opened(tokenizer, start + prompt[-max_prompt:], *sides)
        if not completion:
            counts.dropped_empty += 1
            continue
        counts.boundaries_moved += moved
        counts.prompts_cut += len(prompt) > max_prompt
        counts.continuations_cut += len(completion) > max_continuation
        rows.append((opening, completion[:max_continuation]))
    return rows, counts


def tokenize_labelled(texts: Sequence[tuple[str, bool]], tokenizer: Any, longest: int) -> list[tuple[list[int], bool]]:
    """Ids, bos included and at most `longest` of them, and the label of each text; one without tokens is left out."""
    start = leading_tokens(tokenizer)
    encoded = encode(tokenizer, [text for text, _ in texts]) if texts else []
    return [((start + ids)[:longest], bad) for ids, (_, bad) in zip(encoded, texts, strict=True) if ids]


def _check_limits(max_prompt: int, max_continuation: int) -> None:
    if max_prompt < 1 or max_continuation < 1:
        raise ExpungeError(f"max_prompt {max_prompt}, max_continuation {max_continuation}: each must be at least 1")
