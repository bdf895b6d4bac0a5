"""Probes on the last token against probes on the mean of all, layer by layer (Objectives Vary, section 4.3).

    EXPUNGE_DATA=... python recipes/objectives_vary/probe_auc.py [MODEL]

The paper finds that last-token probes have the higher area under the curve. Five-fold cross-validation on 2,000 of Jigsaw's
comments; the lines go to benchmarks/results/probe-auc.jsonl.
"""

import sys
from pathlib import Path
from typing import Literal

from expunge import load_model
from expunge.data import load_labelled
from expunge.data.tokenize import tokenize_labelled
from expunge.models import Layer, context_length, depth
from expunge.probes import fit_probe, pooled_states_at
from expunge.rows import write_lines

RESULTS = Path("benchmarks/results/probe-auc.jsonl")
N, TOKENS = 2000, 128
POOLS: tuple[Literal["last", "mean"], ...] = ("last", "mean")


def main(name: str = "builtin") -> None:
    model, tokenizer = load_model(name, dtype="float32")
    rows = tokenize_labelled(load_labelled("jigsaw", N), tokenizer, min(TOKENS, context_length(model)))
    ids, labels = [row for row, _ in rows], [int(bad) for _, bad in rows]
    layers: list[Layer] = [*range(depth(model)), "pre_norm", "final"]
    states = {pool: pooled_states_at(model, ids, layers, pool) for pool in POOLS}
    lines = []
    for layer in layers:
        found = {pool: round(fit_probe(states[pool][layer], labels).auc, 4) for pool in POOLS}
        lines.append({"model": name, "data": "jigsaw", "n": len(rows), "layer": layer, **found})
        print(f"into block {layer}: last token {found['last']:.3f}, mean {found['mean']:.3f}", flush=True)
    write_lines(RESULTS, lines)


if __name__ == "__main__":
    main(*sys.argv[1:])
