"""What would train here, and what a run would take of this machine: `expunge doctor`, and the estimate of `--dry-run`.

made = forecast(RunConfig(model="gpt2"))
made.peak / 1e9, made.seconds / 3600, advice(made, config)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from expunge.config import RunConfig
from expunge.data import tokenize_pairs
from expunge.estimate import SHARE, estimate, matrix_rate, rows_of
from expunge.pipeline import build_method, build_training, outline_of, resolve, steps_of, training_pairs


@dataclass(frozen=True)
class Forecast:
    """What training will take on this machine.

    memory, process, peak: bytes by part, of Python with its libraries, and in all on the device that trains; loading: bytes
    of the machine's memory while the weights are read; operations: of a step; seconds: in all, None where nobody measured
    what a step reaches of the device's rate.
    """

    pairs: int
    steps: int
    parameters: int
    trained: int
    memory: Mapping[str, int]
    process: int
    loading: int
    peak: int
    device: torch.device
    operations: int
    seconds: float | None


def forecast(config: RunConfig) -> Forecast:
    """From the pairs and the model's configuration: no weight is loaded. Memory is that of the longest pairs.

    Raises ExpungeError for what `train` would refuse, CannotEstimate for some architectures.
    """
    config = resolve(config)
    method, args = build_method(config.method), build_training(config.training, Path(), config.seed)
    outline, tokenizer = outline_of(config)
    pairs = training_pairs(config, tokenizer)
    rows, _ = tokenize_pairs(pairs, tokenizer, args.max_prompt_tokens, args.max_continuation_tokens)
    longest, usual = rows_of(rows, args.per_device_train_batch_size)
    most, mean = (
        estimate(outline, method, args, config.lora, *lengths, trust_remote_code=config.trust_remote_code)
        for lengths in (longest, usual)
    )
    steps, on_cpu = steps_of(args, len(rows)), args.device.type == "cpu"
    process, loading = psutil.Process().memory_info().rss, 2 * most.parts["weights"]  # the file's pages and the weights
    seconds = None
    if on_cpu:
        rate = matrix_rate(outline.get_text_config().hidden_size, torch.bfloat16 if args.bf16 else torch.float32)
        seconds = steps * mean.operations / (SHARE * rate)
    return Forecast(
        pairs=len(rows),
        steps=steps,
        parameters=most.parameters,
        trained=most.trained,
        memory=most.parts,
        process=process,
        loading=process + loading,
        peak=process + max(loading, most.training) if on_cpu else most.training,
        device=args.device,
        operations=mean.operations,
        seconds=seconds,
    )


def advice(made: Forecast, config: RunConfig) -> str:
    """One line: whether the run fits into the memory that is free now, and else what would make it smaller."""
    free = free_memory(made.device)
    if made.loading > (machine_free := free_memory(torch.device("cpu"))):
        return f"does not fit: loading takes {made.loading / 1e9:.1f} GB of memory, {machine_free / 1e9:.1f} GB are free"
    if made.peak <= free:
        return f"fits: {made.peak / 1e9:.1f} GB of the {free / 1e9:.1f} GB that are free"
    ways = {
        "lora.rank=16": config.lora is None,
        "training.reference=cached": config.lora is None and config.training.get("reference") != "cached",
        "training.gradient_checkpointing=true": not config.training.get("gradient_checkpointing"),
        "a smaller training.per_device_train_batch_size with training.gradient_accumulation_steps": True,
    }
    smaller = ", ".join(way for way, helps in ways.items() if helps)
    return f"does not fit: {made.peak / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; try {smaller}"


def free_memory(device: torch.device) -> int:
    """Bytes: of an accelerator, or of the machine."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def device() -> str:
    """What would train."""
    if not torch.cuda.is_available():
        return f"CPU, {torch.get_num_threads()} threads"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(names)}; {free_memory(torch.device('cuda')) / 1e9:.1f} GB of the first are free"
