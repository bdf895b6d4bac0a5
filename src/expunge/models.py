"""Models of any architecture: load, find the body, the blocks and the head, read hidden states, freeze a reference.

model, tokenizer = load_model("builtin")      # or a hub name, or a folder, LoRA adapters included
"""

import contextlib
import copy
import dataclasses
import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from expunge.adapters import Adapter
from expunge.errors import ExpungeError
from expunge.registry import did_you_mean
from expunge.steering import Steering, is_steered

if TYPE_CHECKING:
    from expunge.states import StoredStates

BUILTIN = Path(__file__).parent / "assets" / "model"
BUILTINS = {"builtin": BUILTIN, "builtin:facts": BUILTIN.parent / "facts" / "adapter"}

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("4bit", "8bit")
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
    device_map: str | int | dict[str, Any] | None = None,
    attn_implementation: str | None = None,
    quantization: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, in evaluation mode, on the accelerator if there is one.

    name: "builtin", "builtin:facts" (the same, taught invented facts), a hub name or a folder. A PEFT adapter is loaded onto
    its base and merged; onto a base in low precision, which merging would round off, it stays an adapter, frozen.
    device_map: where transformers puts the parts, which stay there. quantization: 4bit (NF4, double) or 8bit, by
    bitsandbytes; what is not quantized and the products are in `dtype`.
    Raises ExpungeError, one line, where there is no such model or no tokenizer, weights are missing or unexpected, the
    tokenizer gives ids that the model does not know, or it is not a causal model.
    """
    source = _source(name)
    options = loading_options(dtype, attn_implementation, quantization, trust_remote_code)
    if quantization and device_map is None and device is not None:
        device_map = {"": device}
    _, tokenizer = load_outline(name, revision=revision, trust_remote_code=trust_remote_code)
    with reading(name, "causal language model", "its weights"):
        adapter = _adapter(source, revision)
        base = adapter.base if adapter else source
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base,
            revision=adapter.base_revision if adapter else revision,
            device_map=device_map,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # told below, by name
            output_loading_info=True,
            **options,
        )
        model, info = loaded
        _check_weights(base, info)
        if is_steered(model.config):
            Steering.at(base, adapter.base_revision if adapter else revision).attach(model)
        if adapter:
            model = adapter.onto(model, len(tokenizer))
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # after an evaluation its gradients would be wrong, in silence:
            module.support_avx512bf16_for_cpu = False  # bitsandbytes 0.50 keeps the layout of a kernel without backward
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ExpungeError(
            f"{name}: device_map={device_map!r} leaves parts of it off the accelerators, where weights can be neither "
            "compared nor trained; take a smaller dtype, quantization=4bit, or more accelerators"
        )
    if device_map is None and not getattr(model, "is_quantized", False):
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model.eval()
    _check_causal(name, model)
    return model, tokenizer


def load_outline(
    name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """The configuration and the tokenizer of what `load_model` would load, without the weights; errors as there."""
    source = _source(name)
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    with reading(name, "causal language model", "its configuration"):
        adapter = _adapter(source, revision)
        base, base_revision = (adapter.base, adapter.base_revision) if adapter else (source, revision)
        try:
            config = AutoConfig.from_pretrained(base, revision=base_revision, **trust)
        except OSError as error:
            if adapter is None:
                raise
            reason = str(error).strip().split("\n")[0]
            raise ExpungeError(
                f"{name}: the base of this adapter cannot be loaded ({reason}); put it where adapter_config.json says, or "
                "name it there as base_model_name_or_path"
            ) from None
    if getattr(config, "is_encoder_decoder", False):
        raise ExpungeError(f"{name}: an encoder-decoder model; expunge edits causal language models")
    if adapter and not adapter.has("tokenizer_config.json"):
        source, revision = base, base_revision
    with reading(name, "causal language model", "its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, **trust)
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):  # what transformers makes up where no tokenizer was saved
        raise ExpungeError(f"{name}: there is a model but no tokenizer; save the tokenizer beside it")
    if adapter is None:  # one may come with tokens of its own
        _check_vocabulary(name, config, tokenizer)
    return config, tokenizer


def is_adapter(name: str | Path, revision: str | None = None) -> bool:
    """Is there a PEFT adapter of this name? ExpungeError where its settings cannot be read."""
    with reading(name, "causal language model", "its adapter_config.json"):
        return Adapter.at(_source(name), revision) is not None


def local_folders(name: str | Path) -> list[Path]:
    """What on this machine a model is read from: its folder, and below an adapter its base's. None of a model on the hub."""
    source = _source(name)
    if not Path(source).is_dir():
        return []
    adapter = _adapter(source, None)
    return [Path(source), *(local_folders(adapter.base) if adapter else [])]


