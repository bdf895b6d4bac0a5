"""How far several scorers agree on the same texts, and where they do not.

agreement({"ngram": first, "wordvec": second})[0].spearman
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.stats import rankdata


@dataclass(frozen=True)
class Agreement:
    """Of two scorers: Spearman's rank correlation (nan where one gives all texts the same), and the texts' numbers from 0
    whose ranks differ most, the worst first."""

    first: str
    second: str
    spearman: float
    apart: tuple[int, ...]


def agreement(scores: Mapping[str, np.ndarray], worst: int = 5) -> list[Agreement]:
    """Every two of `scores`, float `[N]` by scorer, in the order given."""
    found = []
    for first, second in combinations(scores, 2):
        a, b = scores[first], scores[second]
        ranks = rankdata(a), rankdata(b)
        gaps = np.abs(ranks[0] - ranks[1])
        apart = [int(i) for i in np.argsort(-gaps, kind="stable")[:worst] if gaps[i] > 0]
        told = len(a) > 1 and np.ptp(a) > 0 and np.ptp(b) > 0
        found.append(Agreement(first, second, float(np.corrcoef(*ranks)[0, 1]) if told else float("nan"), tuple(apart)))
    return found
