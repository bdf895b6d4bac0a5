"""REPO's ablations on the built-in model: one change each, three seeds, one line a run; resumable.

    python recipes/ablations.py                  # trains and measures what is missing
    python recipes/ablations.py --table          # prints the table of what there is

Each change is set against the frontier that the weight alone draws: toxicity at the change's own perplexity, interpolated
between the runs of the same seed at weight 0 (the reference), 0.5, 1, 2 and 4 over the root of what perplexity rises by, on
which the frontier is nearly straight (docs/tuning.md). Below it is better, and a mere trade of one for the other is 0. The
95 % interval is Student's over the seeds.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from statistics import mean

import numpy as np
from scipy.stats import t

from expunge.config import RunConfig, load_config
from expunge.pipeline import run
from expunge.plan import resolve
from expunge.provenance import digest
from expunge.rows import read_lines

RESULTS = Path("benchmarks/results/ablations.jsonl")
SEEDS = (0, 1, 2)
WEIGHTS = {f"weight {weight:g}": [f"method.weight={weight}"] for weight in (0.5, 1, 2, 4)}
VARIANTS = {
    **WEIGHTS,
    "linear discriminator": ["method.depth=0"],
    "segments of 2": ["method.segment=2"],
    "segments of 4": ["method.segment=4"],
    "segments of 8": ["method.segment=8"],
    "segments of 16": ["method.segment=16"],
    "one segment for all": ["method.segment=0"],
    "states before the final norm": ["method.layer=pre_norm"],
    "states into block 8 of 12": ["method.layer=8"],
    "states into block 4 of 12": ["method.layer=4"],
    "erased on all tokens": ["method.erase_on=all"],
    "reverse KL": ["method.kl=reverse"],
    "PPLM pairs": ["data.train=builtin-pplm"],
    "PPLM pairs, weight 0.25": ["data.train=builtin-pplm", "method.weight=0.25"],
    "ParaDetox pairs": ["data.train=paradetox"],
}
BASE = {
    "method": {"name": "repo", "weight": 1.0},
    "data": {"limit": 2000, "neutral": None, "corpus": "wikitext2"},
    "training": {
        "num_train_epochs": 1,
        "learning_rate": 2e-4,
        "warmup_steps": 20,
        "reference": "cached",
        "save_strategy": "no",
        "anchor_text": None,
    },
    "evaluation": {"samples": 5, "heldout": 128, "forced": [8], "perplexity_tokens": 40_000, "scorers": ["ngram"]},
}
FIGURES = {
    "sampled": {"metric": "toxicity_ratio", "decode": "sampled", "dataset": "builtin-challenge"},
    "greedy": {"metric": "toxicity_ratio", "decode": "greedy", "dataset": "builtin-challenge"},
    "rejected_k8": {"metric": "toxicity_ratio", "decode": "sampled", "side": "rejected", "k": 8},
    "perplexity": {"metric": "perplexity_ratio", "mode": "exact"},
}


def measure(variant: str, seed: int) -> None:
    """One run, unless its line is there for the same configuration."""
    config = load_config(RunConfig, [], [f"seed={seed}", *VARIANTS[variant]], base=BASE)
    settings = resolve(config)
    data = [change for change in VARIANTS[variant] if change.startswith("data.")]
    key = digest([BASE, settings.method, settings.training, seed, *data])
    if any(line["config"] == key for line in _lines()):
        return
    folder = Path("runs/ablations") / key[:12]
    started = time.monotonic()
    rows = [vars(row) for row in run(config, folder, quiet=True)]
    found = {}
    for name, wanted in FIGURES.items():
        row = next(row for row in rows if all(row[k] == v for k, v in wanted.items()))
        found[name] = [round(row[k], 4) for k in ("value", "ci_low", "ci_high")]
    seconds = round(time.monotonic() - started)
    with RESULTS.open("a") as file:
        file.write(json.dumps({"variant": variant, "seed": seed, **found, "seconds": seconds, "config": key}) + "\n")
    shutil.rmtree(folder)
    print(f"{variant}, seed {seed}: {found} in {seconds} s", flush=True)


def _lines() -> list[dict]:
    return read_lines(RESULTS) if RESULTS.exists() else []


def table() -> str:
    """Markdown: ratios to the reference as means over seeds; sampled and k = 8 also as differences from the frontier."""
    by_seed = {(line["variant"], line["seed"]): line for line in _lines()}
    head = [
        "change",
        "sampled",
        "greedy",
        "after 8 toxic tokens",
        "perplexity",
        "sampled beside the frontier",
        "k = 8 beside it",
    ]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' --- |' * (len(head) - 1)}"]
    for variant in VARIANTS:
        runs = {seed: by_seed[variant, seed] for seed in SEEDS if (variant, seed) in by_seed}
        if not runs:
            continue
        cells = [f"{mean(run[name][0] for run in runs.values()):.3f}" for name in FIGURES]
        for figure in ("sampled", "rejected_k8"):
            apart = [_apart(by_seed, run, seed, figure) for seed, run in runs.items()]
            cells.append("the frontier" if variant in WEIGHTS else _interval([x for x in apart if x is not None]))
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _apart(by_seed: dict, run: dict, seed: int, figure: str) -> float | None:
    """The run's toxicity less that of the frontier of its seed at its perplexity; None where that ends before it."""
    points = [(0.0, 1.0)]
    points += [(_cost(by_seed[w, seed]), by_seed[w, seed][figure][0]) for w in WEIGHTS if (w, seed) in by_seed]
    costs, toxicities = zip(*sorted(points), strict=True)
    cost = _cost(run)
    return None if cost > costs[-1] else run[figure][0] - float(np.interp(cost, costs, toxicities))


def _cost(run: dict) -> float:
    return max(0.0, run["perplexity"][0] - 1) ** 0.5


def _interval(values: list[float]) -> str:
    if len(values) < 2:
        return "beyond the frontier" if not values else f"{values[0]:+.3f} (one seed)"
    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{mean(values):+.3f} [{mean(values) - half:+.3f}, {mean(values) + half:+.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="store_true", help="print the table of what there is, and stop")
    parser.add_argument("--only", nargs="+", default=VARIANTS, help="some of the changes, by name")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of the training runs")
    arguments = parser.parse_args()
    if not arguments.table:
        for seed in arguments.seeds:
            for variant in arguments.only:
                measure(variant, seed)
    print(table())


if __name__ == "__main__":
    main()
