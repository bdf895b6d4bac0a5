"""Bad input of every kind, in one table: one clear line, a status that is not zero, nothing half-written.

A case is a command, what its one line on standard error must say (what is wrong, where, what to do), and how the bad input
is made, from tiny models on the spot. What only looks bad and works is in a table of its own.
"""
# ruff: noqa: E501 (a case to a line)

import gzip
import json
import lzma
import re
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from expunge.adapters import add_lora
from expunge.cli import main

PAIRS = [
    {"prompt": f"The {thing}", "chosen": f" is {good} today.", "rejected": f" is {bad} and cold."}
    for thing, good, bad in [("river", "calm", "wild"), ("house", "warm", "empty"), ("tree", "green", "bare")] * 2
]
GOOD = json.dumps(PAIRS[0])
SET = "training.per_device_train_batch_size=2"
TRAIN = f"train --quiet --model {{model}} --pairs {{pairs}} --out {{out}} training.max_steps=1 {SET}"
MEASURED = (
    "data.prompts=[{prompts}] data.heldout={pairs} data.neutral={prompts} data.corpus={corpus} evaluation.samples=0 "
    "evaluation.forced=[0] evaluation.max_new_tokens=2 evaluation.scorers=[ngram]"
)
RUN = f"run --quiet --model {{model}} --pairs {{pairs}} --out {{out}} training.max_steps=1 {SET} {MEASURED}"
EVALUATE = f"evaluate {{model}} --quiet --out {{out}} {MEASURED}"


@dataclass
class Kit:
    """What a case is made with: `place` is its own empty folder, `home` holds what is good and shared."""

    home: Path
    place: Path
    model: Callable[..., Any]
    tokenizer: PreTrainedTokenizerFast

    def fill(self, text: str) -> list[str]:
        shared = {name: self.home / file for name, file in SHARED.items()}
        return [word.format(**shared, place=self.place, out=self.place / "out") for word in text.split()]

    def copy(self, name: str = "model") -> Path:
        """The good model's folder, to be spoilt."""
        return Path(shutil.copytree(self.home / "model", self.place / name))


