"""What a training run will take: memory by part and operations a step, before any weight is loaded.

    made = estimate(AutoConfig.from_pretrained("gpt2"), REPO(), UnlearnConfig(output_dir="out"))
    made.peak / 1e9, made.operations / 1e12

The model is built of fake tensors, which have shapes and no memory; its real forward runs on them, and what autograd would
keep is added up. So any architecture, LoRA, autocast and gradient checkpointing count as they are.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from expunge.config import LoraConfig
from expunge.losses.chunked import CHUNK
from expunge.methods import Method
from expunge.models import add_lora, hidden_states, inner_model, without_dropout
from expunge.training import UnlearnConfig

LOGITS_HELD = 4
"""Tensors of a chunk's logits that a chunked loss holds at once: two models' logits and log-probabilities."""


@dataclass(frozen=True)
class Estimate:
    """Bytes by part on one device, float operations of one optimizer step, and parameters in all and trained."""

    parts: Mapping[str, int]
    loading: int
    operations: int
    parameters: int
    trained: int

    @property
    def peak(self) -> int:
        """Bytes: the most that is held at once, be it in training or in loading."""
        return self.parts.get("process", 0) + max(self.loading, sum(self.parts.values()) - self.parts.get("process", 0))


def estimate(
    config: PreTrainedConfig,
    method: Method,
    args: UnlearnConfig,
    lora: LoraConfig | None = None,
    prompt: int | None = None,
    continuation: int | None = None,
) -> Estimate:
    """For pairs of so many tokens in prompt and continuations; by default the most that `args` lets through."""
    prompt = prompt or args.max_prompt_tokens
    continuation = continuation or args.max_continuation_tokens
    rows = args.per_device_train_batch_size
    length = prompt + 2 * continuation
    with FakeTensorMode():
        model: Any = without_dropout(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).train()
        depth = config.get_text_config().num_hidden_layers
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        if lora:
            model = add_lora(model, lora.rank, lora.alpha, lora.targets)
        weights = _bytes(model.parameters())
        trained = _bytes(parameter for parameter in model.parameters() if parameter.requires_grad)
        head = inner_model(model).get_output_embeddings().weight
        tensors = (torch.zeros(rows, length, dtype=torch.long), torch.ones(rows, 1, length, length, dtype=torch.bool))
        kept = _Kept(model)
        with (
            kept,
            FlopCounterMode(display=False) as counter,
            torch.autocast("cpu", torch.bfloat16, enabled=args.bf16),
        ):
            hidden_states(model, *tensors[:1], tensors[1], method.layers, tensors[0])
        head_bytes = head.numel() * head.element_size()
        scored = rows * length * (1 if method.ref_sides is None else (prompt + continuation) / length)
        chunk = LOGITS_HELD * 4 * min(CHUNK, int(scored) * len(head))
        forward, heads = counter.get_total_flops(), 2 * int(scored) * head.numel()
        count = sum(parameter.numel() for parameter in model.parameters())
        learned = trained // 4
    block = kept.bytes if args.gradient_checkpointing else kept.bytes // depth
    gradients = (1 if head.requires_grad else 0) * head_bytes
    parts = {
        "process": resident(),
        "weights": weights,
        "gradients": trained,
        "optimizer": 2 * trained,
        "reference": _reference(method, args, bool(lora), weights, head_bytes),
        "activations": kept.bytes + block,
        "logits": max(gradients + chunk, 3 * gradients),
    }
    live = method.reference and args.reference == "live"
    operations = 3 * (forward + heads) + (forward * scored / (rows * length) if live else 0) + (heads if method.reference else 0)
    steps = args.gradient_accumulation_steps
    return Estimate(parts, 2 * weights, int(operations) * steps, count, learned)


def _bytes(parameters: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _reference(method: Method, args: UnlearnConfig, adapter: bool, weights: int, head: int) -> int:
    if not method.reference or adapter:
        return 0
    return head if args.reference == "cached" else weights


class _Kept:
    """Bytes of all storages, the parameters' aside, that autograd keeps of what runs inside the block."""

    def __init__(self, model: torch.nn.Module):
        self._seen: dict[int, torch.UntypedStorage] = {}
        self._parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._parameters:
            self._seen[storage._cdata] = storage  # held, so that no other gets its address
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._seen.values())

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)


def resident() -> int:
    """Bytes of memory that this process holds now: Python and its libraries, before a model is loaded."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 0


def matrix_rate(width: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seconds: float = 0.5) -> float:
    """Float operations a second in the product of 512 states with a feed-forward layer of that width."""
    a = torch.randn(512, width, device=device, dtype=dtype)
    b = torch.randn(width, 4 * width, device=device, dtype=dtype)
    (a @ b).sum().item()
    start, runs = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        (a @ b).sum().item()
        runs += 1
    return runs * 2 * a.numel() * 4 * width / (time.perf_counter() - start)
