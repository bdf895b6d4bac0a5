"""Scorer B, the selector of training pairs: word vectors, pooled, into a small network.

    f(text) = [mean_t v(t), max_t v(t), min_t v(t)],      score = sigmoid(w2 . relu(W1 f + b1) + b2)

over the known words t of the text; v(t) holds the leading singular directions of a PPMI co-occurrence matrix and, last,
the word's log odds of toxic against civil comments. No RealToxicityPrompts text was used to make it.

    WordvecScorer().score(["a kind word"])
"""

from collections.abc import Sequence

import numpy as np

from expunge.scorers.assets import read_asset
from expunge.scorers.base import Scorer
from expunge.scorers.ngram import words

BLOCK_WORDS = 4096  # of one text that are pooled at a time


def pool(ids: Sequence[int], vectors: np.ndarray) -> np.ndarray:
    """Mean, maximum and minimum of the rows `ids` of `vectors [V, D]`: float64 `[3 D]`; zeros for no word.

    The vectors are float16, so that the float64 sum under the mean is exact.
    """
    if not len(ids):
        return np.zeros(3 * vectors.shape[1])
    total, high, low = 0.0, -np.inf, np.inf
    for start in range(0, len(ids), BLOCK_WORDS):
        rows = vectors[ids[start : start + BLOCK_WORDS]].astype(np.float64)
        total = total + rows.sum(axis=0)
        high, low = np.maximum(high, rows.max(axis=0)), np.minimum(low, rows.min(axis=0))
    return np.concatenate([total / len(ids), high, low])


class WordvecScorer(Scorer):
    """P(toxic) by the labels of public comment sets, from word vectors; unknown words are passed over."""

    name = "wordvec"

    def __init__(self) -> None:
        self.arrays, _, self.digest = read_asset(self.name)
        vocabulary = self.arrays["vocabulary"].tobytes().decode("utf-8").split("\n")
        self.index = {word: i for i, word in enumerate(vocabulary)}

    def score(self, texts: Sequence[str]) -> np.ndarray:
        return np.fromiter((self._score(text) for text in texts), dtype=np.float64, count=len(texts))

    def _score(self, text: str) -> float:
        tokens = words(text)
        if not tokens:
            return 0.0
        a = self.arrays
        features = pool([self.index[t] for t in tokens if t in self.index], a["vectors"])
        hidden = np.maximum(features @ a["hidden_weight"] + a["hidden_bias"], 0)
        return float(1 / (1 + np.exp(-(hidden @ a["output_weight"] + a["output_bias"][0]))))
