"""The main figures: REPO and DPO on the built-in model, three seeds each, budget full; resumable.

    python recipes/acceptance.py                  # trains and measures what is missing
    python recipes/acceptance.py --table          # prints README's table of what there is
    python recipes/acceptance.py --all            # prints every ratio, with its range over the seeds

Each run leaves its rows in benchmarks/results/acceptance/METHOD-SEED.jsonl, which later sessions do not measure again.
The prompts are builtin-challenge and rtp-challenge, the pairs builtin-heldout: none was looked at in tuning.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from expunge.config import BUDGETS, RunConfig, load_config, merge
from expunge.pipeline import run
from expunge.plan import resolve
from expunge.provenance import digest
from expunge.rows import Row, read_lines, write_lines

METHODS = {  # what tuning chose (benchmarks/results/tuning-*.jsonl) beside src/expunge/assets/defaults.json
    "repo": ["training.num_train_epochs=3", "training.anchor_text=null"],
    "dpo": ["training.num_train_epochs=1"],
}
SEEDS = (0, 1, 2)
RESULTS = Path("benchmarks/results/acceptance")
BASE = merge(BUDGETS["full"], {"data": {"prompts": ["builtin-challenge", "rtp-challenge"], "neutral": "wiki-f1"}})
SCORERS = ("ngram", "wordvec")
IDENTITY = ("metric", "dataset", "decode", "side", "k", "mode", "scorer", "samples", "n")
SHOWN = (
    ("toxicity_ratio", "rtp-challenge"),
    ("toxicity_ratio", "builtin-challenge"),
    ("toxicity_ratio", "heldout"),
    ("perplexity_ratio", None),
    ("f1_ratio", None),
    ("continuation_perplexity_ratio", None),
)
TRAINED = {"repo": "6,000, 3", "dpo": "6,000, 1"}  # pairs, epochs
PAPERS = {  # its REPO on GPT-2 small: Tables 3 and 5, section 5; all of it greedy
    "pairs, epochs": "24,576, 10",
    "`rtp-challenge`, 1,199 prompts, greedy": "0.37",
    "after 8 tokens of a toxic continuation, greedy": "0.36",
    "after 8 tokens of a benign continuation, greedy": "0.97",
    "perplexity of the toxic continuations": "3.9",
    "WikiText-2 perplexity, test split": "1.007",
    "F1 as Lee et al. count it, greedy": "1.00",
}


def readme_figures() -> dict[str, dict[str, Any]]:
    """The lines of README's table below its first: by label, the fields of the rows that are meant."""
    found: dict[str, dict[str, Any]] = {}
    for decode in ("greedy", "sampled"):
        for name, prompts in (("rtp-challenge", "1,199"), ("builtin-challenge", "320")):
            found[f"`{name}`, {prompts} prompts, {decode}"] = {"dataset": name, "decode": decode}
    for label, side, k in (
        ("held-out pairs, 512, nothing forced (k = 0)", "rejected", 0),
        ("after 8 tokens of a toxic continuation", "rejected", 8),
        ("after 8 tokens of a benign continuation", "chosen", 8),
    ):
        for decode in ("greedy", "sampled"):
            found[f"{label}, {decode}"] = {"dataset": "heldout", "decode": decode, "side": side, "k": k}
    found = {label: {"metric": "toxicity_ratio", **fields} for label, fields in found.items()}
    for label, side in (
        ("perplexity of the toxic continuations", "rejected"),
        ("perplexity of the benign continuations", "chosen"),
    ):
        found[label] = {"metric": "continuation_perplexity_ratio", "side": side}
    found["WikiText-2 perplexity, test split"] = {"metric": "perplexity_ratio", "mode": "exact"}
    modes = {"F1 as Lee et al. count it, greedy": "lee2024", "F1 by shares, greedy": "share", "F1, greedy": "continuation"}
    return found | {label: {"metric": "f1_ratio", "mode": mode} for label, mode in modes.items()}


def measure(method: str, seed: int) -> None:
    """One run, unless its rows are there for the same configuration."""
    path = RESULTS / f"{method}-{seed}.jsonl"
    config = load_config(RunConfig, [], [f"method.name={method}", f"seed={seed}", *METHODS[method]], base=BASE)
    settings = resolve(config)
    training = {name: value for name, value in settings.training.items() if value is not None}
    key = digest([BASE, settings.method, training, seed])  # not the whole of it, to which versions add keys
    if path.exists() and read_lines(path)[0]["config"] == key:
        return
    rows = run(config, Path(f"runs/acceptance/{method}-{seed}"), quiet=True)
    write_lines(path, [{"config": key, "method": method, "seed": seed}, *(vars(row) for row in rows)])
    print(f"{method}, seed {seed}: done", flush=True)


def read() -> dict[str, list[Row]]:
    """The paired rows of every run that was measured, by method."""
    found: dict[str, list[Row]] = defaultdict(list)
    for path in sorted(RESULTS.glob("*.jsonl")):
        head, *records = read_lines(path)
        found[head["method"]] += [row for row in (Row(**record) for record in records) if row.paired]
    return found


def table() -> str:
    """README's Markdown: means over the seeds by scorer `ngram` (and `wordvec`). A figure that no run has is left out."""
    rows = read()
    lines = ["| | paper: REPO | " + " | ".join(f"ours: {method.upper()}" for method in METHODS) + " |"]
    lines.append("| --- |" + " --- |" * (1 + len(METHODS)))
    lines.append(f"| pairs, epochs | {PAPERS['pairs, epochs']} | {' | '.join(TRAINED[method] for method in METHODS)} |")
    for label, fields in readme_figures().items():
        cells = [_short([row for row in rows[method] if _is(row, fields)]) for method in METHODS]
        if any(cells):
            lines.append(f"| {label} | {PAPERS.get(label, '')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _is(row: Row, fields: dict[str, Any]) -> bool:
    return all(getattr(row, name) == value for name, value in fields.items())


def _short(rows: list[Row]) -> str:
    digits = 3 if rows and rows[0].metric == "perplexity_ratio" else 2
    means = [mean(own) for name in (None, *SCORERS) if (own := [row.value for row in rows if row.scorer == name])]
    first, *others = [f"{value:.{digits}f}" for value in means] or [""]
    return first + "".join(f" ({other})" for other in others)


def every_ratio() -> str:
    """Markdown: each ratio to the reference as the mean over seeds, with their range, method beside method."""
    found: dict[tuple, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for method, rows in read().items():
        for row in rows:
            if any(row.metric == m and d in (None, row.dataset) for m, d in SHOWN):
                found[tuple(getattr(row, name) for name in IDENTITY)][method].append(row)
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
    parser.add_argument("--table", action="store_true", help="print README's table of what there is, and stop")
    parser.add_argument("--all", action="store_true", help="print every ratio instead, and stop")
    parser.add_argument("--only", nargs="*", help="METHOD-SEED, for example repo-0")
    arguments = parser.parse_args()
    if not arguments.table and not arguments.all:
        for seed in SEEDS:
            for method in METHODS:
                if not arguments.only or f"{method}-{seed}" in arguments.only:
                    measure(method, seed)
    print(every_ratio() if arguments.all else table())
    print(json.dumps({"runs": sorted(path.stem for path in RESULTS.glob("*.jsonl"))}))


if __name__ == "__main__":
    main()
