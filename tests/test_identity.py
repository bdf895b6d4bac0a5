"""A model's identity: of content, the same wherever it lies, and in every key that depends on it, and in no other."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from expunge.adapters import add_lora
from expunge.attacks import ATTACKS, AttackData, Budget
from expunge.config import RunConfig
from expunge.data import Pair, load_pairs
from expunge.data.builders import BestOfN
from expunge.data.pair_files import pairs_key
from expunge.metrics.evaluation import EvaluationData
from expunge.models import identity_of, load_model, loaded_identity
from expunge.models.identity import PARTS
from expunge.plan import Plan, evaluation_inputs, training_inputs
from expunge.provenance import data_digest, digest
from expunge.redteam.cases import Bench
from expunge.scorers.base import Scorer
from expunge.states import StoredStates
from expunge.sweep.plan import Cell

PAIRS = [{"prompt": f"The {thing}", "chosen": " is calm.", "rejected": " is wild."} for thing in ("river", "house", "tree")]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture
def home(tmp_path, monkeypatch, tiny_model, tokenizer) -> Path:
    """A model with a chat template and a generation configuration, an adapter on it, and a file of pairs."""
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "cache"))
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    chat = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", pad_token="<eos>", chat_template=TEMPLATE
    )
    chat.save_pretrained(tmp_path / "model")
    adapter = add_lora(load_model(tmp_path / "model")[0], r=2, target_modules=["c_proj"])
    adapter.save_pretrained(tmp_path / "adapter")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return tmp_path


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_tensor(path: Path, part: str = "", byte: int = 0, bits: int = 1) -> None:
    """Bits of one byte of one number; the lowest of it unless told."""
    tensors = load_file(path)
    name = min(name for name, tensor in tensors.items() if tensor.numel() > 1 and part in name)
    changed = tensors[name].clone().contiguous()
    changed.view(-1).view(torch.uint8)[byte] ^= bits
    save_file({**tensors, name: changed}, path, metadata={"format": "pt"})


EDITS: dict[str, Callable[[Path], None]] = {
    "weights": lambda home: edit_tensor(home / "model/model.safetensors"),
    "config": lambda home: edit_json(home / "model/config.json", activation_function="relu"),
    "generation": lambda home: edit_json(home / "model/generation_config.json", eos_token_id=[0, 3]),
    "tokenizer": lambda home: edit_json(home / "model/tokenizer_config.json", add_prefix_space=True, model_max_length=7),
    "template": lambda home: (home / "model/chat_template.jinja").write_text(TEMPLATE + " "),
    "adapter": lambda home: edit_tensor(home / "adapter/adapter_model.safetensors", "lora_B", 3, 0x3F),
    "adapter settings": lambda home: edit_json(home / "adapter/adapter_config.json", lora_alpha=3),
}
LEFT_ALONE: dict[str, Callable[[Path], None]] = {
    "a card": lambda home: (home / "model/README.md").write_text("# Mine"),
    "the version that wrote it": lambda home: edit_json(
        home / "model/config.json", transformers_version="5.0", dtype="float16"
    ),
    "its name": lambda home: edit_json(home / "model/config.json", _name_or_path="elsewhere"),
    "the order of keys": lambda home: reverse_json(home / "model/config.json"),
    "a time": lambda home: os.utime(home / "model/model.safetensors", (1, 1)),
    "shards": lambda home: shard(home / "model"),
}


def reverse_json(path: Path) -> None:
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items()))))


def shard(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{at % 2}.safetensors" for at, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, model / file, metadata={"format": "pt"})
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


@pytest.mark.parametrize("edit", EDITS)
def test_a_changed_byte_changes_its_part_and_no_other(home, edit):
    before = identity_of(home / "adapter")
    EDITS[edit](home)
    found = identity_of(home / "adapter")
    assert found.changed(before.parts) == [{"template": "tokenizer", "adapter settings": "adapter"}.get(edit, edit)]
    assert found.key != before.key


@pytest.mark.parametrize("edit", LEFT_ALONE)
def test_what_no_result_follows_from_is_left_out(home, edit):
    before = identity_of(home / "model")
    LEFT_ALONE[edit](home)
    assert identity_of(home / "model") == before


def test_it_is_the_same_wherever_the_model_lies(home, monkeypatch):
    before, on_top = identity_of(home / "model"), identity_of(home / "adapter")
    shutil.copytree(home / "model", home / "copy/of it")
    assert identity_of(home / "copy/of it") == before
    monkeypatch.chdir(home)
    assert identity_of("model") == before
    (home / "model").rename(home / "moved")
    edit_json(home / "adapter/adapter_config.json", base_model_name_or_path=str(home / "moved"))
    assert identity_of("adapter") == on_top != before


def test_a_replaced_file_of_the_same_size_and_time_is_read_again(home):
    path = home / "model/model.safetensors"
    before, stat = identity_of(home / "model"), path.stat()
    edit_tensor(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size and identity_of(home / "model").changed(before.parts) == ["weights"]


def test_in_memory_it_follows_from_each_part_too(home):
    model, tokenizer = load_model(home / "model")
    before = loaded_identity(model, tokenizer)
    assert loaded_identity(*load_model(home / "model")) == before
    tokenizer("A river", truncation=True, max_length=3)  # sets the backend, not the tokenizer
    assert loaded_identity(model, tokenizer) == before
    model.generation_config.eos_token_id = [0, 3]
    tokenizer.chat_template += " "
    model.config.activation_function = "relu"
    model.transformer.ln_f.bias.data[0] += 1
    assert loaded_identity(model, tokenizer).changed(before.parts) == ["weights", "config", "generation", "tokenizer"]
    adapted = add_lora(load_model(home / "model")[0], r=2, lora_alpha=4, target_modules=["c_proj"])
    first = loaded_identity(adapted)
    adapted.peft_config["default"].lora_alpha = 8
    assert loaded_identity(adapted).changed(first.parts) == ["adapter"]


class Judge(Scorer):
    name = "judge"

    def __init__(self, digest: str):
        self.digest = digest

    def score(self, texts):
        raise NotImplementedError


KEYS = ("evaluation", "training", "case", "states", "pairs", "cell")
DEPENDS = {
    **{part: set(KEYS) for part in ("weights", "config")},
    **{part: set(KEYS) - {"states"} for part in ("generation", "template", "tokenizer")},  # states follow from token ids
    "adapter": set(KEYS),
    "adapter settings": set(KEYS) - {"pairs", "states"},  # merged at this scale, it does nothing: B is zero
    "rows": {"training", "cell"},
    "scorer": {"evaluation", "case", "pairs"},
    "prompts": {"evaluation", "case", "pairs"},
    "dtype": {"evaluation", "training", "case", "cell"},
}


def keys_of(home: Path, model: str, scorer: str, prompts: list[str], dtype: str) -> dict[str, str]:
    """Every key of this package, without running what it is a key of."""
    config = RunConfig(model=str(home / model), dtype=dtype, method={"name": "dpo"})
    config = replace(config, data=replace(config.data, train=str(home / "pairs.jsonl")))
    plan, judge = Plan.of(config, home / "out"), Judge(scorer)
    plan.scorers = [judge]
    plan.evaluation_data = EvaluationData(challenge={"prompts": prompts}, pairs=[Pair("a", "b", "c")])
    loaded, tokenizer = load_model(home / model)
    had = AttackData(tokenizer)
    bench = Bench(home, None, had, Budget(), plan.evaluation_data, plan.evaluation_plan, plan.scorers, True)
    attack = ATTACKS.get("prune")()
    StoredStates.of(loaded, [[1, 2, 3]], ("final",), loaded_identity(loaded).weights)
    newest = max((home / "cache/states").iterdir(), key=lambda path: path.stat().st_ctime_ns)
    return {
        "evaluation": digest(evaluation_inputs(plan, plan.start)),
        "training": digest(training_inputs(plan)),
        "case": bench._place("prune", attack, plan.start).name,
        "states": newest.name,
        "pairs": pairs_key(loaded, tokenizer, prompts, judge, BestOfN())[1],
        "cell": Cell({}, {}, False, plan).name,
    }


@pytest.mark.parametrize("what", DEPENDS)
def test_every_key_that_depends_on_an_input_changes_with_it_and_no_other(home, what):
    """The table: inputs by keys."""
    given = {"model": "adapter", "scorer": "1", "prompts": ["A river"], "dtype": "float32"}
    before = keys_of(home, **given)
    if what in EDITS:
        EDITS[what](home)
    elif what == "rows":
        path = home / "pairs.jsonl"
        path.write_text(path.read_text().replace("calm", "Calm"))
    else:
        changed = {"scorer": "2", "prompts": ["A River"], "dtype": "bfloat16"}[what]
        given |= {what: changed}
    shutil.rmtree(home / "cache")
    after = keys_of(home, **given)
    assert {name for name in KEYS if before[name] != after[name]} == DEPENDS[what]


def test_every_part_has_a_row_in_the_table():
    assert set(PARTS) - {"steering", "code"} <= set(DEPENDS)


def test_data_is_its_rows_not_where_they_lie(home):
    first = data_digest(load_pairs(home / "pairs.jsonl"))
    shutil.copy(home / "pairs.jsonl", home / "other.jsonl")
    assert data_digest(load_pairs(home / "other.jsonl")) == first
    rows = load_pairs(home / "pairs.jsonl")
    assert data_digest(rows[::-1]) != first != data_digest(rows[:2])
    whole = EvaluationData(challenge={"a": ["x", "y"], "b": ["z"]})
    assert data_digest(whole) != data_digest(EvaluationData(challenge={"a": ["x"], "b": ["y", "z"]}))
    with pytest.raises(TypeError, match="Tensor has no lasting form"):
        digest([torch.zeros(2)])


def test_how_it_is_loaded_counts_where_it_is_set(home):
    found = identity_of(home / "model")
    plain = found.loaded({"dtype": "float32", "device_map": "auto", "attn_implementation": None})
    assert plain == {"model": found.key, "dtype": "float32"} != found.loaded({"dtype": "float16"})
    assert found.loaded({"dtype": "auto"}) == plain == found.loaded({})
    assert found.loaded({"attn_implementation": "eager"})["attn_implementation"] == "eager"
