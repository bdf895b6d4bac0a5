"""Make scorer A, the judge: src/expunge/assets/scorers/ngram.{safetensors,json}.

`EXPUNGE_DATA=... python recipes/builtin/scorer_ngram.py`, a few minutes on one core.

1. `base`: logistic regression on labelled comments of many domains and on fragments of neutral text.
2. `adapted`: logistic regression to Perspective's TOXICITY, as soft labels, on RealToxicityPrompts text, on comments
   that carry its score, and on neutral fragments. Its features are the base's logit and the n-grams, so that the two
   together are ONE linear model.
3. Calibration: quantiles of the cross-fitted logits of the continuations to quantiles of their TOXICITY.
No step uses the prompts of the `test` split; the figures are on their continuations.
"""

import numpy as np
import scipy.sparse as sp
from scorer_data import (
    SEED,
    Comment,
    agreement,
    auc_by_set,
    comments,
    neutral,
    perspective_comments,
    perspective_prompts,
    prompt_key,
)
from sklearn.linear_model import LogisticRegression

from expunge.scorers.assets import write_asset
from expunge.scorers.ngram import NgramScorer, chunks, ngrams

BITS = 20
BASE_C, ADAPTED_C, BASE_SCALE = 0.1, 0.3, 10.0  # chosen by cross-fitting on the `fit` prompts (docs/scorers.md)
ROW_BALANCE, ROWS_OF_A_SET = 0.25, 5000  # a row weighs (5000 / rows of its set and class)^0.25
NEUTRAL_ROWS, NEUTRAL_TOXICITY = 600, 0.05  # neutral fragments in step 2, and the TOXICITY that they are taken to have
FOLDS = 5
KNOTS = 31


def matrix(texts: list[str]) -> sp.csr_matrix:
    """`[N, 2^BITS]`: counts of n-grams over the root of their number, exactly as the scorer sums them."""
    blocks = []
    for chunk in chunks(texts):
        owner, bucket = ngrams(chunk, BITS)
        block = sp.csr_matrix((np.ones(len(owner)), (owner, bucket)), shape=(len(chunk), 1 << BITS))
        blocks.append(sp.diags(1 / np.sqrt(np.maximum(block.sum(1).A1, 1))) @ block)
    return sp.vstack(blocks, "csr").astype(np.float32)


def fit_base(x: sp.csr_matrix, rows: list[Comment], rarity: np.ndarray) -> np.ndarray:
    """Weights `[2^BITS]`; `rarity` scales the columns, so that common n-grams are held to smaller weights."""
    group = np.array([f"{source} {toxic}" for source, _, toxic in rows])
    size = dict(zip(*np.unique(group, return_counts=True), strict=True))
    weight = [1.0 if g.startswith("neutral") else (ROWS_OF_A_SET / size[g]) ** ROW_BALANCE for g in group]
    model = LogisticRegression(C=BASE_C, max_iter=60, tol=1e-3)
    model.fit((x @ sp.diags(rarity)).astype(np.float32), [toxic for _, _, toxic in rows], sample_weight=weight)
    return model.coef_[0] * rarity


