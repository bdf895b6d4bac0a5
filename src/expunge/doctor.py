"""What would train here, and what a run would take of this machine: `expunge doctor`, and the estimate of `--dry-run`.

plan = Plan.of(RunConfig(model="gpt2"), Path("runs/first"))
made = forecast(plan)
made.peak / 1e9, made.seconds / 3600, advice(made, plan.config)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from transformers.integrations import integration_utils

from expunge.config import RunConfig
from expunge.data import Unpaired, tokenize_pairs, tokenize_unpaired
from expunge.estimate import SHARE, CannotEstimate, estimate, matrix_rate, rows_of, texts_of
from expunge.ids import check_known
from expunge.models import loading_options
from expunge.plan import Plan


@dataclass(frozen=True)
class Forecast:
    """What training will take on this machine.

    rows, truncation: pairs or texts to forget, and what did not fit, of each set. trains: names of weights by blocks.
    memory, process, peak: bytes by part, of Python with its libraries, and in all on the device that trains; loading: bytes
    of the machine's memory while the weights are read; operations: of a step; seconds: in all, None where nobody measured
    what a step reaches of the device's rate.
    """

    rows: int
    truncation: str | Mapping[str, str]
    steps: int
    parameters: int
    trained: int
    trains: Mapping[str, str]
    memory: Mapping[str, int]
    process: int
    loading: int
    peak: int
    device: torch.device
    operations: int
    seconds: float | None


def forecast(plan: Plan) -> Forecast:
    """From the model's configuration and the data: no weight is loaded. Memory: the longest rows'.

    Raises ExpungeError for what `train` would refuse, CannotEstimate for some architectures.
    """
    plan.check_settings()
    config, args = plan.config, plan.args
    if not plan.trains:
        raise CannotEstimate(
            f"{plan.method.name} trains nothing: it takes the weights, and forwards over what it is fitted on"
        )
    model, tokenizer = plan.start.description, plan.tokenizer
    outline, method = model.config, plan.method.placed(model.depth)
    _ = plan.monitor_data
    data = plan.training_data
    limits, batch = (args.max_prompt_tokens, args.max_continuation_tokens), args.per_device_train_batch_size
    if paired := not isinstance(data, Unpaired):
        rows, cut = tokenize_pairs(data, tokenizer, *limits)
        longest, usual, truncation = *rows_of(rows, batch), str(cut)
        texts = [ids for row in rows for ids in (row.prompt, row.chosen, row.rejected)]
    else:
        sides, by_side = tokenize_unpaired(data, tokenizer, *limits)
        rows = sides["forget"]
        longest, usual = texts_of([*rows, *sides["retain"]], 2 * batch)
        truncation = {side: str(cut) for side, cut in by_side.items()}
        texts = [ids for side in sides.values() for row in side for ids in row]
    check_known(texts, model.known, tokenizer)
    lora = None if config.lora is None else plan.lora[0]
    dtype = loading_options(config.dtype or "float32")["dtype"]
    settings: dict[str, Any] = {
        "trust_remote_code": config.trust_remote_code,
        "paired": paired,
        "quantization": config.quantization,
        "dtype": (outline.dtype or torch.float32) if dtype == "auto" else dtype,
    }
    most, mean = (estimate(outline, method, args, lora, *lengths, **settings) for lengths in (longest, usual))
    steps, on_cpu = plan.steps, args.device.type == "cpu"
    process, loading = psutil.Process().memory_info().rss, 2 * most.parts["weights"]  # the file's pages and the weights
    seconds = None
    if on_cpu:
        rate = matrix_rate(outline.get_text_config().hidden_size, torch.bfloat16 if args.bf16 else torch.float32)
        seconds = steps * mean.operations / (SHARE * rate)
    return Forecast(
        rows=len(rows),
        truncation=truncation,
        steps=steps,
        parameters=most.parameters,
        trained=most.trained,
        trains=most.trains,
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
        "lora.r=16": config.lora is None,
        "quantization=4bit": config.lora is not None and config.quantization is None,
        "training.reference=cached": config.lora is None and config.training.get("reference") != "cached",
        "training.gradient_checkpointing=true": not config.training.get("gradient_checkpointing"),
        "a smaller training.per_device_train_batch_size with training.gradient_accumulation_steps": True,
    }
    smaller = ", ".join(way for way, helps in ways.items() if helps)
    return f"does not fit: {made.peak / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; try {smaller}"


def free_memory(device: torch.device) -> int:
    """Bytes: of an accelerator, or of the machine."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def reports() -> str:
    """What `training.report_to` may name."""
    installed = integration_utils.get_available_reporting_integrations()
    return ", ".join(installed) or "no package for training.report_to (wandb, trackio, tensorboard) is installed"


def device() -> str:
    """What would train."""
    if not torch.cuda.is_available():
        return f"CPU, {torch.get_num_threads()} threads"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(names)}; {free_memory(torch.device('cuda')) / 1e9:.1f} GB of the first are free"