SHARED = {"model": "model", "pairs": "pairs.jsonl", "prompts": "prompts.jsonl", "corpus": "corpus.txt", "done": "done"}


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_model, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("home")
    tiny_model().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    (folder / "prompts.jsonl").write_text(
        '{"prompt": "The river", "gold": " is calm."}\n{"prompt": "A house", "gold": " by"}\n'
    )
    (folder / "corpus.txt").write_text("The river runs past the old mill and on to the sea. " * 20)
    kit = Kit(folder, folder, tiny_model, tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPUNGE_CACHE", str(folder / "cache"))
        assert call(kit.fill(RUN.replace("{out}", "{done}"))) == 0
    return folder


@pytest.fixture
def kit(home, tmp_path, tiny_model, tokenizer, monkeypatch) -> Kit:
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("EXPUNGE_DATA", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "place").mkdir()
    return Kit(home, tmp_path / "place", tiny_model, tokenizer)


def call(arguments: list[str]) -> int:
    """`expunge ARGUMENTS` in this process; returns the exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["expunge", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
    return int(stopped.value.code or 0)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path in `folder` and its bytes; None is a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))
    }


def written(name: str, content: str | bytes) -> Callable[[Kit], None]:
    def make(kit: Kit) -> None:
        path = kit.place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def spoilt(name: str, content: str | bytes) -> Callable[[Kit], None]:
    """The good model with one of its files overwritten."""

    def make(kit: Kit) -> None:
        kit.copy()
        written(f"model/{name}", content)(kit)

    return make


def finished(name: str, content: str | bytes | None) -> Callable[[Kit], None]:
    """A finished run with one of its files overwritten, or gone."""

    def make(kit: Kit) -> None:
        shutil.copytree(kit.home / "done", kit.place / "out")
        if content is None:
            (kit.place / "out" / name).unlink()
        else:
            written(f"out/{name}", content)(kit)

    return make


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Kit], None]:
    def make(kit: Kit) -> None:
        path = kit.copy() / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return make


def pickled(kit: Kit) -> None:
    folder = kit.copy()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_tokenizer(kit: Kit) -> None:
    kit.model().save_pretrained(kit.place / "model")


def larger_tokenizer(kit: Kit) -> None:
    larger = PreTrainedTokenizerFast.from_pretrained(kit.home / "model")
    larger.add_tokens([f"word{number}" for number in range(8)])
    larger.save_pretrained(kit.copy())


def turned(name: str) -> Callable[[Kit], None]:
    """A chat template with special tokens of its own, for which the embedding has no rows; conversations in bad.jsonl and,
    as text, in `name`."""
    turn = {"role": "user", "content": "The weather"}
    sides = {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "Mild"), ("rejected", "Foul"))}

    def make(kit: Kit) -> None:
        chat = PreTrainedTokenizerFast.from_pretrained(kit.copy())
        chat.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        chat.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
        chat.save_pretrained(kit.place / "model")
        written("bad.jsonl", json.dumps({"prompt": [turn], **sides}))(kit)
        written(name, "The river <|im_end|> runs past the old mill. " * 20)(kit)

    return make


def packed(kit: Kit) -> None:
    """A checkpoint that says that it is quantized, in a way that needs no package."""
    path = kit.copy() / "config.json"
    own = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": own}))


def encoder(kit: Kit) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    BertForMaskedLM(BertConfig(vocab_size=320, initializer_range=0.2, **small)).save_pretrained(kit.place / "model")
    kit.tokenizer.save_pretrained(kit.place / "model")


def encoder_decoder(kit: Kit) -> None:
    small = T5Config(vocab_size=320, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(small).save_pretrained(kit.place / "model")
    kit.tokenizer.save_pretrained(kit.place / "model")


def classifier(*labels: str, pad: bool = True) -> Callable[[Kit], None]:
    def make(kit: Kit) -> None:
        config = kit.model().config
        config.id2label = dict(enumerate(labels))
        GPT2ForSequenceClassification(config).save_pretrained(kit.place / "judge")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(kit.home / "model")
        tokenizer.pad_token = "<eos>" if pad else None
        tokenizer.save_pretrained(kit.place / "judge")

    return make


def adapter(spoil: Callable[[Path], None]) -> Callable[[Kit], None]:
    def make(kit: Kit) -> None:
        base = kit.copy("base")
        model = kit.model("gpt2")
        model.name_or_path = str(base)
        lora = add_lora(model, r=2)
        lora.peft_config["default"].base_model_name_or_path = str(base)
        lora.save_pretrained(kit.place / "model")
        kit.tokenizer.save_pretrained(kit.place / "model")
        spoil(kit.place / "model")

    return make


def drop_adapter_weight(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors[min(tensors)]
    save_file(tensors, folder / "adapter_model.safetensors")


def both(*makers: Callable[[Kit], None]) -> Callable[[Kit], None]:
    return lambda kit: [make(kit) for make in makers] and None


Make = Callable[[Kit], None] | None
OWN = TRAIN.replace("{model}", "{place}/model")
JSONL = TRAIN.replace("{pairs}", "{place}/bad.jsonl")
SCORE = "score {place}/texts.jsonl --quiet"
TEXTS = written("texts.jsonl", '{"text": "The river is calm."}\n')


SETS = f"train --quiet --model {{model}} --forget {{place}}/bad.txt --retain {{place}}/good.txt --out {{out}} training.max_steps=1 {SET}"
SIDES = both(written("bad.txt", "The river is wild.\n"), written("good.txt", "The river is calm.\n"))
PROBED = f"{TRAIN} --method probe_directions"
PACKED = r"quantized already \(bitnet\), and quantized weights cannot be trained; add an adapter"
UNKNOWN = r"has the token '<\|im_(start|end)\|>', id 32[01], and the model's embedding has 320 rows: resize it"


def labelled(*labels: int) -> Make:
    return written(
        "p.jsonl", "".join(json.dumps({"text": f"The river {i}", "label": bad}) + "\n" for i, bad in enumerate(labels))
    )


def pairs_of(*lines: str) -> Make:
    return written("bad.jsonl", "\n".join(lines) + "\n")


# name: (command, what the line says, how the bad input is made)
CASES: dict[str, tuple[str, str, Make]] = {
    # the command line itself
    "an unknown command": ("tarin", r"tarin.*see `expunge --help`", None),
    "an unknown option": (f"{TRAIN} --metod repo", r"--metod.*see `expunge train --help`", None),
    "an option without its value": (f"{TRAIN} --method", r"--method.*see `expunge --help`", None),
    "a missing argument": ("score", r"(?i)missing argument.*see `expunge score --help`", None),
    "a word for a number": ("generate {prompts} --samples many", r"--samples.*see `expunge generate --help`", None),
    "an option out of range": ("generate {prompts} --top-p 1.5", r"top-p.*see `expunge generate --help`", None),
    "a nucleus of nothing": ("generate {prompts} -m {model} --top-p 0", r"0 < top_p <= 1", None),
    "nothing of this name to list": ("list datta", r"did you mean 'data'\?", None),
    "an unknown budget": (f"{TRAIN} --budget quik", r"unknown budget 'quik' \(did you mean 'quick'\?\)", None),
    "an unknown method": (f"{TRAIN} --method repp", r"unknown method 'repp' \(did you mean 'repo'\?\)", None),
    "an unknown scorer": (f"{RUN} evaluation.scorers=[ngrm]", r"unknown scorer 'ngrm' \(did you mean 'ngram'\?\)", None),
    "an unknown scorer of score": (f"{SCORE} --scorer ngrm", r"did you mean 'ngram'\?", TEXTS),
    "an unknown set of pairs": (f"{TRAIN} data.train=biultin", r"did you mean 'builtin'\?", None),
    "an unknown set of prompts": (f"{EVALUATE} --prompts rtp-chalenge", r"did you mean 'rtp-challenge'\?", None),
    "an unknown corpus": (f"{RUN} data.corpus=wikitext", r"did you mean 'wikitext2'\?", None),
    # configuration
    "an unknown key": (f"{TRAIN} methd.weight=1", r"unknown key 'methd' \(did you mean 'method'\?\)", None),
    "an unknown key of the method": (f"{TRAIN} method.wieght=1", r"'method.wieght' \(did you mean 'weight'\?\)", None),
    "an unknown key of training": (f"{TRAIN} training.learning_rat=1", r"did you mean 'learning_rate'\?", None),
    "no override": (f"{TRAIN} method.weight", r"'method.weight': an override is key=value", None),
    "a section that is a value": (f"{TRAIN} evaluation=3", r"evaluation=3: expected keys such as evaluation.samples", None),
    "a wrong type": (f"{TRAIN} evaluation.samples=many", r"evaluation.samples='many': expected a whole number", None),
    "a wrong type of training": (f"{TRAIN} training.learning_rate=fast", r"'fast': expected a number", None),
    "a wrong type that may be null": (f"{TRAIN} training.heads_learning_rate=fast", r"expected a number or null", None),
    "a wrong choice": (f"{TRAIN} method.anchor_on=prompt", r"method.anchor_on='prompt': expected", None),
    "a wrong choice of the evaluation": (f"{RUN} evaluation.truncate=first", r"evaluation.truncate='first'.*last", None),
    "a layout that is none": (f"{TRAIN} training.layout=packed", r"training.layout='packed': auto or plain", None),
    "a scheduler that is none": (f"{TRAIN} training.lr_scheduler_type=wavy", r"training: .*wavy", None),
    "no such configuration": (f"{TRAIN} -c {{place}}/none.yaml", r"none.yaml: no such file", None),
    "a configuration that is a folder": (f"{TRAIN} -c {{place}}", r"place: cannot be read", None),
    "broken YAML": (f"{TRAIN} -c {{place}}/a.yaml", r"a.yaml:3: not valid YAML", written("a.yaml", "seed: 1\ndata: [x\n")),
    "a list for a configuration": (f"{TRAIN} -c {{place}}/a.yaml", r"expected a mapping", written("a.yaml", "- a\n")),
    "a key that stands twice": (f"{TRAIN} -c {{place}}/a.yaml", r"a.yaml:2.*'seed' stands twice", written("a.yaml", "seed: 1\nseed: 2\n")),
    "a binary configuration": (f"{TRAIN} -c {{place}}/a.yaml", r"a.yaml:1: a NUL byte", written("a.yaml", b"seed: \x00\x01\n")),
    "a configuration in Latin-1": (f"{TRAIN} -c {{place}}/a.yaml", r"a.yaml:1: not UTF-8 text", written("a.yaml", b"model: \xe9\n")),
    # numbers
    "a negative weight": (f"{TRAIN} method.weight=-1", r"method.weight=-1.*>= 0", None),
    "a weight that is no number": (f"{TRAIN} method.weight=.nan", r"method.weight=nan: expected a finite number", None),
    "an infinite weight": (f"{TRAIN} method.weight=1e999", r"method.weight=inf: expected a finite number", None),
    "a weight of a thousand digits": (f"{TRAIN} method.weight=1{'0' * 1000}", r"expected a finite number", None),
    "a width of nothing": (f"{TRAIN} method.width=0", r"method.width=0.*at least 1", None),
    "a width beyond all memory": (f"{TRAIN} method.width=999999999999999", r"memory", None),
    "a negative beta": (f"{TRAIN} method.name=dpo method.beta=-1", r"method.beta=-1.*> 0", None),
    "a layer that is not there": (f"{TRAIN} method.layer=7", r"layer 7: the model has 3 blocks", None),
    "a negative learning rate": (f"{TRAIN} training.learning_rate=-1", r"training.learning_rate=-1.0: expected 0 or more", None),
    "no epochs": (f"{TRAIN} training.num_train_epochs=0", r"training.num_train_epochs=0.0: expected", None),
    "no batch": (f"{TRAIN} training.per_device_train_batch_size=0", r"per_device_train_batch_size=0: expected 1", None),
    "no accumulation": (f"{TRAIN} training.gradient_accumulation_steps=0", r"accumulation_steps=0: expected 1", None),
    "no steps between checkpoints": (f"{TRAIN} training.save_steps=0", r"training.save_steps=0.0: expected", None),
    "negative prompt tokens": (f"{TRAIN} training.max_prompt_tokens=-1", r"max_prompt_tokens=-1: expected 1 or more", None),
    "a negative seed": (f"{TRAIN} seed=-1", r"seed=-1: expected 0 to 4,294,967,295", None),
    "a seed of 40 bits": (f"{TRAIN} seed=1099511627776", r"seed=1099511627776: expected 0 to 4,294,967,295", None),
    "a rank of nothing": (f"{TRAIN} lora.r=0", r"LoRA: `r` should be a positive integer", None),
    "an unknown key of the adapter": (f"{TRAIN} lora.targt_modules=x", r"did you mean 'target_modules'\?", None),
    # methods
    "two sets for a method of pairs": (f"{SETS} --method dpo", r"dpo compares the two sides of a pair: give pairs", SIDES),
    "a block that is not there": (f"{TRAIN} --method rmu method.layer=40", r"block 40: the model has 3 blocks, 0 to 2", None),
    "one of several blocks that is not there": (f"{PROBED} method.blocks=[0,5]", r"block 5: the model has 3 blocks", None),
    "no block": (f"{PROBED} method.blocks=[]", r"method.blocks=\[\]: at least one block", None),
    "weights of no name": (f"{TRAIN} --method rmu method.parameters=gate_proj", r"no trainable weight of blocks 0, 1 .* a part of: .*mlp.c_proj", None),
    "an interpolation beyond 1": (f"{TRAIN} --method rmu method.alpha=100", r"method.alpha=100.0: rmu wants .* from 0 to 1", None),
    "a wrong reward": (f"{TRAIN} --method cosine_rmu method.reward=most", r"method.reward='most': expected one of normalised", None),
    "an alpha of nothing": (f"{TRAIN} --method cosine_rmu method.alpha0=0", r"method.alpha0=0.0: cosine_rmu wants a number > 0", None),
    "a negative gamma": (f"{TRAIN} --method circuit_breakers method.gamma=-1", r"method.gamma=-1.0: circuit_breakers wants", None),
    "no such probe data": (f"{PROBED} data.probe={{place}}/none.jsonl", r"none.jsonl: no such file", None),
    "probe data of one class": (f"{PROBED} data.probe={{place}}/p.jsonl", r"p.jsonl: only texts with label 1 to fit a probe on", labelled(1, 1, 1, 1, 1, 1)),
    "probe data without labels": (f"{PROBED} data.probe={{place}}/p.jsonl", r"p.jsonl:1: field 'label' must be 0 or 1", written("p.jsonl", '{"text": "a"}\n')),
    "too few of a class for a probe": (f"{PROBED} data.probe={{place}}/p.jsonl", r"at least 5 texts of each label; the rarer one has 2", labelled(0, 0, 1, 1, 1, 1, 1, 1)),
    "neutral text that is not read": (f"{TRAIN} --method dpo training.anchor_text={{corpus}}", r"training.anchor_text: dpo .* leave it out", None),
    "a direction that is none": (f"{TRAIN} --method tvi method.direction=pca", r"method.direction='pca': expected one of probe", None),
    "unknown questions": (f"{EVALUATE} data.questions=[mmul]", r"mmul: no questions set.*did you mean 'mmlu'", None),
    "S-unlearning of what is not measured": (f"{EVALUATE} evaluation.s_unlearning.utility=mmlu evaluation.s_unlearning.forget=toxicity", r"s_unlearning.utility=mmlu: not measured; add it to data.questions", None),
    # how a model is loaded and trained
    "an unknown dtype": (f"{TRAIN} --dtype bf16", r"unknown dtype 'bf16' \(did you mean 'bfloat16'\?\)", None),
    "an unknown attention": (f"{TRAIN} --attn-implementation spda", r"did you mean 'sdpa'\?", None),
    "attention from a hub": (f"{TRAIN} --attn-implementation org/kernel", r"runs with --trust-remote-code only", None),
    "an unknown device": (f"{TRAIN} --device-map nowhere", r"nowhere", None),
    "quantized weights without an adapter": (f"{TRAIN} --quantization 8bit", r"quantization=8bit: .*", None),
    "an unknown reporter": (f"{TRAIN} training.report_to=wndb", r"did you mean 'wandb'\?", None),
    "a secret in the configuration": (f"{TRAIN} training.hub_token=abc", r"set HF_TOKEN", None),
    "nothing to measure in training": (f"{TRAIN} training.eval_strategy=epoch monitor.prompts=null monitor.corpus=null", r"nothing to measure", None),
    "the best of no measure": (f"{TRAIN} training.eval_strategy=epoch training.metric_for_best_model=toxicty", r"did you mean 'toxicity'\?", None),
    "modules that are not there": (f"{TRAIN} lora.target_modules=nowhere", r"LoRA: .*nowhere", None),
    "no pairs wanted": (f"{TRAIN} data.limit=0", r"data.limit=0: expected 1 or more", None),
    "negative samples": (f"{RUN} evaluation.samples=-2", r"evaluation.samples=-2: expected 0 or more", None),
    "no new tokens": (f"{RUN} evaluation.max_new_tokens=0", r"evaluation.max_new_tokens=0: expected 1 or more", None),
    "a negative k": (f"{RUN} evaluation.forced=[0,-4]", r"evaluation.forced=-4: expected 0 or more", None),
    "no scorer": (f"{RUN} evaluation.scorers=[]", r"evaluation.scorers=\[\]: at least one", None),
    # pairs, prompts and text
    "no such pairs": (TRAIN.replace("{pairs}", "{place}/none.jsonl"), r"none.jsonl: no such file", None),
    "pairs that are a folder": (TRAIN.replace("{pairs}", "{place}"), r"place: a folder; name one file in it", None),
    "pairs of an unknown kind": (TRAIN.replace("{pairs}", "{place}/p.xyz"), r"p.xyz: unknown kind of file; use .jsonl", written("p.xyz", "x")),
    "a malformed line": (JSONL, r"bad.jsonl:2: not valid JSON", pairs_of(GOOD, "{oops")),
    "a line that is no object": (JSONL, r"bad.jsonl:2: expected a JSON object, found list", pairs_of(GOOD, "[1]")),
    "a missing field": (JSONL, r"bad.jsonl:2: no field 'rejected'", pairs_of(GOOD, '{"prompt": "a", "chosen": "b"}')),
    "an empty prompt": (JSONL, r"bad.jsonl:1: field 'prompt' is empty", pairs_of(GOOD.replace("The river", " "))),
    "an empty side": (JSONL, r"bad.jsonl:1: field 'chosen' is empty", pairs_of(GOOD.replace(" is calm today.", ""))),
    "a number for text": (JSONL, r"'chosen' must be text, found int", pairs_of('{"prompt": "a", "chosen": 1, "rejected": "c"}')),
    "equal sides": (JSONL, r"bad.jsonl:1: chosen and rejected are equal", pairs_of('{"prompt": "a", "chosen": "b", "rejected": "b"}')),
    "half a surrogate pair": (JSONL, r"bad.jsonl:1: .*surrogate", pairs_of(GOOD.replace("calm", "\\ud800"))),
    "an empty file": (JSONL, r"bad.jsonl: no pair in it", written("bad.jsonl", "")),
    "a binary file": (JSONL, r"bad.jsonl.*(UTF-8|JSON)", written("bad.jsonl", bytes(range(256)))),
    "zeros for a file": (JSONL, r"bad.jsonl:1: a NUL byte.*binary", written("bad.jsonl", bytes(1000))),
    "a file in UTF-16 without its mark": (JSONL, r"bad.jsonl:1: a NUL byte.*UTF-16.*convert", written("bad.jsonl", GOOD.encode("utf-16-le"))),
    "a damaged packed file": (TRAIN.replace("{pairs}", "{place}/p.jsonl.gz"), r"p.jsonl.gz: compressed data that is damaged or cut off.*make", written("p.jsonl.gz", gzip.compress(GOOD.encode())[:-9])),
    "an archive of pairs": (TRAIN.replace("{pairs}", "{place}/p.zip"), r"p.zip: .zip is not read; unpack it", written("p.zip", b"PK")),
    "weights for pairs": (TRAIN.replace("{pairs}", "{place}/p.gguf"), r"p.gguf: weights of a model, no text", written("p.gguf", b"GGUF")),
    "no such weights for a corpus": (EVALUATE.replace("{corpus}", "{place}/c.gguf"), r"c.gguf: no such file", None),
    "a corpus without text": (EVALUATE.replace("{corpus}", "{place}/c.csv"), r"c.csv:2: no field 'text' with text in it \(found: id\)", written("c.csv", "id\n1\n")),
    "a corpus of an unknown kind": (EVALUATE.replace("{corpus}", "{place}/c.html"), r"c.html: unknown kind of file; .* txt:c.html", written("c.html", "one")),
    "standard input for what is read again": (TRAIN.replace("{pairs}", "-"), r"data.train=-: .* save standard input to a file", None),
    "standard input for prompts that are recorded": ("evaluate {model} --prompts jsonl:-", r"data.prompts=jsonl:-: .* save standard input", None),
    "a variable that is not set": (TRAIN.replace("{pairs}", "$NO_SUCH_THING/p.jsonl"), r"the environment variable NO_SUCH_THING is not set", None),
    "a variable that is not set in an output": (TRAIN.replace("{out}", "$NO_SUCH_THING/out"), r"the environment variable NO_SUCH_THING is not set", None),
    "a file in Latin-1": (JSONL, r"bad.jsonl:1: not UTF-8.*convert", written("bad.jsonl", GOOD.replace("calm", "café").encode("latin-1"))),
    "JSON without an end": (TRAIN.replace("{pairs}", "{place}/p.json"), r"p.json:1: not valid JSON", written("p.json", f"[{GOOD}")),
    "JSON nested without end": (JSONL, r"bad.jsonl:1: JSON nested too deep", written("bad.jsonl", "[" * 100_000)),
    "a ragged table": (TRAIN.replace("{pairs}", "{place}/p.csv"), r"p.csv:2: not as many fields", written("p.csv", "prompt,chosen,rejected\na,b\n")),
    "no Parquet": (TRAIN.replace("{pairs}", "{place}/p.parquet"), r"p.parquet: not valid Parquet", written("p.parquet", b"PAR1")),
    "a conversation without a template": (JSONL, r"bad.jsonl:1: .*no chat template", pairs_of('{"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}], "rejected": [{"role": "assistant", "content": "c"}]}')),
    "no prompt": (EVALUATE.replace("{prompts}", "{place}/p.txt"), r"p.txt: no prompt in it", written("p.txt", "\n\n")),
    "a prompt without text": (EVALUATE.replace("{prompts}", "{place}/p.jsonl"), r"p.jsonl:1: no field 'prompt'", written("p.jsonl", '{"question": "a"}\n')),
    "no text": (RUN.replace("{corpus}", "{place}/c.txt"), r"c.txt: no text in it", written("c.txt", " \n")),
    "a text of one token": (EVALUATE.replace("{corpus}", "{place}/c.txt"), r"data.corpus=.*c.txt: fewer than two tokens", written("c.txt", "a")),
    "pairs longer than the context": (f"{JSONL} training.max_prompt_tokens=400", r"the model's context 64: lower training.max_prompt_tokens", pairs_of(GOOD.replace("The river", "The river " * 100))),
    "held-out pairs longer than the context": (RUN.replace("heldout={pairs}", "heldout={place}/bad.jsonl"), r"held-out pair 0: .*context of 64", pairs_of(GOOD.replace("The river", "The river " * 100))),
    "prompts longer than the context": (f"{RUN.replace('{prompts}', '{place}/p.txt')} evaluation.prompt_tokens=100", r"100 tokens and 2 new ones exceed the model's context of 64: lower evaluation.prompt_tokens", written("p.txt", "The river " * 100)),
    "a prompt of generate longer than the context": ("generate {place}/p.txt -m {model}", r"prompt 0: .*context of 64", written("p.txt", "The river " * 100)),
    "no such prompts of generate": ("generate {place}/none.txt -m {model}", r"none.txt: no such file", None),
    "no such texts to score": ("score {place}/none.jsonl", r"none.jsonl: no such file", None),
    "texts without text": (SCORE, r"texts.jsonl.*1.*no field 'text'", written("texts.jsonl", '{"txt": "a"}\n')),
    "texts that are no JSON": (SCORE, r"texts.jsonl:1: not valid JSON", written("texts.jsonl", "The river\n")),
    # models
    "no such folder": (OWN, r"place/model: no such folder; a causal language model is", None),
    "no hub": (TRAIN.replace("{model}", "nobody/nothing"), r"nobody/nothing: cannot load .*the connection; HF_TOKEN", None),
    "a name that no hub has": (TRAIN.replace("{model}", "nosuchname"), r"nosuchname: cannot load .*check the name", None),
    "a folder without a model": (OWN, r"place/model: cannot load .*its configuration", written("model/readme.txt", "nothing")),
    "a broken configuration of a model": (OWN, r"place/model: cannot load .*its configuration", spoilt("config.json", "{")),
    "a kind of model that is none": (OWN, r"place/model: cannot load .*its configuration", spoilt("config.json", '{"model_type": "gtp2"}')),
    "a configuration of a model that is a list": (OWN, r"place/model: cannot load .*its configuration", spoilt("config.json", "[]")),
    "no tokenizer": (OWN, r"place/model: there is a model but no tokenizer; save the tokenizer", without_tokenizer),
    "a broken tokenizer": (OWN, r"place/model: cannot load .*its tokenizer", spoilt("tokenizer.json", "{")),
    "a tokenizer of a larger vocabulary": (OWN, r"ids up to 327, the model knows 320 tokens", larger_tokenizer),
    "a chat template of tokens that the model does not know": (JSONL.replace("{model}", "{place}/model"), UNKNOWN, turned("c.txt")),
    "the same when fitted": (f"{JSONL} --method leace".replace("{model}", "{place}/model"), UNKNOWN, turned("c.txt")),
    "the same in a forecast": (f"{JSONL} --dry-run".replace("{model}", "{place}/model"), UNKNOWN, turned("c.txt")),
    "prompts of tokens that the model does not know": (EVALUATE.replace("{model}", "{place}/model").replace("{prompts}", "{place}/bad.jsonl"), UNKNOWN, turned("c.txt")),
    "running text of such tokens, before training": (RUN.replace("{model}", "{place}/model").replace("{corpus}", "{place}/c.txt"), UNKNOWN, turned("c.txt")),
    "conversations of such tokens, looked over": ("pairs validate {place}/bad.jsonl --model {place}/model", UNKNOWN, turned("c.txt")),
    "a quantized checkpoint without an adapter": (OWN, rf"model: {PACKED}", packed),
    "the same in a forecast, of quantized weights": (f"{OWN} --dry-run", rf"model: {PACKED}", packed),
    "an adapter merged into a quantized checkpoint": (f"{OWN} lora.r=2 lora.merge=true", r"lora.merge=true: .* \(bitnet\); leave it out", packed),
    "a name that is not text": (EVALUATE.replace("{prompts}", "{place}/\udce9.jsonl"), r"\\udce9.jsonl.*not text in utf-8, .* another name", None),
    "text to continue of such tokens": ("generate {place}/c.txt --model {place}/model --quiet", UNKNOWN, turned("c.txt")),
    "a missing weight": (OWN, r"its weights lack transformer.h.0.ln_1.weight: save", weights(lambda t: t.pop("transformer.h.0.ln_1.weight"))),
    "an unexpected weight": (OWN, r"beside the model, extra.weight", weights(lambda t: t.update({"extra.weight": torch.zeros(2)}))),
    "a weight of another shape": (OWN, r"have another shape for transformer.ln_f.bias", weights(lambda t: t.update({"transformer.ln_f.bias": torch.zeros(7)}))),
    "pickled weights": (OWN, r"pytorch_model.bin: pickled weights are not read; save", pickled),
    "half a file of weights": (OWN, r"place/model: cannot load .*its weights", spoilt("model.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{}")),
    "an empty file of weights": (OWN, r"place/model: cannot load .*its weights", spoilt("model.safetensors", b"")),
    "an encoder": (OWN, r"place/model: (an encoder|its weights)", encoder),
    "an encoder and a decoder": (OWN, r"place/model: an encoder-decoder model", encoder_decoder),
    "an adapter without its base": (OWN, r"the base of this adapter cannot be loaded.*adapter_config.json", adapter(lambda f: shutil.rmtree(f.parent / "base"))),
    "an adapter without weights": (OWN, r"an adapter without adapter_model.safetensors; save it", adapter(lambda f: (f / "adapter_model.safetensors").unlink())),
    "an adapter with a missing weight": (OWN, r"does not hold all", adapter(drop_adapter_weight)),
    "an adapter with a broken configuration": (OWN, r"adapter_config.json cannot be read", adapter(lambda f: (f / "adapter_config.json").write_text("{")) ),
    # scorers
    "a classifier without a toxic label": (f"{SCORE} --scorer hf:{{place}}/judge", r"no single label is called toxic.*add @LABEL", both(TEXTS, classifier("calm", "warm"))),
    "a label that is not there": (f"{SCORE} --scorer hf:{{place}}/judge@cold", r"no label 'cold' \(labels: 'calm', 'warm'\)", both(TEXTS, classifier("calm", "warm"))),
    "a classifier that is none": (f"{SCORE} --scorer hf:{{model}}", r"no sequence classifier", TEXTS),
    "a classifier that cannot pad": (f"{SCORE} --scorer hf:{{place}}/judge", r"no pad token", both(TEXTS, classifier("calm", "toxic", pad=False))),
    "no such classifier": (f"{SCORE} --scorer hf:{{place}}/none", r"none: no such folder; a sequence classifier is", TEXTS),
    "half a classifier": (f"{SCORE} --scorer hf:{{place}}/judge", r"judge: cannot load .*its weights", both(TEXTS, classifier("calm", "toxic"), written("judge/model.safetensors", b"half"))),
    # the folder of a run
    "a folder that holds another run": (f"{RUN} method.weight=0.9", r"out holds another run \(method.weight is None there and 0.9 here\): choose", finished("x", "")),
    "a folder that holds something else": (TRAIN, r"out is not empty and holds no run: choose another --out", written("out/diary.txt", "mine")),
    "a file for a folder": (TRAIN, r"out: cannot be written", written("out", "a file")),
    "a folder inside a file": (TRAIN.replace("{out}", "{place}/file/out"), r"out: cannot be written", written("file", "a file")),
    "a folder whose configuration is broken": (RUN, r"config.yaml: not valid YAML: choose another --out", finished("config.yaml", "a: [")),
    "a broken record of a stage": (RUN, r"train.json: not the JSON object.*remove it", finished("stages/train.json", "{")),
    "a report of nothing": ("report {place}/none", r"none holds no run \(config.yaml is missing\): give a folder", None),
    "a report of an unfinished run": ("report {out}", r"not finished \(results.jsonl is missing\): the command that began it", finished("results.jsonl", None)),
    "a report with a broken line": ("report {out}", r"results.jsonl:2: not valid JSON", finished("results.jsonl", '{"stage": "evaluate"}\n{"st')),
    "a report with half a row": ("report {out}", r"results.jsonl: a row is incomplete", finished("results.jsonl", '{"stage": "evaluate"}\n')),
    "a report with a word for a figure": ("report {out}", r"results.jsonl: row 1 .*'many'", finished("results.jsonl", '{"stage": "evaluate", "subject": "reference", "metric": "f1", "value": "many"}\n')),
    "a report with broken samples": ("report {out}", r"samples.jsonl: record 1 has no field", finished("samples.jsonl", "{}\n")),
    "a report with broken provenance": ("report {out}", r"provenance.json:1: not valid JSON", finished("provenance.json", "{")),
    "a report with a binary file": ("report {out}", r"provenance.json: not UTF-8", finished("provenance.json", b"\xff\xfe")),
    "an evaluation of a broken run": ("evaluate {out} --out {place}/new", r"config.yaml: not the configuration of a run: name", finished("config.yaml", "a: [")),
    "an evaluation of a run without its model": ("evaluate {out} --out {place}/new", r"config.yaml: not the configuration of a run: name", finished("config.yaml", "a: 1\n")),
    "a JSON key that stands twice": (JSONL, r"bad.jsonl:1: .*prompt", pairs_of(GOOD.replace("{", '{"prompt": "A", '))),
    "a strategy for pairs that is none": ("pairs build --strategy plpm --out {place}/p.jsonl", r"unknown strategy 'plpm' \(did you mean 'pplm'", None),
    "a setting of another strategy": ("pairs build iterations=3 --out {place}/p.jsonl", r"unknown key 'iterations'", None),
    "a preset without its strategy": ("pairs build --preset pplm --out {place}/p.jsonl", r"settings of --strategy pplm", None),
    "a probe on labels of one kind": ("pairs build --strategy pplm -m {model} --prompts {prompts} --probe-data {place}/p.jsonl --out {place}/o.jsonl", r"only texts with label 1 to fit a probe on", written("p.jsonl", '{"text": "A river", "label": 1}\n' * 9)),
    "pairs of which none is toxic": ("pairs build -m {model} --prompts {prompts} --out {place}/p.jsonl min_tokens=1 max_new_tokens=2 toxic=1.0 --quiet", r"no prompt of \d+ gave a pair", None),
    "a broken set looked over": ("pairs validate {place}/p.jsonl", r"p.jsonl:1: not valid JSON", written("p.jsonl", "{")),
}  # fmt: skip


def complaint(kit: Kit, capfd, command: str) -> str:
    """The one line of a command that fails, after which everything is as it was."""
    before = contents(kit.place)
    capfd.readouterr()
    status = call(kit.fill(command))
    found = capfd.readouterr()
    lines = found.err.splitlines()
    assert status == 2, found.err
    assert len(lines) == 1, found.err
    assert lines[0].startswith("expunge: ")
    assert len(lines[0]) < 600
    assert found.out == ""
    assert contents(kit.place) == before
    assert not list((kit.place.parent / "cache").rglob("*.tmp"))
    return lines[0]


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_clear_line_and_leaves_nothing(case, kit, capfd):
    command, said, make = CASES[case]
    if make:
        make(kit)
    line = complaint(kit, capfd, command)
    assert re.search(said, line), line


def test_a_loss_that_is_no_number_leaves_nothing_where_no_checkpoint_was(kit, capfd):
    line = complaint(kit, capfd, f"{TRAIN} training.max_steps=9 training.learning_rate=1e30 training.max_grad_norm=1e30")
    assert re.search(r"not a number at step \d .*lower training.learning_rate", line)


@pytest.mark.parametrize(
    ("limit", "saved"),
    [(500, "no"), (20_000, "no"), (20_000, "steps"), (200_000, "steps")],
    ids=["configuration", "model", "checkpoint's model", "checkpoint's optimizer"],
)
def test_a_disk_that_has_no_more_room(kit, capfd, limit, saved):
    """The system refuses to let any file grow above a limit, whoever writes it: Python, safetensors or torch."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        line = complaint(kit, capfd, f"{TRAIN} training.save_strategy={saved}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.search(r"out.*: cannot be written \(.+\): make room there", line), line


def test_a_second_process_is_refused_while_the_first_holds_the_folder(kit, capfd):
    out = kit.place / "out"
    code = f"from expunge.claim import claimed; from pathlib import Path; import time\nwith claimed(Path({str(out)!r}), {{}}): print(flush=True); time.sleep(600)"
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert first.stdout and first.stdout.readline()
    (out / "config.yaml").unlink()  # so that nothing but the lock stands in the way
    assert re.search(rf"out: process {first.pid} on .* is writing there: wait", complaint(kit, capfd, TRAIN))
    first.kill()
    first.wait()
    assert (out / ".lock").exists()  # left by the killed one
    (out / "config.yaml.1.tmp").write_text("half")
    assert call(kit.fill(TRAIN)) == 0
    assert not (out / ".lock").exists() and not list(out.rglob("*.tmp"))
    assert (out / "model" / "model.safetensors").is_file()


IN_EARNEST = ["an unknown option", "a missing weight", "a report of nothing"]


@pytest.mark.parametrize("case", IN_EARNEST)
def test_bad_input_in_a_process_of_its_own(case, kit):
    command, said, make = CASES[case]
    if make:
        make(kit)
    before = contents(kit.place)
    done = subprocess.run([sys.executable, "-m", "expunge", *kit.fill(command)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(rf"expunge: .*{said}.*\n", done.stderr), done.stderr
    assert contents(kit.place) == before


def mounted(options: str, folder: Path, command: list[str]) -> subprocess.CompletedProcess:
    """`command` where `folder` is a file system of its own, which goes with the process; then what it left there.

    Root may write where permissions say no, but not here.
    """
    shell = (
        f'mount -t tmpfs -o {options} none {folder} || exit 77; "$@"; status=$?; find {folder} -mindepth 1 >&2; exit $status'
    )
    done = subprocess.run(["unshare", "-m", "sh", "-c", shell, "-", *command], capture_output=True, text=True, check=False)
    if done.returncode in (77, 1) and "expunge" not in done.stderr:
        pytest.skip("no file system may be mounted here")
    return done


def test_a_file_system_that_is_full(kit):
    done = mounted("size=100k", kit.place, [sys.executable, "-m", "expunge", *kit.fill(TRAIN)])
    assert done.returncode == 2
    assert re.fullmatch(r"expunge: .*checkpoint-1: cannot be written \(.*\): make room there.*\n", done.stderr), done.stderr


def test_a_file_system_that_is_read_only(kit):
    code = f"from expunge.claim import claimed; from pathlib import Path\nwith claimed(Path({str(kit.place / 'out')!r}), {{}}): pass"
    done = mounted("ro", kit.place, [sys.executable, "-c", code])
    assert done.returncode == 1
    assert re.search(r"ExpungeError: .*out: cannot be written \(Read-only file system\): make room.*\n$", done.stderr), (
        done.stderr
    )


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (404, "RepoNotFound", r"nobody/nothing: cannot load .*not a valid model identifier.*check the name"),
        (403, "GatedRepo", r"nobody/nothing: cannot load .*gated.*HF_TOKEN"),
        (401, "", r"nobody/nothing: cannot load .*HF_TOKEN"),
    ],
    ids=["no such model", "a gated model", "an expired token"],
)
def test_a_hub_that_answers_no(kit, capfd, monkeypatch, status, code, said):
    """A hub of our own on this machine, which has no model and says so."""
    asked = []

    class No(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_):
            pass

    hub = HTTPServer(("127.0.0.1", 0), No)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    place = f"http://127.0.0.1:{hub.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", place)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", place + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
    try:
        line = complaint(kit, capfd, TRAIN.replace("{model}", "nobody/nothing"))
    finally:
        hub.shutdown()
        hub.server_close()
        close_session()
    assert asked
    assert re.search(said, line), line
    assert "hf_expired" not in line


