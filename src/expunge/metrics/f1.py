"""F1: the overlap of a generated continuation with the true one, in token ids.

F1 = 2 P R / (P + R)      f1([1, 2, 3, 3], [3, 3, 3, 4]) == 0.5,  share_f1([1, 2, 3, 3], [3, 3, 3, 4]) == 0.6

    overlap as multisets, o tokens     P = o / |prediction|,                          R = o / |gold|
    shares, as the REPO paper has it   P = share of the prediction's tokens in gold,  R = share of gold's in the prediction
"""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

Mode = Literal["continuation", "share", "lee2024"]


def f1(prediction: Sequence[int], gold: Sequence[int]) -> float:
    """0 where either is empty or nothing overlaps."""
    overlap = sum((Counter(prediction) & Counter(gold)).values())
    return 2 * overlap / (len(prediction) + len(gold)) if overlap else 0.0


def share_f1(prediction: Sequence[int], gold: Sequence[int]) -> float:
    """A token that the other text has once counts each time that it stands here; 0 where nothing is shared."""
    precision = sum(token in set(gold) for token in prediction) / max(1, len(prediction))
    recall = sum(token in set(prediction) for token in gold) / max(1, len(gold))
    return 2 * precision * recall / (precision + recall) if precision else 0.0


def continuation_f1(prompt: Sequence[int], new: Sequence[int], gold: Sequence[int], limit: int, mode: Mode) -> float:
    """F1 of one continuation. limit: the most new tokens that were allowed.

    continuation, ours: the new tokens against as many of the gold, as multisets. share: the same tokens by shares, as
    appendix B.1 of the REPO paper defines it. lee2024: as the public code of Lee et al. 2024 does it, the prompt counts as
    predicted, and the gold is cut at prompt + limit tokens (methods.md section 4).
    """
    if mode != "lee2024":
        return (share_f1 if mode == "share" else f1)(new, gold[:limit])
    return f1([*prompt, *new], gold[: len(prompt) + limit])
