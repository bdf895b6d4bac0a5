"""Token strings that can be typed: which tokens they may hold, which strings survive as text, a first string.

    allowed = allowed_tokens(tokenizer, model.get_input_embeddings().num_embeddings)     # bool [V]
    kept = rows[round_trips(tokenizer, rows, before=prompt)]

A string round-trips if its text is encoded to the same ids again. Only such a string can be typed.
"""

from collections.abc import Sequence
from typing import Any

import torch

from expunge.errors import ExpungeError
from expunge.ids import encode, leading_tokens

FILLERS = (" x", " !", "x", "!")
"""What a first string repeats, if the tokenizer can."""


def allowed_tokens(tokenizer: Any, vocabulary: int, ascii_only: bool = True) -> torch.Tensor:
    """bool `[vocabulary]`: the ids that a string may hold.

    vocabulary: rows of the model's embedding. Left out: special and added tokens, ids that the tokenizer does not know, and
    what is no whole printable text by itself; with `ascii_only`, what is not ASCII too. ExpungeError where none is left.
    """
    added = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    known = sorted(id for id in set(tokenizer.get_vocab().values()) - added if id < vocabulary)
    allowed = torch.zeros(vocabulary, dtype=torch.bool)
    for id, text in zip(known, decode(tokenizer, [[id] for id in known]), strict=True):
        allowed[id] = bool(text) and text.isprintable() and "\ufffd" not in text and (text.isascii() or not ascii_only)
    if not allowed.any():
        raise ExpungeError("the tokenizer has no token of printable text that an attack may use; allow more than ASCII")
    return allowed


def decode(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    """The text of each row, as it is: special tokens too, no spaces tidied away."""
    return [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in rows]


def round_trips(tokenizer: Any, ids: torch.Tensor, before: Sequence[int] = (), after: Sequence[int] = ()) -> torch.Tensor:
    """bool `[N]`: is each row of `ids` `[N, T]`, decoded and encoded again in its place, the same ids?

    before, after: ids that it stands between; of those it does not matter whether they are the same again, but bos must
    not be among them.
    """
    start, end, rows = len(before), len(after), ids.tolist()
    texts = decode(tokenizer, [[*before, *row, *after] for row in rows])
    same = []
    for row, found in zip(rows, encode(tokenizer, texts) if texts else [], strict=True):
        from_the_end = len(found) - end - len(row)
        same.append(row in (found[start : start + len(row)], found[max(0, from_the_end) : len(found) - end]))
    return torch.tensor(same, dtype=torch.bool, device=ids.device)


def typed_anywhere(tokenizer: Any, rows: torch.Tensor, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """The rows of `[N, T]` that round-trip after every one of `prompts`, given without bos."""
    for prompt in prompts:
        rows = rows[round_trips(tokenizer, rows, before=prompt)]
    return rows


def typed_before(tokenizer: Any, prompts: Sequence[Sequence[int]], rows: torch.Tensor) -> torch.Tensor:
    """bool `[N]`: does each of the rows `[N, T]` round-trip, alone and before every prompt, given without bos?"""
    kept = round_trips(tokenizer, rows)
    for prompt in prompts:
        kept[kept.clone()] = round_trips(tokenizer, rows[kept], after=prompt)
    return kept


def first_string(
    tokenizer: Any, length: int, allowed: torch.Tensor, prompts: Sequence[Sequence[int]] = ((),)
) -> torch.Tensor:
    """int64 `[length]`, one token again and again, that round-trips after every prompt: " x" if the tokenizer has that.

    prompts: without bos. Raises ExpungeError where no allowed token can be repeated so.
    """
    wished = [ids[0] for ids in encode(tokenizer, list(FILLERS)) if len(ids) == 1 and allowed[ids[0]]]
    for tokens in (torch.tensor(wished, dtype=torch.long), allowed.cpu().nonzero().flatten()):
        rows = typed_anywhere(tokenizer, tokens[:, None].expand(-1, length), prompts)
        if len(rows):
            return rows[0].clone()
    raise ExpungeError(f"the tokenizer gives no string of {length} equal tokens back as it was; take another length")


def without_bos(tokenizer: Any, prompt: Sequence[int]) -> list[int]:
    """The ids of a prompt without what the tokenizer puts before every text."""
    start = leading_tokens(tokenizer)
    return list(prompt[len(start) :] if list(prompt[: len(start)]) == start else prompt)
