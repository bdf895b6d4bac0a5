import numpy as np
import pytest
from scipy.stats import spearmanr

from expunge.scorers.agreement import agreement


def test_correlation_and_the_texts_that_stand_apart_by_hand():
    scores = {
        "a": np.array([0.1, 0.2, 0.3, 0.9]),
        "b": np.array([0.01, 0.02, 0.03, 0.04]),  # the same order
        "c": np.array([0.9, 0.2, 0.3, 0.1]),  # the first and the last change places
    }
    same, turned, _ = agreement(scores)
    assert (same.first, same.second, same.spearman, same.apart) == ("a", "b", pytest.approx(1), ())
    assert (turned.first, turned.second, turned.spearman) == ("a", "c", pytest.approx(1 - 6 * 18 / (4 * 15)))
    assert turned.apart == (0, 3)


def test_one_text_or_one_score_has_no_correlation():
    for a in (np.array([0.5]), np.array([0.5, 0.5])):
        [found] = agreement({"a": a, "b": np.arange(len(a)) / 2})
        assert np.isnan(found.spearman)


def test_spearman_is_scipy_s_with_ties():
    rng = np.random.default_rng(0)
    a, b = rng.integers(5, size=50) / 5, rng.integers(7, size=50) / 7
    assert agreement({"a": a, "b": b})[0].spearman == pytest.approx(spearmanr(a, b).statistic)
