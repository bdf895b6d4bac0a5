"""Learned alpha beside the best fixed one, on invented facts (Objectives Vary, section 4.2): one line a run; resumable.

    python recipes/objectives_vary/alpha.py                       # trains and measures what is missing
    python recipes/objectives_vary/alpha.py --seeds 0 --only fixed
    python recipes/objectives_vary/alpha.py --table               # prints the tables and draws docs/alpha.svg

Every run is cosine RMU on builtin:facts for 1,000 steps of 4 texts a side. In some alpha stays, in the others REINFORCE
moves it from one of four places. All figures are of the tuning questions and of WikiText-2's validation split: nothing is
reported from them elsewhere.
"""

import argparse
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from expunge.config import RunConfig, load_config
from expunge.methods.policy import TOLERATED
from expunge.pipeline import run
from expunge.plan import resolve
from expunge.provenance import digest
from expunge.rows import read_lines

FIGURE, RESULTS = Path("docs/alpha.svg"), Path("benchmarks/results/alpha.jsonl")
SEEDS = (0, 1, 2)
FIXED = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
STARTS = (0.1, 1.0, 10.0, 100.0)
REWARDS = ("normalised", "improvement", "product")
LAST = 100  # steps whose losses are averaged
POINTS = 50  # of a trace that are kept
RUNS = {
    **{f"fixed {alpha:g}": {"alpha": "fixed", "alpha0": alpha} for alpha in FIXED},
    **{
        f"{reward} from {start:g}": {"alpha": "learned", "alpha0": start, "reward": reward}
        for reward, start in itertools.product(REWARDS, STARTS)
    },
}
BASE = {
    "model": "builtin:facts",
    "method": {"name": "cosine_rmu"},
    "data": {
        "forget": "builtin-facts-forget",
        "retain": "builtin-facts-retain",
        "questions": ["builtin-facts-forget-tuning", "builtin-facts-retain-tuning"],
        "prompts": [],
        "heldout": None,
        "neutral": None,
        "corpus": "wikitext2-valid",
    },
    "training": {
        "learning_rate": 1e-3,
        "max_steps": 1000,
        "per_device_train_batch_size": 4,
        "warmup_steps": 10,
        "reference": "cached",
        "save_strategy": "no",
    },
    "evaluation": {
        "samples": 0,
        "perplexity_tokens": 16_000,
        "s_unlearning": {"utility": "builtin-facts-retain-tuning", "forget": "builtin-facts-forget-tuning"},
    },
}
FIGURES = {
    "s": {"metric": "s_unlearning", "paired": False},
    "forget": {"metric": "accuracy", "mode": "acc", "dataset": "builtin-facts-forget-tuning", "paired": False},
    "retain": {"metric": "accuracy", "mode": "acc", "dataset": "builtin-facts-retain-tuning", "paired": False},
    "perplexity": {"metric": "perplexity_ratio", "mode": "exact"},
}
WORTH: dict[str, Callable[[float, float], float]] = {
    "normalised": lambda forget, retain: -(forget + retain / TOLERATED),
    "product": lambda forget, retain: (1 - forget) * (1 - retain),
}
"""What rewards make of L_F, which is 1 or so at step 0, and L_R; `improvement` adds up to `normalised`."""


