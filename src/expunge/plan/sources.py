"""What a run reads, by name: pairs, sets of texts, prompts, running text, questions, scorers. Each is read once.

    sources = Sources(lambda: tokenizer)
    sources.pairs("builtin", limit=2000) is sources.pairs("builtin", limit=2000)

Whoever reads here must leave what he gets as it is: others are given the same.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from expunge.config import DataConfig
from expunge.data import Pair, Prompt, Unpaired, load_corpus, load_pairs, load_prompts, load_unpaired
from expunge.data.multiple_choice import Question, load_questions
from expunge.scorers import Scorer, load_scorer

T = TypeVar("T")


class Sources:
    """tokenizer: gives the one whose chat template renders conversations; asked for when the first is read."""

    def __init__(self, tokenizer: Callable[[], PreTrainedTokenizerBase]):
        self._tokenizer = tokenizer
        self._read: dict[tuple[Any, ...], Any] = {}

    def trained_on(self, data: DataConfig, seed: int, passage: int) -> list[Pair] | Unpaired | None:
        """Pairs, or a forget and a retain set; None where neither is named."""
        if data.train is not None:
            return self.pairs(data.train, data.limit, seed)
        if data.forget is None or data.retain is None:
            return None
        return self.unpaired(data.forget, data.retain, data.limit, seed, passage)

    def pairs(self, name: str, limit: int | None = None, seed: int = 0) -> list[Pair]:
        read = partial(load_pairs, name, limit=limit, seed=seed)
        return self._once(lambda: read(tokenizer=self._tokenizer()), "pairs", name, limit, seed)

    def unpaired(self, forget: str, retain: str, limit: int | None, seed: int, passage: int) -> Unpaired:
        """Two sets of texts; passage: tokens of a piece of running text."""
        given = (forget, retain, limit, seed)
        return self._once(lambda: load_unpaired(*given, self._tokenizer(), passage), "unpaired", *given, passage)

    def prompts(self, name: str, limit: int | None = None) -> list[Prompt]:
        return self._once(lambda: load_prompts(name, limit, self._tokenizer()), "prompts", name, limit)

    def corpus(self, name: str) -> str:
        return self._once(lambda: load_corpus(name), "corpus", name)

    def questions(self, name: str, limit: int | None, seed: int, shots: int) -> list[Question]:
        return self._once(lambda: load_questions(name, limit, seed, shots), "questions", name, limit, seed, shots)

    def scorer(self, name: str) -> Scorer:
        return self._once(lambda: load_scorer(name), "scorer", name)

    def _once(self, read: Callable[[], T], *what: Any) -> T:
        if what not in self._read:
            self._read[what] = read()
        return self._read[what]
