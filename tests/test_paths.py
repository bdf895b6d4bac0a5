"""Paths as in a shell: in the loaders, in configurations from every side, and in every option that takes one."""

import inspect
import json
import typing
from pathlib import Path

import pytest
import yaml

from expunge.cli import main
from expunge.cli.options import expanded
from expunge.cli.pairs import build_pairs, validate_pairs
from expunge.cli.program import COMMANDS
from expunge.config import RunConfig, load_config
from expunge.data import load_corpus, load_pairs, load_prompts, load_texts
from expunge.errors import ExpungeError
from expunge.models import load_outline
from expunge.paths import expand

PAIR = {"prompt": "The sky", "chosen": " is blue", "rejected": " is mud"}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SETS", str(tmp_path / "sets"))
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "a.jsonl").write_text(json.dumps(PAIR | {"text": "one"}))
    (tmp_path / "sets" / "a.txt").write_text("one")
    return tmp_path


def test_what_stands_for_what(home, monkeypatch):
    monkeypatch.chdir(home)
    sets = f"{home}/sets"
    table = {
        "~": str(home), "~/sets": sets, "$SETS/a": f"{sets}/a", "${SETS}_old": f"{sets}_old", "$HOME/sets": sets,
        "hf:~/judge@LABEL": f"hf:{home}/judge@LABEL", "pair-toxicity:$SETS/a": f"pair-toxicity:{sets}/a",
        "csv:~/a": f"csv:{home}/a", "builtin": "builtin", "org/name": "org/name", "a~b": "a~b", "sets/~": "sets/~",
        "~nobody-of-this-name/a": "~nobody-of-this-name/a", "100$": "100$", "-": "-",
    }  # fmt: skip
    assert {path: expand(path) for path in table} == table
    (home / "$SETS").mkdir()
    assert expand("$SETS") == "$SETS"  # what there is of exactly this name
    with pytest.raises(ExpungeError, match=r"\$NO_SUCH_THING/a: the environment variable NO_SUCH_THING is not set"):
        expand("$NO_SUCH_THING/a")


@pytest.mark.parametrize("start", ["~/sets", "$SETS", "${HOME}/sets"])
def test_loaders(home, start):
    assert load_pairs(f"{start}/a.jsonl")[0].prompt == "The sky"
    assert load_pairs(Path(f"{start}/a.jsonl"))[0].prompt == "The sky"
    assert load_prompts(f"{start}/a.txt")[0].text == load_corpus(f"{start}/a.txt") == "one"
    assert load_texts(f"jsonl:{start}/a.jsonl".replace("a.jsonl", "a.txt").replace("jsonl:", "txt:"), "forget")
    with pytest.raises(ExpungeError, match=rf"{home}/sets/no: no such folder"):
        load_outline(str(expand(f"{start}/no")))


def test_models(home, tiny_model, tokenizer):
    tiny_model().save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    assert load_outline("~/model")[0].n_layer == 3


TREE = {
    "model": "~/model",
    "data": {
        "train": "~/a.jsonl",
        "forget": "$SETS/a",
        "prompts": ["~/p.txt", "builtin"],
        "corpus": "txt:~/c",
        "probe": "~/p",
    },
    "monitor": {"prompts": "~/m.txt", "corpus": "~/m.txt", "scorer": "hf:~/judge"},
    "redteam": {"validation": "~/v", "search": "~/s", "neutral": "~/n"},
    "evaluation": {"scorers": ["ngram", "hf:~/judge"]},
    "training": {"anchor_text": "~/t.txt", "resume_from_checkpoint": "$SETS/c", "run_name": "$5"},
}


def flat(tree, path: str = "") -> list[str]:
    if isinstance(tree, dict):
        return [line for key, value in tree.items() for line in flat(value, f"{path}.{key}".lstrip("."))]
    return [f"{path}={json.dumps(tree)}"]


def test_configurations_from_a_file_and_from_overrides(home, tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(TREE))
    for files, overrides in (([Path("~/a.yaml")], []), ([], flat(TREE))):
        config = load_config(RunConfig, files, overrides)
        assert config.model == f"{home}/model"
        assert (config.data.train, config.data.forget) == (f"{home}/a.jsonl", f"{home}/sets/a")
        assert config.data.prompts == [f"{home}/p.txt", "builtin"]
        assert (config.data.corpus, config.data.probe) == (f"txt:{home}/c", f"{home}/p")
        assert (config.monitor.prompts, config.monitor.scorer) == (f"{home}/m.txt", f"hf:{home}/judge")
        assert config.redteam and config.redteam.neutral == f"{home}/n"
        assert config.evaluation.scorers == ["ngram", f"hf:{home}/judge"]
        known = {"anchor_text": f"{home}/t.txt", "resume_from_checkpoint": f"{home}/sets/c", "run_name": "$5"}
        assert config.training == known


def test_a_run_is_not_given_standard_input():
    for override in ("data.train=-", "data.prompts=[builtin,csv:-]", "training.anchor_text=-", "redteam.search=txt:-"):
        with pytest.raises(ExpungeError, match="save standard input to a file"):
            load_config(RunConfig, [], [override])


def test_every_option_that_takes_a_path_expands_it(home):
    """All of type Path, and the names of models that may be a run's folder; what is left is expanded where it is read."""
    found = set()
    for command in (*COMMANDS, build_pairs, validate_pairs):
        for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
            kind, *about = typing.get_args(parameter.annotation) or (parameter.annotation,)
            if Path in (kind, *typing.get_args(kind)) or list[Path] in (kind, *typing.get_args(kind)):
                found.add((command.__name__, name))
                assert about[0].callback is expanded, f"{command.__name__}: {name}"
            elif about and getattr(about[0], "callback", None) is expanded:
                found.add((command.__name__, name))
    runs = {(command, name) for command in ("evaluate", "attack") for name in ("model", "reference", "config", "output")}
    assert found > runs | {("report", "folder"), ("compare", "runs"), ("sweep", "recipe"), ("build_pairs", "output")}
    assert expanded(None) is None and expanded(Path("~/a")) == home / "a"
    assert expanded(["~/a", "$SETS"]) == [f"{home}/a", f"{home}/sets"]


def test_a_command_line_in_earnest(home, monkeypatch, capsys):
    """The shell would expand none of these: they stand in quotes."""
    (home / "sets" / "texts.jsonl").write_text('{"text": "The river is calm."}')
    monkeypatch.setattr("sys.argv", ["expunge", "score", "$SETS/texts.jsonl"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code and json.loads(capsys.readouterr().out)["text"] == "The river is calm."