def no_ends(kit: Kit) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(kit.copy())
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.bos_token = None
    tokenizer.save_pretrained(kit.place / "model")
    settings = json.loads((kit.place / "model" / "tokenizer_config.json").read_text())
    assert not {"eos_token", "pad_token", "bos_token"} & {key for key, value in settings.items() if value}


def padded(kit: Kit) -> None:
    model = kit.model()
    model.resize_token_embeddings(384, mean_resizing=False)
    model.save_pretrained(kit.place / "model")
    kit.tokenizer.save_pretrained(kit.place / "model")


def special(kit: Kit) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(kit.copy())
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<image>"]})
    assert len(tokenizer) == 322
    tokenizer.save_pretrained(kit.place / "model")


OWN_RUN = RUN.replace("{model}", "{place}/model")
FINE: dict[str, tuple[str, Make]] = {
    "neither pad nor eos nor bos": (OWN_RUN, no_ends),
    "an embedding with rows to spare": (OWN_RUN, padded),
    "special tokens that the model does not know": (OWN_RUN, special),
    "masks of old beside the weights": (OWN, weights(lambda t: t.update({"transformer.h.0.attn.masked_bias": torch.zeros(1)}))),
    "an adapter": (OWN, adapter(lambda folder: None)),
    "pairs in UTF-16": (JSONL, written("bad.jsonl", GOOD.encode("utf-16"))),
    "a configuration in UTF-16": (f"{TRAIN} -c {{place}}/a.yaml", written("a.yaml", "seed: 1\n".encode("utf-16"))),
    "pairs that are packed": (TRAIN.replace("{pairs}", "{place}/p.jsonl.xz"), written("p.jsonl.xz", lzma.compress(GOOD.encode()))),
    "a corpus of rows": (EVALUATE.replace("{corpus}", "{place}/c.jsonl"), written("c.jsonl", '{"text": "The river is calm."}\n' * 9)),
    "lines that end as on Windows": (JSONL, written("bad.jsonl", f"{GOOD}\r\n\r\n{GOOD}\r\n")),
    "an output folder that is there and empty": (TRAIN, lambda kit: (kit.place / "out").mkdir()),
    "prompts longer than the context that are cut": (RUN.replace("{prompts}", "{place}/p.txt"), written("p.txt", "The river " * 100)),
}  # fmt: skip


@pytest.mark.parametrize("case", FINE)
def test_what_looks_bad_and_works(case, kit, capfd):
    command, make = FINE[case]
    if make:
        make(kit)
    assert call(kit.fill(command)) == 0
    assert capfd.readouterr().err == ""
