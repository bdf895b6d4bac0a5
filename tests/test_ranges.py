from dataclasses import dataclass
from typing import Annotated

import pytest

from expunge.config import convert, hold_fields
from expunge.errors import ExpungeError
from expunge.ranges import Count, NonNegative, Positive, Range, range_of


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "said"),
    [
        (Range(ge=1), [1, 2], [0, -1], "1 or more"),
        (Range(gt=0), [1e-9], [0, -1], "more than 0"),
        (Range(ge=0, le=1), [0, 0.5, 1], [-0.1, 1.1], "0 to 1"),
        (Range(gt=0, le=1), [1], [0, 1.1], "more than 0 and at most 1"),
        (Range(ge=0, lt=1), [0, 0.9], [1], "0 or more and less than 1"),
        (Range(ge=0), [0], [float("nan")], "0 or more"),
    ],
)
def test_bounds_are_checked_and_said(bounds, inside, outside, said):
    for value in inside:
        bounds.check(value, "x")
    for value in outside:
        with pytest.raises(ExpungeError, match=f"^a.x={value}: expected {said}$"):
            bounds.check(value, "a.x")


def test_a_range_holds_inside_unions_and_lists():
    """What is out of range is said to be that, and not to be of another type."""
    assert convert(Positive | None, None, "x") is None
    assert convert(Positive | None, 2, "x") == 2.0
    with pytest.raises(ExpungeError, match=r"^x=0.0: expected more than 0$"):
        convert(Positive | None, 0, "x")
    with pytest.raises(ExpungeError, match=r"^x='a': expected a number or null$"):
        convert(Positive | None, "a", "x")
    assert convert(list[Count], [1, 2], "x") == [1, 2]
    with pytest.raises(ExpungeError, match=r"^x=0: expected 1 or more$"):
        convert(list[Count], [1, 0], "x")
    with pytest.raises(ExpungeError, match=r"^x=1.5: expected a whole number$"):
        convert(Count, 1.5, "x")


def test_fields_of_a_dataclass_are_held_to_their_ranges():
    @dataclass
    class Settings:
        weight: NonNegative = 0.2
        share: Annotated[float, Range(ge=0, le=1)] | None = None

    settings = Settings(weight=1)
    hold_fields(settings, "method")
    assert settings.weight == 1.0 and isinstance(settings.weight, float)
    with pytest.raises(ExpungeError, match=r"^method.share=2.0: expected 0 to 1$"):
        hold_fields(Settings(share=2), "method")


def test_the_range_of_an_annotation_is_found():
    assert range_of(Count) == Range(ge=1) and range_of(int) is None
