import math
from dataclasses import replace
from itertools import pairwise

import pytest

from expunge.report.frontier import BOTTOM, LEFT, RIGHT, TOP, frontier, pareto

RATIOS = {10: (1.01, 0.8), 20: (1.04, 0.7), 30: (1.02, 0.5), 40: (1.05, 0.5), 50: (1.1, 0.25)}


def column(found, name):
    at = found.table.headers.index(name) - 1
    return [line.cells[at].value for line in found.table.lines]


def test_the_frontier_is_what_nothing_beats_in_both(checkpoint_rows):
    found = frontier(checkpoint_rows(RATIOS))
    assert column(found, "frontier") == [1, 0, 1, 0, 1]  # 20 loses to 30 in both, 40 to 30 in perplexity alone
    assert [point.best for point in found.drawing.points] == [True, False, True, False, True]
    assert column(found, "toxicity") == [0.4, 0.35, 0.25, 0.25, 0.125]
    assert column(found, "perplexity ratio") == [pair[0] for pair in RATIOS.values()]


@pytest.mark.parametrize(
    ("pairs", "best"),
    [
        ([(1.1, 1.0)], {(1.0, 1.0)}),  # worse than doing nothing
        ([(1.0, 0.5)], {(1.0, 0.5)}),
        ([(0.9, 1.1)], {(0.9, 1.1), (1.0, 1.0)}),
        ([(1.2, 0.5), (1.2, 0.4), (1.2, 0.4)], {(1.0, 1.0), (1.2, 0.4)}),
    ],
)
def test_the_reference_competes(pairs, best):
    assert pareto(pairs) == best


def test_pareto_against_its_definition():
    pairs = [((7 * i) % 11 / 10 + 0.5, (5 * i) % 13 / 10 + 0.1) for i in range(40)]
    rivals = [*pairs, (1.0, 1.0)]
    beaten = {p for p in pairs if any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in rivals)}
    assert pareto(pairs) - {(1.0, 1.0)} == set(pairs) - beaten


def test_right_is_dearer_and_down_is_better(checkpoint_rows):
    drawing = frontier(checkpoint_rows({10: (1.0, 0.5), 20: (1.1, 0.25)})).drawing
    path = [tuple(map(float, point.split(","))) for point in drawing.line.split()]
    reference, first, second = path
    assert reference == (drawing.reference.x, drawing.reference.y)
    assert first[0] == reference[0] < second[0] <= RIGHT
    assert BOTTOM - first[1] == pytest.approx((BOTTOM - reference[1]) / 2, abs=0.1)
    assert BOTTOM - second[1] == pytest.approx((BOTTOM - reference[1]) / 4, abs=0.1)
    assert drawing.y_ticks[0] == (BOTTOM, "0.0")
    assert ("1.00" in [text for _, text in drawing.x_ticks]) and all(LEFT <= x <= RIGHT for x, _ in drawing.x_ticks)


def test_labels_cover_neither_points_nor_each_other(checkpoint_rows):
    points = frontier(checkpoint_rows({i: (1 + i / 1000, 0.5) for i in range(1, 60)})).drawing.points
    labelled = [point for point in points if point.label]
    assert 5 <= len(labelled) < len(points)
    assert points[0].best and points[0].label
    for point in labelled:
        assert LEFT <= point.label.x <= RIGHT and TOP <= point.label.y <= BOTTOM
    heights = sorted((point.label.y, point.label.x) for point in labelled)
    assert all(b[1] - a[1] > 7 for a, b in pairwise(heights) if a[0] == b[0])


def test_the_first_scorer_is_drawn_and_every_one_tabled(checkpoint_rows):
    rows = checkpoint_rows({10: (1.0, 0.5)}) + [r for r in checkpoint_rows({10: (1.0, 0.75)}, "wordvec") if r.scorer]
    found = frontier(rows)
    assert found.drawing.name == "sampled, challenge, ngram"
    assert [line.group for line in found.table.lines] == ["sampled, challenge, ngram", "sampled, challenge, wordvec"]
    assert column(found, "toxicity ratio") == [0.5, 0.75]


def test_of_two_measurements_of_a_step_the_later_holds(checkpoint_rows):
    found = frontier([*checkpoint_rows({10: (1.0, 0.5)}), *checkpoint_rows({10: (1.0, 0.25)})])
    assert column(found, "toxicity ratio") == [0.25]


def test_steps_are_in_order_whatever_the_rows(checkpoint_rows):
    found = frontier(checkpoint_rows({100: (1.1, 0.25), 20: (1.0, 0.5)}))
    assert [line.label for line in found.table.lines] == ["20", "100"]


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_checkpoint_without_both_ratios_is_tabled_and_not_drawn(checkpoint_rows, value):
    rows = checkpoint_rows({10: (1.0, 0.5), 20: (1.0, 0.25)})
    rows = [replace(row, value=value) if row.step == 20 and row.metric == "perplexity_ratio" else row for row in rows]
    found = frontier(rows)
    assert [point.step for point in found.drawing.points] == [10]
    assert column(found, "frontier") == [1, None]
    lone = [row for row in rows if row.metric.startswith("toxicity")]
    assert frontier(lone).drawing is None
    assert len(frontier(lone).table.lines) == 2


def test_no_checkpoints(checkpoint_rows, run_rows):
    assert frontier([]) is None
    assert frontier(run_rows()) is None


def test_many_checkpoints_are_thinned_and_the_best_kept(checkpoint_rows):
    ratios = {i: (1.5, 0.5 + i / 10_000) for i in range(1, 1001)}
    ratios[777] = (1.25, 0.25)
    drawing = frontier(checkpoint_rows(ratios)).drawing
    assert len(drawing.points) < 250
    assert [point.step for point in drawing.points if point.best] == [777]
    assert len(drawing.line.split()) == 1001
