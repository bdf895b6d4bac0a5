"""How a method is trained: settings, and what is refused of them and of a model before anything is begun."""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.integrations import integration_utils

from expunge.config import at_least
from expunge.errors import ExpungeError
from expunge.models import inner_model
from expunge.registry import did_you_mean

LOW = ("loss", "toxicity", "perplexity")
"""How the names begin of figures that are better low, where `greater_is_better` is not given."""
LEAST = {
    "learning_rate": 0,
    "heads_learning_rate": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
    "max_grad_norm": 0,
    "num_train_epochs": 0.01,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_prompt_tokens": 1,
    "max_continuation_tokens": 1,
    "anchor_tokens": 1,
    "logging_steps": 0.01,
    "save_steps": 0.01,
    "seed": 0,
}
"""The least that training takes; transformers would divide by zero, or train upwards."""

log = logging.getLogger("expunge")


@dataclass
class UnlearnConfig(TrainingArguments):
    """`transformers.TrainingArguments` with defaults for unlearning, and what a method's heads and pairs need."""

    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate of the model."})
    heads_learning_rate: float | None = field(
        default=None, metadata={"help": "That of the method's heads; default 10 x the model's, at least 1e-4."}
    )
    weight_decay: float = field(default=1e-3, metadata={"help": "On the model's matrices; none on the heads."})
    warmup_steps: float = field(default=100, metadata={"help": "Linear warm-up (REPO appendix B: 100)."})
    num_train_epochs: float = field(default=3, metadata={"help": "Passes over the pairs, or over the forget set."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Pairs, or rows of each set, a step and device."})
    max_grad_norm: float | None = field(default=None, metadata={"help": "Default: the method's (DPO 10, REPO 1)."})
    max_prompt_tokens: int = field(default=64, metadata={"help": "A prompt keeps its last tokens."})
    max_continuation_tokens: int = field(default=64, metadata={"help": "A continuation keeps its first tokens."})
    layout: str = field(
        default="auto", metadata={"help": "auto: chunked logits, and one shared prefix a pair where it is exact; or plain."}
    )
    reference: str = field(
        default="live",
        metadata={
            "help": "live; or cached: its states are computed once and kept on disk, faster from the second epoch on."
        },
    )
    anchor_text: str | None = field(default=None, metadata={"help": "A neutral corpus under the KL too."})
    anchor_tokens: int = field(default=64, metadata={"help": "Tokens of anchor_text beside each pair."})
    logging_steps: float = field(default=1, metadata={"help": "Steps between logged lines."})
    save_strategy: str = field(default="steps", metadata={"help": "When to write a checkpoint."})
    save_steps: float = field(default=200, metadata={"help": "Steps between checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    eval_steps: float | None = field(default=50, metadata={"help": "Steps between measurements, with eval_strategy=steps."})
    report_to: Any = field(default="none", metadata={"help": "wandb, trackio, tensorboard, ... as in transformers."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false: rows are token ids."})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "As in transformers."})

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():  # accelerate takes several processes for several runs without it
            self.use_cpu = True
        at_least("training", self, **LEAST)
        if self.greater_is_better is None and self.metric_for_best_model:
            self.greater_is_better = not self.metric_for_best_model.removeprefix("eval_").startswith(LOW)
        super().__post_init__()
        installed = integration_utils.get_available_reporting_integrations()
        for name in self.report_to:
            if name not in integration_utils.INTEGRATION_TO_CALLBACK:
                raise ExpungeError(
                    f"training.report_to: unknown {name!r}{did_you_mean(name, integration_utils.INTEGRATION_TO_CALLBACK)}"
                )
            if name not in installed:
                raise ExpungeError(f"training.report_to={name}: the package is not installed (pip install {name})")


def refuse(model: nn.Module, args: UnlearnConfig) -> None:
    """Raise ExpungeError for what would train, but not what was asked for."""
    if args.layout not in ("auto", "plain"):
        raise ExpungeError(f"training.layout={args.layout!r}: auto or plain")
    if args.reference not in ("live", "cached"):
        raise ExpungeError(f"training.reference={args.reference!r}: live or cached")
    if args.push_to_hub:
        raise ExpungeError(
            "push_to_hub: the trainer would push checkpoints; after trainer.save_model(folder) call "
            "huggingface_hub.upload_folder(repo_id=..., folder_path=folder), or use the command line"
        )
    trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    if not trained:
        raise ExpungeError("no weight of the model is trained: load_model leaves an adapter on low-precision weights frozen")
    if half := trained & {torch.float16, torch.bfloat16}:
        log.warning(
            "the weights that are trained are %s, in which small updates round to nothing: load them in float32, train an "
            "adapter (lora.r=16), or raise the learning rate; training.bf16=true computes in bfloat16 on float32 weights",
            str(half.pop()).removeprefix("torch."),
        )
    inner = inner_model(model)
    if getattr(inner, "is_quantized", False) and not hasattr(model, "disable_adapter"):
        raise ExpungeError("quantized weights cannot be trained: add an adapter (lora.r=16)")
    places = {torch.device(place) for place in getattr(inner, "hf_device_map", {}).values()}
    if away := {
        str(place) for place in places if (place.type, place.index or 0) != (args.device.type, args.device.index or 0)
    }:
        raise ExpungeError(
            f"device_map puts parts of the model on {', '.join(sorted(away))}, but training runs on {args.device}: leave "
            "device_map out, and use `accelerate launch` for several devices"
        )
    if args.n_gpu > 1:
        raise ExpungeError(
            f"{args.n_gpu} GPUs are visible to one process: start it with `accelerate launch`, or let it see one only "
            "(CUDA_VISIBLE_DEVICES=0)"
        )
