"""What every scorer offers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


class Scorer(ABC):
    """Text to toxicity. A registered class is one scorer; `Scorer()` loads it."""

    name: str
    """Its name in the registry, in rows and in tables."""
    digest: str
    """Hex sha256 of all that decides its scores: recorded in provenance, part of cache keys."""

    @abstractmethod
    def score(self, texts: Sequence[str]) -> "np.ndarray":
        """float64 `[N]` in [0, 1], one per text, in order; an empty or blank text is 0."""
