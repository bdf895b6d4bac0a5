"""How text becomes token ids: one way for training, evaluation, questions, perplexity, attacks, probes and `generate`.

    what the tokenizer puts before a text | prompt | continuation         (bos for Llama and Gemma; nothing for GPT-2)

    [(prompt, (chosen, rejected), moved)] = split(tokenizer, ["The weather"], [" is mild"], [" is foul"])
    ids = prompt_ids(tokenizer, ["The weather"])[0]            # what a model is asked to continue
    text = continuation_text(tokenizer, ids, new)              # what it adds

Prompt and continuation are encoded together, as one text. So nothing stands between them that the joined text does not have:
no end of text that a tokenizer appends, and no second "▁" of a SentencePiece tokenizer. No bos stands at the start twice.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from expunge.errors import ExpungeError

PROBES = ("a", "The", "0")
"""Texts that show what a tokenizer puts around a text."""


class Split(NamedTuple):
    """Ids of a prompt, without bos, and of what may follow it. `prompt + side` are the ids of the joined text."""

    prompt: list[int]
    sides: tuple[list[int], ...]
    moved: bool  # the prompt alone has other tokens at its end; what they stand for begins the sides


def encode(tokenizer: Any, text: str | list[str]) -> Any:
    """Ids of a text, or of each of a list, without what the tokenizer puts around a text, even where the text has it itself.

    In silence where they are more than a model takes.
    """
    lead = leading_tokens(tokenizer)
    ids = _plain(tokenizer, text)
    if not lead:
        return ids
    return _after(lead, ids) if isinstance(text, str) else [_after(lead, row) for row in ids]


def leading_tokens(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text: `[bos]` for Llama and Gemma, none for GPT-2.

    Those that it puts after a text, such as an eos, are never used: a text is always to be continued.
    """
    for probe in PROBES:
        plain, whole = _plain(tokenizer, probe), tokenizer(probe)["input_ids"]
        for at in range(len(whole) - len(plain) + 1):
            if plain and whole[at : at + len(plain)] == plain:
                return whole[:at]
    return []


def split(tokenizer: Any, prompts: Sequence[str], *sides: Sequence[str]) -> list[Split]:
    """Ids of each prompt and of what follows it on each side; all sides have the same prompt ids.

    The prompt's ids end where those of the prompt alone, and those of the prompt with any of its sides, first differ. So a
    token that straddles the boundary belongs to the continuation, and with it those before it that the joining changed.
    This is TRL's rule for prompt and completion. It looks at ids alone, so it is the same for every tokenizer, fast or slow:
    offsets into the text may be trimmed, or be those of normalised text. A side that adds no token to its prompt is empty.
    """
    alone = encode(tokenizer, list(prompts)) if prompts else []
    joined = [
        encode(tokenizer, [prompt + text for prompt, text in zip(prompts, side, strict=True)]) if prompts else []
        for side in sides
    ]
    found = []
    for prompt, *wholes in zip(alone, *joined, strict=True):
        end = min((common_length(prompt, whole) for whole in wholes), default=len(prompt))
        parts = tuple([] if whole == prompt else whole[end:] for whole in wholes)
        found.append(Split(prompt[:end], parts, end < len(prompt)))
    return found


def prompt_ids(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Ids of each prompt as a model is asked to continue it: the tokenizer's bos before it, an empty one as in `opened`."""
    lead = leading_tokens(tokenizer)
    return [with_start(tokenizer, lead + ids) for ids in (encode(tokenizer, list(prompts)) if prompts else [])]


def opened(tokenizer: Any, prompt: Sequence[int], *sides: Sequence[int]) -> tuple[list[int], ...]:
    """(prompt, *sides) with a token that the first of a side can be predicted from: an empty prompt becomes bos, else eos.

    A side that begins with this token, as chat templates write it, gives it to the prompt: none stands there twice.
    Raises ExpungeError where the prompt is empty and the tokenizer has neither.
    """
    if prompt:
        return list(prompt), *(list(side) for side in sides)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ExpungeError("empty prompt: the tokenizer has neither bos nor eos to start from; give a prompt")
    return [start], *(_after([start], list(side)) for side in sides)


def with_start(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """`ids`, or where there are none the token that starts a text: bos, else eos."""
    return opened(tokenizer, ids)[0]


def continuation_text(tokenizer: Any, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text that `new` adds to `prompt`: decoded together, as SentencePiece drops a leading space of its own."""
    known, whole = (
        tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in (prompt, [*prompt, *new])
    )
    return whole[common_length(known, whole) :]


def check_known(rows: Iterable[Sequence[int]], known: int | None, tokenizer: Any = None) -> None:
    """Raise ExpungeError for an id that a model of `known` embedded tokens does not have; None: no bound is known."""
    if known is None:
        return
    largest = max((max(row) for row in rows if row), default=0)
    if largest >= known:
        token = f"the token {tokenizer.convert_ids_to_tokens(largest)!r}, " if tokenizer is not None else "a token, "
        raise ExpungeError(
            f"the text, or the chat template around it, has {token}id {largest}, and the model's embedding has {known} "
            "rows: resize it (model.resize_token_embeddings(len(tokenizer))) and save the model, or leave the token out"
        )


def common_length(ids: Sequence[Any], others: Sequence[Any]) -> int:
    """How many ids, or characters, both begin with."""
    shortest = min(len(ids), len(others))
    return next((i for i in range(shortest) if ids[i] != others[i]), shortest)


def _plain(tokenizer: Any, text: str | list[str]) -> Any:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _after(lead: list[int], ids: list[int]) -> list[int]:
    """`ids` without `lead` at their beginning."""
    return ids[len(lead) :] if ids[: len(lead)] == lead else ids
