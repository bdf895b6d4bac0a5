"""What this machine offers, and what a run would take of it: `expunge doctor`, and the estimate of `--dry-run`.

made = forecast(RunConfig(model="gpt2"))
made.peak / 1e9, made.seconds / 3600, advice(made, config)
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from expunge.config import RunConfig, cache_folder
from expunge.data import load_pairs, tokenize_pairs
from expunge.estimate import SHARE, estimate, matrix_rate, rows_of
from expunge.models import load_outline
from expunge.pipeline import build_method, build_training, resolve, steps_of
from expunge.provenance import environment


@dataclass(frozen=True)
class Forecast:
    """What training will take on this machine: bytes at its peak and by part, operations a step, seconds in all."""

    pairs: int
    steps: int
    parameters: int
    trained: int
    memory: Mapping[str, int]
    peak: int
    operations: int
    seconds: float


def forecast(config: RunConfig) -> Forecast:
    """From the pairs and the model's configuration: no weight is loaded. Memory is that of the longest pairs."""
    config = resolve(config)
    method, args = build_method(config.method), build_training(config.training, Path(), config.seed)
    pairs = load_pairs(config.data.train, limit=config.data.limit, seed=config.seed)
    outline, tokenizer = load_outline(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    rows, _ = tokenize_pairs(pairs, tokenizer, args.max_prompt_tokens, args.max_continuation_tokens)
    longest, usual = rows_of(rows, args.per_device_train_batch_size)
    most, mean = (estimate(outline, method, args, config.lora, *lengths) for lengths in (longest, usual))
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    rate = matrix_rate(outline.get_text_config().hidden_size, dtype, args.device.type)
    steps = steps_of(args, len(rows))
    return Forecast(
        pairs=len(rows),
        steps=steps,
        parameters=most.parameters,
        trained=most.trained,
        memory=most.parts,
        peak=most.peak,
        operations=mean.operations,
        seconds=steps * mean.operations / (SHARE * rate),
    )


def advice(made: Forecast, config: RunConfig) -> str:
    """One line: whether the run fits into the memory that is free now, and else what would make it smaller."""
    free = free_memory()
    if made.peak <= free:
        return f"fits: {made.peak / 1e9:.1f} GB of the {free / 1e9:.1f} GB that are free"
    ways = {
        "lora.rank=16": config.lora is None,
        "training.reference=cached": config.lora is None and config.training.get("reference") != "cached",
        "training.gradient_checkpointing=true": not config.training.get("gradient_checkpointing"),
        "a smaller training.per_device_train_batch_size with training.gradient_accumulation_steps": True,
    }
    smaller = ", ".join(way for way, open_ in ways.items() if open_)
    return f"does not fit: {made.peak / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; try {smaller}"


def free_memory() -> int:
    """Bytes: of the accelerator if there is one, else of the machine."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available


def machine() -> dict[str, str]:
    """What there is to work with, by name, each in a line."""
    found = environment()
    cache = cache_folder("")
    at = next(path for path in (cache, *cache.parents) if path.exists())
    device = f"CPU, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    data = os.environ.get("EXPUNGE_DATA")
    if not data:
        data = "EXPUNGE_DATA is not set: sets that are not built in are read from the hub"
    elif not Path(data).is_dir():
        data = f"EXPUNGE_DATA={data}, which is no folder"
    return {
        "expunge": f"{found['expunge']}, Python {found['python']}",
        "libraries": ", ".join(f"{name} {number}" for name, number in found["packages"].items()),
        "device": f"{device}; {free_memory() / 1e9:.1f} GB of memory are free",
        "cache": f"{cache}; {shutil.disk_usage(at).free / 1e9:.0f} GB are free there",
        "data": data,
        "offline": "yes" if os.environ.get("HF_HUB_OFFLINE") == "1" else "no",
    }
