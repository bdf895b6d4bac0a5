"""Measure one model: toxicity on provoking and held-out prompts, perplexity, F1, answers, and signs of broken text.

    evaluation = evaluate_model(model, tokenizer, data, EvaluationPlan(), [load_scorer("ngram")])
    for row in rows(evaluation, reference): ...                 # expunge.metrics.figures

An answer of fewer than `max_new_tokens` tokens has ended by itself (`ended_share`).

In-distribution toxicity ("heldout"): the model goes on after a held-out prompt and the first k tokens of one of its two
sides; only what it writes itself is scored. With k = 0 both sides ask the same question, and share the answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from expunge.data.multiple_choice import Question
from expunge.data.tokenize import split_pairs
from expunge.errors import ExpungeError
from expunge.generation import Decoding, generate
from expunge.ids import Split, check_known, continuation_text, encode, leading_tokens, opened, split
from expunge.metrics.f1 import Mode as F1Mode
from expunge.metrics.f1 import continuation_f1
from expunge.metrics.figures import Evaluation, Figure, Key
from expunge.metrics.multiple_choice import Mode, chance, choice_logps, is_right, lengths_differ
from expunge.metrics.perplexity import row_nll, text_windows
from expunge.metrics.toxicity import distinct_2, loops, per_prompt
from expunge.models import context_length, evaluating, known_tokens
from expunge.scorers import Scorer


@dataclass
class EvaluationData:
    """What a model is measured on; an empty part is left out."""

    challenge: dict[str, list[str]] = field(default_factory=dict)  # dataset name -> prompts
    pairs: Sequence[Any] = ()  # held-out, with .prompt .chosen .rejected
    neutral: Sequence[Any] = ()  # with .text (the prompt) and .gold (what follows it), for F1
    corpora: dict[str, str] = field(default_factory=dict)  # name -> text
    questions: dict[str, Sequence[Question]] = field(default_factory=dict)  # multiple choice, by name


@dataclass(frozen=True)
class EvaluationPlan:
    """How much is measured, and how (methods.md section 4)."""

    greedy: bool = True
    samples: int = 25  # per prompt, beside the greedy continuation; 0 = greedy alone
    max_new_tokens: int = 20
    prompt_tokens: int = 32
    truncate: Literal["last", "lee2024"] = "last"  # which tokens of a longer prompt are kept: its last, or its first
    ks: tuple[int, ...] = (0, 4, 8)
    sides: tuple[str, ...] = ("rejected", "chosen")
    perplexity_tokens: int | None = None
    perplexity_modes: tuple[Literal["exact", "lee2024"], ...] = ("exact", "lee2024")
    f1_modes: tuple[F1Mode, ...] = ("continuation", "share", "lee2024")
    top_p: float = 0.9
    temperature: float = 1.0
    seed: int = 0
    prefix: tuple[int, ...] = ()  # token ids of an attack, before each prompt, after bos
    suffix: tuple[int, ...] = ()  # and after it, before what is forced

    def __post_init__(self) -> None:
        if self.truncate not in ("last", "lee2024"):
            raise ExpungeError(f"truncate {self.truncate!r}: last (keep the last tokens) or lee2024 (keep the first)")

    def cut(self, ids: list[int]) -> list[int]:
        """What is kept of a prompt, given without bos."""
        return ids[: self.prompt_tokens] if self.truncate == "lee2024" else ids[-self.prompt_tokens :]

    def decodings(self) -> dict[str, Decoding]:
        sampled = Decoding(self.max_new_tokens, self.samples, self.top_p, self.temperature, self.seed)
        found = {"greedy": Decoding(self.max_new_tokens)} if self.greedy else {}
        return {**found, **({"sampled": sampled} if self.samples else {})}


@dataclass(frozen=True)
class Prompts:
    """Prompts of one dataset to be continued; `ids` may keep fewer tokens than the text. sides: those it answers."""

    dataset: str
    prompts: list[str]
    prompt_ids: list[int]
    ids: list[list[int]]
    sides: tuple[str | None, ...] = (None,)
    k: int | None = None


def evaluate_model(
    model: Any,
    tokenizer: Any,
    data: EvaluationData,
    plan: EvaluationPlan,
    scorers: Sequence[Scorer],
    progress: bool = False,
    parts: Path | None = None,
) -> Evaluation:
    """Every figure of `plan` that `data` has text for. progress: show bars on standard error.

    parts: a folder for this model, data and plan alone, where each part is kept once it is measured; the same call goes on
    from there. Raises ExpungeError where a prompt or pair does not fit the model's context, or has an id that the model does
    not know.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    check_room(data, plan, tokenizer, context_length(model), known_tokens(model))
    with evaluating(model), Progress(*columns, console=Console(stderr=True), disable=not progress) as bars:
        evaluator = _Evaluator(model, tokenizer, plan, scorers, bars)
        measured = [partial(evaluator.perplexities, data), partial(evaluator.f1, data.neutral)]
        measured += [partial(evaluator.accuracies, *named) for named in data.questions.items()]
        for prompts in evaluator.prompts(data):
            measured += [partial(evaluator.answer, prompts, *how) for how in plan.decodings().items()]
        found = evaluator.taken()
        for number, measure in enumerate(measured):
            kept = parts / str(number) if parts else None
            if kept and kept.exists():
                found.extend(Evaluation.load(kept))
                continue
            measure()
            part = evaluator.taken()
            if kept:
                part.save(kept)
            found.extend(part)
        evaluator.agreement(found)
    return found


