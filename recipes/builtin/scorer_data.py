"""The rows that the two scorers are made from and measured on: disjoint by hash, and clear of evaluation text.

`part(text)` says whose a comment or document is: the judge's (`a`), the selector's (`b`), or neither's (`held`).
"""

import csv
import hashlib
import random
from collections.abc import Callable

import numpy as np
from decontaminate import Forbidden, digest
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from sources import clean, data_folder, forbidden_texts, imdb, labelled, rtp_rows, wikipedia

SEED = 0
Comment = tuple[str, str, bool]  # source, text, toxic
Figure = dict[str, float]


def part(text: str) -> str:
    """`a` for 7 texts of 12, `b` for 4, `held` for 1: by hash of the words."""
    twelfth = digest(text) % 12
    return "a" if twelfth < 7 else "b" if twelfth < 11 else "held"


def comments() -> dict[str, list[Comment]]:
    """Labelled comments of each part; none repeats evaluation text."""
    forbidden = Forbidden(forbidden_texts())
    parts: dict[str, list[Comment]] = {"a": [], "b": [], "held": []}
    for row in labelled():
        if not forbidden.touches(row[1]):
            parts[part(row[1])].append(row)
    return parts


def neutral(name: str) -> list[Comment]:
    """Fragments of 3-25 words of Wikipedia and IMDb, taken as civil; each part has its own documents."""
    rng = random.Random(f"{SEED} {name}")
    forbidden = Forbidden(forbidden_texts())
    fragments = []
    for document in [*list(wikipedia())[:1000], *list(imdb())[:4000]]:
        if part(document) == name:
            tokens = document.split()
            for _ in range(6):
                size = rng.randint(3, 25)
                start = rng.randrange(max(1, len(tokens) - size))
                fragments.append(" ".join(tokens[start : start + size]))
    return [("neutral", fragment, False) for fragment in fragments if not forbidden.touches(fragment)]


def prompt_key(prompt: str) -> int:
    """64-bit hash of a prompt, exactly as it is written: decides its split, and is stored with the judge."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "big")


def perspective_prompts() -> dict[str, list[dict]]:
    """RealToxicityPrompts rows whose continuation has a TOXICITY: `fit` (7 prompts of 10, by hash) and `test`."""
    parts: dict[str, list[dict]] = {"fit": [], "test": []}
    for row in rtp_rows():
        if row["continuation"]["toxicity"] is not None:
            parts["fit" if prompt_key(row["prompt"]["text"]) % 10 < 7 else "test"].append(row)
    return parts


def perspective_comments(above: float = 0.3, others: int = 1500) -> tuple[list[str], np.ndarray]:
    """Part `a` of the Wikipedia comments that carry a Perspective score: all above `above`, and some of the rest."""
    forbidden = Forbidden(forbidden_texts())
    rows = []
    for name in ("gc", "gn"):
        with (data_folder() / "context_toxicity" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            rows += [(clean(row["text"]), float(row["api"])) for row in csv.DictReader(file) if row["api"]]
    rows = [row for row in rows if part(row[0]) == "a" and not forbidden.touches(row[0])]
    low = [row for row in rows if row[1] <= above]
    rows = [row for row in rows if row[1] > above] + random.Random(SEED).sample(low, others)
    return [text for text, _ in rows], np.array([score for _, score in rows])


def with_interval(statistic: Callable[[np.ndarray], float], n: int) -> Figure:
    """Value and 95 % bootstrap interval of `statistic(rows)` over `n` rows."""
    rng = np.random.default_rng(SEED)
    low, high = np.percentile([statistic(rng.integers(n, size=n)) for _ in range(1000)], [2.5, 97.5])
    value = statistic(np.arange(n))
    return {"value": round(value, 4), "ci_low": round(float(low), 4), "ci_high": round(float(high), 4), "n": n}


def agreement(score: np.ndarray, toxicity: np.ndarray) -> dict[str, Figure]:
    """How well scores follow Perspective's TOXICITY on the same texts."""
    n = len(score)
    return {
        "spearman": with_interval(lambda i: float(spearmanr(score[i], toxicity[i])[0]), n),
        "auc_above_half": with_interval(lambda i: float(roc_auc_score(toxicity[i] > 0.5, score[i])), n),
        "mean_absolute_error": with_interval(lambda i: float(np.abs(score[i] - toxicity[i]).mean()), n),
        "mean_score": with_interval(lambda i: float(score[i].mean()), n),
        "mean_toxicity": with_interval(lambda i: float(toxicity[i].mean()), n),
    }


def auc_by_set(score: Callable[[list[str]], np.ndarray], rows: list[Comment]) -> dict[str, Figure]:
    """ROC-AUC on the rows of each source that has both labels."""
    figures = {}
    for source in sorted({source for source, _, _ in rows}):
        texts = [text for name, text, _ in rows if name == source]
        toxic = np.array([toxic for name, _, toxic in rows if name == source])
        if 0 < toxic.sum() < len(toxic):
            value = score(texts)
            figures[source] = with_interval(lambda i, v=value, t=toxic: float(roc_auc_score(t[i], v[i])), len(texts))
    return figures
