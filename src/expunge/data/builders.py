"""Preference pairs from a model's own continuations, the best and the worst of n by a scorer.

    pairs, report = build_pairs(model, tokenizer, prompts, load_scorer("wordvec"), BestOfN(samples=8))

    chosen   = the greedy continuation if its score <= benign, else the least toxic sample
    rejected = the most toxic sample if its score >= toxic; otherwise the prompt gives no pair

Both sides are likely continuations under the model, so what tells them apart is content, not fluency. Continuations
that end early, repeat themselves or are not text are never candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from expunge.data.pairs import Pair
from expunge.data.tokenize import encode, leading_tokens
from expunge.errors import ExpungeError
from expunge.generation import Decoding, generate
from expunge.scorers import Scorer


@dataclass(frozen=True)
class BestOfN:
    """How continuations are drawn, and which may make a pair. Scores are the scorer's, in [0, 1]."""

    samples: int = 8
    max_new_tokens: int = 20
    min_tokens: int = 14  # a shorter continuation is not used
    top_p: float = 0.9
    temperature: float = 1.0
    benign: float = 0.2  # chosen scores at most this
    toxic: float = 0.5  # rejected scores at least this
    variety: float = 0.6  # at least this share of a continuation's tokens are different ones
    similarity: float = 0.5  # Jaccard index of both sides' tokens, at most
    one_line: bool = False  # a continuation that leaves the prompt's line is not used
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.min_tokens > self.max_new_tokens or self.benign >= self.toxic:
            raise ExpungeError(f"{self}: need samples >= 1, min_tokens <= max_new_tokens, benign < toxic")


@dataclass(frozen=True)
class Candidate:
    """One continuation: its tokens, its text with the leading space it brings, and its score."""

    ids: tuple[int, ...]
    text: str
    score: float


@dataclass
class BuildReport:
    """What became of the prompts."""

    prompts: int = 0
    pairs: int = 0
    greedy: int = 0  # pairs whose chosen side is the greedy continuation
    chosen_score: float = 0.0  # mean over the pairs
    rejected_score: float = 0.0
    dropped: dict[str, int] = field(default_factory=dict)  # prompts that gave no pair, by reason


def build_pairs(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    scorer: Scorer,
    recipe: BestOfN | None = None,
    batch_size: int | None = None,
) -> tuple[list[Pair], BuildReport]:
    """At most one pair for each prompt, in order, and the count of prompts without one by reason."""
    recipe = recipe or BestOfN()
    report = BuildReport(prompts=len(prompts))
    pairs: list[Pair] = []
    seen: set[str] = set()
    for prompt, candidates in zip(prompts, draw(model, tokenizer, prompts, scorer, recipe, batch_size), strict=True):
        selected = select(candidates, recipe)
        if not isinstance(selected, str) and {prompt, *(side.text for side in selected)} & seen:
            selected = "duplicate"
        if isinstance(selected, str):
            report.dropped[selected] = report.dropped.get(selected, 0) + 1
            continue
        chosen, rejected = selected
        seen |= {prompt, chosen.text, rejected.text}
        pairs.append(Pair(prompt, chosen.text, rejected.text))
        report.greedy += chosen is candidates[0]
        report.chosen_score += chosen.score
        report.rejected_score += rejected.score
    report.pairs = len(pairs)
    report.chosen_score /= max(1, len(pairs))
    report.rejected_score /= max(1, len(pairs))
    return pairs, report


def draw(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    scorer: Scorer,
    recipe: BestOfN,
    batch_size: int | None = None,
) -> list[list[Candidate]]:
    """For each prompt its scored candidates: the greedy continuation first, then `recipe.samples` samples."""
    start = leading_tokens(tokenizer)
    ids = [start + encode(tokenizer, prompt) for prompt in prompts]
    sampling = Decoding(recipe.max_new_tokens, recipe.samples, recipe.top_p, recipe.temperature, recipe.seed)
    greedy = generate(model, tokenizer, ids, Decoding(recipe.max_new_tokens), batch_size)
    sampled = generate(model, tokenizer, ids, sampling, batch_size)
    drawn = [first + others for first, others in zip(greedy, sampled, strict=True)]
    texts = [[continuation_text(tokenizer, p, new) for new in group] for p, group in zip(ids, drawn, strict=True)]
    scores = iter(scorer.score([text for group in texts for text in group]).tolist())
    return [
        [Candidate(tuple(new), text, next(scores)) for new, text in zip(group, group_texts, strict=True)]
        for group, group_texts in zip(drawn, texts, strict=True)
    ]


def continuation_text(tokenizer: Any, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text that `new` adds to `prompt`: decoded together, as SentencePiece drops a leading space of its own."""
    known = tokenizer.decode(prompt, skip_special_tokens=True)
    return tokenizer.decode([*prompt, *new], skip_special_tokens=True)[len(known) :]


def select(candidates: Sequence[Candidate], recipe: BestOfN) -> tuple[Candidate, Candidate] | str:
    """(chosen, rejected) of one prompt's candidates, the greedy one first; or the reason why there is no pair."""
    usable = [candidate for candidate in candidates if is_usable(candidate, recipe)]
    if not usable:
        return "unusable"
    rejected = max(usable, key=lambda candidate: candidate.score)
    if rejected.score < recipe.toxic:
        return "none toxic"
    greedy = candidates[0]
    greedy_serves = usable[0] is greedy and greedy.score <= recipe.benign
    chosen = greedy if greedy_serves else min(usable, key=lambda candidate: candidate.score)
    if chosen.score > recipe.benign:
        return "none benign"
    if jaccard(chosen.ids, rejected.ids) > recipe.similarity:
        return "similar"
    return chosen, rejected


def is_usable(candidate: Candidate, recipe: BestOfN) -> bool:
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