def _source(name: str | Path) -> str:
    """A folder by its whole path: an adapter that is saved names its base so, and is then found from anywhere."""
    if str(name) in BUILTINS:
        return str(BUILTINS[str(name)])
    if str(name).startswith("builtin:"):
        raise ExpungeError(f"{name}: no built-in model of this name{did_you_mean(str(name), BUILTINS)}")
    return str(Path(name).resolve()) if Path(name).is_dir() else str(name)


def _adapter(source: str, revision: str | None) -> Adapter | None:
    """The adapter at `source`, if there is one; its base may be a built-in model."""
    adapter = Adapter.at(source, revision)
    return adapter and dataclasses.replace(adapter, base=_source(adapter.base))


@contextlib.contextmanager
def reading(name: str | Path, kind: str, part: str) -> Iterator[None]:
    """Whatever the libraries raise in the block as one ExpungeError: `name` should be a `kind`, of which `part` is read."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, AssertionError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise ExpungeError(
                f"{name}: comes with code of its own; read it, and if you trust it, run it with --trust-remote-code "
                "(trust_remote_code=True)"
            ) from None
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


def loading_options(
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    quantization: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Arguments of `from_pretrained`. Raises ExpungeError for what is unknown, not installed, or code from a hub unasked."""
    if isinstance(dtype, str) and dtype != "auto":
        if dtype not in DTYPES:
            raise ExpungeError(f"unknown dtype {dtype!r}{did_you_mean(dtype, ('auto', *DTYPES))}")
        dtype = getattr(torch, dtype)
    return {
        "dtype": dtype,
        "attn_implementation": _attention(attn_implementation, trust_remote_code),
        "quantization_config": _quantized(quantization, torch.float32 if dtype == "auto" else dtype),
        "trust_remote_code": trust_remote_code,
    }


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
    rows = (torch.tensor([[0, token]], device=model.device) for token in (0, 1))
    first, second = (body(model)(input_ids=ids).last_hidden_state[0, 0] for ids in rows)
    if (first - second).norm() > 0.02 * first.norm():  # above rounding, where experts are chosen by batch
        raise ExpungeError(f"{name}: an encoder, which sees the text to come; expunge edits causal language models")


def _attention(name: str | None, trust_remote_code: bool) -> str | None:
    if name is None or trust_remote_code:
        return name
    if "/" in name:
        raise ExpungeError(f"attn_implementation={name!r}: code from a hub; it runs with --trust-remote-code only")
    known = {"eager", *(key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in key)}
    if name not in known:
        raise ExpungeError(f"unknown attn_implementation {name!r}{did_you_mean(name, known)}")
    if name == "flash_attention_2" and not is_flash_attn_2_available():  # else fetched from a hub where `kernels` is there
        raise ExpungeError("attn_implementation=flash_attention_2: the package flash-attn is not installed; sdpa needs none")
    return name


