"""Adapters against PEFT's own: the same start, the same model with the adapter off, the same adapter folder as input."""

import importlib.util
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from expunge import REPO, ExpungeError, UnlearnConfig, UnlearnTrainer
from expunge.adapters import add_lora, lora_config, merge
from expunge.models import Reference, head_logits, hidden_states, load_model, load_outline, loading, loading_options

IDS = torch.tensor([[5, 17, 250, 33, 8, 91]])
SETTINGS = {
    "plain": {},
    "names": {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 4},
    "a pattern": {"target_modules": r".*\.o_proj"},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "layers": {"target_modules": ["up_proj"], "layers_to_transform": [1]},
    "ranks": {"rank_pattern": {"q_proj": 8}, "exclude_modules": ["v_proj"]},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding and head": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "bias": {"lora_bias": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 17]},
}


def seeded(model, **settings):
    torch.manual_seed(7)
    return add_lora(model, **{"r": 4, **settings})


def move(model, std: float = 0.3):
    """Change all that is trained, so that forgetting to switch it off shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * std)
    return model


@pytest.fixture
def base(tmp_path, tiny_model, tokenizer) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path, base) -> Path:
    """An adapter folder made by PEFT alone, without a tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    move(peft.get_peft_model(model, settings)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def theirs(adapter: Path) -> torch.Tensor:
    """Logits of an adapter folder by PEFT alone."""
    with torch.no_grad():
        return peft.AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).eval()(IDS).logits


@pytest.mark.parametrize("name", SETTINGS)
def test_an_adapter_begins_as_peft_begins_it_and_is_off_in_the_reference(tiny_model, name):
    settings = {"r": 4, "lora_alpha": 32, "target_modules": "all-linear", **SETTINGS[name]}
    ours = seeded(tiny_model("llama"), **SETTINGS[name])
    torch.manual_seed(7)
    oracle = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(task_type="CAUSAL_LM", **settings)).state_dict()
    assert ours.state_dict().keys() == oracle.keys()
    assert all(torch.equal(tensor, oracle[key]) for key, tensor in ours.state_dict().items())
    untouched = tiny_model("llama")(IDS).logits
    torch.testing.assert_close(ours(IDS).logits, untouched, rtol=1e-4, atol=1e-4)
    reference = Reference(ours)
    assert not torch.allclose(move(ours)(IDS).logits, untouched, atol=1e-2)
    with reference.of(ours) as frozen:
        assert torch.equal(frozen(IDS).logits, untouched)
        states = hidden_states(frozen, IDS, torch.ones_like(IDS), ["final"])["final"]
        torch.testing.assert_close(head_logits(frozen, states), untouched)


def test_a_start_that_changes_the_weights_beneath_would_change_the_reference(tiny_model):
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": "pissa"}
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad(), model.disable_adapter():
        assert not torch.allclose(model(IDS).logits, tiny_model("llama")(IDS).logits, atol=1e-2)
    with pytest.raises(ExpungeError, match=r"lora.init_lora_weights='pissa': changes the model that is the reference"):
        lora_config({"init_lora_weights": "pissa"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_alhpa": 3}, r"unknown key 'lora.lora_alhpa' \(did you mean 'lora_alpha'\?\)"),
        ({"r": "abc"}, r"lora.r='abc': expected a whole number"),
        ({"use_dora": 1}, r"lora.use_dora=1: expected true or false"),
        ({"bias": "all"}, r"lora.bias: not passed on to PEFT"),
        ({"lora_dropout": 0.1}, r"lora.lora_dropout: not passed on"),
        ({"r": 0}, r"LoRA: .*positive"),
        ({"target_modules": "nowhere"}, r"LoRA: .*nowhere"),
        ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, r"lora: .*layers_to_transform"),
    ],
)
def test_a_bad_setting_is_one_line(tiny_model, settings, message):
    with pytest.raises(ExpungeError, match=f"^{message}") as caught:
        add_lora(tiny_model("llama"), **settings)
    assert "\n" not in str(caught.value)