def check_room(data: EvaluationData, plan: EvaluationPlan, tokenizer: Any, context: int, known: int | None = None) -> int:
    """Raise ExpungeError for what cannot be measured on a model of so many tokens' context, before anything is.

    known: ids that the model has embeddings of, if that is known: another id in the text is an error too. Returns how many
    tokens every prompt could still be longer by.
    """
    start, most = len(leading_tokens(tokenizer)), plan.prompt_tokens
    check = partial(check_known, known=known, tokenizer=tokenizer)
    for name, text in data.corpora.items():
        if start + len(encode(tokenizer, text[:1000])) < 2:
            raise ExpungeError(f"data.corpus={name}: fewer than two tokens; perplexity needs a text")
    if known is not None and max(tokenizer.added_tokens_decoder, default=0) >= known:  # else long text is not looked through
        check(encode(tokenizer, text) for text in data.corpora.values())
        for question in (one for some in data.questions.values() for one in some):
            check(encode(tokenizer, [question.prompt + choice for choice in question.choices]))
    prompts = [text for texts in data.challenge.values() for text in texts] + [row.text for row in data.neutral]
    encoded = encode(tokenizer, prompts) if prompts else []
    check(encoded)
    lengths = [min(most, len(ids)) for ids in encoded]
    for index, (prompt, sides, _) in enumerate(split_pairs(tokenizer, data.pairs)):
        check([prompt, *sides])
        for side in plan.sides:
            length = len(side_of(sides, side))
            lengths.append(min(most, len(prompt)) + max((k for k in plan.ks if k < length), default=0))
            if max(1, start + len(prompt)) + length > context:
                raise ExpungeError(
                    f"held-out pair {index}: prompt and {side} side have {start + len(prompt) + length} tokens, more than "
                    f"the context of {context}; shorten the pair"
                )
    start += len(plan.prefix) + len(plan.suffix)
    left = context - plan.max_new_tokens - max(1, start + max(lengths, default=0))
    if lengths and left < 0:
        raise ExpungeError(
            f"a prompt of {start + max(lengths)} tokens and {plan.max_new_tokens} new ones exceed the model's context of "
            f"{context}: lower evaluation.prompt_tokens ({most}) or evaluation.max_new_tokens"
        )
    return left


def side_of(sides: Sequence[list[int]], side: str) -> list[int]:
    """Of `split_pairs`: the ids of that side."""
    return sides[("chosen", "rejected").index(side)]


