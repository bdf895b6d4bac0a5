"""Bootstrap intervals of ratios of sums, by independent unit (a prompt, or a window of text).

Every figure here is  g( sum_i x_i / sum_i w_i ):  a mean has w = 1; a perplexity has x = nll, w = tokens, g = exp.
Units are drawn with replacement; two evaluations of the same units are drawn together, so that a paired ratio is tight.

    interval(ratio_of_sums(np.array([0.1, 0.5]), np.ones(2)))
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from scipy.stats import spearmanr

RESAMPLES = 2000
LEVEL = 0.95


@lru_cache(maxsize=4)
def resample_counts(units: int, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """How often each unit is drawn in each resample, `[resamples, units]`; each row sums to `units`."""
    return np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=resamples)


def ratio_of_sums(values: np.ndarray, weights: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """sum(values) / sum(weights), a scalar; with `counts` `[R, N]`, the same of each resample, `[R]`."""
    if counts is None:
        return np.asarray(values.sum() / weights.sum())
    return (counts @ values) / np.maximum(counts @ weights, 1e-300)


def interval(resampled: np.ndarray) -> tuple[float, float]:
    """The percentile interval of level 95 %."""
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def bootstrap(
    statistic: Callable[[np.ndarray | None], np.ndarray], units: int, seed: int = 0
) -> tuple[float, float | None, float | None]:
    """(value, low, high) of `statistic(counts)`; no interval where there is a single unit."""
    value = float(statistic(None))
    if units < 2:
        return value, None, None
    low, high = interval(statistic(resample_counts(units, seed)))
    return value, low, high


def rank_correlation(a: np.ndarray, b: np.ndarray, independent: int) -> tuple[float, float | None, float | None]:
    """Spearman's rho of two `[N]` vectors, and Fisher's interval for `independent` units, at most N.

    NaN where one vector is constant.
    """
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan, None, None
    rho = float(spearmanr(a, b)[0])  # type: ignore[arg-type]
    if independent < 4:
        return rho, None, None
    half = 1.96 * math.sqrt(1.06 / (independent - 3))  # 1.06: Fieller et al. 1957, for ranks
    centre = math.atanh(max(-0.999999, min(0.999999, rho)))
    return rho, math.tanh(centre - half), math.tanh(centre + half)
