"""The main figures: REPO and DPO on the built-in model, three seeds each, budget full; resumable.

    python recipes/acceptance.py                  # trains and measures what is missing
    python recipes/acceptance.py --table          # prints the table of what there is

Each run leaves its rows in benchmarks/results/acceptance/METHOD-SEED.jsonl, which later sessions do not measure again.
The prompts are builtin-challenge and rtp-challenge, the pairs builtin-heldout: none was looked at in tuning.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean

from expunge.assembly import resolve
from expunge.config import BUDGETS, RunConfig, load_config, merge
from expunge.pipeline import run
from expunge.provenance import digest
from expunge.rows import Row, read_lines, write_lines

METHODS = {  # what tuning chose (benchmarks/results/tuning-*.jsonl) beside src/expunge/assets/defaults.json
    "repo": ["training.num_train_epochs=3"],
    "dpo": ["training.num_train_epochs=1"],
}
SEEDS = (0, 1, 2)
RESULTS = Path("benchmarks/results/acceptance")
BASE = merge(BUDGETS["full"], {"data": {"prompts": ["builtin-challenge", "rtp-challenge"], "neutral": "wiki-f1"}})
IDENTITY = ("metric", "dataset", "decode", "side", "k", "mode", "scorer", "samples", "n")
SHOWN = (
    ("toxicity_ratio", "rtp-challenge"),
    ("toxicity_ratio", "builtin-challenge"),
    ("toxicity_ratio", "heldout"),
    ("perplexity_ratio", None),
    ("f1_ratio", None),
    ("continuation_perplexity_ratio", None),
)


def measure(method: str, seed: int) -> None:
    """One run, unless its rows are there for the same configuration."""
    path = RESULTS / f"{method}-{seed}.jsonl"
    config = load_config(RunConfig, [], [f"method.name={method}", f"seed={seed}", *METHODS[method]], base=BASE)
    settings = resolve(config)
    key = digest([BASE, settings.method, settings.training, seed])  # not the whole of it, to which versions add keys
    if path.exists() and read_lines(path)[0]["config"] == key:
        return
    rows = run(config, Path(f"runs/acceptance/{method}-{seed}"), quiet=True)
    write_lines(path, [{"config": key, "method": method, "seed": seed}, *(vars(row) for row in rows)])
    print(f"{method}, seed {seed}: done", flush=True)


def table() -> str:
    """Markdown: each ratio to the reference as the mean over seeds, with their range, method beside method."""
    found: dict[tuple, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(RESULTS.glob("*.jsonl")):
        head, *records = read_lines(path)
        for row in (Row(**record) for record in records):
            if row.paired and any(row.metric == m and d in (None, row.dataset) for m, d in SHOWN):
                found[tuple(getattr(row, name) for name in IDENTITY)][head["method"]].append(row)
    lines = ["| figure | " + " | ".join(METHODS) + " |", "| --- |" + " --- |" * len(METHODS)]
    for key, by_method in found.items():
        label = ", ".join(f"{name} {value}" for name, value in zip(IDENTITY, key, strict=True) if value is not None)
        cells = [_cell(by_method[method]) for method in METHODS]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(rows: list[Row]) -> str:
    values = [row.value for row in rows]
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f}, {len(values)} seeds)" if values else "not run"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="store_true", help="print the table of what there is, and stop")
    parser.add_argument("--only", nargs="*", help="METHOD-SEED, for example repo-0")
    arguments = parser.parse_args()
    if not arguments.table:
        for seed in SEEDS:
            for method in METHODS:
                if not arguments.only or f"{method}-{seed}" in arguments.only:
                    measure(method, seed)
    print(table())
    print(json.dumps({"runs": sorted(path.stem for path in RESULTS.glob("*.jsonl"))}))


if __name__ == "__main__":
    main()
