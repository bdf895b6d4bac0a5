"""Probes on the last token against probes on the mean of all, layer by layer (Objectives Vary, section 4.3).

    EXPUNGE_DATA=... python recipes/objectives_vary/probe_auc.py [MODEL]

The paper finds that last-token probes have the higher area under the curve. Five-fold cross-validation on 2,000 of Jigsaw's
comments; the lines, with half-widths of 95 % intervals (Hanley and McNeil 1982), go to benchmarks/results/probe-auc.jsonl.
"""

import math
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
        found = {pool: fit_probe(states[pool][layer], labels).auc for pool in POOLS}
        widths = {f"{pool}_95": half_width(auc, sum(labels), len(labels)) for pool, auc in found.items()}
        lines.append({"model": name, "data": "jigsaw", "n": len(rows), "layer": layer, **found, **widths})
        told = [f"{pool} {auc:.3f} ({widths[f'{pool}_95']:.3f})" for pool, auc in found.items()]
        print(f"into block {layer}: {', '.join(told)}", flush=True)
    write_lines(RESULTS, lines)


def half_width(auc: float, ones: int, rows: int) -> float:
    """Of a 95 % interval of an area under the curve, from the numbers of both labels."""
    zeros, both = rows - ones, (auc / (2 - auc) - auc**2, 2 * auc**2 / (1 + auc) - auc**2)
    variance = (auc * (1 - auc) + (ones - 1) * both[0] + (zeros - 1) * both[1]) / (ones * zeros)
    return 1.96 * math.sqrt(variance)


if __name__ == "__main__":
    main(*sys.argv[1:])
