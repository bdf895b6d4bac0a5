"""Can a probe still tell toxic from benign tokens inside a model? Fitted anew on the states of each, layer by layer.

python recipes/repo/features.py runs/mine [runs/other ...]    # adds to benchmarks/results/features.jsonl; prints the table

A probe learns on pairs that the run was trained on, and its area under the curve is of held-out pairs, tokens of their
continuations, with an interval over pairs. Into block 0 go embeddings: what that layer tells are the words themselves.
A linear probe finds what lies along one direction; a perceptron, also what was only folded.
"""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from expunge.attacks.orthogonalize import each_layer
from expunge.config import RunConfig, load_config
from expunge.data import Pair, Text
from expunge.data.tokenize import tokenize_texts
from expunge.metrics.stats import interval, resample_counts
from expunge.models import Layer, depth, width
from expunge.plan import Plan
from expunge.rows import read_lines, write_lines

RESULTS = Path("benchmarks/results/features.jsonl")
PAIRS, HELDOUT, RESAMPLES = 2000, 500, 200
PROBES = {
    "linear": LogisticRegression(max_iter=1000),
    "perceptron": MLPClassifier((64,), early_stopping=True, n_iter_no_change=5, random_state=0),
}
States = dict[Layer, np.ndarray]


def tokens_of(
    model: Any, tokenizer: Any, pairs: Sequence[Pair], layers: Sequence[Layer]
) -> tuple[States, np.ndarray, np.ndarray]:
    """States of all tokens of both sides, whether each is of the rejected side, and the number of its pair."""
    texts = [Text(pair.prompt, side) for pair in pairs for side in (pair.chosen, pair.rejected)]
    rows, counts = tokenize_texts(texts, tokenizer)
    assert len(rows) == len(texts), counts
    text = np.repeat(np.arange(len(rows)), [len(continuation) for _, continuation in rows])  # of each token
    found = {layer: np.zeros((len(text), width(model)), np.float32) for layer in layers}

    def add(layer: Layer, tokens: torch.Tensor, states: torch.Tensor) -> None:
        found[layer][tokens.numpy()] = states.numpy()

    each_layer(model, rows, layers, add)
    return found, text % 2, text // 2


def found_in(name: str, model: Any, tokenizer: Any, train: Sequence[Pair], heldout: Sequence[Pair]) -> list[dict[str, Any]]:
    layers: list[Layer] = [*range(0, depth(model), max(1, depth(model) // 3)), "pre_norm", "final"]
    (seen, bad, _), (new, truth, pair) = (tokens_of(model, tokenizer, pairs, layers) for pairs in (train, heldout))
    lines, counts = [], resample_counts(len(heldout))[:RESAMPLES]
    for layer, (kind, probe) in itertools.product(layers, PROBES.items()):
        fitted = make_pipeline(StandardScaler(), clone(probe)).fit(seen[layer], bad)
        score = fitted.predict_proba(new[layer])[:, 1]
        low, high = interval(np.array([roc_auc_score(truth, score, sample_weight=drawn[pair]) for drawn in counts]))
        auc = float(roc_auc_score(truth, score))
        made = {"pairs": len(train), "heldout": len(heldout)}
        lines.append({"model": name, "layer": layer, "probe": kind, "auc": auc, "low": low, "high": high, **made})
        print(f"{name}: {kind}, into block {layer}: {auc:.3f} [{low:.3f}, {high:.3f}]", flush=True)
    return lines


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each layer and probe, a column for each model."""
    names = list(dict.fromkeys(line["model"] for line in lines))
    cells: dict[Any, dict[str, str]] = {}
    for line in lines:
        ends = ", ".join(f"{line[end]:.3f}".removeprefix("0") for end in ("low", "high"))
        own = cells.setdefault((line["layer"], line["probe"]), {})
        own[line["model"]] = f"{line['auc']:.3f}".removeprefix("0") + f" [{ends}]"
    made = [[*map(str, place), *(own.get(name, "") for name in names)] for place, own in cells.items()]
    head = [["into block", "probe", *names], [":---", ":---"] + ["---:"] * len(names)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [*head, *made])


def main(*folders: str) -> None:
    lines = read_lines(RESULTS) if RESULTS.exists() else []
    for folder in map(Path, folders):
        plan = Plan.of(load_config(RunConfig, [folder / "config.yaml"], []), folder)
        model, tokenizer = plan.unlearned.loaded
        train, heldout = plan.training_data[:PAIRS], plan.sources.pairs(plan.config.data.heldout, HELDOUT)
        if not lines:
            lines += found_in("reference", plan.reference.model, tokenizer, train, heldout)
        lines = [line for line in lines if line["model"] != folder.name]
        lines += found_in(folder.name, model, tokenizer, train, heldout)
        write_lines(RESULTS, lines)
    print(table(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
