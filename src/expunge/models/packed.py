"""Checkpoints whose weights are packed: a GGUF file, and what other tools quantized. Either this machine reads them, or it
says so before any work.

    gguf_file("models/mine.gguf")               # the file; also of a folder with nothing but one
    check_quantization("mine", config)          # raises where the kernels or the packages for it are not here
"""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.quantizers import AutoHfQuantizer

from expunge.errors import ExpungeError


def gguf_file(name: str | Path) -> Path | None:
    """The GGUF file of this name, or in a folder that holds no other model; None where there is none.

    Raises ExpungeError for a file that is not there, for one of several, and without the package that reads it.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        found = [] if any(path.glob("*config.json")) or any(path.glob("*.safetensors")) else sorted(path.glob("*.gguf"))
        if not found:
            return None
        if len(found) > 1:
            raise ExpungeError(f"{name}: {len(found)} GGUF files; name one of them, such as {found[0]}")
        path = found[0]
    elif path.suffix.lower() != ".gguf":
        return None
    if not path.is_file():
        raise ExpungeError(f"{name}: no such file; a GGUF model is a file on this machine")
    if importlib.util.find_spec("gguf") is None:
        raise ExpungeError(f"{name}: to read GGUF install the package gguf: pip install 'expunge[gguf]'")
    return path.resolve()


def unpacking() -> dict[str, Any]:
    """Arguments of `from_pretrained` for a GGUF file whose weights are to be plain ones, which can be edited."""
    config = getattr(transformers, "GgufConfig", None)  # before it was there, transformers always unpacked
    return {"quantization_config": config(dequantize=True)} if config else {}


def forget_packing(model: Any) -> None:
    """Take out of an unpacked model that it was packed: while its configuration says so, it cannot be saved."""
    for thing, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method")):
        vars(thing).pop(name, None)
    model.is_quantized = False


def quantization_of(config: PreTrainedConfig) -> str | None:
    """By what the checkpoint says that it was quantized, such as gptq; None where it is not."""
    found = _settings(config)
    if found is None:
        return None
    method = found.get("quant_method")
    return str(getattr(method, "value", method) or "bitsandbytes")


def check_quantization(name: str | Path, config: PreTrainedConfig) -> None:
    """Raise ExpungeError for a checkpoint that is quantized in a way that transformers does not know, that needs packages
    which are not installed, or that this machine has no kernels for: what is loaded would be another model."""
    found = _settings(config)
    if found is None:
        return
    method, advice = quantization_of(config), "use another machine, or the model before it was quantized"
    try:
        if not AutoHfQuantizer.supports_quant_method(found):
            raise ExpungeError(f"{name}: quantized by {method!r}, which transformers does not know; {advice}")
        quantizer = AutoHfQuantizer.from_config(copy.deepcopy(found), pre_quantized=True)
        unpacked = getattr(quantizer.quantization_config, "dequantize", False)
        quantizer.validate_environment(device_map=None, weights_only=True)
    except (ImportError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ExpungeError(f"{name}: quantized by {method}, and cannot be run here ({reason}): {advice}") from None
    if getattr(quantizer.quantization_config, "dequantize", False) != unpacked:
        raise ExpungeError(f"{name}: quantized by {method}, for which this machine has no kernels: {advice}")


def _settings(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The `quantization_config` of a checkpoint or of its text part, which may be a mapping or an object."""
    found = getattr(config, "quantization_config", None) or getattr(config.get_text_config(), "quantization_config", None)
    return found if found is None or isinstance(found, dict) else found.to_dict()
