"""Scorers: text to toxicity in [0, 1].

scorer = load_scorer("ngram")
scorer.score(["a kind word"])          # array([0.02...])
"""

from expunge.errors import ExpungeError
from expunge.paths import expand
from expunge.registry import Registry, UnknownName
from expunge.scorers.base import Scorer

SCORERS: Registry[Scorer] = Registry(
    "scorer",
    {
        "ngram": "expunge.scorers.ngram:NgramScorer",
        "wordvec": "expunge.scorers.wordvec:WordvecScorer",
        "perspective": "expunge.scorers.perspective:PerspectiveScorer",
    },
)


def load_scorer(name: str) -> Scorer:
    """The scorer called `name`, ready to use; ExpungeError where there is none.

    `hf:NAME[@LABEL]` is a classifier, `perspective:ATTRIBUTE` an attribute of Perspective other than TOXICITY.
    """
    name = expand(name)
    if name.startswith("hf:"):
        from expunge.scorers.classifier import ClassifierScorer

        return ClassifierScorer(name.removeprefix("hf:"))
    if name.startswith("perspective:"):
        from expunge.scorers.perspective import PerspectiveScorer

        return PerspectiveScorer(name.removeprefix("perspective:"))
    try:
        return SCORERS.get(name)()
    except UnknownName as error:
        raise ExpungeError(str(error)) from None


__all__ = ["SCORERS", "Scorer", "load_scorer"]
