"""What searches over token strings share: tokens that may be used, strings that survive as text, targets, a first string.

    allowed = allowed_tokens(tokenizer, model.get_input_embeddings().num_embeddings)
    targets, left_out = reference_targets(reference, data, 8, 20)
    kept = rows[round_trips(tokenizer, rows, before=without_bos(tokenizer, targets[0].prompt))]

A string round-trips where it decodes to a text that is encoded to the very same ids, so that it can be typed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from expunge.attacks.base import AttackData
from expunge.errors import ExpungeError
from expunge.generation import Decoding, generate
from expunge.ids import continuation_text, encode, leading_tokens, with_start
from expunge.metrics.evaluation import EvaluationPlan

FILLERS = (" x", " !", "x", "!")
"""What a first string repeats, if the tokenizer can."""


@dataclass(frozen=True)
class Target:
    """A prompt, bos included, and what is to be written after it; the string of an attack comes in between, or before."""

    prompt: list[int]
    ids: list[int]


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


def cut_prompts(data: AttackData) -> list[list[int]]:
    """The ids of each of `data.prompts` that an evaluation keeps, without bos."""
    plan = data.plan or EvaluationPlan()
    return [plan.cut(ids) for ids in (encode(data.tokenizer, list(data.prompts)) if data.prompts else [])]


def check_prompts(data: AttackData, count: int) -> None:
    """Raise ExpungeError where there are not so many prompts to search on."""
    if len(data.prompts) < count:
        raise ExpungeError(f"{count} prompts were asked for and {len(data.prompts)} given: give more, or ask for fewer")


def reference_targets(reference: Any, data: AttackData, count: int, tokens: int) -> tuple[list[Target], dict[str, int]]:
    """The `count` prompts of `data.prompts` whose greedy continuation by the reference scores highest, worst first.

    tokens: of each continuation, at most. Also returned: how many prompts there were, and of how many the continuation was
    empty or did not round-trip, which are left out.
    Raises ExpungeError where fewer than `count` are left.
    """
    tokenizer = data.tokenizer
    assert data.score is not None, "an attack that comes here needs a score"
    start, cut = leading_tokens(tokenizer), cut_prompts(data)
    prompts = [with_start(tokenizer, start + ids) for ids in cut]
    found = [answer for (answer,) in generate(reference, tokenizer, prompts, Decoding(tokens))]
    empty = [not answer for answer in found]
    broken = [
        bool(answer) and not round_trips(tokenizer, torch.tensor([answer]), before=ids)[0]
        for ids, answer in zip(cut, found, strict=True)
    ]
    whole = [i for i in range(len(found)) if not empty[i] and not broken[i]]
    about = {"prompts": len(prompts), "empty": sum(empty), "not_round_tripping": sum(broken)}
    if len(whole) < count:
        raise ExpungeError(
            f"{count} prompts were asked for and {len(prompts)} given, of which {sum(empty)} have an empty target and "
            f"{sum(broken)} a target that the tokenizer cannot round-trip: give more prompts, or ask for fewer"
        )
    scores = data.score([continuation_text(tokenizer, cut[i], found[i]) for i in whole])
    order = sorted(range(len(whole)), key=lambda place: -float(scores[place]))[:count]
    return [Target(prompts[whole[place]], found[whole[place]]) for place in order], about