def measure(name: str, seed: int) -> None:
    """One run, unless its line is there for the same configuration."""
    overrides = [f"seed={seed}", *(f"method.{key}={value}" for key, value in RUNS[name].items())]
    config = load_config(RunConfig, [], overrides, base=BASE)
    settings = resolve(config)
    key = digest([BASE, settings.method, settings.training, seed])
    if any(line["config"] == key for line in lines()):
        return
    folder = Path("runs/alpha") / key[:12]
    shutil.rmtree(folder, ignore_errors=True)
    started = time.monotonic()
    rows = [vars(row) for row in run(config, folder, quiet=True) if row.subject == "unlearned"]
    found = {}
    for figure, wanted in FIGURES.items():
        row = next(row for row in rows if all(row[k] == v for k, v in wanted.items()))
        found[figure] = round(row["value"], 4)
    steps = [line for line in read_lines(folder / "training.jsonl") if "forget_loss" in line]
    for loss in ("forget_loss", "retain_loss"):
        found[loss] = round(mean(line[loss] for line in steps[-LAST:]), 4)
    if RUNS[name]["alpha"] == "learned":
        trace = [(line["step"], round(line["alpha_mean"], 4)) for line in steps]
        found["alpha"] = round(mean(alpha for _, alpha in trace[-LAST:]), 4)
        found["trace"] = [*trace[:: len(trace) // POINTS], trace[-1]]
    record = {"run": name, "seed": seed, **found, "seconds": round(time.monotonic() - started), "config": key}
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    shutil.rmtree(folder)
    print(f"{name}, seed {seed}: { ({k: v for k, v in found.items() if k != 'trace'}) }", flush=True)


def lines() -> list[dict]:
    return read_lines(RESULTS) if RESULTS.exists() else []


def table(found: list[dict]) -> str:
    """Markdown: of each run the means over its seeds; the rewards are of the mean losses of the last steps."""
    shown = ["run", "seeds", "alpha at the end", "S-unlearning", "forget accuracy", "retain accuracy", "perplexity, ratio"]
    shown += ["L_F", "L_R", *(f"reward {name}" for name in WORTH)]
    text = [f"| {' | '.join(shown)} |", f"| :--- |{' ---: |' * (len(shown) - 1)}"]
    for name in RUNS:
        of = [line for line in found if line["run"] == name]
        if not of:
            continue
        ends = ", ".join(f"{line['alpha']:.3g}" for line in of if "alpha" in line) or f"{RUNS[name]['alpha0']:g}"
        cells = [name, str(len(of)), ends, *(f"{_mean(of, figure):.3f}" for figure in FIGURES)]
        losses = [_mean(of, "forget_loss"), _mean(of, "retain_loss")]
        cells += [f"{loss:.3f}" for loss in losses]
        cells += [f"{worth(*losses):.2f}" for worth in WORTH.values()]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def _mean(of: Iterable[dict], figure: str) -> float:
    return mean(line[figure] for line in of)


def draw(found: list[dict]) -> None:
    """A panel for each reward that was run: alpha by step from each start; dashed, the best fixed alpha."""
    fixed = {alpha: [line for line in found if line["run"] == f"fixed {alpha:g}"] for alpha in FIXED}
    scored = {alpha: _mean(of, "s") for alpha, of in fixed.items() if of}
    best = max(scored, key=lambda alpha: scored[alpha])
    shown = [reward for reward in REWARDS if any(line["run"].startswith(f"{reward} ") for line in found)]
    if not shown:
        return
    size = (4 * len(shown) + 1, 3.6)
    figure, panels = plt.subplots(1, len(shown), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axes, reward in zip(panels[0], shown, strict=True):
        for color, start in enumerate(STARTS):
            for line in (line for line in found if line["run"] == f"{reward} from {start:g}"):
                axes.plot(*zip(*line["trace"], strict=True), color=f"C{color}")
        axes.axhline(best, color="black", linestyle="--", linewidth=1)
        axes.set(title=reward, xlabel="optimizer step", yscale="log")
    panels[0][0].set_ylabel("mean of alpha")
    plt.rcParams["svg.hashsalt"] = "expunge"
    figure.savefig(FIGURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="store_true", help="print the table of what there is, draw the figure, and stop")
    parser.add_argument("--only", nargs="+", default=[""], help="runs whose names begin so, in this order")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of the training runs")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(lines()))
        draw(lines())
        return
    for seed, first in itertools.product(arguments.seeds, arguments.only):
        for name in RUNS:
            if name.startswith(first):
                measure(name, seed)


if __name__ == "__main__":
    main()
