"""Continuations in batches against one `model.generate` after another, and the memory that they take.

    python benchmarks/evaluate.py          # measures, writes benchmarks/results/evaluate.jsonl, prints the table

The built-in model, prompts of its held-out pairs, 20 new tokens, one thread. Both run in turns in one process; the ratio is
the median over rounds. Memory is resident memory above what is held before, at more and more prompts.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine import resident
from expunge import load_model, load_pairs
from expunge.generation import Decoding, generate
from expunge.ids import encode
from expunge.provenance import environment
from expunge.rows import write_lines

RESULTS = Path("benchmarks/results/evaluate.jsonl")
ROUNDS, PROMPTS, SAMPLES, NEW = 5, 64, 5, 20


def one_by_one(model: Any, tokenizer: Any, prompts: list[list[int]], samples: int) -> list[list[int]]:
    """transformers' own generation, a row at a time."""
    settings = {"do_sample": samples > 0, "max_new_tokens": NEW, "pad_token_id": 0}
    settings |= {"top_p": 0.9, "top_k": 0} if samples else {}
    found = []
    for prompt in prompts:
        for _ in range(samples or 1):
            ids = torch.tensor([prompt])
            output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
            new = output[0, len(prompt) :].tolist()
            found.append(new[: new.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in new else new)
    return found


def in_turns(steps: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of CPU time of each, in rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    return seconds


def peak_of(step: Callable[[], Any]) -> int:
    """Bytes of resident memory at its highest during `step`, above what was held before."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step()
    return resident("VmHWM") - before


def main() -> None:
    torch.set_num_threads(1)
    model, tokenizer = load_model("builtin", dtype="float32", device="cpu")
    prompts = [encode(tokenizer, pair.prompt)[-32:] for pair in load_pairs("builtin-heldout")]
    records: list[dict[str, Any]] = []
    for samples in (0, SAMPLES):
        decoding = Decoding(NEW, samples=samples)
        steps = {
            "one by one": lambda samples=samples: one_by_one(model, tokenizer, prompts[:PROMPTS], samples),
            "in batches": lambda decoding=decoding: generate(model, tokenizer, prompts[:PROMPTS], decoding),
        }
        record: dict[str, Any] = {"kind": "time", "samples": samples, "prompts": PROMPTS}
        if not samples:
            pairs = zip(steps["one by one"](), steps["in batches"](), strict=True)
            record["equal"] = sum(ours == [theirs] for theirs, ours in pairs) / PROMPTS
        records.append({**record, "seconds": in_turns(steps)})
    for number in (64, 128, 256, 512):
        peak = peak_of(lambda number=number: generate(model, tokenizer, prompts[:number], Decoding(NEW, samples=25)))
        records.append({"kind": "memory", "samples": 25, "prompts": number, "bytes": peak})
    write_lines(RESULTS, [{**record, "environment": environment()} for record in records])
    print(table(records))


def table(records: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| continuations | one by one (s) | in batches (s) | ratio |", "| --- | --- | --- | --- |"]
    for record in records:
        if record["kind"] == "time":
            slow, fast = record["seconds"].values()
            ratios = [a / b for a, b in zip(slow, fast, strict=True)]
            name = f"{record['prompts']} prompts, " + (f"{record['samples']} samples" if record["samples"] else "greedy")
            ratio = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
            lines.append(f"| {name} | {statistics.median(slow):.1f} | {statistics.median(fast):.2f} | {ratio} |")
    lines += ["", "| rows | memory (MB) |", "| --- | --- |"]
    for record in records:
        if record["kind"] == "memory":
            lines.append(f"| {record['prompts'] * record['samples']} | {record['bytes'] / 1e6:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
