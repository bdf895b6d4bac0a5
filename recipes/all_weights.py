"""RMU and circuit breakers, a few matrices or all weights, on the built-in model: one line a run; resumable.

    python recipes/all_weights.py                # trains and measures what is missing
    python recipes/all_weights.py --only rmu     # or what begins so
    python recipes/all_weights.py --table        # prints the table of what there is

The REPO paper trains all weights of GPT-2 and does not say which of RMU's two losses alpha weighs: both readings are run. A
rate that suits a few matrices does not suit all weights, so each has a ladder of its own. One seed, 1,000 pairs, one epoch
at batch 8; only sets for tuning are read: builtin-tuning (prompts), builtin-validation (pairs), WikiText-2's validation
split.
"""

import argparse
import itertools
import json
import shutil
import time
from pathlib import Path
from statistics import mean

from expunge.config import RunConfig, load_config
from expunge.pipeline import run
from expunge.plan import resolve
from expunge.provenance import digest
from expunge.rows import read_lines

RESULTS = Path("benchmarks/results/all-weights.jsonl")
SEED = 0
FEW, ALL = (1.5e-3, 5e-3, 1.5e-2), (5e-5, 1.5e-4, 5e-4)
VARIANTS: dict[str, tuple[list[str], tuple[float, ...]]] = {
    **{
        f"rmu, {form}, {parameters}": (["method.name=rmu", f"method.form={form}", f"method.parameters={parameters}"], rates)
        for form, (parameters, rates) in itertools.product(("repo", "repo_forget"), (("mlp_out", FEW), ("all", ALL)))
    },
    **{
        f"circuit_breakers, {parameters}": (
            ["method.name=circuit_breakers", f"method.parameters={parameters}", "training.warmup_steps=0"],
            rates,
        )
        for parameters, rates in (
            ("mlp_out", (1.5e-4, 5e-4, 1.5e-3)),
            ("all_block", (5e-5, 1e-4, 1.5e-4)),
            ("all", (5e-5, 1e-4, 1.5e-4)),
        )
    },
}
"""Of each: overrides, and learning rates. Circuit breakers have no warm-up, which they might not outlive."""
BASE = {
    "seed": SEED,
    "data": {
        "prompts": ["builtin-tuning"],
        "heldout": "builtin-validation",
        "corpus": "wikitext2-valid",
        "neutral": None,
        "limit": 1000,
    },
    "training": {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "warmup_steps": 20,
        "reference": "cached",
        "save_strategy": "no",
    },
    "evaluation": {
        "samples": 2,
        "prompts": 96,
        "heldout": 48,
        "forced": [0],
        "perplexity_tokens": 16_000,
        "scorers": ["ngram"],
    },
}
FIGURES = {
    "sampled": {"metric": "toxicity_ratio", "decode": "sampled", "dataset": "builtin-tuning"},
    "greedy": {"metric": "toxicity_ratio", "decode": "greedy", "dataset": "builtin-tuning"},
    "rejected_k0": {"metric": "toxicity_ratio", "decode": "sampled", "side": "rejected", "k": 0},
    "perplexity": {"metric": "perplexity_ratio", "mode": "exact"},
}
LOGGED = ("forget_norm", "retain_norm", "reroute_cosine", "retain_distance")


def measure(variant: str, rate: float) -> None:
    """One run, unless its line is there for the same configuration."""
    config = load_config(RunConfig, [], [*VARIANTS[variant][0], f"training.learning_rate={rate}"], base=BASE)
    settings = resolve(config)
    key = digest([BASE, settings.method, settings.training])
    if any(line["config"] == key for line in lines()):
        return
    folder = Path("runs/all-weights") / key[:12]
    shutil.rmtree(folder, ignore_errors=True)
    started = time.monotonic()
    rows = [vars(row) for row in run(config, folder, quiet=True)]
    found = {}
    for name, wanted in FIGURES.items():
        row = next(row for row in rows if all(row[k] == v for k, v in wanted.items()))
        found[name] = [round(row[k], 4) for k in ("value", "ci_low", "ci_high")]
        found.setdefault("n", row["n"])
    steps = [line for line in read_lines(folder / "training.jsonl") if "loss" in line]
    for name in LOGGED:
        if name in steps[0]:
            found[name] = [round(steps[0][name], 3), round(mean(line[name] for line in steps[-10:]), 3)]
    seconds = round(time.monotonic() - started)
    record = {"variant": variant, "learning_rate": rate, "seed": SEED, **found, "seconds": seconds, "config": key}
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    shutil.rmtree(folder)
    print(f"{variant}, {rate:g}: {found} in {seconds} s", flush=True)


def lines() -> list[dict]:
    return read_lines(RESULTS) if RESULTS.exists() else []


def table() -> str:
    """Markdown: ratios to the reference with intervals over prompts; what was logged at first and in the last ten steps."""
    head = ["trained", "learning rate", "sampled", "greedy", "held-out pairs", "perplexity", "forget side", "retain side"]
    text = [f"| {' | '.join(head)} |", f"| :--- |{' ---: |' * (len(head) - 1)}"]
    of = {(line["variant"], line["learning_rate"]): line for line in lines()}
    for variant, (_, rates) in VARIANTS.items():
        for rate in rates:
            if line := of.get((variant, rate)):
                cells = [variant, f"{rate:g}"]
                for name in FIGURES:
                    value, low, high = line[name]
                    cells.append(f"{value:.3f}" if name == "perplexity" else f"{value:.2f} [{low:.2f}, {high:.2f}]")
                cells += [f"{line[name][0]:g} to {line[name][1]:g}" for name in LOGGED if name in line]
                text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="store_true", help="print the table of what there is, and stop")
    parser.add_argument("--only", nargs="+", default=[""], help="runs whose names begin so")
    arguments = parser.parse_args()
    if not arguments.table:
        for place in (1, 0, 2):  # the middle of each ladder first
            for variant, (_, rates) in VARIANTS.items():
                if variant.startswith(tuple(arguments.only)):
                    measure(variant, rates[place])
    print(table())


if __name__ == "__main__":
    main()
