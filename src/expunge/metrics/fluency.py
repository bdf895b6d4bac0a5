"""Signs of broken generation, from token ids: repeated bigrams, and loops.

    distinct-2 = different bigrams / bigrams
    looping:     for some n <= 4, at least half of the tokens equal the token n places before

    is_looping([7, 8, 7, 8, 7, 8])      # True: four of six repeat what stands two before
"""

from collections.abc import Sequence

LONGEST_LOOP = 4


def bigrams(ids: Sequence[int]) -> tuple[int, int]:
    """(different bigrams, bigrams) of one continuation; (0, 0) where it has fewer than two tokens."""
    pairs = list(zip(ids, ids[1:], strict=False))
    return len(set(pairs)), len(pairs)


def is_looping(ids: Sequence[int]) -> bool:
    repeats = (sum(a == b for a, b in zip(ids, ids[n:], strict=False)) for n in range(1, LONGEST_LOOP + 1))
    return len(ids) > 1 and 2 * max(repeats) >= len(ids)
