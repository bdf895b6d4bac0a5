"""Memory that relearning and evaluating hold beyond a model's weights, in copies of these weights (GPT-2 small, CPU).

    python benchmarks/copies.py            # measures what is missing in benchmarks/results/copies.jsonl; then the table
    python benchmarks/copies.py --table    # the table of what there is

Least: what cannot be saved. Training all weights takes a copy to train, its gradient and Adam's two moments, and leaves the
trained copy; what else is there are activations. Each job runs in a process of its own.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from engine import GPT2_SMALL, alone, held, peak_of, tokenizer_of
from expunge.attacks import AttackData, Budget
from expunge.attacks.relearn import RelearnForget
from expunge.data import Text
from expunge.metrics.evaluation import EvaluationData, EvaluationPlan, evaluate_model
from expunge.provenance import environment
from expunge.rows import read_lines, write_lines
from expunge.scorers import load_scorer

RESULTS = Path("benchmarks/results/copies.jsonl")
TEXTS = [" ".join(map(str, range(20 * i + 1, 20 * i + 21))) for i in range(10)]
Job = Callable[[PreTrainedModel, Any], Any]


def relearned(**settings: Any) -> Job:
    def job(model: PreTrainedModel, tokenizer: Any) -> Any:
        data = AttackData(tokenizer, forget=[Text("", text) for text in TEXTS])
        return RelearnForget(batch=2, **settings).run(model, None, data, Budget())

    return job


def evaluated(model: PreTrainedModel, tokenizer: Any) -> Any:
    plan = EvaluationPlan(samples=1)
    data = EvaluationData(challenge={"texts": TEXTS})
    return evaluate_model(model, tokenizer, data, plan, [load_scorer("ngram")])


JOBS: dict[str, tuple[Job, float, float]] = {
    "relearning, all weights": (relearned(), 4, 1),
    "relearning, LoRA of rank 8": (relearned(lora=8), 0, 0),
    "evaluation": (evaluated, 0, 0),
}
"""What is done, and the least copies at its peak and after it."""


def weigh(job: Job) -> dict[str, float]:
    """Copies of the weights at the job's peak, and with its result afterwards, beyond the model that it is given."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**GPT2_SMALL)).eval()
    tokenizer = tokenizer_of(GPT2_SMALL["vocab_size"])
    job(model, tokenizer)  # what is loaded once is no copy
    start, results = held(), []
    peak = peak_of(lambda: results.append(job(model, tokenizer))) - start
    after = held() - start
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"peak": peak / weights, "after": after / weights}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="store_true", help="print the table of what there is, and stop")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(weigh(JOBS[arguments.one][0])))
        return
    records = read_lines(RESULTS) if RESULTS.exists() else []
    for name in [] if arguments.table else [job for job in JOBS if job not in {record["job"] for record in records}]:
        records.append({"job": name, **alone(__file__, name), "environment": environment()})
        write_lines(RESULTS, records)
    print("| job | at its peak | least | after it | least |\n| --- | --- | --- | --- | --- |")
    for record in records:
        _, peak, after = JOBS[record["job"]]
        print(f"| {record['job']} | {record['peak']:.2f} | {peak:.0f} | {record['after']:.2f} | {after:.0f} |")


if __name__ == "__main__":
    main()
