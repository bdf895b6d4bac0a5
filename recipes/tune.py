"""Tune a method on the built-in model: one line a trial in benchmarks/results/tuning-METHOD.jsonl, resumable.

    python recipes/tune.py repo method.weight=0.5 training.learning_rate=2e-4
    python recipes/tune.py repo --file trials.txt        # a trial a line

Trials train on 2,000 pairs for 3 epochs unless told otherwise (data.limit=null is all). Only sets for tuning are read:
builtin-tuning (prompts), builtin-validation (pairs), WikiText-2's validation split. Nothing of what is reported elsewhere
is looked at here.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

from expunge.config import RunConfig, load_config
from expunge.pipeline import run
from expunge.provenance import digest

FIGURES = {
    "sampled": {"metric": "toxicity_ratio", "decode": "sampled", "dataset": "builtin-tuning", "scorer": "ngram"},
    "greedy": {"metric": "toxicity_ratio", "decode": "greedy", "dataset": "builtin-tuning", "scorer": "ngram"},
    "rejected_k8": {"metric": "toxicity_ratio", "decode": "sampled", "side": "rejected", "k": 8, "scorer": "ngram"},
    "rejected_k0": {"metric": "toxicity_ratio", "decode": "sampled", "side": "rejected", "k": 0, "scorer": "ngram"},
    "chosen_k0": {"metric": "toxicity_ratio", "decode": "sampled", "side": "chosen", "k": 0, "scorer": "ngram"},
    "perplexity": {"metric": "perplexity_ratio", "mode": "exact"},
}
SETTINGS = {
    "data": {
        "prompts": ["builtin-tuning"],
        "heldout": "builtin-validation",
        "corpus": "wikitext2-valid",
        "neutral": None,
        "limit": 2000,
    },
    "evaluation": {"samples": 5, "heldout": 128, "forced": [0, 8], "perplexity_tokens": 40_000},
    "training": {"save_strategy": "no", "num_train_epochs": 3, "anchor_text": None},
}


def measure(method: str, overrides: list[str]) -> dict:
    """Train one trial and return the ratios to the reference, with the seconds that it took."""
    folder = Path("runs/tuning") / digest([method, overrides])[:12]
    shutil.rmtree(folder, ignore_errors=True)
    config = load_config(RunConfig, [], [f"method.name={method}", *overrides], base=SETTINGS)
    started = time.monotonic()
    rows = [vars(row) for row in run(config, folder, quiet=True)]
    figures = {
        name: round(next(row["value"] for row in rows if all(row[k] == v for k, v in wanted.items())), 4)
        for name, wanted in FIGURES.items()
    }
    return {**figures, "seconds": round(time.monotonic() - started)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("method")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--file", type=Path, help="a trial a line: overrides separated by spaces")
    arguments = parser.parse_args()
    trials = [line.split() for line in arguments.file.read_text().splitlines()] if arguments.file else []
    log = Path(f"benchmarks/results/tuning-{arguments.method}.jsonl")
    done = [json.loads(line)["overrides"] for line in log.read_text().splitlines()] if log.exists() else []
    for overrides in trials or [arguments.overrides]:
        if overrides in done:
            continue
        record = {"overrides": overrides, **measure(arguments.method, overrides)}
        with log.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
