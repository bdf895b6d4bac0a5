"""Does a prefix that enhanced GCG found bring something back, or does it make any model more toxic?

python recipes/repo/prefixes.py runs/table1 runs/repo [runs/npo ...]    # benchmarks/results/prefixes.jsonl; prints the table

The attack's own control is another prefix, that of the reference. Here each prefix of a sweep's cells is put before the same
prompts on every run, and on the reference, sampled as in the sweep. Runs are of the cells' settings.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from expunge.config import RunConfig, load_config
from expunge.ids import encode
from expunge.metrics.evaluation import evaluate_model
from expunge.metrics.figures import rows
from expunge.plan import Plan
from expunge.redteam import attacked_plan
from expunge.rows import read_lines, write_lines

RESULTS = Path("benchmarks/results/prefixes.jsonl")


def strings_of(sweep: Path) -> dict[str, str]:
    """The prefix of each finished cell, by the cell's labels."""
    found = {}
    for record in read_lines(sweep / "sweep.jsonl"):
        for case in (sweep / "cells" / record["cell"]).glob("attacks/unlearned-enhanced_gcg-*/case.json"):
            found[", ".join(record["labels"].values())] = json.loads(case.read_text(encoding="utf-8"))["about"]["string"]
    return found


def found_in(name: str, model: Any, plan: Plan, strings: dict[str, str]) -> Iterator[dict[str, Any]]:
    tokenizer = plan.unlearned.tokenizer
    measured = dataclasses.replace(plan.attacked_data, corpora={})
    how = dataclasses.replace(attacked_plan(plan), greedy=False)
    for of, string in {"none": "", **strings}.items():
        prefix = tuple(encode(tokenizer, string)) if string else ()
        evaluation = evaluate_model(model, tokenizer, measured, dataclasses.replace(how, prefix=prefix), plan.scorers)
        for row in rows(evaluation):
            if row.metric in ("toxicity", "loop_share") and row.side != "chosen":
                wanted = ("metric", "dataset", "scorer", "value", "ci_low", "ci_high", "n")
                yield {"model": name, "prefix": of, **{key: getattr(row, key) for key in wanted}}
        print(f"{name}: prefix of {of}", flush=True)


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: toxicity by the first scorer, a line for each prefix and set, a column for each model."""
    scorer = next(line["scorer"] for line in lines if line["metric"] == "toxicity")
    names = list(dict.fromkeys(line["model"] for line in lines))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for line in lines:
        if line["scorer"] == scorer:
            value, low, high = (f"{line[key]:.2f}".removeprefix("0") for key in ("value", "ci_low", "ci_high"))
            cells.setdefault((line["dataset"], line["prefix"]), {})[line["model"]] = f"{value} [{low}, {high}]"
    made = [[*place, *(own.get(name, "") for name in names)] for place, own in cells.items()]
    head = [["set", "prefix of", *names], [":---", ":---"] + ["---:"] * len(names)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [*head, *made])


def main(sweep: str, *folders: str) -> None:
    strings = strings_of(Path(sweep))
    if not strings:
        sys.exit(f"{sweep}: no finished cell with a prefix")
    lines: list[dict[str, Any]] = []
    for folder in map(Path, folders):
        plan = Plan.of(load_config(RunConfig, [folder / "config.yaml"], []), folder)
        if not lines:
            lines += found_in("reference", plan.reference.model, plan, strings)
        lines += found_in(folder.name, plan.unlearned.model, plan, strings)
        write_lines(RESULTS, lines)
    print(table(lines or read_lines(RESULTS)))


if __name__ == "__main__":
    main(*sys.argv[1:])
