"""Models of any architecture: load, find the body, the blocks and the head, read hidden states, freeze a reference.

model, tokenizer = load_model("builtin")      # or a hub name, or a folder, LoRA adapters included
"""

import contextlib
import copy
import hashlib
import json
import re
import sys
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from expunge.errors import ExpungeError

if TYPE_CHECKING:
    from expunge.states import StoredStates

BUILTIN = Path(__file__).parent / "assets" / "model"

MASK_BUFFER = re.compile(r"(attn|attention)\.(masked_)?bias$|inv_freq$")
"""What old checkpoints hold beside weights, and transformers computes."""

Layer = int | Literal["final", "pre_norm"]
"""A residual state: l in 0..L-1 is the stream entering block l (0 = embeddings), "pre_norm" the last block's raw
output, "final" the same after the final norm, in which the logits are linear."""


def load_model(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, in evaluation mode, on the accelerator if there is one.

    name: "builtin", a hub name or a folder; a PEFT adapter folder is loaded onto its base and merged.
    Raises ExpungeError, one line, where there is no such model or no tokenizer, weights are missing or unexpected, the
    tokenizer gives ids that the model does not know, or it is not a causal model.
    """
    source = _source(name)
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    _, tokenizer = load_outline(name, **common)
    base = _base_of(name)
    with reading(name, "causal language model", "its weights"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=dtype,
            attn_implementation=attn_implementation,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # told below, by name
            output_loading_info=True,
            **common,
        )
        model, info = loaded
        _check_weights(base, info)
        if base != source:
            model = _with_adapter(model, Path(source))
    _check_causal(name, model)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval(), tokenizer  # type: ignore[arg-type]


def load_outline(
    name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """The configuration and the tokenizer of what `load_model` would load, without the weights; errors as there."""
    source = _source(name)
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    with reading(name, "causal language model", "its configuration"):
        config = AutoConfig.from_pretrained(_base_of(name), **common)
    if getattr(config, "is_encoder_decoder", False):
        raise ExpungeError(f"{name}: an encoder-decoder model; expunge edits causal language models")
    with reading(name, "causal language model", "its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, **common)
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):  # what transformers makes up where no tokenizer was saved
        raise ExpungeError(f"{name}: there is a model but no tokenizer; save the tokenizer beside it")
    _check_vocabulary(name, config, tokenizer)
    return config, tokenizer


def _source(name: str | Path) -> str:
    return str(BUILTIN) if str(name) == "builtin" else str(name)


def _base_of(name: str | Path) -> str:
    """What the weights of `name` are laid over, or its own place where it is no adapter."""
    path = Path(_source(name)) / "adapter_config.json"
    if not path.is_file():
        return _source(name)
    with reading(name, "causal language model", "its adapter_config.json"):
        return json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]


@contextlib.contextmanager
def reading(name: str | Path, kind: str, part: str) -> Iterator[None]:
    """Whatever the libraries raise in the block as one ExpungeError: `name` should be a `kind`, of which `part` is read."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        path = Path(name)
        if not path.exists() and (path.is_absolute() or len(path.parts) > 2 or str(name).startswith(".")):
            raise ExpungeError(f"{name}: no such folder; a {kind} is a hub name, or a folder that holds one") from None
        if path.is_dir() and not list(path.glob("*.safetensors")) and (found := [*path.glob("*.bin"), *path.glob("*.pt*")]):
            raise ExpungeError(f"{found[0]}: pickled weights are not read; save the model as safetensors") from None
        lines = [line for line in str(error).split("\n") if line.strip()] or [type(error).__name__]
        advice = (
            "save the model there again" if path.is_dir() else "check the name and the connection; HF_TOKEN opens gated ones"
        )
        raise ExpungeError(f"{name}: cannot load a {kind} ({part}: {lines[0].strip()}): {advice}") from None


def _check_weights(base: str, info: Mapping[str, Any]) -> None:
    """ExpungeError unless every weight of the model was in its files, and nothing else; transformers makes up the rest."""
    unexpected = [key for key in info["unexpected_keys"] if not MASK_BUFFER.search(key)]
    mismatched = [key for key, *_ in info["mismatched_keys"]]
    lists = {"lack": info["missing_keys"], "hold, beside the model,": unexpected, "have another shape for": mismatched}
    for what, keys in lists.items():
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ExpungeError(
                f"{base}: its weights {what} {min(keys)}{more}: save the whole model with its own configuration"
            )


def _check_vocabulary(name: str | Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """ExpungeError where an ordinary token, bos or eos has no row in the embedding; others may, while no text names them."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    largest = max(id for id in tokenizer.get_vocab().values() if id in ends or id not in special)
    if size is not None and largest >= size:
        raise ExpungeError(
            f"{name}: its tokenizer gives ids up to {largest}, the model knows {size} tokens: save the model's own "
            "tokenizer beside it, or resize the embedding"
        )


@torch.no_grad()
def _check_causal(name: str | Path, model: PreTrainedModel) -> None:
    """ExpungeError for an encoder, which transformers loads as if it were a decoder: its states look ahead."""
    first, second = (body(model)(input_ids=torch.tensor([[0, token]])).last_hidden_state[0, 0] for token in (0, 1))
    if (first - second).norm() > 0.02 * first.norm():  # above rounding, where experts are chosen by batch
        raise ExpungeError(f"{name}: an encoder, which sees the text to come; expunge edits causal language models")


def _with_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`model` with the PEFT adapter of `folder` merged into it."""
    from peft import PeftModel

    if not (folder / "adapter_model.safetensors").is_file():
        raise ExpungeError(f"{folder}: no adapter_model.safetensors; pickled weights are not read, save them as safetensors")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()  # type: ignore[operator]
        except UserWarning:
            raise ExpungeError(
                f"{folder}: the adapter does not hold all that its configuration names; save it again"
            ) from None


def add_lora(model: PreTrainedModel, rank: int = 16, alpha: int = 32, targets: str | Sequence[str] = "all-linear") -> Any:
    """The model with a trainable LoRA adapter; with the adapter off it is the reference."""
    from peft import LoraConfig, get_peft_model

    modules = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=modules, task_type="CAUSAL_LM")
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ExpungeError(f"LoRA: {str(error).splitlines()[0]}") from None


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, return-value]


