"""Rows of two sets: how often each text comes, in which epoch, and that it is the same again."""

from collections import Counter

import pytest

from expunge.data.rows import PairRows, SetRows
from expunge.data.tokenize import TokenizedPair


def sides(forget: int, retain: int):
    return {"retain": [([0], [i]) for i in range(retain)], "forget": [([0], [100 + i]) for i in range(forget)]}


def epoch_of(rows: SetRows, epoch: int) -> list[tuple[int, int]]:
    """(forget, retain) of each row."""
    rows.set_epoch(epoch)
    return [(rows[i]["forget"][1][0], rows[i]["retain"][1][0]) for i in range(len(rows))]


@pytest.mark.parametrize(("forget", "retain"), [(5, 5), (7, 3), (3, 7), (10, 1), (1, 4), (4, 8)])
def test_the_forget_set_comes_once_an_epoch_and_the_retain_set_evenly(forget, retain):
    rows, seen = SetRows(sides(forget, retain), seed=0), Counter()
    assert len(rows) == forget
    for epoch in range(6):
        bad, good = zip(*epoch_of(rows, epoch), strict=True)
        assert list(bad) == [100 + i for i in range(forget)]
        seen.update(good)
        counts = [seen[i] for i in range(retain)]
        assert max(counts) - min(counts) <= 1


def test_each_pass_has_an_order_of_its_own_and_the_same_seed_the_same():
    rows = SetRows(sides(20, 20), seed=3)
    first, second = epoch_of(rows, 0), epoch_of(rows, 1)
    assert first != second
    assert epoch_of(SetRows(sides(20, 20), seed=3), 1) == second != epoch_of(SetRows(sides(20, 20), seed=4), 1)
    assert epoch_of(rows, 0) == first


def test_sequences_are_all_that_a_reference_may_be_asked_for():
    rows = SetRows(sides(2, 3), seed=0, anchor=[[7, 8], [9, 9], [5, 5]])
    assert list(rows.sequences(["retain"])) == [[0, 0], [0, 1], [0, 2]]
    assert list(rows.sequences(None)) == [[0, 0], [0, 1], [0, 2], [0, 100], [0, 101], [7, 8], [9, 9]]
    pairs = PairRows([TokenizedPair([1], [2], [3])], anchor=[[7, 8]])
    assert pairs[0] == {"retain": ([1], [2]), "forget": ([1], [3]), "anchor": ([], [7, 8])}
    assert list(pairs.sequences(["retain", "anchor"])) == [[1, 2], [7, 8]]
