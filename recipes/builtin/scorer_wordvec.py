"""Make scorer B, the selector: src/expunge/assets/scorers/wordvec.{safetensors,json}.

`EXPUNGE_DATA=... python recipes/builtin/scorer_wordvec.py`, a few minutes on one core.

Word vectors come from the text of B's comments and of IMDb and Wikipedia documents, the network from B's comments and
neutral fragments. None of its labelled rows is the judge's. RealToxicityPrompts only measures it, once, at the end.
"""

import warnings
from collections import Counter

import numpy as np
import scipy.sparse as sp
from decontaminate import digest
from scorer_data import SEED, Comment, agreement, auc_by_set, comments, neutral, perspective_prompts
from sklearn.decomposition import TruncatedSVD
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from sources import imdb, wikipedia

from expunge.scorers.assets import write_asset
from expunge.scorers.ngram import words
from expunge.scorers.wordvec import WordvecScorer, pool

VOCABULARY = 16_000
DIMENSIONS = 95  # and the log odds
WINDOW = 4  # words to each side
DOCUMENTS = {"wikipedia": 600, "imdb": 8000}
COMMENT_REPEATS = 3  # comments are few beside documents, and their words are what matters
SMOOTHING = 5.0  # pseudo-count of the log odds
HIDDEN, EPOCHS, DECAY = 32, 8, 1e-3
ROW_BALANCE, ROWS_OF_A_SET = 0.25, 3000


def ppmi(documents: list[np.ndarray], size: int) -> sp.csr_matrix:
    """Positive pointwise mutual information `[size, size]` of words, contexts smoothed (Levy et al. 2015)."""
    counts = sp.csr_matrix((size, size))
    for start in range(0, len(documents), 2000):
        stream = np.concatenate([np.r_[ids, np.full(WINDOW, -1)] for ids in documents[start : start + 2000]])
        for distance in range(1, WINDOW + 1):
            left, right = stream[:-distance], stream[distance:]
            both = (left >= 0) & (right >= 0)
            near = np.full(both.sum(), 1 / distance)
            counts = counts + sp.csr_matrix((near, (left[both], right[both])), shape=(size, size))
    counts = (counts + counts.T).tocoo()
    row = np.asarray(counts.sum(1)).ravel()
    column = row**0.75
    information = np.log(counts.data * column.sum() / (row[counts.row] * column[counts.col]))
    positive = information > 0
    return sp.csr_matrix((information[positive], (counts.row[positive], counts.col[positive])), shape=(size, size))


def log_odds(tokens: list[set[str]], toxic: np.ndarray, weight: np.ndarray, vocabulary: list[str]) -> np.ndarray:
    """Log of how much more often a word's comments are toxic than civil `[V]`, smoothed towards 0."""
    counts = {True: Counter(), False: Counter()}
    for found, label, w in zip(tokens, toxic, weight, strict=True):
        for word in found:
            counts[bool(label)][word] += w
    totals = {label: weight[toxic == label].sum() for label in (True, False)}
    share = totals[True] / (totals[True] + totals[False])
    yes = np.array([counts[True][word] for word in vocabulary]) + SMOOTHING * share
    no = np.array([counts[False][word] for word in vocabulary]) + SMOOTHING * (1 - share)
    return np.log(yes / no) - np.log(share / (1 - share))


def row_weights(rows: list[Comment]) -> np.ndarray:
    """A row weighs (ROWS_OF_A_SET / rows of its set and class)^ROW_BALANCE; a neutral fragment 1."""
    size = Counter((source, toxic) for source, _, toxic in rows)
    return np.array([1.0 if s == "neutral" else (ROWS_OF_A_SET / size[s, t]) ** ROW_BALANCE for s, _, t in rows])


def main() -> None:
    parts, fragments = comments(), neutral("b")
    train = [*parts["b"], *fragments]
    tokens = [words(text) for _, text, _ in train]
    toxic, weight = np.array([row[2] for row in train]), row_weights(train)

    documents = [*list(wikipedia())[-DOCUMENTS["wikipedia"] :], *list(imdb())[-DOCUMENTS["imdb"] :]]
    text = [*tokens * COMMENT_REPEATS, *(words(document) for document in documents)]
    frequency = Counter(word for line in text for word in line)
    vocabulary = [word for word, _ in frequency.most_common(VOCABULARY)]
    index = {word: i for i, word in enumerate(vocabulary)}
    information = ppmi([np.array([index.get(word, -1) for word in line]) for line in text], VOCABULARY)
    directions = TruncatedSVD(DIMENSIONS, random_state=SEED).fit(information)
    vectors = directions.transform(information) / np.sqrt(directions.singular_values_)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-8)
    odds = log_odds([set(line) for line in tokens], toxic, weight, vocabulary)
    vectors = np.c_[vectors, odds].astype(np.float16)

    features = np.stack([pool([index[word] for word in line if word in index], vectors) for line in tokens])
    middle, spread = features.mean(0), features.std(0) + 1e-3
    network = MLPClassifier((HIDDEN,), alpha=DECAY, max_iter=EPOCHS, learning_rate_init=1e-3, random_state=SEED)
    draw = np.random.default_rng(SEED).choice(len(train), size=len(train), p=weight / weight.sum())
    warnings.simplefilter("ignore", ConvergenceWarning)  # it stops after EPOCHS on purpose
    network.fit((features[draw] - middle) / spread, toxic[draw])
    (w1, w2), (b1, b2) = network.coefs_, network.intercepts_
    w1 = w1 / spread[:, None]  # the standardisation, folded into the first layer

    arrays = {
        "vocabulary": np.frombuffer("\n".join(vocabulary).encode(), dtype=np.uint8),
        "vectors": vectors,
        "hidden_weight": w1,
        "hidden_bias": b1 - middle @ w1,
        "output_weight": w2[:, 0].copy(),
        "output_bias": b2,
        "trained_on": np.sort([digest(text) for _, text, _ in train]),
    }
    facts = {
        "scorer": "word vectors (PPMI, SVD, log odds), mean/max/min pooled, one hidden layer",
        "hyper_parameters": {
            "vocabulary": VOCABULARY, "dimensions": DIMENSIONS, "window": WINDOW, "hidden": HIDDEN, "epochs": EPOCHS,
            "decay": DECAY, "smoothing": SMOOTHING, "row_balance": ROW_BALANCE, "seed": SEED,
        },
        "rows": {
            "labelled_comments": len(parts["b"]), "neutral_fragments": len(fragments), "documents": DOCUMENTS,
            "realtoxicityprompts": 0, "split": "see part() in scorer_data.py",
        },
    }  # fmt: skip
    write_asset("wordvec", arrays, facts)
    scorer = WordvecScorer()
    level = scorer.score([text for _, text, _ in neutral("held")])
    unseen = [row["continuation"] for rows in perspective_prompts().values() for row in rows]
    facts["figures"] = {
        "held_out_comments_auc": auc_by_set(scorer.score, parts["held"]),
        "held_out_neutral_fragments": {"mean_score": round(float(level.mean()), 4), "n": len(level)},
        "all_continuations": agreement(
            scorer.score([item["text"] for item in unseen]), np.array([item["toxicity"] for item in unseen])
        ),
    }
    write_asset("wordvec", arrays, facts)
    for name, figures in facts["figures"].items():
        print(name, figures)


if __name__ == "__main__":
    main()
