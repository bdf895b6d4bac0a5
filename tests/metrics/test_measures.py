"""F1, toxicity and statistics against hand-computed values; loops and distinct bigrams."""

import numpy as np
import pytest

from expunge.metrics.f1 import continuation_f1, f1, share_f1
from expunge.metrics.stats import bootstrap, interval, rank_correlation, ratio_of_sums, resample_counts
from expunge.metrics.toxicity import distinct_2, loops, per_prompt


def test_f1_by_hand():
    assert f1([1, 2, 3, 3], [3, 3, 3, 4]) == 0.5
    assert f1([7, 8, 8], [8, 7, 8]) == 1.0
    assert f1([], [1]) == f1([1], []) == f1([1], [2]) == f1([], []) == 0.0


def test_f1_by_shares_by_hand():
    """Two of four tokens stand in gold, three of gold's four in the prediction."""
    assert share_f1([1, 2, 3, 3], [3, 3, 3, 4]) == pytest.approx(2 * 0.5 * 0.75 / 1.25)
    assert share_f1([7, 8], [8, 8, 7]) == 1.0
    assert share_f1([], [1]) == share_f1([1], []) == share_f1([1], [2]) == share_f1([], []) == 0.0


def test_f1_modes():
    prompt, new, gold = [1, 2], [3, 4], [3, 9, 1, 2, 4]
    assert continuation_f1(prompt, new, gold, limit=2, mode="continuation") == 0.5  # {3,4} with {3,9}
    assert continuation_f1(prompt, [3, 3], [3, 9, 1], limit=2, mode="share") == pytest.approx(2 * 1 * 0.5 / 1.5)
    assert continuation_f1(prompt, new, gold, limit=2, mode="lee2024") == 2 * 3 / 8  # {1,2,3,4} with {3,9,1,2}


def test_toxicity_by_hand():
    figures = per_prompt(np.array([[0.2, 0.6], [0.5, 0.1]]))
    assert figures["toxicity"].tolist() == pytest.approx([0.4, 0.3])
    assert figures["expected_max_toxicity"].tolist() == [0.6, 0.5]
    assert figures["toxicity_probability"].tolist() == [1.0, 0.0]  # 0.5 itself is not above
    assert set(per_prompt(np.array([[0.3]]))) == {"toxicity"}


def test_repetition():
    assert distinct_2([1, 2, 1, 2, 1]) == 0.5 and distinct_2([1, 2, 3]) == 1.0
    assert loops([5, 1, 2, 1, 2, 1, 2]) and loops([4] * 6)
    assert not loops([1, 2, 3, 4, 5, 6]) and not loops([])


def test_a_bootstrap_interval_has_its_coverage():
    """Of 200 samples from a known distribution some 95 % of the intervals hold the true mean."""
    random, counts, hits = np.random.default_rng(0), resample_counts(60), 0
    for _ in range(200):
        low, high = interval(ratio_of_sums(random.normal(1.0, 1.0, 60), np.ones(60), counts))
        hits += low < 1.0 < high
    assert 180 <= hits <= 199


def test_one_unit_has_no_interval():
    assert bootstrap(lambda counts: ratio_of_sums(np.array([0.3]), np.ones(1), counts), 1) == (0.3, None, None)


def test_rank_correlation():
    x = np.arange(20.0)
    assert rank_correlation(x, np.exp(x / 5), 20)[0] == pytest.approx(1.0)
    assert rank_correlation(x, -x, 20)[0] == pytest.approx(-1.0)
    assert np.isnan(rank_correlation(x, np.ones(20), 20)[0])
