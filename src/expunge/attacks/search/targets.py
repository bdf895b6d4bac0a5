"""What a search is to make the victim write: the reference's own continuations that score highest.

targets, counts = reference_targets(reference, data, 8, 20)      # eight targets of at most 20 tokens
"""

from dataclasses import dataclass
from typing import Any

import torch

from expunge.attacks.base import AttackData
from expunge.attacks.search.strings import round_trips
from expunge.errors import ExpungeError
from expunge.generation import Decoding, generate
from expunge.ids import continuation_text, encode, leading_tokens, with_start
from expunge.metrics.evaluation import EvaluationPlan


@dataclass(frozen=True)
class Target:
    """A prompt, bos included, and what is to be written after it; the string of an attack comes in between, or before."""

    prompt: list[int]
    ids: list[int]


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
