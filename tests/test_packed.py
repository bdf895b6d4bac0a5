"""Checkpoints that others packed: kept as they are, or refused before any work; GGUF is read, or the line says how to."""

import importlib.util
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from expunge.errors import ExpungeError
from expunge.models import load_model, load_outline, loading, packed
from expunge.models.loading import place_of


@pytest.fixture
def checkpoint(tmp_path, tiny_model, tokenizer):
    """A model that says it was quantized as `settings` have it."""

    def make(**settings):
        tiny_model("llama").save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        path = tmp_path / "model/config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))
        return tmp_path / "model"

    return make


def test_a_checkpoint_s_own_quantization_is_kept(checkpoint):
    online = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    folder = checkpoint(**online)
    model, _ = load_model(folder, dtype="float32")
    ours = {type(module).__name__ for module in model.modules()}
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert "AutoBitLinear" in ours == {type(module).__name__ for module in theirs.modules()} and model.is_quantized
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(model(ids).logits, theirs(ids).logits)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine may run them")
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "quantized by fp8, for which this machine has no kernels"),
        ({"quant_method": "gptq", "bits": 4}, r"quantized by gptq, and cannot be run here \(.*optimum"),
        ({"quant_method": "awq", "bits": 4}, r"quantized by awq, and cannot be run here \(.*gptqmodel"),
        ({"quant_method": "mine"}, "quantized by 'mine', which transformers does not know"),
        ({"bits": 4}, "cannot be run here"),
    ],
    ids=lambda value: value.get("quant_method") if isinstance(value, dict) else "",
)
def test_what_this_machine_cannot_run_is_said_before_any_weight_is_read(checkpoint, settings, message):
    folder = checkpoint(**settings)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ExpungeError, match=message) as error:
        load_outline(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_two_quantizations_are_one_too_many(checkpoint, monkeypatch):
    monkeypatch.setattr(loading, "_quantized", lambda kind, dtype: None)  # as if bitsandbytes were there
    folder = checkpoint(quant_method="bitnet", linear_class="autobitlinear", quantization_mode="online")
    with pytest.raises(ExpungeError, match=r"quantization=4bit: .* is quantized already \(bitnet\)"):
        load_model(folder, quantization="4bit")


def test_what_is_not_set_is_not_passed(tmp_path, tiny_model, tokenizer, monkeypatch):
    tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    passed = {}
    for cls in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):

        def spy(*args, real=cls.from_pretrained, name=cls.__name__, **options):
            passed.setdefault(name, options)  # not what transformers calls itself with
            return real(*args, **options)

        monkeypatch.setattr(cls, "from_pretrained", spy)
    load_model(tmp_path)
    none = {name: [key for key, value in options.items() if value is None] for name, options in passed.items()}
    assert none == {"AutoConfig": [], "AutoTokenizer": [], "AutoModelForCausalLM": []}


@pytest.fixture
def gguf(tmp_path):
    (tmp_path / "only").mkdir()
    (tmp_path / "only/mine.gguf").write_bytes(b"GGUF")
    return tmp_path / "only/mine.gguf"


@pytest.mark.skipif(importlib.util.find_spec("gguf") is not None, reason="the package is there")
def test_without_the_package_it_says_what_to_install(gguf):
    for name in (gguf, str(gguf), gguf.parent):
        with pytest.raises(ExpungeError, match=r"to read GGUF install the package gguf: pip install 'expunge\[gguf\]'"):
            load_model(name)


def test_a_gguf_file_is_read_from_its_folder_and_its_weights_are_unpacked(gguf, tiny_model, tokenizer, monkeypatch):
    """The routing: transformers itself is replaced, as the package is not there."""
    monkeypatch.setattr(packed.importlib.util, "find_spec", lambda name: object())
    made, seen = tiny_model(), []
    made.config.quantization_config = packed.unpacking()["quantization_config"]
    made.hf_quantizer, made.is_quantized = object(), True
    none = {"unexpected_keys": [], "mismatched_keys": [], "missing_keys": []}
    plain = tiny_model().config
    for cls, result in ((AutoConfig, plain), (AutoTokenizer, tokenizer), (AutoModelForCausalLM, (made, none))):

        def load(source, result=result, **options):
            seen.append((source, options["gguf_file"], options.get("quantization_config")))
            return result

        monkeypatch.setattr(cls, "from_pretrained", load)
    for name in (gguf, gguf.parent):
        seen.clear()
        model, _ = load_model(name)
        assert [part[:2] for part in seen] == [(str(gguf.parent), "mine.gguf")] * 3
        assert seen[2][2].dequantize and seen[0][2] is seen[1][2] is None
        assert not model.is_quantized and not hasattr(model, "hf_quantizer")
        assert "quantization_config" not in model.config.to_dict()
    model.save_pretrained(gguf.parent.parent / "saved")  # which transformers refuses while it is packed
    assert place_of(gguf).gguf == "mine.gguf"


def test_of_several_files_one_is_to_be_named(gguf, monkeypatch):
    gguf.with_name("other.gguf").write_bytes(b"GGUF")
    with pytest.raises(ExpungeError, match=r"2 GGUF files; name one of them, such as .*mine\.gguf"):
        load_model(gguf.parent)
    with pytest.raises(ExpungeError, match="no such file"):
        load_model(gguf.with_name("none.gguf"))
