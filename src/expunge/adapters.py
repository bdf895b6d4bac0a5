"""LoRA adapters, by PEFT: settings under PEFT's own names, a new adapter on a model, an adapter folder as a model.

    model = add_lora(model, r=8, target_modules=["q_proj", "v_proj"], use_dora=True)

With the adapter off the model is what it was, bit for bit: that is the reference, so a setting that would change what lies
under the adapter is refused.
"""

import json
import typing
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from expunge.claim import found_again
from expunge.config import convert
from expunge.errors import ExpungeError
from expunge.registry import did_you_mean

DEFAULTS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
PASSED = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "modules_to_save", "use_dora", "use_rslora", "lora_bias",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "trainable_token_indices", "ensure_weight_tying",
)  # fmt: skip
"""Of peft.LoraConfig, what leaves the model under the adapter as it was."""
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
STARTS = (True, "gaussian", "orthogonal")
"""Of `init_lora_weights`, what begins with the model's own output; pissa and its like change the weights beneath."""


def lora_config(settings: Mapping[str, Any]) -> Any:
    """peft.LoraConfig of `settings` over DEFAULTS; ExpungeError for an unknown key, a wrong value, or one of no use here."""
    from peft import LoraConfig

    hints = typing.get_type_hints(LoraConfig)
    values = {}
    for key, value in {**DEFAULTS, **settings}.items():
        if key not in PASSED:
            if key in {field.name for field in fields(LoraConfig)}:
                raise ExpungeError(
                    f"lora.{key}: not passed on to PEFT: there is no dropout and, with the adapter off, the model must be "
                    f"what it was (passed on: {', '.join(PASSED)})"
                )
            raise ExpungeError(f"unknown key 'lora.{key}'{did_you_mean(key, (*PASSED, 'merge'))}")
        values[key] = convert(hints[key], value, f"lora.{key}")
    if values.get("init_lora_weights", True) not in STARTS:
        raise ExpungeError(
            f"lora.init_lora_weights={values['init_lora_weights']!r}: changes the model that is the reference; expected "
            "true, gaussian or orthogonal"
        )
    try:
        return LoraConfig(task_type="CAUSAL_LM", **values)
    except (ValueError, TypeError, ImportError) as error:
        raise ExpungeError(f"lora: {_first_line(error)}") from None


def add_lora(model: PreTrainedModel, revision: str | None = None, **settings: Any) -> Any:
    """The model with a trainable LoRA adapter; with the adapter off it is the reference.

    settings: fields of peft.LoraConfig; revision: the base's, to be found again by what is saved. Weights that bitsandbytes
    holds are made ready for training as PEFT does it. Raises ExpungeError, one line, for what PEFT refuses.
    """
    from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training

    config = lora_config(settings)
    if isinstance(model, PeftModel):
        raise ExpungeError("LoRA: the model has an adapter already, which would be no part of the reference; merge it first")
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # the trainer's business
    try:
        return get_peft_model(model, config, revision=revision)
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise ExpungeError(f"LoRA: {_first_line(error)}") from None


@dataclass(frozen=True)
class Adapter:
    """An adapter in a folder or on a hub, and the model that it was trained on."""

    source: str
    revision: str | None
    base: str
    base_revision: str | None

    @classmethod
    def at(cls, source: str, revision: str | None = None) -> "Adapter | None":
        """The adapter at `source`, or None where it is something else. Raises ExpungeError where its base is not named."""
        found = find_adapter_config_file(source, revision=revision)
        if found is None:
            return None
        try:
            settings = json.loads(Path(found).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ExpungeError(f"{source}: adapter_config.json cannot be read ({_first_line(error)})") from None
        base = settings.get("base_model_name_or_path")
        if not isinstance(base, str):
            raise ExpungeError(f"{source}: an adapter whose adapter_config.json names no base_model_name_or_path")
        base = found_again(base, Path(source).parent)  # that of a run which was moved with its model
        if (Path(base) / ADAPTER_CONFIG).is_file():
            raise ExpungeError(f"{source}: the base of this adapter, {base}, is an adapter itself; merge that one first")
        return cls(source, revision, base, settings.get("revision"))

    def has(self, file: str) -> bool:
        """Does this file lie beside the adapter?"""
        return (
            cached_file(self.source, file, revision=self.revision, _raise_exceptions_for_missing_entries=False) is not None
        )

    def onto(self, base: PreTrainedModel, tokens: int) -> Any:
        """The base with this adapter: merged into float32 weights; frozen on top of others, which would round it off.

        tokens: length of the adapter's tokenizer, to which a smaller embedding grows. Nothing is unpickled.
        """
        from peft import PeftModel

        if not self.has(ADAPTER_WEIGHTS):
            raise ExpungeError(f"{self.source}: an adapter without adapter_model.safetensors; save it as safetensors")
        embedding: Any = base.get_input_embeddings()
        if tokens > embedding.weight.shape[0]:
            base.resize_token_embeddings(tokens)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="Found missing adapter keys")
                model: Any = PeftModel.from_pretrained(base, self.source, revision=self.revision)
        except UserWarning:
            raise ExpungeError(
                f"{self.source}: the adapter does not hold all that its configuration names; save it again"
            ) from None
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            reason = _first_line(error)
            raise ExpungeError(f"{self.source}: this adapter does not fit its base {self.base} ({reason})") from None
        if not hasattr(model, "merge_and_unload"):
            kind = model.active_peft_config.peft_type.value
            raise ExpungeError(f"{self.source}: a {kind} adapter; only one that can be merged into weights is taken")
        exact = not getattr(base, "is_quantized", False) and base.dtype in (torch.float32, torch.float64)
        return merge(model) if exact else model


def merge(model: Any) -> PreTrainedModel:
    """The base with what its adapter has learnt, trainable. A head trained apart is no longer tied to the embedding."""
    inner = model.merge_and_unload().requires_grad_(True)  # PEFT froze it
    if inner.get_output_embeddings().weight is not inner.get_input_embeddings().weight:
        for config in (inner.config, inner.config.get_text_config()):
            config.tie_word_embeddings = False
    return inner


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
