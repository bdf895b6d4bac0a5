"""What a training run will take: memory by part and operations a step, before any weight is loaded.

    made = estimate(AutoConfig.from_pretrained("gpt2"), REPO(), UnlearnConfig(output_dir="out"))
    made.peak / 1e9, made.operations / 1e12

The model is made on the meta device, of tensors that have shapes and no memory; its real forward runs on them, and what
autograd would keep is added up. So any architecture, LoRA, autocast and gradient checkpointing count as they are.
"""

import math
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from expunge.config import LoraConfig
from expunge.data.tokenize import TokenizedPair
from expunge.losses.chunked import CHUNK
from expunge.methods import Method
from expunge.models import add_lora, hidden_states, inner_model, without_dropout
from expunge.training import UnlearnConfig

LOGITS_HELD = 4
"""Tensors of a chunk's logits that a chunked loss holds at once: two models' logits and log-probabilities."""

SHARE = 0.6
"""Of the rate of one matrix product, what a step reaches on a CPU (benchmarks/results/engine.jsonl)."""


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
    depth = config.get_text_config().num_hidden_layers
    with torch.device("meta"):
        model: Any = without_dropout(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
        if lora:
            model = add_lora(model, lora.rank, lora.alpha, lora.targets)
    model.train()
    mode = FakeTensorMode()
    _fake(model, mode)
    weights = _bytes(model.parameters())
    trained = _bytes(parameter for parameter in model.parameters() if parameter.requires_grad)
    head: Any = inner_model(model).get_output_embeddings().weight  # type: ignore[union-attr]
    with mode, torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
        ids, seen = torch.zeros(rows, length, dtype=torch.long), torch.ones(rows, 1, length, length, dtype=torch.bool)
        with _Kept(model) as kept, FlopCounterMode(display=False) as counter:
            hidden_states(model, ids, seen, method.layers, ids)
        activations, block = kept.bytes, kept.bytes // depth
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable()
            with _Kept(model) as kept:
                hidden_states(model, ids, seen, method.layers, ids)
            activations = kept.bytes
    head_bytes = head.numel() * head.element_size()
    scored = rows * (length if method.ref_sides is None else prompt + continuation)
    chunk = LOGITS_HELD * 4 * min(CHUNK, scored * len(head))
    forward, heads = counter.get_total_flops(), 2 * scored * head.numel()
    gradients = (1 if head.requires_grad else 0) * head_bytes
    parts = {
        "process": resident(),
        "weights": weights,
        "gradients": trained,
        "optimizer": 2 * trained,
        "reference": _reference(method, args, bool(lora), weights, head_bytes),
        "activations": activations + block,
        "logits": max(gradients + chunk, 3 * gradients),
    }
    operations = 3 * (forward + heads)
    if method.reference:
        operations += heads + (forward * scored // (rows * length) if args.reference == "live" else 0)
    count = sum(parameter.numel() for parameter in model.parameters())
    return Estimate(parts, 2 * weights, operations * args.gradient_accumulation_steps, count, trained // 4)


def _fake(model: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Every tensor of a model on the meta device in its place as a fake one on the CPU, whose operators run on it."""
    made: dict[int, torch.Tensor] = {}  # tied ones stay tied
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in made:
                    fake: torch.Tensor = FakeTensor(mode, tensor.detach(), torch.device("cpu"))
                    if isinstance(tensor, torch.nn.Parameter):
                        fake = torch.nn.Parameter(fake, tensor.requires_grad)
                    made[id(tensor)] = fake
                if tensor is not None:
                    tensors[name] = made[id(tensor)]  # type: ignore[assignment]


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

    def __enter__(self) -> "_Kept":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)


def resident() -> int:
    """Bytes of memory that this process holds now: Python and its libraries, before a model is loaded."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 0


def rows_of(pairs: Sequence[TokenizedPair], batch: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(prompt, continuation) in tokens of the longest pair, which memory must hold, and of what a batch is padded to."""
    lengths = sorted((len(pair.prompt) + len(pair.chosen) + len(pair.rejected), len(pair.prompt)) for pair in pairs)
    shuffled = random.Random(0).sample(lengths, len(lengths))
    longest = [max(shuffled[i : i + batch]) for i in range(0, len(shuffled), batch)]
    usual = tuple(round(sum(values) / len(longest)) for values in zip(*longest, strict=True))
    return _split(*lengths[-1]), _split(*usual)


def _split(length: int, prompt: int) -> tuple[int, int]:
    return prompt, math.ceil((length - prompt) / 2)


def matrix_rate(width: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seconds: float = 0.5) -> float:
    """Float operations a second in the product of 512 states with a feed-forward layer of that width, at best."""
    a = torch.randn(512, width, device=device, dtype=dtype)
    b = torch.randn(width, 4 * width, device=device, dtype=dtype)
    end, fastest = time.perf_counter() + seconds, math.inf
    while (start := time.perf_counter()) < end:
        (a @ b)[0, 0].item()
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * a.numel() * 4 * width / fastest