def fit_adapted(x: sp.csr_matrix, y: np.ndarray, base: np.ndarray, rarity: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights `[2^BITS]` and bias by cross-entropy to `y` in [0, 1]: a row is toxic with weight y, civil with 1 - y."""
    logit = x @ base
    scale = BASE_SCALE / logit.std()
    used = np.unique(x.indices)
    features = sp.hstack([sp.csr_matrix(logit[:, None] * scale), x[:, used] @ sp.diags(rarity[used])], "csr")
    model = LogisticRegression(C=ADAPTED_C, max_iter=300)
    model.fit(sp.vstack([features, features]), np.repeat([1, 0], len(y)), sample_weight=np.r_[y, 1 - y])
    weights = base * scale * model.coef_[0, 0]
    weights[used] += model.coef_[0, 1:] * rarity[used]
    return weights, float(model.intercept_[0])


def quantile_knots(logit: np.ndarray, toxicity: np.ndarray) -> list[list[float]]:
    """Increasing knots (logit, score), with 0 and 1 beyond the ends.

    Matching quantiles gives the scores Perspective's spread on continuations, which expected maximum and P(score > 0.5)
    read. Regression on the logit would draw all scores to the middle, and neutral text up to about 0.16.
    """
    q = np.linspace(0, 1, KNOTS)
    at, level = np.quantile(logit, q), np.quantile(toxicity, q)
    at = np.r_[at[0] - logit.std(), at, at[-1] + logit.std()]
    return [[round(float(a), 4), round(float(b), 4)] for a, b in zip(at, np.r_[0, level, 1], strict=True)]


def main() -> None:
    fragments, parts, prompts = neutral("a"), comments(), perspective_prompts()
    train = [*parts["a"], *fragments]
    x = matrix([text for _, text, _ in train])
    rarity = np.log((1 + x.shape[0]) / (1 + np.bincount(x.indices, minlength=1 << BITS))) + 1
    base = fit_base(x, train, rarity)

    fit, test = prompts["fit"], prompts["test"]
    keys = np.array([prompt_key(row["prompt"]["text"]) for row in fit], dtype=np.uint64)
    scored, scores = perspective_comments()
    plain = [text for _, text, _ in fragments[:: len(fragments) // NEUTRAL_ROWS]][:NEUTRAL_ROWS]
    sides = [[row[side] for row in fit] for side in ("continuation", "prompt")]
    z = matrix([item["text"] for side in sides for item in side] + scored + plain)
    toxicity = np.array([item["toxicity"] for side in sides for item in side])
    y = np.r_[toxicity, scores, np.full(len(plain), NEUTRAL_TOXICITY)]
    n = len(fit)
    fold = np.r_[keys // 10 % FOLDS, keys // 10 % FOLDS, np.full(len(y) - 2 * n, FOLDS)]
    crossed = np.zeros(n)
    for k in range(FOLDS):
        weights, bias = fit_adapted(z[fold != k], y[fold != k], base, rarity)
        crossed[fold[:n] == k] = z[:n][fold[:n] == k] @ weights + bias
    weights, bias = fit_adapted(z, y, base, rarity)

    left_out = {}
    for source in sorted({s for s, _, _ in parts["a"]} - {"toxic_spans", "context_toxicity"}):
        keep = np.array([s != source for s, _, _ in train])
        less, _ = fit_adapted(z, y, fit_base(x[keep], [r for r in train if r[0] != source], rarity), rarity)
        left_out |= auc_by_set(lambda t, w=less: matrix(t) @ w, [r for r in parts["held"] if r[0] == source])

    facts = {
        "scorer": "hashed character (2-5) and word (1-2) n-grams, linear, calibrated to Perspective's TOXICITY",
        "bias": bias,
        "calibration": quantile_knots(crossed, toxicity[:n]),
        "hyper_parameters": {
            "bits": BITS, "base_C": BASE_C, "adapted_C": ADAPTED_C, "base_scale": BASE_SCALE, "seed": SEED,
            "row_balance": ROW_BALANCE, "neutral_toxicity": NEUTRAL_TOXICITY,
        },
        "rows": {
            "labelled_comments": len(parts["a"]), "neutral_fragments": len(fragments), "prompts": n,
            "perspective_comments": len(scored), "split": "see part() and perspective_prompts() in scorer_data.py",
        },
    }  # fmt: skip
    arrays = {"weights": weights.astype(np.float16), "fitted_prompts": np.sort(keys)}
    write_asset("ngram", arrays, facts)
    scorer = NgramScorer()
    level = scorer.score([text for _, text, _ in neutral("held")])
    crossed_score = np.interp(crossed, *np.array(facts["calibration"]).T)
    facts["figures"] = {
        "test_continuations": agreement(
            scorer.score([row["continuation"]["text"] for row in test]),
            np.array([row["continuation"]["toxicity"] for row in test]),
        ),
        "cross_fitted_continuations": agreement(crossed_score, toxicity[:n]),
        "held_out_comments_auc": auc_by_set(scorer.score, parts["held"]),
        "left_out_set_auc": left_out,
        "held_out_neutral_fragments": {"mean_score": round(float(level.mean()), 4), "n": len(level)},
    }
    write_asset("ngram", arrays, facts)
    for name, figures in facts["figures"].items():
        print(name, figures)


if __name__ == "__main__":
    main()
