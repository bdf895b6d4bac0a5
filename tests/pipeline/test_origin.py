"""A finished run is compared with what it recorded: nothing is made anew over it, and no other model passes for its own."""

import json
import os
import shutil
from datetime import date
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from expunge import pipeline
from expunge.config import RunConfig, build
from expunge.data import clock
from expunge.errors import ExpungeError
from expunge.plan import Plan
from expunge.rows import read_rows
from expunge.scorers import ngram

CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }} on {{ strftime_now('%d %b %Y') }}\n{% endfor %}"
PAIRS = [{"prompt": f"The {thing}", "chosen": " is calm.", "rejected": " is wild."} for thing in ("river", "house", "tree")]


@pytest.fixture
def home(tmp_path, monkeypatch, tiny_model, tokenizer) -> Path:
    """A working directory with a model that speaks in chats, pairs, prompts, and a text."""
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "home"
    place.mkdir()
    monkeypatch.chdir(place)
    for seed, name in enumerate(("model", "other")):
        tiny_model(seed=seed).save_pretrained(place / name)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", pad_token="<eos>", chat_template=CHAT
        ).save_pretrained(place / name)
    write(place / "pairs.jsonl", PAIRS)
    write(place / "chats.jsonl", [chat(pair) for pair in PAIRS])
    write(place / "prompts.jsonl", [{"prompt": "A river"}, {"prompt": "A house"}])
    (place / "corpus.txt").write_text("The river runs past the old mill and on to the sea. " * 9)
    (place / "anchor.txt").write_text("She carried the kind letter home and read it by the window. " * 9)
    return place


def write(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def chat(pair: dict) -> dict:
    turns = {side: [{"role": "assistant", "content": pair[side]}] for side in ("chosen", "rejected")}
    return {"prompt": [{"role": "user", "content": pair["prompt"]}], **turns}


def config(**more) -> RunConfig:
    small = {"max_steps": 1, "warmup_steps": 0, "per_device_train_batch_size": 2, **more.pop("training", {})}
    data = {"train": "pairs.jsonl", "prompts": ["prompts.jsonl"], "heldout": None, "neutral": None, "corpus": "corpus.txt"}
    evaluation = {"samples": 1, "max_new_tokens": 2, "scorers": ["ngram"]}
    tree = {"model": "model", "method": {"name": "dpo"}, "training": small, "evaluation": evaluation}
    return build(RunConfig, {**tree, "data": {**data, **more.pop("data", {})}, **more}, "")


def train(out: Path = Path("out"), **more) -> bytes:
    plan = Plan.of(config(**more), out, quiet=True)
    with pipeline.claim(out, plan.config):
        pipeline.train(plan)
    return (out / "model/model.safetensors").read_bytes()


def nudge(path: Path) -> None:
    tensors = load_file(path)
    name = min(tensors)
    save_file({**tensors, name: tensors[name] + 1}, path, metadata={"format": "pt"})


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda: nudge(Path("model/model.safetensors")), "this changed: the model's weights; choose another --out"),
        (lambda: edit_json(Path("model/tokenizer_config.json"), model_max_length=9), "this changed: the model's tokenizer;"),
        (lambda: edit_json(Path("model/generation_config.json"), eos_token_id=[3]), "this changed: the model's generation;"),
        (lambda: write(Path("pairs.jsonl"), PAIRS[:2]), "this changed: the data that is trained on;"),
        (lambda: Path("anchor.txt").write_text("They planted apple trees. " * 40), "changed: training.anchor_text;"),
        (lambda: nudge(Path("out/model/model.safetensors")), r"out/model is not what the run left there \(weights changed"),
        (lambda: edit_json(Path("out/stages/train.json"), inputs=None), "does not say what the model was made from"),
    ],
    ids=["weights", "tokenizer", "generation", "pairs", "anchor", "by hand", "an older record"],
)
def test_a_finished_model_is_not_made_anew_over_what_changed(home, change, message):
    more = {"method": {"name": "repo"}, "training": {"anchor_text": "anchor.txt", "anchor_tokens": 8}}
    train(**more)
    change()
    left = Path("out/model/model.safetensors").read_bytes()
    with pytest.raises(ExpungeError, match=message) as error:
        train(**more)
    assert "\n" not in str(error.value)
    assert Path("out/model/model.safetensors").read_bytes() == left


def test_of_what_is_measured_in_the_midst_of_training_the_text_and_the_scorer_are_told_apart(home, monkeypatch):
    more = {"training": {"eval_strategy": "steps", "eval_steps": 1}, "monitor": {"prompts": None, "corpus": "anchor.txt"}}
    train(**more)
    read = ngram.read_asset
    with monkeypatch.context() as patch, pytest.raises(ExpungeError, match=r"this changed: monitor\.scorer; choose"):
        patch.setattr(ngram, "read_asset", lambda name: (*read(name)[:2], "another"))
        train(**more)
    Path("anchor.txt").write_text("They planted apple trees. " * 40)
    with pytest.raises(ExpungeError, match=r"this changed: what is measured in the midst of training; choose"):
        train(**more)


def test_what_lies_elsewhere_but_is_the_same_is_done_before(home, caplog):
    train()
    os.utime("pairs.jsonl", (1, 1))
    (home / "model/README.md").write_text("# A card")
    caplog.set_level("INFO", logger="expunge")
    train()
    assert "done before" in caplog.text


