"""Load a causal language model and its tokenizer: by a hub name, from a folder or a GGUF file, with its adapter, or the
built-in one. What the user did not set is not passed on, so that the checkpoint's own stands.

model, tokenizer = load_model("builtin")
"""

import contextlib
import dataclasses
import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from expunge.adapters import ADAPTER_CONFIG, Adapter
from expunge.errors import ExpungeError
from expunge.models.checks import check_model
from expunge.models.forward import body
from expunge.models.packed import check_quantization, forget_packing, gguf_file, quantization_of, unpacking
from expunge.paths import expand
from expunge.registry import did_you_mean
from expunge.steering import Steering, is_steered

BUILTIN = Path(__file__).parent.parent / "assets" / "model"
BUILTINS = {"builtin": BUILTIN, "builtin:facts": BUILTIN.parent / "facts" / "adapter"}

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("4bit", "8bit")
MASK_BUFFER = re.compile(r"(attn|attention)\.(masked_)?bias$|inv_freq$")
"""What old checkpoints hold beside weights, and transformers computes."""


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

    name: "builtin", "builtin:facts" (the same, taught invented facts), a hub name, a folder, or a GGUF file, whose weights
    are unpacked. A PEFT adapter is loaded onto its base and merged; onto a base in low precision, which merging would round
    off, it stays an adapter, frozen.
    device_map: where transformers puts the parts, which stay there. quantization: 4bit (NF4, double) or 8bit, by
    bitsandbytes; what is not quantized and the products are in `dtype`. A checkpoint that is quantized stays so.
    Raises ExpungeError, one line, where there is no such model or no tokenizer, weights are missing or unexpected, the
    tokenizer gives ids that the model does not know, this machine cannot run its quantization, or it is not a causal model.
    """
    options = loading_options(dtype, attn_implementation, quantization, trust_remote_code)
    if quantization and device_map is None and device is not None:
        device_map = {"": device}
    config, tokenizer = load_outline(name, revision=revision, trust_remote_code=trust_remote_code)
    if quantization and (own := quantization_of(config)) not in (None, "bitsandbytes"):
        raise ExpungeError(f"quantization={quantization}: {name} is quantized already ({own}); leave it out")
    with reading(name, "causal language model", "its weights"):
        at = place_of(name, revision)
        if at.gguf:
            options |= unpacking()
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            at.base,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # told below, by name
            output_loading_info=True,
            **_given(device_map=device_map),
            **at.options,
            **options,
        )
        model, info = loaded
        _check_weights(at.base, info)
        if at.gguf:
            forget_packing(model)
        if is_steered(model.config):
            Steering.at(at.base, at.base_revision).attach(model)
        if at.adapter:
            model = at.adapter.onto(model, len(tokenizer))
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
    if hasattr(model.config, "rescale_every"):
        model.config.rescale_every = 0  # else RWKV's forward divides its weights in place, and they are saved so
    check_model(model)
    _check_causal(name, model)
    return model, tokenizer


def load_outline(
    name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """The configuration and the tokenizer of what `load_model` would load, without the weights; errors as there."""
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    with reading(name, "causal language model", "its configuration"):
        at = place_of(name, revision)
        try:
            config = AutoConfig.from_pretrained(at.base, **at.options, **trust)
        except OSError as error:
            if at.adapter is None:
                raise
            reason = str(error).strip().split("\n")[0]
            raise ExpungeError(
                f"{name}: the base of this adapter cannot be loaded ({reason}); put it where adapter_config.json says, or "
                "name it there as base_model_name_or_path"
            ) from None
    if getattr(config, "is_encoder_decoder", False):
        raise ExpungeError(f"{name}: an encoder-decoder model; expunge edits causal language models")
    check_quantization(name, config)
    own = at.adapter is not None and at.adapter.has("tokenizer_config.json")
    source, options = (at.source, _given(revision=at.revision)) if own else (at.base, at.options)
    with reading(name, "causal language model", "its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, **options, **trust)
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):  # what transformers makes up where no tokenizer was saved
        raise ExpungeError(f"{name}: there is a model but no tokenizer; save the tokenizer beside it")
    if at.adapter is None:
        _check_vocabulary(name, config, tokenizer)
    elif (text := config.get_text_config()).vocab_size < len(
        tokenizer
    ):  # one may come with tokens of its own, and rows for them
        text.vocab_size = len(tokenizer)
    return config, tokenizer


def is_adapter(name: str | Path, revision: str | None = None) -> bool:
    """Is there a PEFT adapter of this name? ExpungeError where its settings cannot be read."""
    with reading(name, "causal language model", "its adapter_config.json"):
        return place_of(name, revision).adapter is not None


def is_local(name: str | Path) -> bool:
    """Does a model of this name lie on this machine, outside the cache of the hub?"""
    if str(name) in BUILTINS or Path(name).suffix.lower() == ".gguf":
        return True
    return any((Path(name) / file).is_file() for file in ("config.json", ADAPTER_CONFIG)) or bool(
        [*Path(name).glob("*.gguf")]
    )


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a model lies: `source`, a folder or a hub name; an adapter there, or the name of a GGUF file in it."""

    source: str
    revision: str | None
    adapter: Adapter | None = None
    gguf: str | None = None

    @property
    def base(self) -> str:
        """Where the weights are that an adapter lies on, or those of the model itself."""
        return self.adapter.base if self.adapter else self.source

    @property
    def base_revision(self) -> str | None:
        return self.adapter.base_revision if self.adapter else self.revision

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` for the base."""
        return _given(revision=self.base_revision, gguf_file=self.gguf)


def place_of(name: str | Path, revision: str | None = None) -> Place:
    """Where the model of this name lies. Raises ExpungeError for a built-in one that there is not, for GGUF without the
    package that reads it, and for an adapter whose base is not named."""
    gguf = gguf_file(name)
    if gguf:
        return Place(str(gguf.parent), None, None, gguf.name)
    source = _source(name)
    adapter = Adapter.at(source, revision)
    # its base may be a built-in model
    return Place(source, revision, adapter and dataclasses.replace(adapter, base=_source(adapter.base)))


def _source(name: str | Path) -> str:
    """A folder by its whole path: an adapter that is saved names its base so, and is then found from anywhere."""
    name = expand(name)
    if str(name) in BUILTINS:
        return str(BUILTINS[str(name)])
    if str(name).startswith("builtin:"):
        raise ExpungeError(f"{name}: no built-in model of this name{did_you_mean(str(name), BUILTINS)}")
    return str(Path(name).resolve()) if Path(name).is_dir() else str(name)


def _given(**options: Any) -> dict[str, Any]:
    """Those that are set: None would take the place of what the checkpoint says."""
    return {key: value for key, value in options.items() if value is not None}


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
    return _given(
        dtype=dtype,
        attn_implementation=_attention(attn_implementation, trust_remote_code),
        quantization_config=_quantized(quantization, torch.float32 if dtype == "auto" else dtype),
        trust_remote_code=trust_remote_code,
    )


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
    first, second = (body(model)(input_ids=ids, use_cache=False).last_hidden_state[0, 0] for ids in rows)
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
