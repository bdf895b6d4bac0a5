"""The operators of FLRT's search: what they may change, what they draw from, and which strings survive as text."""

import itertools
from collections import Counter

import pytest
import torch

from expunge.attacks.search.proposals import expected, grow, liked, minimum_length, pick, propose
from expunge.attacks.search.strings import allowed_tokens, typed_before
from expunge.errors import ExpungeError
from expunge.ids import encode

WEIGHTS = {"gcg": 0.7, "delete": 0.1, "insert": 0.1, "swap": 0.1}
STRING = [5, 6, 7, 6]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def all_survive(rows: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(rows), dtype=torch.bool)


def test_the_minimum_rises_along_a_ramp():
    assert [minimum_length(i, 32, 100, 1000) for i in (0, 500, 1000, 5000)] == [32, 66, 100, 100]


def test_operators_come_by_their_weight_and_lengths_keep_to_the_bounds(generator):
    def drawn(length, weights=WEIGHTS, minimum=10, maximum=20, times=2000):
        return Counter(pick(weights, length, minimum, maximum, generator) for _ in range(times))

    middle = drawn(15)
    assert all(abs(middle[name] / 2000 - weight) < 0.04 for name, weight in WEIGHTS.items())
    for short in (1, 9, 10):
        assert set(drawn(short, times=50)) == {"insert"}
    for long in (20, 25):
        assert set(drawn(long, times=400)) == {"gcg", "delete", "swap"}
    fixed = {**WEIGHTS, "insert": 0.0}
    assert set(drawn(10, fixed, times=400)) == {"gcg", "swap"}  # nothing could grow again
    assert set(drawn(11, fixed, times=400)) == {"gcg", "swap", "delete"}
    assert set(drawn(10, minimum=10, maximum=10, times=400)) == {"gcg", "swap"}  # it may neither grow nor shrink


def test_liked_are_the_allowed_tokens_of_least_slope():
    slope = torch.tensor([[3.0, -1.0, 0.0, -5.0], [0.0, 1.0, 2.0, -1.0]])
    allowed = torch.tensor([True, True, True, False])
    assert liked(slope, allowed, 2).tolist() == [[1, 2], [0, 1]]
    assert liked(slope, allowed, 64).shape == (2, 3)


def test_expected_are_different_allowed_tokens_drawn_by_their_probability(generator):
    probabilities = torch.tensor([0.5, 0.2, 0.2, 0.1])
    allowed = torch.tensor([True, True, False, True])
    rows = expected(probabilities.log().expand(4000, -1), allowed, 2, generator)
    assert all(a != b for a, b in rows.tolist()) and 2 not in rows
    share = torch.bincount(rows[:, 0], minlength=4) / 4000
    torch.testing.assert_close(share, torch.tensor([0.5, 0.2, 0.0, 0.1]) / 0.8, atol=0.03, rtol=0)


@pytest.mark.parametrize("operator", ["gcg", "swap", "insert", "delete"])
def test_proposals_are_all_strings_one_change_away(generator, operator):
    """Asked for more than there are, they are exactly those that can be made by hand."""
    table = torch.tensor([[10, 11], [12, 13], [14, 7], [16, 17], [18, 19]])[: 5 if operator == "insert" else 4]
    wanted = set()
    for place, row in enumerate(table.tolist()):
        if operator == "delete":
            wanted.add((*STRING[:place], *STRING[place + 1 :]))
        for token in [] if operator == "delete" else row:
            changed = list(STRING)
            changed[place : place + (operator != "insert")] = [token]
            wanted.add(tuple(changed))
    wanted.discard(tuple(STRING))  # 7 in the place of 7 is none
    found = propose(operator, STRING, None if operator == "delete" else table, 99, all_survive, generator)
    assert len(found) == len(wanted) and {tuple(row) for row in found} == wanted
    some = propose(operator, STRING, None if operator == "delete" else table, 2, all_survive, generator)
    assert len(some) == 2 and {tuple(row) for row in some} < wanted
    length = len(STRING) + {"insert": 1, "delete": -1}.get(operator, 0)
    assert {len(row) for row in found} == {length}


def test_those_that_do_not_survive_are_not_proposed(generator):
    table = torch.arange(10, 110).expand(4, -1)
    even = propose("swap", STRING, table, 16, lambda rows: (rows >= 10).logical_and(rows % 2 == 0).any(1), generator)
    assert len(even) == 16 and all(any(t >= 10 and t % 2 == 0 for t in row) for row in even)
    assert propose("swap", STRING, table, 16, lambda rows: ~all_survive(rows), generator) == []
    assert propose("delete", [5], None, 16, all_survive, generator) == []


def test_typed_before_tells_what_comes_back_from_text(tokenizer):
    """Every pair of tokens, against the plain definition."""
    allowed = allowed_tokens(tokenizer, 320).nonzero().flatten().tolist()
    rows = torch.tensor(list(itertools.product(allowed[::9], repeat=2)))
    prompts = [encode(tokenizer, "The river"), encode(tokenizer, "ed home")]
    kept = typed_before(tokenizer, prompts, rows)
    texts = [tokenizer.decode(row) for row in rows.tolist()]
    for row, text, survived in zip(rows.tolist(), texts, kept.tolist(), strict=True):
        after = [encode(tokenizer, text + more)[:2] for more in ("", "The river", "ed home")]
        assert survived == all(found == row for found in after)
    assert 0 < kept.sum() < len(kept)
    alone = typed_before(tokenizer, [], rows)
    assert (kept <= alone).all() and kept.sum() < alone.sum()


def test_a_string_grows_by_the_first_token_with_which_it_survives():
    asked = []

    def draw(string):
        asked.append(list(string))
        return torch.arange(40, 80)

    def survives(rows):
        return rows[:, -1] >= 50 + rows.shape[1]

    assert grow(3, draw, survives) == [51, 52, 53] and asked == [[], [51], [51, 52]]
    with pytest.raises(ExpungeError, match="no string of 2 tokens"):
        grow(2, draw, lambda rows: ~all_survive(rows))
