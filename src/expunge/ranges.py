"""Ranges of settings, written into their annotations.

    weight: NonNegative = 0.2
    top_p: Annotated[float, Range(gt=0, le=1)] = 0.9

`config.convert` checks them, wherever a setting comes from.
"""

import dataclasses
from typing import Annotated, Any

from expunge.errors import ExpungeError


class OutOfRange(ExpungeError):
    """A value of the right type that is too small or too large."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """Bounds of a number, each of them None where there is none: ge <= value <= le, gt < value < lt."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def check(self, value: float, path: str) -> None:
        """Raise OutOfRange, with the dotted `path` of the setting."""
        inside = (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )
        if not inside:
            raise OutOfRange(f"{path}={value!r}: expected {self}")

    def __str__(self) -> str:
        if self.ge is not None and self.le is not None:
            return f"{self.ge:,} to {self.le:,}"
        words = [
            *([f"{self.ge:,} or more"] if self.ge is not None else []),
            *([f"more than {self.gt:,}"] if self.gt is not None else []),
            *([f"at most {self.le:,}"] if self.le is not None else []),
            *([f"less than {self.lt:,}"] if self.lt is not None else []),
        ]
        return " and ".join(words)


def range_of(hint: Any) -> Range | None:
    """The range in an annotation, or None."""
    return next((extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Range)), None)


Count = Annotated[int, Range(ge=1)]
NonNegativeInt = Annotated[int, Range(ge=0)]
Positive = Annotated[float, Range(gt=0)]
NonNegative = Annotated[float, Range(ge=0)]
Seed = Annotated[int, Range(ge=0, le=2**32 - 1)]
