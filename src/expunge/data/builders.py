"""Preference pairs from a model's own continuations of prompts, told apart by a scorer.

    pairs, report = build_pairs(model, tokenizer, prompts, load_scorer("wordvec"), BestOfN(samples=8))
    pairs, report = build_pairs(model, tokenizer, prompts, load_scorer("wordvec"), PPLM(), probe=probe)

    chosen   = the greedy continuation if its score <= benign, else (best-of-n) the least toxic sample
    rejected = the most toxic sample if its score >= toxic; otherwise the prompt gives no pair

Samples are the model's own (best-of-n), or pushed by a probe (PPLM). Continuations that end early, repeat themselves or are
not text are never candidates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from expunge.data.pairs import Pair
from expunge.data.pplm import PPLM, perturbed
from expunge.data.selection import Candidate, Selection, is_usable, select
from expunge.errors import ExpungeError
from expunge.generation import Decoding, generate
from expunge.ids import continuation_text, prompt_ids
from expunge.probes import Probe
from expunge.scorers import Scorer


@dataclass(frozen=True, kw_only=True)
class BestOfN(Selection):
    """How continuations are drawn, and which may make a pair: both sides are likely ones under the model."""

    samples: int = 8
    top_p: float = 0.9
    temperature: float = 1.0


STRATEGIES: dict[str, type[Selection]] = {"best-of-n": BestOfN, "pplm": PPLM}


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
    recipe: Selection | None = None,
    batch_size: int | None = None,
    probe: Probe | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Pair], BuildReport]:
    """At most one pair for each prompt, in order, and the count of prompts without one by reason.

    recipe: BestOfN (default) or PPLM, which needs a probe. progress: called with (samples drawn, samples in all).
    """
    recipe = recipe or BestOfN()
    report = BuildReport(prompts=len(prompts))
    pairs: list[Pair] = []
    seen: set[str] = set()
    drawn = draw(model, tokenizer, prompts, scorer, recipe, batch_size, probe, progress)
    for prompt, candidates in zip(prompts, drawn, strict=True):
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
    recipe: Selection,
    batch_size: int | None = None,
    probe: Probe | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Candidate]]:
    """For each prompt its scored candidates: the greedy continuation first, then `recipe.samples` samples.

    PPLM is slow: a prompt whose greedy side cannot be chosen gets no samples.
    """
    ids = prompt_ids(tokenizer, prompts)

    def scored(of: Sequence[int], drawn: Sequence[Sequence[Sequence[int]]]) -> list[list[Candidate]]:
        texts = [[continuation_text(tokenizer, ids[i], new) for new in group] for i, group in zip(of, drawn, strict=True)]
        scores = iter(scorer.score([text for group in texts for text in group]).tolist())
        return [
            [Candidate(tuple(new), text, next(scores)) for new, text in zip(*group, strict=True)]
            for group in zip(drawn, texts, strict=True)
        ]

    everyone = range(len(ids))
    found = scored(everyone, generate(model, tokenizer, ids, Decoding(recipe.max_new_tokens), batch_size))
    if isinstance(recipe, PPLM):
        if probe is None:
            raise ExpungeError("PPLM needs a probe that says where toxic is (expunge.probes.fit_probe)")
        worth = [i for i in everyone if is_usable(found[i][0], recipe) and found[i][0].score <= recipe.benign]
        sampled = perturbed(model, tokenizer, [ids[i] for i in worth], probe, recipe, batch_size, progress)
    else:
        assert isinstance(recipe, BestOfN)
        sampling = Decoding(recipe.max_new_tokens, recipe.samples, recipe.top_p, recipe.temperature, recipe.seed)
        worth, sampled = everyone, generate(model, tokenizer, ids, sampling, batch_size, progress)
    for i, samples in zip(worth, scored(worth, sampled), strict=True):
        found[i] += samples
    return found
