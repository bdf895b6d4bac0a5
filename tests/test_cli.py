"""The command line as a user meets it: results on standard output, one line and a status for every mistake."""

import copy
import datetime
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
import torch
import yaml
from pyarrow import parquet
from typer.main import get_command

from expunge import load_model
from expunge.adapters import add_lora
from expunge.cli import app, main
from expunge.estimate import CannotEstimate
from expunge.methods import METHODS
from expunge.scorers import SCORERS

PAIRS = [
    {"prompt": f"The {thing}", "chosen": f" is {good} today.", "rejected": f" is {bad} and cold."}
    for thing, good, bad in [("river", "calm", "wild"), ("house", "warm", "empty"), ("tree", "green", "bare")] * 4
]


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_model, tokenizer) -> Path:
    """A folder with a tiny model, pairs and prompts."""
    folder = tmp_path_factory.mktemp("home")
    tiny_model().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write(folder / "pairs.jsonl", PAIRS)
    write(
        folder / "prompts.jsonl",
        [{"prompt": "The river", "gold": " is calm."}, {"prompt": "A house", "gold": " by the sea."}],
    )
    (folder / "corpus.txt").write_text("The river runs past the old mill and on to the sea. " * 20)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "cache"))


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def call(*arguments: object) -> int:
    """`expunge ARGUMENTS` in this process; returns the exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["expunge", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
    return int(stopped.value.code or 0)


def run_arguments(home: Path, out: Path) -> list[object]:
    return [
        "run", "--model", home / "model", "--pairs", home / "pairs.jsonl", "--out", out, "--quiet",
        f"data.prompts=[{home}/prompts.jsonl]", f"data.heldout={home}/pairs.jsonl", f"data.neutral={home}/prompts.jsonl",
        f"data.corpus={home}/corpus.txt", "evaluation.samples=2", "evaluation.forced=[0,2]", "evaluation.max_new_tokens=4",
        "training.num_train_epochs=2", "training.per_device_train_batch_size=4", "training.warmup_steps=1",
    ]  # fmt: skip


def test_a_run_leaves_everything_behind(home, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(*run_arguments(home, out)) == 0
    printed = capsys.readouterr().out
    assert "report.html" in printed
    assert "perplexity" in printed.lower()
    for name in (
        "config.yaml",
        "model/model.safetensors",
        "provenance.json",
        "results.jsonl",
        "samples.jsonl",
        "report.html",
    ):
        assert (out / name).is_file(), name
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert {row["subject"] for row in rows} == {"reference", "unlearned"}
    assert not list(out.rglob("*.tmp"))
    logged = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    assert len(logged) == 6
    assert {"anchor", "erase", "discriminator_accuracy", "discriminator_bce", "grad_norm", "tokens_per_second"} <= set(
        logged[0]
    )


def test_the_same_command_again_changes_nothing(home, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(*run_arguments(home, out)) == 0
    before = (out / "results.jsonl").read_bytes(), (out / "model" / "model.safetensors").stat().st_mtime_ns
    assert call(*run_arguments(home, out)) == 0
    assert before == ((out / "results.jsonl").read_bytes(), (out / "model" / "model.safetensors").stat().st_mtime_ns)


PLUGIN = '''
import numpy as np

from expunge.methods import method
from expunge.methods.dpo import DPO
from expunge.scorers import SCORERS


@method("plugged")
class Plugged(DPO):
    """DPO under another name."""


@SCORERS.register("vowels")
class Vowels:
    """The share of vowels."""

    digest = "1"

    def score(self, texts):
        return np.array([sum(c in "aeiou" for c in text) / max(1, len(text)) for text in texts])
'''


def test_a_plug_in_file_brings_a_method_and_a_scorer(home, tmp_path, capsys):
    plugin, out = tmp_path / "my plugin.py", tmp_path / "out"
    plugin.write_text(PLUGIN)
    small = ["--method", "plugged", "evaluation.scorers=[vowels]", "training.max_steps=1"]
    try:
        assert call(*run_arguments(home, out), *small, "--plugin", plugin) == 0
        rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        assert {row["scorer"] for row in rows if row["metric"] == "toxicity"} == {"vowels"}
        assert yaml.safe_load((out / "config.yaml").read_text())["method"]["name"] == "plugged"
        capsys.readouterr()
        assert call("list", f"--plugin={plugin}", "methods") == 0
        assert "plugged" in capsys.readouterr().out
    finally:
        METHODS._entries.pop("plugged", None)
        SCORERS._entries.pop("vowels", None)


def test_a_model_of_pairs_that_changed_is_not_trained_over(home, tmp_path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    shutil.copy(home / "pairs.jsonl", pairs)

    def train(out: str) -> int:
        small = ["--quiet", "training.max_steps=2", "training.per_device_train_batch_size=2", "training.warmup_steps=0"]
        return call("train", "--model", home / "model", "--pairs", pairs, "--out", tmp_path / out, *small)

    assert train("out") == 0
    first = (tmp_path / "out/model/model.safetensors").read_bytes()
    pairs.write_text(pairs.read_text().replace("calm", "kind"))
    capsys.readouterr()
    assert train("out") == 2
    assert "made before this changed: the data that is trained on; choose another --out" in one_line(capsys)
    assert (tmp_path / "out/model/model.safetensors").read_bytes() == first
    assert train("other") == 0
    assert (tmp_path / "other/model/model.safetensors").read_bytes() != first


def test_a_run_s_folder_is_not_an_evaluation_s(home, tmp_path, capsys):
    out, measured = tmp_path / "out", run_arguments(home, tmp_path)[8:]
    assert call(*run_arguments(home, out), "training.max_steps=1") == 0
    saved = (out / "results.jsonl").read_bytes()
    capsys.readouterr()
    assert call("evaluate", home / "model", "--out", out, "--quiet", *measured, "training.max_steps=1") == 2
    assert "another run" in one_line(capsys)
    assert (out / "results.jsonl").read_bytes() == saved
    assert call("evaluate", out, "--out", tmp_path / "again", "--quiet", *measured) == 0
    rows = [json.loads(line) for line in (tmp_path / "again" / "results.jsonl").read_text().splitlines()]
    assert {row["method"] for row in rows if row["subject"] == "unlearned"} == {"repo"}


def test_a_folder_with_another_run_is_left_alone(home, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(*run_arguments(home, out)) == 0
    saved = (out / "config.yaml").read_bytes()
    capsys.readouterr()
    assert call(*run_arguments(home, out), "method.weight=0.9") == 2
    assert "another run" in one_line(capsys)
    assert (out / "config.yaml").read_bytes() == saved


def test_evaluate_a_run_against_its_reference(home, tmp_path, capsys):
    out = tmp_path / "out"
    call(*run_arguments(home, out))
    keys = [argument for argument in run_arguments(home, out) if str(argument).startswith(("data.", "evaluation."))]
    assert call("evaluate", out, "--prompts", home / "prompts.jsonl", "--out", tmp_path / "again", "--quiet", *keys) == 0
    rows = [json.loads(line) for line in (tmp_path / "again" / "results.jsonl").read_text().splitlines()]
    assert {row["subject"] for row in rows} == {"reference", "unlearned"}


def test_score_keeps_order_and_fields(tmp_path, capsys):
    file = write(tmp_path / "texts.jsonl", [{"text": "The river is calm.", "id": 7}, {"text": ""}])
    assert call("score", file) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["id"] == 7
    assert first["text"] == "The river is calm."
    assert 0 <= first["score"] < 0.5
    assert second["score"] == 0
    assert call("score", file, "--scorer", "ngram", "--scorer", "wordvec") == 0
    said = capsys.readouterr()
    assert [set(json.loads(line)["scores"]) for line in said.out.splitlines()] == [{"ngram", "wordvec"}] * 2
    assert said.err.startswith("ngram and wordvec: Spearman ")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_score_reads_every_encoding_from_a_file_and_from_standard_input(encoding, tmp_path, capsys, monkeypatch):
    data = '{"text": "The café is calm."}\r\n\r\n{"text": "日本", "id": 1}'.encode(encoding)
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "b").write_bytes(data)  # JSON lines, where no name says otherwise
    said = []
    for source in (tmp_path / "a.jsonl", tmp_path / "b", "-", "jsonl:-"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))
        assert call("score", source) == 0
        said.append(capsys.readouterr().out)
    assert len(set(said)) == 1
    assert [json.loads(line)["text"] for line in said[0].splitlines()] == ["The café is calm.", "日本"]


def test_score_reads_tables_and_text(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.csv").write_text('text,id\n"calm, and\nkind",1\n')
    assert call("score", tmp_path / "a.csv") == 0
    assert json.loads(capsys.readouterr().out) | {"score": 0} == {"text": "calm, and\nkind", "id": "1", "score": 0}
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo"))
    assert call("score", "txt:-") == 0
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == ["one", "two"]
    parquet.write_table(pyarrow.table({"text": ["a"], "day": [datetime.date(2020, 1, 2)]}), tmp_path / "a.parquet")
    assert call("score", tmp_path / "a.parquet") == 2
    assert "a.parquet: row 1: field 'day' is date" in one_line(capsys)


def test_prompts_on_standard_input_are_those_of_the_file(home, capsys, monkeypatch):
    """Their lines are no prompts: JSON is recognised."""
    said = []
    for source in (home / "prompts.jsonl", "-", "jsonl:-"):
        monkeypatch.setattr(sys, "stdin", io.StringIO((home / "prompts.jsonl").read_text()))
        assert call("generate", source, "--model", home / "model", "--max-new-tokens", "2") == 0
        said.append(capsys.readouterr().out)
    assert len(set(said)) == 1 and json.loads(said[0].splitlines()[1])["prompt"] == "A house"
    monkeypatch.setattr(sys, "stdin", io.StringIO("The river\n\nA house\u2028by\n"))
    assert call("generate", "-", "--model", home / "model", "--max-new-tokens", "2") == 0
    lines = capsys.readouterr().out.removesuffix("\n").split("\n")
    assert [json.loads(line)["prompt"] for line in lines] == ["The river", "A house\u2028by"]


def test_pairs_on_standard_input(home, capsys, monkeypatch):
    found = []
    for source in (home / "pairs.jsonl", "-"):
        monkeypatch.setattr(sys, "stdin", io.StringIO((home / "pairs.jsonl").read_text()))
        assert call("pairs", "validate", source, "--model", home / "model", "--json") == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_what_cannot_be_printed_ends_nothing(encoding, home, tmp_path):
    """In a process of its own: the encoding of its streams is fixed when it starts."""
    folder = tmp_path / "日本 é"
    folder.mkdir()
    pairs = [{**pair, "chosen": pair["chosen"] + " 日é\u2028"} for pair in PAIRS]
    sources = {
        name: write(folder / f"{name}.jsonl", rows) for name, rows in (("pairs", pairs), ("texts", [{"text": "日é🙂"}]))
    }
    run = [argument if argument != tmp_path / "out" else folder / "out" for argument in run_arguments(home, folder / "out")]
    run[run.index("--pairs") + 1] = sources["pairs"]
    commands = [
        ["score", sources["texts"]],
        ["pairs", "validate", sources["pairs"], "--model", home / "model"],
        ["list", "attacks"],
        ["list", "data"],
        [*run, "--dry-run"],
        [*run, "training.max_steps=1"],
        ["report", folder / "out"],
        ["score", folder / "none.jsonl"],
    ]
    code = "import sys\nfrom expunge.cli import main\nsys.argv[1:] = []\n"
    code += "for command in COMMANDS:\n sys.argv = ['expunge', *command]\n try: main()\n"
    code += " except SystemExit as stop: print(stop.code or 0)\n"
    script = tmp_path / "all.py"  # one process: torch is imported once
    script.write_text(f"COMMANDS = {[[str(word) for word in command] for command in commands]!r}\n{code}", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script], env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, check=False
    )
    said, complained = done.stdout.decode(encoding), done.stderr.decode(encoding)
    assert [line for line in said.splitlines() if line in ("0", "1", "2")] == ["0"] * 7 + ["2"], complained
    assert "Traceback" not in complained and re.search(r"expunge: .*\\u65e5\\u672c .*none.jsonl: no such file", complained)
    assert json.loads(said.splitlines()[0])["text"] == "日é🙂"  # JSON's own escapes lose nothing
    assert (folder / "out" / "report.html").is_file() and r"\u65e5\u672c" in said


def test_generate_writes_one_line_a_sample(home, capsys):
    assert (
        call("generate", home / "prompts.jsonl", "--model", home / "model", "--samples", "3", "--max-new-tokens", "4") == 0
    )
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["sample"] for line in lines] == [0, 1, 2] * 2


@pytest.mark.parametrize("what", ["methods", "attacks", "scorers", "data", "budgets"])
def test_list(what, capsys):
    assert call("list", what) == 0
    assert {"methods": "repo", "attacks": "gcg", "scorers": "ngram", "data": "builtin", "budgets": "quick"}[
        what
    ] in capsys.readouterr().out


def test_dry_run_prints_the_plan_and_writes_nothing(home, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(*run_arguments(home, out), "--dry-run", "method.weight=0.7") == 0
    plan = capsys.readouterr().out
    assert "weight: 0.7" in plan
    assert "steps: 6" in plan
    assert "verdict: 'fits: " in plan
    assert not out.exists()


def test_dry_run_says_where_defaults_come_from(home, tmp_path, capsys, monkeypatch):
    start = ["train", "--dry-run", "--json", "--out", tmp_path / "out"]
    rmu = ["--model", home / "model", "--pairs", home / "pairs.jsonl", "--method", "rmu", "method.c=3"]
    rmu.append("training.per_device_train_batch_size=2")
    assert call(*start, *rmu) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["method"]["layer"] == 1 and plan["method"]["alpha"] == 0.95
    assert plan["defaults"] == {
        "method.layer": "1 (scaled: block 7 of 32 in Zephyr 7B)",
        "method.train_blocks": "[0, 1] (paper: the steered block and the two below it)",
        "method.alpha": "0.95 (paper: REPO, Table 5)",
    }
    assert plan["estimate"]["trains"] == {"blocks 0, 1": "mlp.c_proj.weight"}

    def forecast(*_):
        raise CannotEstimate("it takes seconds")

    monkeypatch.setattr("expunge.doctor.forecast", forecast)
    assert call(*start, "data.limit=8", "training.learning_rate=1e-3") == 0  # of the built-in model with repo
    plan = json.loads(capsys.readouterr().out)
    assert plan["defaults"] == {
        "training.anchor_text": "builtin-anchor (ours: neutral text under the KL)",
        "method.weight": "1.0 (ours: tuned for the built-in model)",
        "method.anchor_on": "continuation (ours: tuned for the built-in model)",
        "training.adam_beta1": "0.0 (ours: tuned for the built-in model)",
    }
    assert plan["training"]["learning_rate"] == 1e-3 and plan["training"]["adam_beta1"] == 0.0


def test_conversations_are_trained_on_through_the_chat_template(home, tmp_path, tokenizer):
    chat = copy.deepcopy(tokenizer)
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    chat.chat_template = turns + "{% if add_generation_prompt %}<assistant>{% endif %}"
    tiny = tmp_path / "model"
    shutil.copytree(home / "model", tiny)
    chat.save_pretrained(tiny)
    rows = [
        {
            "prompt": [{"role": "user", "content": pair["prompt"]}],
            "chosen": [{"role": "assistant", "content": pair["chosen"]}],
            "rejected": [{"role": "assistant", "content": pair["rejected"]}],
        }
        for pair in PAIRS
    ]
    write(tmp_path / "chats.jsonl", rows)
    settings = ["--model", tiny, "--pairs", tmp_path / "chats.jsonl", "training.max_steps=1", "--quiet"]
    assert call("train", *settings, "--out", tmp_path / "run") == 0
    assert json.loads((tmp_path / "run/stages/train.json").read_text())["pairs"]["n"] == len(PAIRS)
    assert call("train", *settings, "--out", tmp_path / "other", "--model", home / "model") == 2
    assert call("train", *settings, "--out", tmp_path / "plain", "--pairs", home / "pairs.jsonl") == 0


def sets(home: Path) -> list[object]:
    forget = [{"text": f"The {i} river is wild and cold, and the house is empty and bare."} for i in range(9)]
    retain = [{"prompt": "The river", "completion": f" is {i} calm today."} for i in range(4)]
    return ["--forget", write(home / "forget.jsonl", forget), "--retain", write(home / "retain.jsonl", retain)]


def test_two_sets_are_trained_on_and_what_was_cut_is_left_behind(home, tmp_path, capsys):
    arguments = [word for word in run_arguments(home, tmp_path / "run") if word not in ("--pairs", home / "pairs.jsonl")]
    arguments += [*sets(tmp_path), "training.max_continuation_tokens=8", "evaluation.prompt_tokens=2"]
    assert call(*arguments, "--dry-run") == 0
    plan = yaml.safe_load(capsys.readouterr().out)
    assert (plan["texts"], plan["steps"]) == ({"forget": 9, "retain": 4}, 6)
    assert plan["data"]["train"] is None and plan["estimate"]["truncation"]["forget"] == "9 texts: 9 continuations cut"
    assert call(*arguments) == 0
    stages = json.loads((tmp_path / "run/provenance.json").read_text())["stages"]
    forget, retain = stages["train"]["forget"], stages["train"]["retain"]
    assert forget["source"] == str(tmp_path / "forget.jsonl") and forget["sha256"] != retain["sha256"]
    assert (forget["n"], forget["truncation"]["continuations_cut"], retain["n"]) == (9, 9, 4)
    for subject in ("reference", "unlearned"):
        found = stages[f"evaluate-{subject}"]
        assert found["prompts"] == {str(home / "prompts.jsonl"): 2, "neutral": 2, "heldout": 12}
        assert found["prompts_cut"]["neutral"] == 2 and found["prompts_cut"]["heldout"] > 0
        assert found["empty_continuations"]["heldout sampled"] >= 0
    assert call("doctor", "--model", home / "model", *sets(tmp_path)) == 0
    capsys.readouterr()
    assert call(*arguments, "training.max_continuation_tokens=9") == 2  # another run
    assert call(*arguments) == 0


def test_mistakes_about_two_sets_are_one_line(home, tmp_path, capsys):
    both, start = sets(tmp_path), ["train", "--model", home / "model", "--out", tmp_path / "out", "--quiet"]
    for settings, expected in [
        (both[:2], "data.forget without data.retain"),
        (both[2:], "data.retain without data.forget"),
        ([*both, "--pairs", home / "pairs.jsonl"], "give pairs, or the two sets"),
        ([*both, "--method", "dpo"], "dpo compares the two sides of a pair"),
        ([*both[:2], "--retain", both[1]], "9 texts are to be retained and to be forgotten"),
        (["data.train=null"], "nothing to train on"),
    ]:
        assert call(*start, *settings) == 2
        assert expected in one_line(capsys)
        assert not (tmp_path / "out").exists()


def test_doctor_says_what_there_is_and_what_a_run_takes(home, capsys, monkeypatch):
    monkeypatch.setenv("EXPUNGE_DATA", "/no/such/folder")
    assert call("doctor", "--model", home / "model", "--pairs", home / "pairs.jsonl", "lora.r=2") == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert found["machine"]["data"] == "EXPUNGE_DATA=/no/such/folder, which is no folder"
    assert found["run"]["trained"] < found["run"]["parameters"]
    assert call("doctor", "--model", home) == 2
    assert "cannot load a causal language model" in capsys.readouterr().err


@pytest.fixture(scope="module")
def adapter(home, tmp_path_factory) -> Path:
    """An adapter folder on the tiny model."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    torch.manual_seed(0)
    model = add_lora(load_model(home / "model", dtype="float32")[0], r=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


def short(home: Path, out: Path) -> list[object]:
    keys = ["training.max_steps=2", "evaluation.forced=[0]", "evaluation.samples=1", "data.neutral=null"]
    return [*run_arguments(home, out), *keys]


def test_options_reach_every_load(home, tmp_path, monkeypatch):
    loaded = []

    def spy(name, **options):
        loaded.append((Path(name).name, options))
        return load_model(name, **options)

    monkeypatch.setattr("expunge.plan.subject.load_model", spy)
    given = ["--revision", "v2", "--dtype", "bfloat16", "--attn-implementation", "eager", "--device-map", "cpu"]
    out = tmp_path / "out"
    assert call(*short(home, out), *given, "--trust-remote-code", "lora.r=2") == 0
    how = {"dtype": "bfloat16", "attn_implementation": "eager", "device_map": "cpu", "quantization": None}
    wanted = {"revision": "v2", **how, "trust_remote_code": True}
    assert [name for name, _ in loaded] == ["model"] * 3  # trained; the reference; OUT/model
    assert all(options == wanted for _, options in loaded)
    adapter = json.loads((out / "model" / "adapter_config.json").read_text())
    assert adapter["revision"] == "v2" and adapter["base_model_name_or_path"] == str(home / "model")
    loaded.clear()
    keys = [word for word in short(home, out) if str(word).startswith(("data.", "evaluation."))]
    assert call("evaluate", out, "--out", tmp_path / "again", "--quiet", *keys) == 0
    how["device_map"] = None
    assert all(options == {"revision": "v2", **how, "trust_remote_code": False} for _, options in loaded)
    rows = [(tmp_path / name / "results.jsonl").read_text().replace(name, "") for name in ("out", "again")]
    assert [json.loads(line)["value"] for line in rows[0].splitlines()] == [
        json.loads(line)["value"] for line in rows[1].splitlines()
    ]


REVISIONS = """
import sys
from expunge.cli import main
words = sys.argv
for revision in ("main", "v2", "v3"):
    sys.argv = [*words, revision]
    try:
        main()
    except SystemExit as end:
        print(end.code, end="\\n=\\n")
"""


def test_a_revision_is_that_of_the_hub(home, tmp_path):
    """In a cache as the hub's library lays it out, main and v2 are different models."""
    cache = tmp_path / "hub"
    for revision, commit in (("main", "1" * 40), ("v2", "2" * 40)):
        snapshot = cache / "models--org--tiny" / "snapshots" / commit
        shutil.copytree(home / "model", snapshot)
        (refs := cache / "models--org--tiny" / "refs").mkdir(exist_ok=True)
        (refs / revision).write_text(commit)
    config = json.loads((snapshot / "config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True, "layer_norm_epsilon": 3.0}))
    (tmp_path / "one.txt").write_text("The river runs")
    environ = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}  # which a process reads once
    command = [sys.executable, "-c", REVISIONS, "generate", str(tmp_path / "one.txt"), "--model", "org/tiny", "--revision"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    first, second, third, _ = done.stdout.split("=\n")
    said = [part.removesuffix("0\n") for part in (first, second)]
    assert all(said) and said[0] != said[1] and first.endswith("0\n") and second.endswith("0\n") and third == "2\n"
    assert "expunge: org/tiny: cannot load" in done.stderr and "Traceback" not in done.stderr


CODE = """
from transformers import GPT2Config, GPT2LMHeadModel
class OwnConfig(GPT2Config):
    model_type = "own"
class OwnModel(GPT2LMHeadModel):
    config_class = OwnConfig
"""


def test_code_that_comes_with_a_model_runs_when_asked_and_only_then(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    own = tmp_path / "own"
    shutil.copytree(home / "model", own)
    (own / "own.py").write_text(CODE)
    config = json.loads((own / "config.json").read_text())
    places = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (own / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": places}))
    arguments = short(home, tmp_path / "out")
    arguments[2] = own
    assert call(*arguments) == 2
    assert "own: comes with code of its own; read it, and if you trust it, run it with --trust-remote-code" in one_line(
        capsys
    )
    assert not (tmp_path / "modules").exists()
    assert call(*arguments, "--trust-remote-code") == 0


def test_a_lora_export_is_an_adapter_or_a_merged_checkpoint(home, tmp_path):
    logits = []
    for merge in ("false", "true"):
        out = tmp_path / merge
        change = [f"lora.merge={merge}", "lora.r=2", "lora.use_dora=true", "training.learning_rate=1e-2"]
        assert call(*short(home, out), *change, "training.warmup_steps=0") == 0
        files = {path.name for path in (out / "model").iterdir()}
        assert ("model.safetensors" in files) is (merge == "true")
        assert ("adapter_model.safetensors" in files) is (merge == "false")
        logits.append(load_model(out / "model", dtype="float32")[0](torch.tensor([[5, 17, 250]])).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    start = load_model(home / "model", dtype="float32")[0](torch.tensor([[5, 17, 250]])).logits
    assert not torch.allclose(start, logits[0], atol=1e-2)


def test_an_adapter_is_a_model_to_start_from(home, adapter, tmp_path, capsys):
    arguments = short(home, tmp_path / "out")
    arguments[2] = adapter
    assert call(*arguments, "lora.r=2") == 2
    assert "an adapter on top of an adapter is no model by itself: add lora.merge=true" in one_line(capsys)
    assert call(*arguments, "--dtype", "bfloat16") == 2
    assert "leave out dtype and quantization" in one_line(capsys)
    assert not (tmp_path / "out").exists()
    assert call(*arguments, "lora.r=2", "lora.merge=true", "training.learning_rate=1e-9") == 0
    ids = torch.tensor([[5, 17, 250]])
    out, start = (load_model(name, dtype="float32")[0](ids).logits for name in (tmp_path / "out" / "model", adapter))
    torch.testing.assert_close(out, start, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(out, load_model(home / "model", dtype="float32")[0](ids).logits, atol=1e-2)


def test_a_run_measures_itself_on_text_that_is_not_reported(home, tmp_path, capsys):
    (tmp_path / "monitor.txt").write_text("A cold wind\nThe old mill\n")
    (tmp_path / "corpus.txt").write_text("She carried the kind letter home. " * 20)
    keys = ["training.eval_strategy=epoch", "monitor.limit=2", f"monitor.prompts={tmp_path}/monitor.txt"]
    keys += [f"monitor.corpus={tmp_path}/corpus.txt", "training.save_strategy=epoch", "training.load_best_model_at_end=true"]
    keys += ["training.metric_for_best_model=perplexity_ratio", "training.max_steps=-1"]
    out = tmp_path / "out"
    assert call(*short(home, out), *keys, f"monitor.prompts={home}/prompts.jsonl") == 2
    assert "prompts.jsonl: it is reported too" in one_line(capsys)
    for _ in range(2):
        assert call(*short(home, out), *keys) == 0
    rows = [json.loads(line) for line in (out / "checkpoints.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3] * 4 + [6] * 4
    assert {row["method"] for row in rows} == {"repo"} and {row["run"] for row in rows} == {"out"}


def test_the_plan_and_the_doctor_show_how_a_model_is_loaded(home, tmp_path, capsys):
    keys = ["--dtype", "bfloat16", "lora.r=2", "lora.use_rslora=true"]
    assert call(*run_arguments(home, tmp_path / "out"), *keys, "--dry-run") == 0
    plan = yaml.safe_load(capsys.readouterr().out)
    assert (plan["dtype"], plan["lora"], plan["trust_remote_code"]) == ("bfloat16", {"r": 2, "use_rslora": True}, False)
    memory = {}
    for dtype in ("float32", "bfloat16"):
        assert call("doctor", "--model", home / "model", "--pairs", home / "pairs.jsonl", "--dtype", dtype, "lora.r=2") == 0
        found = yaml.safe_load(capsys.readouterr().out)
        assert found["run"]["dtype"] == dtype
        memory[dtype] = found["run"]["memory_gb"]["weights"]
    assert "bitsandbytes" in found["machine"]["quantization"] and found["reports"]


def start(arguments: str, before: str = "", **environment: str) -> subprocess.CompletedProcess:
    """`expunge ARGUMENTS` in a process of its own, which ends by saying whether torch was imported."""
    code = f"import sys; sys.argv = ['expunge', *{arguments.split()!r}]\n{before}\n"
    code += (
        "try:\n    from expunge.cli import main; main()\nexcept SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--version", "expunge 0.1"),
        ("--help", "Remove a behaviour"),
        ("run --help", "--dry-run"),
        ("list methods", "representation"),
        ("list scorers --json", '"name": "ngram"'),
        ("list data", "rtp-challenge"),
    ],
)
def test_what_needs_no_torch_does_not_wait_for_it(arguments, said):
    found = start(arguments).stdout
    assert said in found and found.splitlines()[-1] == "0 False"


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("l", ["list"]),
        ("list ", ["methods", "attacks", "scorers", "data", "budgets"]),
        ("run --method rep", ["repo"]),
        ("train --pairs b", ["builtin", "builtin-heldout", "builtin-validation", "builtin-pplm", "builtin-pplm-wikipedia"]),
        ("doctor --budget ", ["quick", "full"]),
        ("evaluate x --prompts r", ["rtp-challenge", "rtp-tuning"]),
        ("score x --scorer ", ["ngram", "perspective", "wordvec", "hf:", "perspective:"]),
    ],
)
def test_the_shell_completes_names_without_torch(words, offered):
    typed = f"expunge {words}"
    settings = {"_EXPUNGE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split(" ")) - 1)}
    *found, last = start("", **settings).stdout.splitlines()
    assert found == offered
    assert last == "0 False"


def test_doctor_speaks_before_torch_is_there():
    found = start("doctor", before="sys.modules['torch'] = None")
    assert "memory: " in found.stdout and "device:" not in found.stdout
    assert "ModuleNotFoundError: import of torch halted" in found.stderr


def test_json_is_one_object_on_standard_output(home, tmp_path, capfd):
    def said(*arguments: object) -> dict:
        capfd.readouterr()
        assert call(*arguments, "--json") == 0
        found = capfd.readouterr()
        assert found.err == "" and found.out.count("\n") == 1
        return json.loads(found.out)

    out = tmp_path / "out"
    assert said(*run_arguments(home, out), "--dry-run")["steps"] == 6
    assert not out.exists()
    run = said(*run_arguments(home, out))
    assert run["report"] == str(out / "report.html")
    lines = {(line["metric"], line["decode"], line["side"]): line for line in run["figures"]}
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    [perplexity] = [
        row["value"]
        for row in rows
        if (row["metric"], row["mode"], row["subject"], row["paired"]) == ("perplexity", "exact", "unlearned", False)
    ]
    assert lines["perplexity", None, None]["unlearned"]["value"] == perplexity
    assert set(lines["toxicity", "greedy", None]) >= {"dataset", "scorer", "reference", "unlearned", "ratio", "n"}
    assert said("report", out) == {"report": str(out / "report.html")}
    measured = run_arguments(home, out)[8:]
    alone = said("evaluate", home / "model", "--out", tmp_path / "alone", "--quiet", *measured)
    assert all("unlearned" in line and "reference" not in line for line in alone["figures"])
    small = ["--model", home / "model", "--pairs", home / "pairs.jsonl", "--quiet"]
    trained = tmp_path / "trained"
    assert said("train", *small, "--out", trained, "training.max_steps=1") == {"model": str(trained / "model")}
    assert set(said("doctor", *small)) == {"machine", "device", "reports", "run"}
    texts = write(tmp_path / "texts.jsonl", [{"text": "The river is calm."}, {"text": "The house is empty."}])
    score = said("score", texts, "--scorer", "ngram", "--scorer", "wordvec")
    assert [set(record) for record in score["records"]] == [{"text", "scores"}] * 2
    assert [(each["first"], each["second"], each["n"]) for each in score["agreement"]] == [("ngram", "wordvec", 2)]
    assert {entry["name"] for entry in said("list", "methods")["methods"]} >= {"repo", "dpo"}


def test_a_reader_that_leaves_is_no_fault():
    command = [sys.executable, "-m", "expunge", "list", "data"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1


PAGE = (Path(__file__).parent.parent / "docs" / "cli.md").read_text(encoding="utf-8")
GROUPS = get_command(app).commands  # type: ignore[attr-defined]
COMMANDS = {
    f"{name} {inner}" if inner else name: command
    for name, group in GROUPS.items()
    for inner, command in getattr(group, "commands", {"": group}).items()
}


def sections() -> dict[str, str]:
    return {part.split("\n", 1)[0]: part for part in PAGE.split("\n## ")[1:]}


def test_the_page_lists_every_command():
    assert set(sections()) == set(COMMANDS)
    assert set(re.findall(r"`(--[\w-]+)`", sections()["list"])) == {"--json"}  # the control


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_lists_every_option_of_a_command(name):
    [listed] = re.findall(r"^Options: (.*)\.$", sections()[name], re.MULTILINE)
    options = {max(param.opts, key=len) for param in COMMANDS[name].params if param.opts[0].startswith("-")}
    assert set(re.findall(r"`(--[\w-]+)`", listed)) == options - {"--help"}


EXAMPLES = re.findall(r"^(?:echo .* \| )?expunge (.*)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("line", EXAMPLES)
def test_the_page_s_examples_are_commands(line):
    name, *words = shlex.split(line)
    if name not in COMMANDS:
        name, words = f"{name} {words[0]}", words[1:]
    COMMANDS[name].make_context(name, words)


def one_line(capsys) -> str:
    """What was printed on standard error: one line that begins with the program's name, and no traceback."""
    error = capsys.readouterr().err.strip()
    lines = [line for line in error.splitlines() if line.startswith("expunge: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]
