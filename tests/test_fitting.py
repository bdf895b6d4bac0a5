"""A method that is applied, from the command line: run, evaluated, moved, evaluated again; its card; what is refused."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from expunge.cli import main
from expunge.config import RunConfig
from expunge.data import Pair, Text, Unpaired, load_unpaired
from expunge.errors import ExpungeError
from expunge.fitting import fit_and_apply
from expunge.methods import METHODS
from expunge.models import load_model
from expunge.plan import Plan

PAIRS = [
    {"prompt": f"The {thing}", "chosen": f" is {good} today.", "rejected": f" is {bad} and cold."}
    for thing in ("river", "house", "tree", "hill")
    for good, bad in [("calm", "wild"), ("warm", "empty"), ("green", "bare")]
]
LABELLED = [
    {"text": f"The {thing} is {word} {when}.", "label": label}
    for thing in ("road", "field", "mill")
    for label, words in ((0, ("kind", "soft")), (1, ("dark", "lost")))
    for word in words
    for when in ("now", "again")
]


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_model, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("home")
    for name in ("gpt2", "llama"):
        tiny_model(name).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write(folder / "pairs.jsonl", PAIRS)
    write(folder / "probe.jsonl", LABELLED)
    write(
        folder / "prompts.jsonl",
        [{"prompt": "The river", "gold": " is calm."}, {"prompt": "A house", "gold": " by the sea."}],
    )
    for name in ("corpus", "validation"):
        (folder / f"{name}.txt").write_text(f"The {name} runs past the old mill and on to the sea. " * 20)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "cache"))


def call(command: str, *arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["expunge", command, *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
    return int(stopped.value.code or 0)


def measured(home: Path) -> list[str]:
    return [
        "--quiet", f"data.prompts=[{home}/prompts.jsonl]", f"data.heldout={home}/pairs.jsonl", "data.neutral=null",
        f"data.corpus={home}/corpus.txt", "evaluation.samples=2", "evaluation.forced=[2]", "evaluation.max_new_tokens=4",
    ]  # fmt: skip


def run(home: Path, out: Path, *more: object, model: str = "llama", method: str = "tvi") -> int:
    shared = ("--model", home / model, "--pairs", home / "pairs.jsonl", "--out", out, f"data.probe={home}/probe.jsonl")
    return call("run", "--method", method, *shared, *measured(home), *more)


def figures(out: Path, subject: str = "unlearned") -> dict[tuple, float]:
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    plain = [row for row in rows if row["subject"] == subject and not row.get("paired")]
    return {
        tuple(row.get(key) for key in ("metric", "dataset", "decode", "side", "k", "mode", "scorer")): row["value"]
        for row in plain
    }


def applied(out: Path) -> dict:
    return json.loads((out / "stages/train.json").read_text())["applied"]


@pytest.mark.parametrize(("model", "folded"), [("gpt2", True), ("llama", False)])
def test_a_run_is_evaluated_moved_and_evaluated_again(home, tmp_path, model, folded):
    out = tmp_path / "out"
    assert run(home, out, "method.alpha=3", model=model) == 0
    assert applied(out)["folded"] is folded and (out / "report.html").is_file()
    assert (out / "model/steering.json").is_file() is not folded
    before, after = figures(out, "reference"), figures(out)
    assert before.keys() == after.keys() and before != after
    card = (out / "model/README.md").read_text(encoding="utf-8")
    assert ("expunge.load_model" in card) is not folded
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == ("transformers" if folded else "expunge")
    assert "Nothing was trained" in card and "Training used" not in card
    (out / "model").rename(tmp_path / "moved")
    assert call("evaluate", tmp_path / "moved", "--out", tmp_path / "again", *measured(home)) == 0
    again = figures(tmp_path / "again")
    assert {key: again[key] for key in after} == pytest.approx(after, rel=1e-6)


def test_a_done_run_is_not_done_again_and_another_strength_is(home, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(home, out, "method.alpha=3") == 0
    stamp = (out / "model/steering.safetensors").stat().st_mtime_ns
    assert run(home, out, "method.alpha=3") == 0
    assert (out / "model/steering.safetensors").stat().st_mtime_ns == stamp
    assert run(home, tmp_path / "other", "method.alpha=9") == 0
    assert figures(tmp_path / "other", "reference") == figures(out, "reference")
    assert figures(tmp_path / "other") != figures(out)


def test_a_steered_model_as_the_reference_is_not_taken_for_the_unsteered_one(home, tmp_path):
    """They share their weights and the cache of evaluations."""
    out, last = tmp_path / "out", tmp_path / "last"
    assert run(home, out, "method.alpha=3") == 0
    how = ("--reference", out / "model", "--out", last, *measured(home))
    assert call("evaluate", home / "llama", *how) == 0
    assert figures(last, "reference") == figures(out) and figures(last) == figures(out, "reference")


def test_perplexity_is_matched_on_text_that_is_not_reported(home, tmp_path, capsys):
    corpus = f"monitor.corpus={home}/validation.txt"
    assert run(home, tmp_path / "out", "method.match_perplexity=1.05", corpus) == 0
    assert applied(tmp_path / "out")["perplexity_ratio"] == pytest.approx(1.05, rel=2e-3)
    capsys.readouterr()
    assert run(home, tmp_path / "no", "method.match_perplexity=1.05", f"monitor.corpus={home}/corpus.txt") != 0
    assert "it is reported too" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_leace_on_sides_and_into_the_head(home, tmp_path):
    assert run(home, tmp_path / "sides", "method.fit_on=sides", "method.at=[0, final]", method="leace") == 0
    assert set(applied(tmp_path / "sides")["erased"]) == {"1", "final"}
    assert run(home, tmp_path / "head", "method.affine=false", method="leace") == 0
    assert applied(tmp_path / "head")["folded"] is True
    assert not (tmp_path / "head/model/steering.json").exists()


def test_two_sets_do_as_well_as_pairs(home, tmp_path, tiny_model, tokenizer):
    for side, name in (("forget", "rejected"), ("retain", "chosen")):
        write(tmp_path / f"{side}.jsonl", [{"text": pair[name]} for pair in PAIRS])
    data = load_unpaired(tmp_path / "forget.jsonl", tmp_path / "retain.jsonl")
    assert isinstance(data, Unpaired)
    about = fit_and_apply(tiny_model(), tokenizer, METHODS.get("leace")(fit_on="sides", shrinkage=0.5), data)
    assert about["erased"]["final"]["rank"] == 1


def test_neither_pairs_nor_sets_are_needed(home, tmp_path, capsys):
    """Nor does anything ask for them but an attack that trains on them."""
    out, keys = tmp_path / "out", ["--model", home / "gpt2", f"data.probe={home}/probe.jsonl", "data.train=null"]
    assert call("run", "--method", "tvi", "--out", out, *keys, *measured(home)) == 0
    assert "data" not in json.loads((out / "stages/train.json").read_text()) and (out / "report.html").is_file()
    leace = ["train", "--method", "leace", *keys, "--quiet"]
    assert call(*leace, "--out", tmp_path / "leace") == 0
    assert applied(tmp_path / "leace")["method"] == "leace"
    for arguments, message in (
        (["attack", out, "--attacks", "relearn_forget", *measured(home)], "relearn_forget: the forget set is empty"),
        ([*leace, "method.fit_on=sides"], "nothing to train on: give data.train (--pairs), or data.forget and data.retain"),
    ):
        capsys.readouterr()
        assert call(*arguments, "--out", tmp_path / "no") == 2
        assert message in capsys.readouterr().err


def test_what_is_to_be_forgotten_is_left_out_of_the_probe(home, tmp_path):
    forgotten = [pair["prompt"] + pair["rejected"] for pair in PAIRS]
    overlapping = [*LABELLED, *({"text": text, "label": 1} for text in forgotten)]
    config = RunConfig(method={"name": "tvi"})
    config.data.probe = str(write(tmp_path / "probe.jsonl", overlapping))
    pairs = [Pair(**pair) for pair in PAIRS]
    sets = Unpaired([Text(pair.prompt, pair.rejected) for pair in pairs], [Text("", "Other text.")])
    for data in (pairs, sets):
        found = [text for text, _ in probe_data(config, data)]
        assert found == [row["text"] for row in LABELLED]
    assert len(probe_data(config, [])) == len(overlapping)


def probe_data(config, data):
    plan = Plan.of(config, Path("out"))
    plan.training_data = data
    return plan.probe_data


def test_what_is_refused_is_one_line_and_leaves_nothing(home, tmp_path, capsys):
    for more, message in (
        (["lora.r=2"], "trains nothing"),
        (["method.alpha=1", "method.match_perplexity=1.1"], "give one of them"),
        (["method.block=7"], "block 7: the model has 3 blocks"),
    ):
        assert run(home, tmp_path / "out", *more) != 0
        lines = capsys.readouterr().err.strip().splitlines()
        assert message in lines[-1], lines
        assert not (tmp_path / "out").exists()


def test_a_steered_model_is_not_steered_again(home, tmp_path, capsys):
    assert run(home, tmp_path / "first", "method.alpha=3") == 0
    capsys.readouterr()
    again = ("--method", "tvi", "--model", tmp_path / "first/model", "--pairs", home / "pairs.jsonl")
    assert call("run", *again, "--out", tmp_path / "second", f"data.probe={home}/probe.jsonl", *measured(home)) != 0
    assert "steered already" in capsys.readouterr().err


def test_a_plan_says_that_nothing_is_trained(home, capsys):
    assert run(home, Path("nowhere"), "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"] == 0 and "trains nothing" in plan["estimate"]["unavailable"]


def test_a_method_that_is_trained_is_not_applied(tiny_model, tokenizer):
    with pytest.raises(ExpungeError, match="repo is trained"):
        fit_and_apply(tiny_model(), tokenizer, METHODS.get("repo")())
    with pytest.raises(ExpungeError, match="merge the model's adapter"):
        from expunge.adapters import add_lora

        fit_and_apply(add_lora(tiny_model(), r=2), tokenizer, METHODS.get("tvi")())


def test_loaded_by_the_library_it_is_what_was_run(home, tmp_path):
    assert run(home, tmp_path / "out", "method.alpha=3") == 0
    ids = torch.tensor([[5, 17, 9]])
    steered, plain = (load_model(folder, device="cpu")[0](ids).logits for folder in (tmp_path / "out/model", home / "llama"))
    assert not torch.allclose(steered, plain, atol=1e-2)