class _Evaluator:
    """Collects the figures and samples of one model, until they are taken."""

    def __init__(self, model: Any, tokenizer: Any, plan: EvaluationPlan, scorers: Sequence[Scorer], bars: Progress):
        self.model, self.tokenizer, self.plan, self.scorers, self.bars = model, tokenizer, plan, scorers, bars
        self.start = leading_tokens(tokenizer)
        self.found = Evaluation()

    def taken(self) -> Evaluation:
        """What was found since the last call."""
        found, self.found = self.found, Evaluation()
        return found

    def add(self, key: Key, values: Any) -> None:
        self.found.figures.append(Figure.mean(key, np.asarray(values, dtype=np.float64)))

    def cut(self, dataset: str, prompts: Sequence[str]) -> list[list[int]]:
        """Prompts as at most `prompt_tokens` ids, without bos; the share that was longer becomes a figure."""
        encoded = encode(self.tokenizer, list(prompts)) if prompts else []
        self.add(Key("truncated_share", dataset), [len(ids) > self.plan.prompt_tokens for ids in encoded])
        return [self.plan.cut(ids) for ids in encoded]

    def perplexities(self, data: EvaluationData) -> None:
        """Perplexity of each corpus, and of both sides of the held-out pairs given their prompt."""
        for name, text in data.corpora.items():
            found = text_windows(self.model, self.tokenizer, text, self.plan.perplexity_tokens)
            lengths = found.tokens + 1  # with the first token, or the bos, that nothing predicts
            weights = {"exact": found.tokens, "lee2024": lengths}
            for mode in self.plan.perplexity_modes:
                self.perplexity(Key("perplexity", name, mode=mode), found.nll / found.tokens * weights[mode], weights[mode])
            words = found.words * found.tokens / found.tokens.sum()  # shared out to windows by their tokens
            self.perplexity(Key("word_perplexity", name), found.nll, words)
        pairs = split_pairs(self.tokenizer, data.pairs)
        for side in self.plan.sides if data.pairs else ():
            opening = [opened(self.tokenizer, self.start + pair.prompt, side_of(pair.sides, side)) for pair in pairs]
            rows = [(prompt + text, len(prompt)) for prompt, text in opening]
            self.perplexity(Key("continuation_perplexity", "heldout", side=side), *row_nll(self.model, rows))

    def perplexity(self, key: Key, nll: np.ndarray, weights: np.ndarray) -> None:
        self.found.figures.append(Figure(key, "perplexity", np.stack([nll, weights], axis=1).astype(np.float64)))

    def f1(self, neutral: Sequence[Any]) -> None:
        """F1 of the greedy continuation of each neutral prompt with what its source says next."""
        if not neutral:
            return
        texts, new = [row.text for row in neutral], self.plan.max_new_tokens
        prompts = self.cut("neutral", texts)
        followed = split(self.tokenizer, texts, [_joined(row.text, row.gold) for row in neutral])
        golds = [gold for _, (gold,), _ in followed]
        answers = self.generate("F1", prompts, Decoding(new))
        for mode in self.plan.f1_modes:
            values = [
                continuation_f1(prompt, answer, gold, new, mode)
                for prompt, (answer,), gold in zip(prompts, answers, golds, strict=True)
            ]
            self.add(Key("f1", "neutral", "greedy", mode=mode), values)

    def accuracies(self, name: str, questions: Sequence[Question]) -> None:
        """The share of questions of which the right choice is the likeliest, and of those that were cut."""
        logps, cut = choice_logps(self.model, self.tokenizer, questions, self.shown(name))
        self.add(Key("truncated_share", name), cut)
        modes: list[Mode] = ["acc", "acc_norm"] if lengths_differ(questions) else ["acc"]
        for mode in modes:
            right = is_right(questions, logps, mode)
            self.found.figures.append(Figure.accuracy(Key("accuracy", name, mode=mode), right, chance(questions)))

    def prompts(self, data: EvaluationData) -> list[Prompts]:
        """Challenge prompts as they are; held-out prompts with the first k tokens of a side that has more than k."""
        suffix = list(self.plan.suffix)
        asked = [
            Prompts(name, prompts, list(range(len(prompts))), [ids + suffix for ids in self.cut(name, prompts)])
            for name, prompts in data.challenge.items()
        ]
        if not data.pairs:
            return asked
        starts, pairs = self.cut("heldout", [pair.prompt for pair in data.pairs]), split_pairs(self.tokenizer, data.pairs)
        for k in self.plan.ks:
            for sides in [(side,) for side in self.plan.sides] if k else [self.plan.sides]:
                if not k:
                    prompts, ids = [pair.prompt for pair in data.pairs], [start + suffix for start in starts]
                    asked.append(Prompts("heldout", prompts, list(range(len(ids))), ids, sides, k))
                    continue
                forced = [side_of(pair.sides, sides[0]) for pair in pairs]
                kept = [i for i, ids in enumerate(forced) if len(ids) > k]
                ids = [self.plan.cut(pairs[i].prompt) + suffix + forced[i][:k] for i in kept]
                prompts = [self.forced_text(data.pairs[i].prompt, pairs[i], forced[i][:k]) for i in kept]
                if kept:
                    asked.append(Prompts("heldout", prompts, kept, ids, sides, k))
        return asked

    def forced_text(self, prompt: str, pair: Split, forced: list[int]) -> str:
        """A prompt and what is forced after it, as text."""
        if pair.moved:  # what is forced begins with the prompt's own end
            return continuation_text(self.tokenizer, [], pair.prompt + forced)
        return prompt + continuation_text(self.tokenizer, pair.prompt, forced)

    def answer(self, asked: Prompts, decode: str, decoding: Decoding) -> None:
        """Continue every prompt, score what is new, keep figures and samples."""
        label = f"{asked.dataset} {decode}" + (f" k={asked.k}" if asked.k else "")
        answers = self.generate(label, [[*self.plan.prefix, *ids] for ids in asked.ids], decoding)
        texts = [
            [continuation_text(self.tokenizer, prompt, new) for new in group]
            for prompt, group in zip(asked.ids, answers, strict=True)
        ]
        flat = [text for group in texts for text in group]
        shape = (len(texts), decoding.samples or 1)
        scores = {scorer.name: scorer.score(flat).reshape(shape) for scorer in self.scorers}
        for side in asked.sides:
            self.add_figures(Key("", asked.dataset, decode, side, asked.k, samples=shape[1]), answers, texts, scores)
        for row, (prompt_id, prompt) in enumerate(zip(asked.prompt_ids, asked.prompts, strict=True)):
            for sample, text in enumerate(texts[row]):
                self.found.samples.append(
                    {
                        "dataset": asked.dataset, "decode": decode, "side": asked.sides[0], "k": asked.k,
                        "prompt_id": prompt_id, "prompt": prompt, "sample": sample, "continuation": text,
                        "ended": len(answers[row][sample]) < decoding.max_new_tokens,
                        "scores": {name: round(float(matrix[row, sample]), 6) for name, matrix in scores.items()},
                    }
                )  # fmt: skip

    def add_figures(
        self, key: Key, answers: list[list[list[int]]], texts: list[list[str]], scores: dict[str, np.ndarray]
    ) -> None:
        """Figures of one side; `key` holds all but the metric and the scorer."""
        for name, matrix in scores.items():
            for metric, values in per_prompt(matrix).items():
                self.add(replace(key, metric=metric, scorer=name), values)
        measures: list[tuple[str, Sequence[Sequence[Any]], Callable[[Any], float]]] = [
            ("empty_share", texts, lambda text: not text.strip()),
            ("ended_share", answers, lambda ids: len(ids) < self.plan.max_new_tokens),
            ("loop_share", answers, loops),
            ("distinct_2", answers, distinct_2),
        ]
        for metric, groups, measure in measures:
            self.add(replace(key, metric=metric), [np.mean([measure(one) for one in group]) for group in groups])

    def agreement(self, found: Evaluation) -> None:
        """Rank correlation of the first two scorers over all scored texts, added to `found`; needs both to vary."""
        if len(self.scorers) < 2 or not found.samples:
            return
        a, b = (np.array([s["scores"][scorer.name] for s in found.samples]) for scorer in self.scorers[:2])
        prompts = [(s["dataset"], s["prompt_id"]) for s in found.samples]
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        if np.ptp(a) and np.ptp(b):
            columns = np.stack([a, b, [numbers[prompt] for prompt in prompts]], axis=1).astype(np.float64)
            names = " and ".join(scorer.name for scorer in self.scorers[:2])
            found.figures.append(Figure(Key("scorer_spearman", scorer=names), "correlation", columns))

    def generate(self, label: str, prompts: list[list[int]], decoding: Decoding) -> list[list[list[int]]]:
        rows = [self.start + ids for ids in prompts]
        return generate(self.model, self.tokenizer, rows, decoding, progress=self.shown(label))

    def shown(self, label: str) -> Callable[[int, int], None]:
        """What moves a new bar."""
        bar = self.bars.add_task(label, total=None)
        return lambda done, total: self.bars.update(bar, completed=done, total=total)


def _joined(prompt: str, gold: str) -> str:
    """`gold` as it follows `prompt` in running text: with the space between them, wherever the set keeps it."""
    return gold if prompt[-1:].isspace() or gold[:1].isspace() else " " + gold
