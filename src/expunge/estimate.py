"""What a training run will take: memory by part and operations a step, before any weight is loaded.

    made = estimate(AutoConfig.from_pretrained("gpt2"), REPO(), UnlearnConfig(output_dir="out"))
    made.training / 1e9, made.operations / 1e12

The model is made on the meta device, of tensors that have shapes and no memory. Its real forward and backward run on them:
what autograd keeps is added up and products are counted, with LoRA, autocast and checkpointed activations as they are. The
head follows from its shape, and the optimizer is taken for Adam, whose moments are two copies of what is trained.
"""

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # where torch's documentation of fake tensors has them
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from expunge.adapters import add_lora
from expunge.anatomy import in_words
from expunge.data.tokenize import TokenizedPair, TokenizedText
from expunge.errors import ExpungeError
from expunge.losses.chunked import CHUNK
from expunge.methods import Method
from expunge.models import Layer, blocks, hidden_states, inner_model, without_dropout
from expunge.training import UnlearnConfig

LOGITS_HELD = 4
"""Tensors of the size of a chunk's logits that a chunked loss holds at once: three, and what a product needs for itself."""

SHARE = 0.6
"""Of the rate of one matrix product, what a step reaches on a CPU (benchmarks/results/engine.jsonl)."""


BYTES = {"4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0}
"""Of a quantized weight: 4 bits, a byte for each block of 64, and a float for 256 of these (Dettmers et al. 2023)."""


class CannotEstimate(ExpungeError):
    """The architecture trains as it does, but not on tensors without memory."""


@dataclass(frozen=True)
class Estimate:
    """Bytes by part, float operations of one optimizer step of one process, and parameters in all and trained.

    trains: the names of these, by the blocks that have them; empty for a method that trains all there are.
    """

    parts: Mapping[str, int]
    operations: int
    parameters: int
    trained: int
    trains: Mapping[str, str]

    @property
    def training(self) -> int:
        """Bytes that are held at the peak of a step, beside Python and its libraries."""
        return sum(self.parts.values())


def estimate(
    config: PreTrainedConfig,
    method: Method,
    args: UnlearnConfig,
    lora: Mapping[str, Any] | None = None,
    prompt: int | None = None,
    continuation: int | None = None,
    trust_remote_code: bool = False,
    paired: bool = True,
    dtype: torch.dtype = torch.float32,
    quantization: str | None = None,
) -> Estimate:
    """For pairs, or texts of two sets, of so many tokens in prompt and continuations; by default as many as `args` allows.

    lora: fields of peft.LoraConfig. Quantized weights are counted as what they take; what runs on them is that of `dtype`.
    Raises CannotEstimate where the architecture's forward does not run on tensors without memory.
    """
    prompt = prompt or args.max_prompt_tokens
    continuation = continuation or args.max_continuation_tokens
    pairs = args.per_device_train_batch_size
    anchors = pairs if args.anchor_text else 0
    shared = (pairs + anchors, max(prompt + 2 * continuation, args.anchor_tokens if anchors else 0))
    plain = (2 * pairs + anchors, max(prompt + continuation, args.anchor_tokens if anchors else 0))
    shapes = [(*plain, True), (*plain, False)]
    if args.layout != "plain" and paired:
        shapes.insert(0, (*shared, True))
    if method.applied:
        raise CannotEstimate(f"{method.name} trains nothing: it takes the weights, and states of a batch at a time")
    try:
        model = _model(config, lora, trust_remote_code, dtype)
        chosen = method.trains(model)
        for name, parameter in model.named_parameters() if chosen is not None else ():
            parameter.requires_grad_(name in chosen)
        rows, length, body = _first(model, args, method.layers, shapes)
    except ExpungeError:
        raise
    except Exception as error:  # whatever an architecture may trip over
        reason = str(error).strip().split("\n")[0]
        raise CannotEstimate(f"memory and time cannot be estimated ({type(error).__name__}: {reason})") from None

    weights = _bytes(model.parameters()) - _saved(model, quantization)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    head: Any = inner_model(model).get_output_embeddings().weight  # type: ignore[union-attr]
    head_bytes = _bytes([head])
    neutral = anchors * args.anchor_tokens if "anchor" in method.scored else 0
    scored = len({"retain", "forget"} & {*method.scored}) * pairs * (prompt + continuation) + neutral
    if "final" not in method.layers:
        scored = 0
    logits = 4 * LOGITS_HELD * (scored * len(head) if args.layout == "plain" else min(CHUNK, scored * len(head)))
    if head.requires_grad:  # its gradient is added up beside the logits; later that of tied embeddings comes to it
        logits = max(logits + head_bytes, 2 * head_bytes)
    parts = {
        "weights": weights,
        "gradients": _bytes(learned),
        "optimizer": 2 * _bytes(learned),
        "reference": _reference(method, args, lora is not None, weights if chosen is None else _bytes(learned), head_bytes),
        "activations": body.kept,
        "logits": logits,
    }
    product = 2 * scored * head.numel()
    operations = body.operations + (2 + head.requires_grad) * product
    if method.reference:
        operations += product + (body.forward * scored // (rows * length) if args.reference == "live" else 0)
    return Estimate(
        parts,
        operations * args.gradient_accumulation_steps,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trained=sum(parameter.numel() for parameter in learned),
        trains={} if chosen is None else in_words(model, chosen),
    )


@dataclass(frozen=True)
class _Body:
    """Of the body's forward and backward: bytes held at its peak, operations of both, and of the forward alone."""

    kept: int
    operations: int
    forward: int


def _model(config: PreTrainedConfig, lora: Mapping[str, Any] | None, trust_remote_code: bool, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        without_dropout(model)
        if lora is not None:
            model = add_lora(model, **lora)
    return model.train()


def _saved(model: Any, quantization: str | None) -> int:
    """Bytes that bitsandbytes saves on the frozen matrices of the blocks."""
    if quantization is None:
        return 0
    frozen = [weight for weight in blocks(model).parameters() if weight.ndim == 2 and not weight.requires_grad]
    return sum(round(weight.numel() * (weight.element_size() - BYTES[quantization])) for weight in frozen)


def _first(
    model: Any, args: UnlearnConfig, layers: Sequence[Layer], shapes: Sequence[tuple[int, int, bool]]
) -> tuple[int, int, _Body]:
    """The first of `shapes` that the model takes: (rows, tokens, with a mask of ours)."""
    mode = FakeTensorMode()
    _fake(model, mode)
    for rows, length, masked in shapes:
        try:
            with mode, torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                return rows, length, _run(model, rows, length, masked, layers, bool(args.gradient_checkpointing))
        except (TypeError, ValueError):  # it takes no such mask
            if not masked:
                raise
    raise AssertionError("the last shape has no mask")


def _run(model: Any, rows: int, length: int, masked: bool, layers: Sequence[Layer], checkpointing: bool) -> _Body:
    ids = torch.zeros(rows, length, dtype=torch.long)
    seen = torch.ones(rows, 1, length, length, dtype=torch.bool) if masked else torch.ones(rows, length)
    inputs = (ids, seen, layers, ids if masked else None)
    with _Kept(model) as kept, FlopCounterMode(display=False) as counter:
        states = hidden_states(model, *inputs)
    whole = again = kept.bytes
    forward = counter.get_total_flops()
    if checkpointing:
        model.gradient_checkpointing_enable()
        with _Kept(model) as kept:
            states = hidden_states(model, *inputs)
        again = kept.bytes
    with FlopCounterMode(display=False) as counter:
        torch.stack([state.float().sum() for state in states.values()]).sum().backward()
    depth = inner_model(model).config.get_text_config().num_hidden_layers  # one block's are there twice in backward
    return _Body(again + whole // depth, forward + counter.get_total_flops(), forward)


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


def rows_of(pairs: Sequence[TokenizedPair], batch: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(prompt, continuation) in tokens of the longest pair, which memory must hold, and of what a batch is padded to."""
    lengths = [(len(pair.prompt) + len(pair.chosen) + len(pair.rejected), len(pair.prompt)) for pair in pairs]
    longest, usual = _longest(lengths, batch)
    return _split(*longest), _split(*usual)


def texts_of(texts: Sequence[TokenizedText], batch: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The same of unpaired texts, of which a batch holds so many of both sides."""
    (length, prompt), (usual, usual_prompt) = _longest([(len(p) + len(c), len(p)) for p, c in texts], batch)
    return (prompt, length - prompt), (usual_prompt, usual - usual_prompt)


def _longest(lengths: Sequence[tuple[int, int]], batch: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The longest of all, and the mean of the longest of each batch."""
    lengths = sorted(lengths)
    shuffled = random.Random(0).sample(lengths, len(lengths))
    longest = [max(shuffled[i : i + batch]) for i in range(0, len(shuffled), batch)]
    length, prompt = (round(sum(values) / len(longest)) for values in zip(*longest, strict=True))
    return lengths[-1], (length, prompt)


def _split(length: int, prompt: int) -> tuple[int, int]:
    return prompt, math.ceil((length - prompt) / 2)


def matrix_rate(width: int, dtype: torch.dtype = torch.float32, seconds: float = 0.5) -> float:
    """Float operations a second of the CPU in the product of 512 states with a feed-forward layer of that width, at best."""
    a = torch.randn(512, width, dtype=dtype)
    b = torch.randn(width, 4 * width, dtype=dtype)
    end, fastest = time.perf_counter() + seconds, math.inf
    while (start := time.perf_counter()) < end:
        (a @ b)[0, 0].item()
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * a.numel() * 4 * width / fastest
