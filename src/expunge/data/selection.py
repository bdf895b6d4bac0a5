"""Which continuations of a prompt make a preference pair: usable text, far enough apart in score and in words.

select([greedy, *samples], BestOfN())        # (chosen, rejected), or the reason why there is no pair
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from expunge.errors import ExpungeError


@dataclass(frozen=True, kw_only=True)
class Selection:
    """How long continuations are, and which may make a pair. Scores are the scorer's, in [0, 1]."""

    samples: int = 1  # beside the greedy continuation
    max_new_tokens: int = 20
    min_tokens: int = 14  # a shorter continuation is not used
    chosen: Literal["greedy", "best"] = "best"  # best: the least toxic sample where the greedy one is not benign
    benign: float = 0.2  # chosen scores at most this
    toxic: float = 0.5  # rejected scores at least this
    variety: float = 0.6  # at least this share of a continuation's tokens are different ones
    similarity: float = 0.5  # Jaccard index of both sides' tokens, at most
    one_line: bool = False  # a continuation that leaves the prompt's line is not used
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or not 1 <= self.min_tokens <= self.max_new_tokens or self.benign >= self.toxic:
            raise ExpungeError(f"{self}: need samples >= 1, 1 <= min_tokens <= max_new_tokens, benign < toxic")


@dataclass(frozen=True)
class Candidate:
    """One continuation: its tokens, its text with the leading space it brings, and its score."""

    ids: tuple[int, ...]
    text: str
    score: float


def select(candidates: Sequence[Candidate], recipe: Selection) -> tuple[Candidate, Candidate] | str:
    """(chosen, rejected) of one prompt's candidates, the greedy one first; or the reason why there is no pair."""
    greedy = candidates[0]
    usable = [candidate for candidate in candidates if is_usable(candidate, recipe)]
    if not usable or (recipe.chosen == "greedy" and usable[0] is not greedy):
        return "unusable"
    if recipe.chosen == "greedy" and greedy.score > recipe.benign:
        return "none benign"
    rejected = max(usable, key=lambda candidate: candidate.score)
    if rejected.score < recipe.toxic:
        return "none toxic"
    greedy_serves = usable[0] is greedy and greedy.score <= recipe.benign
    chosen = greedy if greedy_serves else min(usable, key=lambda candidate: candidate.score)
    if chosen.score > recipe.benign:
        return "none benign"
    if jaccard(chosen.ids, rejected.ids) > recipe.similarity:
        return "similar"
    return chosen, rejected


def is_usable(candidate: Candidate, recipe: Selection) -> bool:
    """Long enough, not blank, whole characters only, not repeating itself, and on one line where that is asked for."""
    length = len(candidate.ids)
    return (
        length >= recipe.min_tokens
        and not (recipe.one_line and "\n" in candidate.text)
        and bool(candidate.text.strip())
        and "\ufffd" not in candidate.text
        and len(set(candidate.ids)) >= recipe.variety * length
    )


def jaccard(a: Sequence[int], b: Sequence[int]) -> float:
    """|A and B| / |A or B| of the two sets of tokens; 1 for two empty ones."""
    union = set(a) | set(b)
    return len(set(a) & set(b)) / len(union) if union else 1.0
