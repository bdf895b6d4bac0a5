"""Estimates against what is really held: bytes that autograd keeps, parameters, and the peak of a run in a process."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from expunge import DPO, REPO, UnlearnConfig
from expunge.adapters import add_lora
from expunge.config import RunConfig
from expunge.data.tokenize import TokenizedPair
from expunge.doctor import Forecast, advice, free_memory
from expunge.estimate import CannotEstimate, estimate, rows_of, texts_of
from expunge.models import hidden_states, without_dropout


def config(**changes) -> UnlearnConfig:
    return UnlearnConfig(output_dir="nowhere", use_cpu=True, per_device_train_batch_size=4, **changes)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_what_autograd_keeps_is_counted(tiny_model, architecture, lora, checkpointing):
    model = tiny_model(architecture).train()
    model.config.attention_dropout = 0.0
    args = config(gradient_checkpointing=checkpointing)
    made = estimate(model.config, DPO(), args, {"r": 2} if lora else None, prompt=5, continuation=4)
    if lora:
        model = add_lora(model, r=2)
    without_dropout(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids, seen = torch.zeros(4, 13, dtype=torch.long), torch.ones(4, 1, 13, 13, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden_states(model, ids, seen, ["final"], ids)
    assert made.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert made.trained == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    real = sum(storage.nbytes() for storage in kept.values())
    if checkpointing:
        whole = estimate(model.config, DPO(), config(), {"r": 2} if lora else None, prompt=5, continuation=4)
        real += whole.parts["activations"] // 4  # of three blocks, with one of them twice
    else:
        real += real // 3
    assert made.parts["activations"] == pytest.approx(real, rel=0.05)


def test_parts_follow_from_the_method_and_the_settings(tiny_model):
    outline = tiny_model().config
    full, cached, adapter = (
        estimate(outline, REPO(), config(), None),
        estimate(outline, REPO(), config(reference="cached"), None),
        estimate(outline, REPO(), config(), {"r": 2}),
    )
    weights = full.parts["weights"]
    assert weights == full.parts["gradients"] == full.parts["optimizer"] // 2 == full.parts["reference"]
    assert cached.parts["reference"] == 320 * 32 * 4
    assert adapter.parts["reference"] == 0
    assert adapter.parts["gradients"] == 4 * adapter.trained < weights / 4
    assert cached.operations < full.operations
    assert adapter.operations < full.operations < estimate(outline, REPO(), config(gradient_checkpointing=True)).operations
    plain = estimate(outline, REPO(), config(layout="plain"), None)
    assert plain.operations > full.operations and plain.parts["activations"] > full.parts["activations"]
    anchored = estimate(outline, REPO(), config(anchor_text="some.txt"), None)
    assert anchored.operations > full.operations and anchored.parts["activations"] > 1.5 * full.parts["activations"]
    twice = estimate(outline, REPO(), config(gradient_accumulation_steps=2), None)
    assert twice.operations == 2 * full.operations
    assert twice.parts["activations"] == full.parts["activations"]


def test_weights_take_what_their_precision_takes(tiny_model):
    outline = tiny_model().config
    made = {
        name: estimate(outline, REPO(), config(), {"r": 2}, dtype=getattr(torch, name)) for name in ("float32", "bfloat16")
    }
    adapter = 4 * made["float32"].trained
    assert made["bfloat16"].parts["weights"] - adapter == (made["float32"].parts["weights"] - adapter) / 2
    matrices = 3 * 12 * 32 * 32  # of three blocks: attention 4 d^2, feed-forward 8 d^2
    for kind, size in (("8bit", 1), ("4bit", 0.5 + 1 / 64 + 1 / 4096)):
        held = estimate(outline, REPO(), config(), {"r": 2}, quantization=kind).parts["weights"]
        assert made["float32"].parts["weights"] - held == pytest.approx(matrices * (4 - size), rel=1e-4)


def test_operations_are_six_for_each_weight_and_token():
    outline = GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=1000, bos_token_id=0, eos_token_id=0)
    made = estimate(outline, DPO(), config(reference="cached"), prompt=8, continuation=8)
    in_rows, on_sides = 4 * (8 + 2 * 8), 4 * 2 * (8 + 8)
    expected = in_rows * 6 * (2 * 12 * 64 * 64) + on_sides * 8 * (1000 * 64)  # two more for the reference's logits
    assert made.operations == pytest.approx(expected, rel=0.05)  # attention is the rest


def test_a_model_that_takes_no_mask_of_ours_is_estimated_in_the_plain_layout():
    outline = AutoConfig.for_model("bloom", n_layer=2, hidden_size=32, n_head=2, vocab_size=100)
    made = estimate(outline, REPO(), config(), prompt=5, continuation=4)
    assert made.operations > 0


def test_what_does_not_run_without_memory_is_one_line():
    outline = AutoConfig.for_model("mamba", num_hidden_layers=2, hidden_size=32, vocab_size=100)
    with pytest.raises(CannotEstimate, match="memory and time cannot be estimated") as caught:
        estimate(outline, REPO(), config(), prompt=5, continuation=4)
    assert "\n" not in str(caught.value)


def test_rows_are_the_longest_pair_and_what_a_batch_is_padded_to():
    pairs = [TokenizedPair([1] * 2, [1] * n, [1] * n) for n in (1, 1, 1, 9)]
    assert rows_of(pairs, batch=1) == ((2, 9), (2, 3))
    assert rows_of(pairs, batch=4) == ((2, 9), (2, 9))


def test_texts_of_two_sets_are_twice_as_many_rows_of_their_own_length(tiny_model):
    texts = [([1] * 2, [1] * n) for n in (1, 1, 1, 9)]
    assert texts_of(texts, batch=1) == ((2, 9), (2, 3))
    assert texts_of(texts, batch=4) == ((2, 9), (2, 9))
    outline = tiny_model().config
    made = {paired: estimate(outline, REPO(), config(), prompt=2, continuation=9, paired=paired) for paired in (True, False)}
    plain = estimate(outline, REPO(), config(layout="plain"), prompt=2, continuation=9)
    assert made[False].parts["activations"] == plain.parts["activations"] != made[True].parts["activations"]


@pytest.mark.parametrize("settings", [[], ["lora.r=4"], ["training.reference=cached"]], ids=["full", "lora", "cached"])
def test_the_peak_of_a_run_is_within_a_quarter(tmp_path, tokenizer, settings):
    outline = GPT2Config(n_layer=4, n_embd=512, n_head=8, vocab_size=40_000, bos_token_id=0, eos_token_id=0)
    AutoModelForCausalLM.from_config(outline).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    text = " the river runs past the old mill" * 10
    pairs = [{"prompt": text, "chosen": f"{text} {i}", "rejected": f" {i} {text}"} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    command = [tmp_path / "model", "--pairs", tmp_path / "pairs.jsonl", *settings, "training.max_steps=2"]
    command += ["training.per_device_train_batch_size=4", "training.use_cpu=true"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}

    def expunge(verb: str, *more: object) -> str:
        words = map(str, [sys.executable, "-m", "expunge", verb, "--model", *command, *more])
        environ["EXPUNGE_CACHE"] = str(tmp_path / "cache")
        return subprocess.run([*words], env=environ, check=True, capture_output=True, text=True).stdout

    expunge("train", "--out", tmp_path / "run", "training.save_strategy=no", "--quiet")
    facts = json.loads((tmp_path / "run" / "stages" / "train.json").read_text())
    said = yaml.safe_load(expunge("doctor"))["run"]
    process = said["memory_gb"]["process"]  # Python and its libraries, which are easy
    assert said["peak_gb"] - process == pytest.approx(facts["peak_memory_bytes"] / 1e9 - process, rel=0.25)
    assert said["verdict"].startswith("fits")


def test_what_does_not_fit_is_said_with_what_would():
    cpu = torch.device("cpu")
    made = Forecast(1, "", 1, 1, 1, {}, {}, 1, 1, free_memory(cpu) * 10, cpu, 1, 1.0)
    assert "does not fit" in advice(made, RunConfig()) and "lora.r" in advice(made, RunConfig())
    assert "lora.r" not in advice(made, RunConfig(lora={}))
    unread = dataclasses.replace(made, loading=free_memory(cpu) * 2, peak=1)
    assert "does not fit: loading takes" in advice(unread, RunConfig())