def trainer_of(model, tokenizer, pairs, folder: Path, **changes) -> UnlearnTrainer:
    settings = {"use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2, "warmup_steps": 0, "save_strategy": "no"}
    settings |= {"per_device_train_batch_size": 4, "max_steps": 2}
    return UnlearnTrainer(model, REPO(), UnlearnConfig(str(folder / "run"), **settings | changes), pairs, tokenizer)


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_modules_to_save_are_trained_saved_and_merged(tmp_path, tiny_model, tokenizer, pairs, tied):
    start = tiny_model("llama")
    start.config.tie_word_embeddings = tied
    start.tie_weights()
    start.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = seeded(load_model(tmp_path / "base", dtype="float32")[0], target_modules=["q_proj"], modules_to_save=["lm_head"])
    head = model.get_output_embeddings()
    trainer = trainer_of(model, tokenizer, pairs, tmp_path)
    trainer.train()
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
    trainer.save_model(str(tmp_path / "adapter"))
    assert any("lm_head" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    expected = model.eval()(IDS).logits
    loaded = load_model(tmp_path / "adapter", dtype="float32")[0]
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    for name, merged in (("one", merge(model)), ("other", loaded)):
        merged.save_pretrained(tmp_path / name)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_checkpointed_activations_change_nothing_under_an_adapter(tmp_path, tiny_model, tokenizer, pairs):
    weights = []
    for checkpointing in (False, True):
        model = seeded(tiny_model("llama"), modules_to_save=["norm"])
        trainer_of(model, tokenizer, pairs, tmp_path, gradient_checkpointing=checkpointing).train()
        weights.append([parameter for parameter in model.parameters() if parameter.requires_grad])
    start = [
        parameter
        for parameter in seeded(tiny_model("llama"), modules_to_save=["norm"]).parameters()
        if parameter.requires_grad
    ]
    assert not any(torch.equal(one, before) for one, before in zip(weights[0], start, strict=True))
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_an_adapter_folder_is_the_model_that_peft_makes_of_it(base, adapter):
    model, tokenizer = load_model(adapter, dtype="float32")
    torch.testing.assert_close(model(IDS).logits, theirs(adapter), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(IDS).logits, load_model(base, dtype="float32")[0](IDS).logits, atol=1e-2)
    assert tokenizer("The river") == load_outline(base)[1]("The river")  # the base's, as the folder has none


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_training_goes_on_from_an_adapter_and_its_reference_is_the_adapter_model(tmp_path, adapter, pairs, lora):
    model, tokenizer = load_model(adapter, dtype="float32")
    if lora:
        model = seeded(model)
    trainer = trainer_of(model, tokenizer, pairs, tmp_path)
    trainer.train()
    losses = [line["anchor"] for line in trainer.state.log_history if "anchor" in line]
    assert losses[0] == pytest.approx(0, abs=1e-6) and losses[1] > 1e-5
    with trainer.reference.of(model) as frozen:
        torch.testing.assert_close(frozen.eval()(IDS).logits, theirs(adapter), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model.eval()(IDS).logits, theirs(adapter), atol=1e-3)


def test_onto_low_precision_an_adapter_stays_one_and_is_not_trained(tmp_path, adapter, pairs):
    model, tokenizer = load_model(adapter, dtype="bfloat16")
    oracle = peft.AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.bfloat16).eval()
    assert torch.equal(model(IDS).logits, oracle(IDS).logits)
    with pytest.raises(ExpungeError, match="no weight of the model is trained"):
        trainer_of(model, tokenizer, pairs, tmp_path)
    with pytest.raises(ExpungeError, match="the model has an adapter already"):
        add_lora(model)


def changed(adapter: Path, **settings) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_model_name_or_path": "./moved"}, r"adapter: the base of this adapter cannot be loaded \(.*; put it where"),
        ({"base_model_name_or_path": None}, "adapter: an adapter whose adapter_config.json names no base_model_name"),
        ({"base_model_name_or_path": "{adapter}"}, "is an adapter itself; merge that one first"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}, "adapter"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_one_line(adapter, settings, message):
    changed(adapter, **{key: str(adapter) if value == "{adapter}" else value for key, value in settings.items()})
    with pytest.raises(ExpungeError, match=message) as caught:
        load_model(adapter)
    assert "\n" not in str(caught.value)


def test_a_pickled_adapter_is_not_read(adapter):
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ExpungeError, match=r"without adapter_model.safetensors; save it as safetensors"):
        load_model(adapter)


def test_an_adapter_is_found_from_anywhere_with_its_base(tmp_path, base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seeded(load_model("base", dtype="float32")[0]).save_pretrained("new")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.move(tmp_path / "new", "new")
    assert torch.equal(load_model("new", dtype="float32")[0](IDS).logits, load_model(base, dtype="float32")[0](IDS).logits)


def test_an_adapter_keeps_the_revision_of_its_base(tiny_model):
    assert add_lora(tiny_model("llama"), revision="v2").peft_config["default"].revision == "v2"


def test_quantization_is_what_qlora_says(monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(BitsAndBytesConfig, "post_init", lambda self: None)  # which asks for the package's version
    found = loading_options("bfloat16", quantization="4bit")["quantization_config"]
    assert (found.load_in_4bit, found.bnb_4bit_quant_type, found.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert found.bnb_4bit_compute_dtype == torch.bfloat16
    assert loading_options(quantization="8bit")["quantization_config"].load_in_8bit
    assert "quantization_config" not in loading_options()  # None would stand over a checkpoint's own


def test_quantization_without_bitsandbytes_is_one_line(base, monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ExpungeError, match=r"quantization=4bit: bitsandbytes is not installed; pip install 'expunge\[quant\]'"
    ):
        load_model(base, quantization="4bit")
    with pytest.raises(ExpungeError, match="quantization='3bit': expected 4bit or 8bit"):
        load_model(base, quantization="3bit")


quantized = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.fixture
def wide(tmp_path, tokenizer) -> Path:
    """Wide enough for blocks of 64."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    outline = AutoConfig.for_model("llama", vocab_size=320, eos_token_id=0, initializer_range=0.2, **sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(outline).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


@quantized
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_an_evaluation_leaves_the_gradients_of_quantized_weights_alone(wide, kind):
    gradients = []
    for evaluated in (False, True):
        model = load_model(wide, dtype="float32", quantization=kind)[0]
        if evaluated:
            with torch.no_grad():
                model(IDS)
        model = move(seeded(model), std=0.1).train()
        model(IDS).logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)


@quantized
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_quantized_weights_are_trained_through_an_adapter(tmp_path, wide, pairs, kind):
    model, tokenizer = load_model(wide, dtype="float32", quantization=kind)
    assert model.is_quantized and model.model.layers[0].mlp.up_proj.weight.dtype in (torch.uint8, torch.int8)
    with torch.no_grad():
        start = model(IDS).logits
    assert not torch.equal(start, load_model(wide, dtype="float32")[0](IDS).logits)
    with pytest.raises(ExpungeError, match="quantized weights cannot be trained"):
        trainer_of(model, tokenizer, pairs, tmp_path)
    trainer = trainer_of(seeded(model), tokenizer, pairs, tmp_path)
    trainer.train()
    losses = [line["anchor"] for line in trainer.state.log_history if "anchor" in line]
    assert losses[0] == pytest.approx(0, abs=1e-6) and losses[1] > 1e-5
    trainer.save_model(str(tmp_path / "out"))
    again = load_model(tmp_path / "out", dtype="float32", quantization=kind)[0]
    with torch.no_grad():  # bitsandbytes has another kernel where there are gradients
        expected = trainer.model.eval()(IDS).logits
        torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-3, atol=1e-3)
        with trainer.reference.of(trainer.model) as frozen:
            torch.testing.assert_close(frozen(IDS).logits, start, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(expected, start, atol=1e-2)
