"""The main figures: REPO and DPO on the built-in model, three seeds each, budget full; resumable.

    python recipes/acceptance.py            # trains and measures what is missing, then writes the table

Leaves runs/acceptance/METHOD-SEED/ and benchmarks/results/acceptance.jsonl: each figure as the mean over seeds, with each
seed's value and its 95 % interval by prompt.
"""

import json
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from expunge.config import RunConfig, load_config
from expunge.pipeline import run
from expunge.rows import Row

METHODS = ("repo", "dpo")
SEEDS = (0, 1, 2)
RESULTS = Path("benchmarks/results")
PROMPTS = ["builtin-challenge", "rtp-challenge"]
IDENTITY = ("metric", "dataset", "decode", "side", "k", "mode", "scorer")


def rows_of(method: str, seed: int) -> list[Row]:
    overrides = [f"method.name={method}", f"seed={seed}"]
    config = load_config(RunConfig, [], overrides, base={"data": {"prompts": PROMPTS}})
    return run(config, Path(f"runs/acceptance/{method}-{seed}"), quiet=True)


def summarise(by_seed: dict[int, list[Row]], method: str) -> list[dict]:
    """One record a figure: the mean over seeds, each seed's value and interval."""
    records: dict[tuple, dict] = {}
    for seed, rows in by_seed.items():
        for row in rows:
            key = (row.subject, row.paired, *(getattr(row, name) for name in IDENTITY))
            record = records.setdefault(
                key,
                {
                    "method": method if row.subject == "unlearned" else "reference",
                    "subject": row.subject,
                    "paired": row.paired,
                    "n": row.n,
                    "samples": row.samples,
                    **{name: getattr(row, name) for name in IDENTITY},
                    "seeds": {},
                },
            )
            record["seeds"][seed] = {k: asdict(row)[k] for k in ("value", "ci_low", "ci_high")}
    for record in records.values():
        record["value"] = mean(seed["value"] for seed in record["seeds"].values())
    return list(records.values())


def main() -> None:
    records = []
    for method in METHODS:
        by_seed = {}
        for seed in SEEDS:
            by_seed[seed] = rows_of(method, seed)
            print(f"{method}, seed {seed}: done", flush=True)
        found = summarise(by_seed, method)
        records += [record for record in found if record["subject"] == "unlearned" or method == METHODS[0]]
        RESULTS.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(record) + "\n" for record in records)
        (RESULTS / "acceptance.jsonl").write_text(text)


if __name__ == "__main__":
    main()
