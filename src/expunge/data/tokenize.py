"""Pairs as token ids: prompt and continuations are tokenised apart and joined by concatenation.

    rows, truncation = tokenize_pairs(pairs, tokenizer)      # rows[0].prompt + rows[0].chosen is one sequence

So both sides share the very same prompt tokens: none is merged with the first of a continuation.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from expunge.errors import ExpungeError

if TYPE_CHECKING:
    from expunge.data.pairs import Pair


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
    dropped_equal: int = 0  # both sides the same once they are cut
    dropped_empty: int = 0  # a side of which the tokenizer makes nothing

    def __str__(self) -> str:
        """`"2,000 pairs: 3 prompts cut, 1 dropped equal"`: the counts that are not zero."""
        counts = [f"{n:,} {name.replace('_', ' ')}" for name, n in asdict(self).items() if n and name != "pairs"]
        return f"{self.pairs:,} pairs: {', '.join(counts) or 'nothing cut'}"


def tokenize_pairs(
    pairs: "Sequence[Pair]", tokenizer: Any, max_prompt: int = 64, max_continuation: int = 64
) -> tuple[list[TokenizedPair], Truncation]:
    """Token ids of each pair, in order, and what was cut or dropped.

    max_prompt: a prompt keeps its last so many tokens, bos apart. max_continuation: a side keeps its first so many.
    Raises ExpungeError if a limit is below 1, if no pair is left, or for an empty prompt without a bos or eos.
    """
    if max_prompt < 1 or max_continuation < 1:
        raise ExpungeError(f"max_prompt {max_prompt}, max_continuation {max_continuation}: each must be at least 1")
    start = leading_tokens(tokenizer)
    columns = zip(*((pair.prompt, pair.chosen, pair.rejected) for pair in pairs), strict=True)
    encoded = [encode(tokenizer, list(texts)) for texts in columns]
    rows, counts = [], Truncation(pairs=len(pairs))
    for prompt, chosen, rejected in zip(*encoded, strict=True):
        if not chosen or not rejected:
            counts.dropped_empty += 1
            continue
        row = TokenizedPair(
            (start + prompt[-max_prompt:]) or [_start_token(tokenizer)],
            chosen[:max_continuation],
            rejected[:max_continuation],
        )
        if row.chosen == row.rejected:
            counts.dropped_equal += 1
            continue
        counts.prompts_cut += len(prompt) > max_prompt
        counts.chosen_cut += len(chosen) > max_continuation
        counts.rejected_cut += len(rejected) > max_continuation
        rows.append(row)
    if not rows:
        raise ExpungeError(f"no pair is left to train on ({counts})")
    return rows, counts


def encode(tokenizer: Any, text: str | list[str]) -> Any:
    """Token ids of a text, or of each of a list, without bos and eos; in silence where they are more than a model takes."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def leading_tokens(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text: `[bos]` for Llama and Gemma, none for GPT-2."""
    plain = encode(tokenizer, "a")
    whole = tokenizer("a")["input_ids"]
    at = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[:at]


def _start_token(tokenizer: Any) -> int:
    """What an empty prompt becomes: bos, else eos."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ExpungeError("empty prompt: the tokenizer has neither bos nor eos to start from; give each pair a prompt")


def continuation_text(tokenizer: Any, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text that `new` adds to `prompt`: decoded together, as SentencePiece drops a leading space of its own."""
    known = tokenizer.decode(prompt, skip_special_tokens=True)
    return tokenizer.decode([*prompt, *new], skip_special_tokens=True)[len(known) :]
