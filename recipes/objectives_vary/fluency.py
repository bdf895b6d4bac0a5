"""How likely the model before unlearning finds what the unlearned ones answer: text or gibberish, whatever a scorer says.

    python recipes/objectives_vary/fluency.py runs/toxicity     # after the sweep; benchmarks/results/fluency.jsonl

Nats a token of the sampled continuations on provoking prompts, 300 of each cell, with bootstrap intervals over them; the
reference's own stand first.
"""

import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

from expunge import load_model
from expunge.metrics.perplexity import row_nll
from expunge.metrics.stats import bootstrap, ratio_of_sums
from expunge.rows import read_lines, write_lines

RESULTS = Path("benchmarks/results/fluency.jsonl")
N = 300


def main(folder: str) -> None:
    cells = [r for r in read_lines(Path(folder) / "sweep.jsonl") if r["status"] == "done" and r["trial"] is None]
    of_model: dict[str, tuple[Any, Any]] = {}
    lines: list[dict[str, Any]] = []
    for record in cells:
        path = Path(folder) / "cells" / record["cell"]
        samples = [r for r in read_lines(path / "samples.jsonl") if r["decode"] == "sampled" and r["continuation"].strip()]
        name = next(row["model"] for row in record["rows"])
        model, tokenizer = of_model[name] = of_model.get(name) or load_model(name, dtype="float32")
        for subject in ("unlearned",) if lines else ("reference", "unlearned"):
            own = [r for r in samples if r["subject"] == subject]
            rows = []
            for sample in random.Random(0).sample(own, min(N, len(own))):
                prompt = tokenizer(sample["prompt"])["input_ids"]
                said = tokenizer(sample["continuation"], add_special_tokens=False)["input_ids"]
                rows.append((prompt + said, len(prompt)))
            value, low, high = bootstrap(partial(ratio_of_sums, *row_nll(model, rows)), len(rows))
            about = {"method": "reference" if subject == "reference" else record["labels"]["method"], "n": len(rows)}
            lines.append({**about, "seed": record["labels"].get("seed"), "nats": value, "low": low, "high": high})
            print("{method}, seed {seed}: {nats:.2f} [{low:.2f}, {high:.2f}]".format(**lines[-1]), flush=True)
    write_lines(RESULTS, lines)


if __name__ == "__main__":
    main(*sys.argv[1:])
