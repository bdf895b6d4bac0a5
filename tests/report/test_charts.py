import math

from expunge.report.charts import HEIGHT, POINTS, WIDTH, curves, marks
from expunge.report.tables import CHALLENGE, headline


def coordinates(path):
    return [tuple(map(float, point.split(","))) for point in path.split()]


def test_a_falling_series_runs_from_the_upper_left_to_the_lower_right():
    (curve,) = curves([{"step": step, "anchor": 3.0 - step} for step in (0, 1, 2)])
    assert coordinates(curve.line) == [(0, 0), (WIDTH / 2, HEIGHT / 2), (WIDTH, HEIGHT)]
    assert (curve.first, curve.last, curve.low, curve.high, curve.steps) == (3.0, 1.0, 1.0, 3.0, (0, 2))


def test_a_long_series_is_drawn_as_means_with_their_extremes():
    (curve,) = curves([{"step": step, "loss": float(step % 2)} for step in range(2 * POINTS)])
    assert len(coordinates(curve.line)) == POINTS
    assert {y for _, y in coordinates(curve.line)} == {HEIGHT / 2}
    assert {y for _, y in coordinates(curve.band)} == {0, HEIGHT}


def test_what_is_not_a_number_is_counted_and_left_out():
    records = [{"step": i, "loss": value, "note": "text", "epoch": i} for i, value in enumerate((1.0, math.nan, 2.0, None))]
    (curve,) = curves(records)
    assert curve.skipped == 1
    assert len(coordinates(curve.line)) == 2


def test_a_flat_series_lies_in_the_middle():
    (curve,) = curves([{"step": step, "loss": 0.5} for step in (1, 2)])
    assert {y for _, y in coordinates(curve.line)} == {HEIGHT / 2}


def test_losses_come_first():
    assert [curve.name for curve in curves([{"step": i, "tokens_per_second": i, "erase": i} for i in (1, 2)])] == [
        "erase",
        "tokens per second",
    ]


def test_marks_share_an_axis_from_zero(run_rows):
    ((number, pair),) = marks(headline({"a": run_rows()}), CHALLENGE).items()
    (_, before), (_, after) = pair
    assert number == 0
    assert before.at - 4 == 2 * (after.at - 4)
    assert after.low < after.at < after.high < before.high
