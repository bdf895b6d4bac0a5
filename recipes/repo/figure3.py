"""Toxicity by how many texts a model was relearned on, from the cells of a sweep: a figure, and its lines.

python recipes/repo/figure3.py runs/figure3            # docs/figure3.svg, benchmarks/results/figure3.jsonl
"""

import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from expunge.rows import read_lines, read_rows, write_lines

FIGURE, RESULTS = Path("docs/figure3.svg"), Path("benchmarks/results/figure3.jsonl")
ATTACKS = {"relearn_forget": "forget texts", "relearn_retain": "retain texts"}
SETS = {"heldout": "held-out pairs", "builtin-challenge": "challenge prompts", "rtp-challenge": "RealToxicityPrompts"}


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Of each method, set, attack and number of texts (0 without attack): toxicity of each draw by the judge, REF's too.

    Sampled, or greedy where nothing was sampled, as under budget paper.
    """
    found: dict[tuple, dict[Any, float]] = {}
    for record in read_lines(folder / "sweep.jsonl"):
        path = folder / "cells" / record["cell"] / "attacks.jsonl"
        if record["status"] != "done" or record["trial"] or not path.is_file():
            continue
        rows = [row for row in read_rows(path) if row.metric == "toxicity" and not row.paired and row.dataset in SETS]
        decode = "sampled" if any(row.decode == "sampled" for row in rows) else "greedy"
        for row in rows:
            if row.decode != decode or row.scorer != rows[0].scorer or row.side not in (None, "rejected"):
                continue
            name = "REF" if row.subject == "reference" else record["labels"]["method"]
            size = (row.attack_config or {}).get("samples", 0)
            for attack in ATTACKS if row.attack == "none" else [row.attack]:
                found.setdefault((name, row.dataset, attack, size), {})[row.draw, record["labels"].get("seed")] = row.value
    keys = ("method", "dataset", "attack", "samples")
    return [{**dict(zip(keys, key, strict=True)), "toxicity": list(draws.values())} for key, draws in found.items()]


def draw(lines: list[dict[str, Any]]) -> None:
    sets = {name: title for name, title in SETS.items() if any(line["dataset"] == name for line in lines)}
    figure, grid = plt.subplots(len(sets), len(ATTACKS), figsize=(8, 6), layout="constrained", sharey="row", squeeze=False)
    names = list(dict.fromkeys(line["method"] for line in lines))
    for row, dataset in zip(grid, sets, strict=True):
        for axes, attack in zip(row, ATTACKS, strict=True):
            for name in names:
                color = "grey" if name == "REF" else f"C{names.index(name)}"
                own = [
                    line for line in lines if (line["method"], line["dataset"], line["attack"]) == (name, dataset, attack)
                ]
                own.sort(key=lambda line: line["samples"])
                x, y = [line["samples"] for line in own], [statistics.mean(line["toxicity"]) for line in own]
                ends = [[max(line["toxicity"]) for line in own], [min(line["toxicity"]) for line in own]]
                axes.plot(x, y, marker="o", label=name.upper(), color=color)
                axes.fill_between(x, *ends, alpha=0.15, color=color)
            axes.set(xlabel=ATTACKS[attack], ylabel=f"toxicity, {sets[dataset]}" if axes is row[0] else None)
    grid[0][0].legend()
    plt.rcParams["svg.hashsalt"] = "expunge"
    figure.savefig(FIGURE, metadata={"Date": None})


def main(folder: str) -> None:
    lines = lines_of(Path(folder))
    if not lines:
        sys.exit(f"{folder}: no finished cell with attacks.jsonl")
    write_lines(RESULTS, lines)
    draw(lines)
    print(f"{FIGURE}: {len(lines)} points")


if __name__ == "__main__":
    main(*sys.argv[1:])