def body(model: nn.Module) -> nn.Module:
    """The decoder without its head: input ids to the final hidden states."""
    inner = inner_model(model)
    return getattr(inner, inner.base_model_prefix)


def blocks(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks in order: the one list of `num_hidden_layers` modules in the body."""
    depth = inner_model(model).config.get_text_config().num_hidden_layers
    for module in body(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ExpungeError(f"{type(inner_model(model)).__name__}: no list of {depth} blocks found in its body")


def width(model: nn.Module) -> int:
    """d, the width of the residual stream."""
    return inner_model(model).config.get_text_config().hidden_size


def context_length(model: nn.Module) -> int:
    """The most tokens that the model takes at once; no bound where its positions are relative."""
    return context_of(inner_model(model).config)


def context_of(config: PreTrainedConfig) -> int:
    """The context length of a model of this configuration."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def head_scaling(model: nn.Module) -> tuple[float, float | None]:
    """(scale, cap) of the model's own forward: its logits are cap * tanh(scale * x / cap), or scale * x, of the head's x."""
    config = inner_model(model).config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    return scale, getattr(config, "final_logit_softcapping", None)  # Gemma 2


def head_logits(model: nn.Module, hidden: torch.Tensor, head: nn.Module | None = None) -> torch.Tensor:
    """Logits `[..., V]` of final states `[..., d]`, scaled and soft-capped as the model's own forward does it.

    head: a frozen copy of the model's head to take instead of it.
    """
    head = head or inner_model(model).get_output_embeddings()
    assert head is not None  # a causal language model has one
    scale, cap = head_scaling(model)
    logits = head(hidden) if scale == 1 else head(hidden) * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


def hidden_states(
    model: nn.Module,
    ids: torch.Tensor,
    attention_mask: torch.Tensor,
    layers: Sequence[Layer],
    position_ids: torch.Tensor | None = None,
) -> dict[Layer, torch.Tensor]:
    """Residual states `[B, T, d]` at each of `layers` for right-padded `ids` `[B, T]`.

    The forward ends below the first block that none of them needs: neither it nor its hooks run.

    attention_mask: `[B, T]`; or bool `[B, 1, T, T]`, who sees whom, with `position_ids` `[B, T]`.
    Raises ExpungeError for a layer that the model does not have.
    """
    kept: dict[Layer, torch.Tensor] = {}
    stack = blocks(model)
    placed = {} if position_ids is None else {"position_ids": position_ids}
    if attention_mask.ndim == 4 and inner_model(model).config._attn_implementation == "eager":  # adds its mask
        dtype = inner_model(model).dtype
        least = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
        attention_mask = torch.where(attention_mask, 0.0, least).to(dtype)
    for layer in layers:
        if isinstance(layer, int) and not 0 <= layer < len(stack):
            raise ExpungeError(f"layer {layer}: the model has {len(stack)} blocks; 0 to {len(stack) - 1}, or 'final'")

    def keep_input(layer: Layer) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            kept[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    def keep_output(module: nn.Module, args: tuple, output: Any) -> None:
        kept["pre_norm"] = output if isinstance(output, torch.Tensor) else output[0]

    numbers = {layer for layer in layers if isinstance(layer, int)}
    last = max(numbers, default=None) if numbers >= set(layers) else None
    handles = [stack[layer].register_forward_pre_hook(keep_input(layer), with_kwargs=True) for layer in numbers - {last}]
    if "pre_norm" in layers:
        handles.append(stack[-1].register_forward_hook(keep_output))
    try:
        with contextlib.nullcontext() if last is None else _stop_before(stack, last):
            output = body(model)(input_ids=ids, attention_mask=attention_mask, use_cache=False, **placed)
        kept["final"] = output.last_hidden_state
    except _Reached as reached:
        kept[last] = reached.states  # type: ignore[index]
    finally:
        for handle in handles:
            handle.remove()
    return {layer: kept[layer] for layer in layers}


class _Reached(Exception):
    """The forward got to the first block that nobody needs; `states` would have entered it."""

    def __init__(self, states: torch.Tensor):
        self.states = states


class _End(nn.Module):
    """Stands in for a block: what enters it ends the forward. Raised from a hook, that would leave open what
    gradient checkpointing or FSDP2 had begun for the block."""

    def __init__(self, block: nn.Module):
        super().__init__()
        object.__setattr__(self, "block", block)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)  # a body may ask a block for its kind of attention

    def forward(self, *args: Any, **kwargs: Any) -> None:
        raise _Reached(args[0] if args else kwargs["hidden_states"])


@contextlib.contextmanager
def _stop_before(stack: nn.ModuleList, layer: int) -> Iterator[None]:
    block = stack[layer]
    stack[layer] = _End(block)
    try:
        yield
    finally:
        stack[layer] = block


def in_batches(
    items: Sequence[Any],
    size: Callable[[Any], int],
    work: Callable[[Sequence[Any]], None],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """`work` on runs of items, as many as `size` says of the run's first; half as many where the device's memory runs out.

    progress: called with (items done, items in all). Raises ExpungeError where not even one item fits.
    """
    done, part = 0, 1
    while done < len(items):
        batch = items[done : done + max(1, size(items[done]) // part)]
        try:
            work(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise ExpungeError("out of memory with a single row; use a smaller model, or shorter text") from None
            part *= 2
            continue
        done += len(batch)
        if progress:
            progress(done, len(items))


class Reference:
    """The frozen original: the same model with its adapter off (LoRA), or a frozen copy (full fine-tuning).

    stored: its states, computed before; then no more than its head is copied. `head` is None where an adapter is off.
    """

    def __init__(self, model: nn.Module, stored: "StoredStates | None" = None):
        self.stored = stored
        self.copy: nn.Module | None = None
        self.head: nn.Module | None = None
        if not hasattr(model, "disable_adapter"):
            if stored is None:
                self.copy = _frozen(model)
                self.head = inner_model(self.copy).get_output_embeddings()
            else:
                self.head = _frozen(inner_model(model).get_output_embeddings())  # type: ignore[arg-type]

    @contextlib.contextmanager
    def of(self, model: nn.Module) -> Iterator[nn.Module]:
        """The reference of `model`, without gradients, inside the block. ValueError where all there is are its states."""
        if self.copy is not None:
            with torch.no_grad():
                yield self.copy.to(next(model.parameters()).device)
        elif self.head is None:
            with original(model):
                yield model
        else:
            raise ValueError("this reference is stored states and a head; it has no body to run")


@contextlib.contextmanager
def original(model: nn.Module) -> Iterator[None]:
    """Without gradients, and without the adapter if there is one: what an untrained model was."""
    with torch.no_grad(), model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext():  # type: ignore[operator]
        yield


def _frozen(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).eval().requires_grad_(False)


def without_dropout(model: nn.Module) -> nn.Module:
    """Every dropout of the model set to zero, in place: policy and reference must agree at step 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):  # Llama's attention, OPT's blocks: F.dropout(x, p=...)
                setattr(module, name, 0.0)
    return model


def weights_digest(model: nn.Module, skip: Container[str] = ()) -> str:
    """Hex sha256 of all weights but those named, names included: the model's identity in caches and provenance."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name in skip:
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
