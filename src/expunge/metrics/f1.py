"""F1: the overlap of a generated continuation with the true one, as multisets of token ids.

P = o / |prediction|,  R = o / |gold|,  F1 = 2 P R / (P + R)      f1([1, 2, 3, 3], [3, 3, 3, 4]) == 0.5
"""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

Mode = Literal["continuation", "lee2024"]


def f1(prediction: Sequence[int], gold: Sequence[int]) -> float:
    """0 where either is empty or nothing overlaps."""
    overlap = sum((Counter(prediction) & Counter(gold)).values())
    return 2 * overlap / (len(prediction) + len(gold)) if overlap else 0.0


def continuation_f1(prompt: Sequence[int], new: Sequence[int], gold: Sequence[int], limit: int, mode: Mode) -> float:
    """F1 of one continuation. limit: the most new tokens that were allowed.

    continuation: the new tokens against as many of the gold. lee2024: as the public code of Lee et al. 2024 does it,
    the prompt counts as predicted, and the gold is cut at prompt + limit tokens (methods.md section 4).
    """
    if mode == "continuation":
        return f1(new, gold[:limit])
    return f1([*prompt, *new], gold[: len(prompt) + limit])