def _quantized(kind: str | None, dtype: Any) -> BitsAndBytesConfig | None:
    """How QLoRA quantizes (Dettmers et al. 2023): NF4, with the constants quantized too."""
    if kind is None:
        return None
    if kind not in QUANTIZATIONS:
        raise ExpungeError(f"quantization={kind!r}: expected {' or '.join(QUANTIZATIONS)}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ExpungeError(f"quantization={kind}: bitsandbytes is not installed; pip install 'expunge[quant]'")
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, return-value]


def body(model: nn.Module) -> nn.Module:
    """The decoder without its head: input ids to the final hidden states. Raises ExpungeError where it is not found."""
    inner = inner_model(model)
    found = getattr(inner, inner.base_model_prefix, None)
    if found is None:
        raise ExpungeError(
            f"{type(inner).__name__} is not supported: it has no {inner.base_model_prefix!r}, as its body is called"
        )
    return found


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


def depth(model: nn.Module) -> int:
    """L, the number of blocks."""
    return inner_model(model).config.get_text_config().num_hidden_layers


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
    cache: Cache | None = None,
) -> dict[Layer, torch.Tensor]:
    """Residual states `[B, T, d]` at each of `layers` for right-padded `ids` `[B, T]`.

    The forward ends below the first block that none of them needs: neither it nor its hooks run.

    attention_mask: `[B, T]`; or bool `[B, 1, T, T]`, who sees whom, with `position_ids` `[B, T]`.
    cache: keys and values of what is before `ids`, which `attention_mask` covers too; those of `ids` are put in.
    Raises ExpungeError for a layer that the model does not have.
    """
    kept: dict[Layer, torch.Tensor] = {}
    stack = blocks(model)
    placed: dict[str, Any] = {} if position_ids is None else {"position_ids": position_ids}
    placed |= {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
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
            output = body(model)(input_ids=ids, attention_mask=attention_mask, **placed)
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
    trained: names of the weights that will change; the others are not copied. None: all of them will.
    """

    def __init__(self, model: nn.Module, stored: "StoredStates | None" = None, trained: Collection[str] | None = None):
        self.stored = stored
        self.copy: nn.Module | None = None
        self.head: nn.Module | None = None
        if not hasattr(model, "disable_adapter"):
            if stored is None:
                self.copy = _frozen_copy(model, trained)
                self.head = inner_model(self.copy).get_output_embeddings()
            else:
                self.head = _frozen_copy(inner_model(model).get_output_embeddings())  # type: ignore[arg-type]

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


def _frozen_copy(module: nn.Module, changing: Collection[str] | None = None) -> nn.Module:
    """A copy in evaluation mode and without gradients. changing: the only weights that are copied; others are shared."""
    made = sharing_copy(module, changing).eval()
    shared = {id(parameter) for parameter in module.parameters()}
    for parameter in made.parameters():
        if id(parameter) not in shared:
            parameter.requires_grad_(False)
    return made


def sharing_copy(model: nn.Module, changing: Collection[str] | None) -> nn.Module:
    """A model of its own, hooks and buffers too, whose weights are the very tensors of `model` but for those named in
    `changing`, which are copied; None: all are copied."""
    shared = {} if changing is None else {id(p): p for name, p in model.named_parameters() if name not in changing}
    return copy.deepcopy(model, dict(shared))


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; then every submodule is in the mode that it was in."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def frozen(*models: nn.Module) -> Iterator[None]:
    """No weight of the models takes gradients, and they are in evaluation mode, inside the block; then as before."""
    learned = [p for model in models for p in model.parameters() if p.requires_grad]
    with evaluating(*models):
        try:
            for model in models:
                model.requires_grad_(False)
            yield
        finally:
            for parameter in learned:
                parameter.requires_grad_(True)


@contextlib.contextmanager
def only_training(model: nn.Module, names: Collection[str] | None) -> Iterator[None]:
    """Of the trainable weights of the model, only those named take gradients inside the block; None: all."""
    others = [] if names is None else [p for name, p in model.named_parameters() if name not in names and p.requires_grad]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


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
