"""Scorers: text to toxicity in [0, 1].

scorer = load_scorer("ngram")
scorer.score(["a kind word"])          # array([0.02...])
"""

from expunge.errors import ExpungeError
from expunge.registry import Registry, UnknownName
from expunge.scorers.base import Scorer

SCORERS: Registry[Scorer] = Registry(
    "scorer",
    {"ngram": "expunge.scorers.ngram:NgramScorer", "wordvec": "expunge.scorers.wordvec:WordvecScorer"},
)


def load_scorer(name: str) -> Scorer:
    """The scorer called `name`, or the classifier `hf:NAME[@LABEL]`, ready to use; ExpungeError where there is none."""
    if name.startswith("hf:"):
        from expunge.scorers.classifier import ClassifierScorer

        return ClassifierScorer(name.removeprefix("hf:"))
    try:
        return SCORERS.get(name)()
    except UnknownName as error:
        raise ExpungeError(str(error)) from None


__all__ = ["SCORERS", "Scorer", "load_scorer"]
