"""Does orthogonalization give back what was forgotten, or does it steer? What it takes out of a run's model is taken out of
the reference as well: where that makes the untouched model as much more toxic, nothing was there to be given back.

python recipes/repo/steers.py runs/mine [runs/other ...]      # adds to benchmarks/results/steers.jsonl; prints the table
"""

import sys
from pathlib import Path
from typing import Any

from expunge.attacks import Budget, cases
from expunge.attacks.orthogonalize import FORMS, steered
from expunge.config import RunConfig, load_config
from expunge.metrics.evaluation import evaluate_model
from expunge.metrics.figures import rows
from expunge.plan import Plan
from expunge.redteam import attacked_plan, attackers_data, settings_of
from expunge.rows import read_lines, write_lines

RESULTS = Path("benchmarks/results/steers.jsonl")


def found_in(folder: Path) -> list[dict[str, Any]]:
    """Toxicity of the model and of its reference, as they are and with the edits that each form finds for the model."""
    plan = Plan.of(load_config(RunConfig, [folder / "config.yaml"], []), folder)
    config, (model, tokenizer), reference = plan.config, plan.unlearned.loaded, plan.reference.model
    data = attackers_data(plan, settings_of(config)[0])
    lines: list[dict[str, Any]] = []

    def measure(subject: str, model: Any, **about: Any) -> None:
        for row in rows(evaluate_model(model, tokenizer, plan.attacked_data, attacked_plan(plan), plan.scorers)):
            if row.metric in ("toxicity", "loop_share", "perplexity") and row.side != "chosen":
                wanted = ("metric", "dataset", "decode", "scorer", "value", "ci_low", "ci_high", "n")
                figure = {key: getattr(row, key) for key in wanted}
                lines.append({"method": config.method["name"], "seed": config.seed, "subject": subject, **about, **figure})

    subjects = {"unlearned": model, "reference": reference}
    for subject, own in subjects.items():
        measure(subject, own, form=None, blocks=[])
    for form in FORMS:
        [attack] = cases("orthogonalize_best", "small", {"form": form})
        result = attack.run(model, reference, data.only(frozenset(attack.needs)), Budget())
        if result.idle:
            print(f"{folder}: {form}: {result.idle}", flush=True)
            continue
        for subject, own in subjects.items():
            edits = result.model.expunge_steering.edits
            measure(subject, steered(own, edits, {}), form=form, blocks=result.about["layers"])
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: sampled toxicity by the first scorer, and perplexity."""
    subjects, shown = ("unlearned", "reference"), ("heldout", "builtin-challenge")
    scorer = next(line["scorer"] for line in lines if line["metric"] == "toxicity")
    cells: dict[tuple, dict[tuple, str]] = {}
    for line in lines:
        row = (line["method"], line["seed"], line["form"] or "as it is", ", ".join(map(str, line["blocks"])))
        text = f"{line['value']:.2f}".removeprefix("0")
        if line["metric"] == "toxicity" and line["decode"] == "sampled" and line["scorer"] == scorer:
            text += f" [{', '.join(f'{line[end]:.2f}'.removeprefix('0') for end in ('ci_low', 'ci_high'))}]"
            cells.setdefault(row, {})[line["dataset"], line["subject"]] = text
        elif line["metric"] == "perplexity":
            cells.setdefault(row, {})["perplexity", line["subject"]] = f"{line['value']:.1f}"
    columns = [(name, subject) for name in (*shown, "perplexity") for subject in subjects]
    head = ["method", "seed", "form", "after blocks", *(f"{name}, {subject}" for name, subject in columns)]
    made = [[*map(str, row), *(own.get(column, "") for column in columns)] for row, own in cells.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, [":---"] * 4 + ["---:"] * len(columns), *made])


def main(*folders: str) -> None:
    lines = read_lines(RESULTS) if RESULTS.exists() else []
    for folder in folders:
        lines += found_in(Path(folder))
        write_lines(RESULTS, lines)
    print(table(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
