"""Estimates of `expunge doctor` against the peak memory of real runs, each in a process of its own.

python benchmarks/estimate.py          # measures, writes benchmarks/results/estimate.jsonl, prints the table
"""

import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from engine import GEMMA_VOCABULARY, GPT2_SMALL
from expunge.models import BUILTIN
from expunge.provenance import environment
from expunge.rows import write_lines

RESULTS = Path("benchmarks/results/estimate.jsonl")
MODELS = {"GPT-2 small": GPT2_SMALL, "vocabulary 256,000, 4 x 512": GEMMA_VOCABULARY}
SETTINGS = {
    "full": [],
    "full, cached": ["training.reference=cached"],
    "full, checkpointed": ["training.gradient_checkpointing=true"],
    "full, bf16": ["training.bf16=true"],
    "LoRA": ["lora.r=16"],
}


def main() -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environ["EXPUNGE_CACHE"] = str(folder / "cache")
        text = " the river runs past the old mill and on to the sea" * 10
        pairs = [{"prompt": text, "chosen": f" {i}{text}", "rejected": f" not {i}{text}"} for i in range(32)]
        write_lines(folder / "pairs.jsonl", pairs)
        for number, ((model, shape), method, (label, settings)) in enumerate(
            product(MODELS.items(), ("repo", "dpo"), SETTINGS.items())
        ):
            if not (folder / model).exists():
                torch.manual_seed(0)
                AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape)).save_pretrained(folder / model)
                AutoTokenizer.from_pretrained(BUILTIN).save_pretrained(folder / model)
            common = ["--model", folder / model, "--method", method, "--pairs", folder / "pairs.jsonl", *settings]
            common += ["training.max_steps=3", "training.per_device_train_batch_size=8", "training.save_strategy=no"]

            def expunge(verb: str, *arguments: object) -> str:
                command = map(str, [sys.executable, "-m", "expunge", verb, *arguments])
                return subprocess.run([*command], env=environ, check=True, capture_output=True, text=True).stdout

            said = yaml.safe_load(expunge("doctor", *common))["run"]
            expunge("train", *common, "--quiet", "--out", folder / str(number))
            facts = json.loads((folder / str(number) / "stages" / "train.json").read_text())
            record = {"model": model, "method": method, "settings": label, "estimate": said["peak_gb"]}
            record |= {"process": said["memory_gb"]["process"], "measured": facts["peak_memory_bytes"] / 1e9}
            records.append({**record, "environment": environment()})
            write_lines(RESULTS, records)
            print(row(record), flush=True)


def row(record: dict[str, Any]) -> str:
    """A line of Markdown: the estimate, the measured peak, and their ratio with Python and its libraries and without."""
    made, real, process = record["estimate"], record["measured"], record["process"]
    ratios = f"{made / real:.2f} | {(made - process) / (real - process):.2f}"
    return f"| {record['model']}, {record['method']}, {record['settings']} | {made:.2f} | {real:.2f} | {ratios} |"


if __name__ == "__main__":
    main()