def test_checkpoints_of_other_pairs_are_set_aside_and_said(home, caplog):
    fresh = train(Path("fresh"), data={"train": "chats.jsonl"})
    train(training={"max_steps": 2, "save_steps": 1})
    shutil.rmtree("out/model")  # as a process leaves it that was killed in training
    Path("out/stages/train.json").unlink()
    kept = sorted(path.name for path in Path("out/checkpoints").iterdir())
    write(Path("pairs.jsonl"), [chat(pair) for pair in PAIRS])
    assert train(training={"max_steps": 2, "save_steps": 1}) != fresh
    assert "the data that is trained on" in caplog.text and "out/checkpoints-earlier-1" in caplog.text
    assert sorted(path.name for path in Path("out/checkpoints-earlier-1").iterdir()) == kept


def test_a_template_is_told_the_day_on_which_the_run_began(home, caplog, monkeypatch):
    data = {"train": "chats.jsonl"}
    with clock.told(date(2026, 3, 1)):
        first = train(data=data)
    caplog.set_level("INFO", logger="expunge")
    with clock.told(date(2026, 3, 2)):  # the next day
        assert train(data=data) == first
        assert "done before" in caplog.text and "2026-03-01" in Path("out/.began.json").read_text()
        assert train(Path("new"), data=data) != first  # another run has another text


def run(out: str = "out", **more) -> list:
    return pipeline.run(config(**more), Path(out), quiet=True)


def perplexities(folder: str) -> dict[str, float]:
    return {row.subject: row.value for row in read_rows(Path(folder) / "results.jsonl") if row.metric == "perplexity"}


def evaluate(monkeypatch, capsys, model: str, *words: str) -> str:
    """`expunge evaluate`; what it says on standard error, "" where all went well."""
    from expunge.cli import main

    settings = [
        "data.prompts=[]",
        "data.heldout=null",
        "data.neutral=null",
        "evaluation.samples=1",
        "evaluation.scorers=ngram",
    ]
    monkeypatch.setattr("sys.argv", ["expunge", "evaluate", model, *settings, "--quiet", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    return said if stopped.value.code else ""


def test_a_run_is_measured_from_another_working_directory(home, monkeypatch, capsys, tmp_path):
    run()
    kept = yaml.safe_load(Path("out/config.yaml").read_text())
    assert kept["model"] == str(home / "model") and kept["data"]["train"] == str(home / "pairs.jsonl")
    monkeypatch.chdir(tmp_path)
    corpus = f"data.corpus={home}/corpus.txt"
    assert evaluate(monkeypatch, capsys, "home/out", corpus, "--out", "again") == ""
    assert perplexities("again") == perplexities("home/out")
    assert train(Path("home/out"), model="home/model", data={"train": "home/pairs.jsonl"})  # done before


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["c_proj"]}], ids=["all weights", "adapter"])
def test_a_run_that_was_moved_with_its_model_finds_it(home, monkeypatch, capsys, tmp_path, caplog, lora):
    run("runs/out", lora=lora)
    home.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert evaluate(monkeypatch, capsys, "runs/out", "data.corpus=corpus.txt", "--out", "again") == ""
    assert perplexities("again") == perplexities("runs/out")
    assert pipeline.settings_of_run(Path("runs/out"))["data"]["train"] == str(tmp_path / "moved/pairs.jsonl")
    caplog.set_level("INFO", logger="expunge")
    run("runs/out", lora=lora)  # the same command
    assert "done before" in caplog.text
    assert yaml.safe_load(Path("runs/out/config.yaml").read_text())["model"] == str(tmp_path / "moved/model")


def test_a_run_whose_models_changed_is_not_measured_as_itself(home, monkeypatch, capsys):
    run()
    nudge(Path("model/model.safetensors"))
    said = evaluate(monkeypatch, capsys, "out", "data.corpus=corpus.txt", "--out", "again")
    assert (
        "out/model was made before this changed: the model's weights; bring it back" in said and not Path("again").exists()
    )
    assert evaluate(monkeypatch, capsys, "out", "data.corpus=corpus.txt", "--out", "b", "--reference", "other") == ""
    nudge(Path("out/model/model.safetensors"))
    said = evaluate(monkeypatch, capsys, "out", "data.corpus=corpus.txt", "--out", "c", "--reference", "other")
    assert "out/model is not what the run left there (weights changed since)" in said
    shutil.rmtree("model")
    assert "model, which it was made from, is no longer there" in evaluate(monkeypatch, capsys, "out", "--out", "d")


@pytest.mark.parametrize("part", ["tokenizer", "config", "weights"])
def test_a_reference_that_changed_is_measured_anew_and_its_figures_are_kept(home, monkeypatch, capsys, caplog, part):
    words = ("data.corpus=corpus.txt", "--out", "measured", "--reference", "other")
    assert evaluate(monkeypatch, capsys, "model", *words) == ""
    before, shared = perplexities("measured"), set((home.parent / "cache/evaluations").iterdir())
    if part == "tokenizer":  # a bos before every text
        path = Path("other/tokenizer.json")
        single = [{"SpecialToken": {"id": "<eos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        bos = {"type": "TemplateProcessing", "single": single, "pair": single}
        bos["special_tokens"] = {"<eos>": {"id": "<eos>", "ids": [0], "tokens": ["<eos>"]}}
        edit_json(path, post_processor=bos)
    elif part == "config":
        edit_json(Path("other/config.json"), activation_function="relu")
    else:
        nudge(Path("other/model.safetensors"))
    assert evaluate(monkeypatch, capsys, "model", *words) == ""
    after = perplexities("measured")
    assert after["unlearned"] == before["unlearned"] and after["reference"] != before["reference"]
    assert f"reference other: {part} changed since it was last measured here" in caplog.text
    assert shared < set((home.parent / "cache/evaluations").iterdir())
