"""The pages: every command and program in them runs, every link leads somewhere, and what they tabulate is so.

A `sh` block goes through bash, so loops, quotes, pipes and variables are the shell's own. There `expunge` and what installs
things are functions that only note their arguments; what was noted is then done in this process, on a tiny model, with
smaller numbers (CUTS), in a folder with the files that the pages name (`furnish`). Blocks of a page share that folder.
"""

import ast
import contextlib
import dataclasses
import importlib.util
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import GPT2Config, GPT2LMHeadModel

import expunge
from expunge.cli import app, main
from expunge.config import RunConfig, load_config, parse_value
from expunge.errors import ExpungeError
from expunge.methods import METHODS
from expunge.rows import Row, write_rows
from expunge.scorers import SCORERS
from expunge.scorers.cache import ScoreCache, content_key
from expunge.scorers.perspective import ATTRIBUTES, LANGUAGE, URL
from expunge.training import UnlearnConfig

ROOT = Path(__file__).parents[1]
PACKAGE = Path(expunge.__file__).parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

KINDS = ("sh", "python", "json", "yaml", "toml", "text")  # text is only shown
HUB = ("gpt2", "meta-llama/Llama-3.2-1B", "my-model", "my-chat-model")  # names under which a tiny model lies in the folder
GIVEN = {"data.md": {"model", "tokenizer"}}  # what a page's programs take for granted
SMALLER = {"count=200": "count=2", 'load_model("builtin"': 'load_model("gpt2"'}  # in programs

TRAINING = ["training.max_steps=1", "training.per_device_train_batch_size=2", "data.limit=8"]
EVALUATION = [f"evaluation.{key}" for key in ("samples=1", "prompts=2", "heldout=2", "max_new_tokens=2", "forced=[2]")]
EVALUATION.append("evaluation.perplexity_tokens=500")
CUTS = {
    "run": ["--quiet", *TRAINING, *EVALUATION],
    "train": ["--quiet", *TRAINING],
    "doctor": ["data.limit=8"],
    "evaluate": ["--quiet", *EVALUATION],
    "attack": ["--quiet", *EVALUATION, "attack.relearn_forget.samples=4"],
    "generate": ["--max-new-tokens", "2"],
}

FENCED = re.compile(r"^```(.*)\n((?:.*\n)*?)^```$", re.MULTILINE)

NOTE = """
import json, os, stat, sys
fed, said = os.fstat(0), os.fstat(1)
note = {
    "words": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ), "from": fed.st_ino, "to": said.st_ino,
    "fed": "" if stat.S_ISCHR(fed.st_mode) else sys.stdin.read(),
    "file": os.readlink("/proc/self/fd/1") if stat.S_ISREG(said.st_mode) else None,
}
print(json.dumps(note), file=open(os.environ["NOTES"], "a"))
"""
NEEDS = {"--quantization": "bitsandbytes"}  # where it is not installed, options and keys are looked up, and that is all
UNNAMED = itertools.count()
NOTED = ("expunge", "accelerate", "make", "pip", "python", "git")


@dataclasses.dataclass
class Block:
    kind: str
    line: int
    text: str


def blocks(page: str) -> Iterator[Block]:
    for found in FENCED.finditer(page):
        yield Block(found[1], page[: found.start()].count("\n") + 1, found[2])


def prose(page: str) -> str:
    return FENCED.sub("", page)


# --- a folder where the pages' files lie


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer) -> Path:
    """A tiny model that has room for real text, tiny copies of data sets, and scores that Perspective would give."""
    folder = tmp_path_factory.mktemp("world")
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=1024, **ends)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    (folder / "tiny/chat_template.jinja").write_text(turns + "{% if add_generation_prompt %}<assistant>{% endif %}")
    sentence = "The river runs past the old mill and on to the sea . "
    asked = [{"question": f"Where is river {i}?", "answer": "By the mill."} for i in range(4)]
    texts = {
        "paradetox/paradetox.tsv": "toxic\tneutral1\tneutral2\tneutral3\n"
        + "".join(f"The river {i} is wild .\tThe river {i} is calm .\t\t\n" for i in range(8)),
        "tofu/forget10.json": lines(asked),
        "tofu/retain90.json": lines([{**row, "answer": "By the sea."} for row in asked]),
        "dpo_toxic_eval_prompts/challenge_prompts.jsonl": lines([{"prompt": "The river"}, {"prompt": "A house"}]),
        **{f"wikitext-103-valtest/wiki.{split}.tokens": sentence * 40 for split in ("test", "valid")},
        **{f"wikitext-2/wiki.{split}.tokens": sentence * 40 for split in ("test", "train")},
    }
    for name, text in texts.items():
        write(folder / "data" / name, text)
    cache = ScoreCache(folder / "perspective.jsonl")
    for record in TEXTS:
        cache.add(content_key(f"{URL} {LANGUAGE}", record["text"]), dict.fromkeys(ATTRIBUTES, 0.25))
    return folder


SIDES = [("river", "calm", "wild"), ("house", "warm", "empty"), ("tree", "green", "bare")]
PAIRS = [
    {"prompt": f"The {thing} {i}", "chosen": f" is {good} today.", "rejected": f" is {bad} and cold."}
    for i in range(4)
    for thing, good, bad in SIDES
]
TEXTS = [{"text": f"The {thing} is {good}."} for thing, good, _ in SIDES]
PROMPTS = [{"prompt": f"The {thing}", "gold": f" is {good}."} for thing, good, _ in SIDES]


def chat(pair: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {side: [{"role": role, "content": pair[side].strip()}] for side, role in roles.items()}


def lines(records: list[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def furnish(folder: Path, world: Path, page: str) -> None:
    """What the pages name: files of pairs, prompts and texts, models; results of two runs for docs/report.md."""
    for name in ("pairs", "validation", "heldout", "mine"):
        write(folder / f"{name}.jsonl", lines(PAIRS))
    for name, records in {"prompts": PROMPTS, "tuning": PROMPTS, "texts": TEXTS, "chats": [chat(p) for p in PAIRS]}.items():
        write(folder / f"{name}.jsonl", lines(records))
    labelled = [
        {"text": pair["prompt"] + pair[side], "label": n} for pair in PAIRS for n, side in enumerate(("chosen", "rejected"))
    ]
    write(folder / "labelled.jsonl", lines(labelled))
    write(folder / "good.jsonl", lines(TEXTS))
    write(folder / "bad.jsonl", lines([{"text": f"The {thing} is {bad}."} for thing, _, bad in SIDES]))
    measured = {"samples": 1, "prompts": 2, "max_new_tokens": 2, "perplexity_tokens": 500}
    sets = {"train": "pairs.jsonl", "heldout": None, "neutral": None, "prompts": "prompts.jsonl", "corpus": "wikitext2"}
    recipe = {
        "base": {"model": "gpt2", "data": sets, "evaluation": measured, "training.max_steps": 1},
        "grid": {"seed": [0]},
    }
    write(folder / "recipe.yaml", json.dumps(recipe))
    for name in HUB:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(world / "tiny")
    for name in ("repo", "dpo") if page == "report.md" else ():
        rows = [Row("evaluate", subject, "perplexity", 2.0, dataset="wikitext2") for subject in ("reference", "unlearned")]
        (folder / "runs" / name).mkdir(parents=True)
        write_rows(folder / "runs" / name / "results.jsonl", rows)


# --- doing what a page says


def call(words: list[str], fed: str = "") -> str:
    """`expunge WORDS` in this process; what it prints on standard output. It must succeed."""
    said, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["expunge", *words])
        patch.setattr(sys, "stdin", io.StringIO(fed))
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as stopped:
            main()
    assert not stopped.value.code, f"expunge {' '.join(words)}: exit status {stopped.value.code}: {errors.getvalue()}"
    return said.getvalue()


def small(words: list[str]) -> list[str]:
    """The same command on a tiny model with smaller numbers, into a folder of its own unless the page names one."""
    command = words[0] if words else ""
    more = list(CUTS.get(command, ()))
    if "pplm" in words:  # its probe is fitted on the states of thousands of texts
        more += ["--probe-data", "labelled.jsonl"]
    if command in ("run", "train", "doctor", "generate") and not {"--model", "-m"} & set(words):
        more += ["--model", "gpt2"]
    if command in ("run", "train", "evaluate") and not {"--out", "-o"} & set(words):
        more += ["--out", f"runs/unnamed-{next(UNNAMED)}"]
    return words + more


def done_otherwise(words: list[str]) -> list[str] | None:
    """Checks a command that is not run, as it would install, download or take hours; or the expunge command in it."""
    program, *rest = words
    if any(option in words and importlib.util.find_spec(package) is None for option, package in NEEDS.items()):
        assert unknown_words(f"`{' '.join(words)}`") == []
        return None
    if program == "expunge":
        return rest
    if program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert rest[0] == "launch", words
        parsed = launch_command_parser().parse_args(rest[1:])
        assert parsed.module and parsed.training_script == "expunge", words
        return parsed.training_script_args
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert rest and set(rest) <= set(targets), words
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
        asked = re.findall(r"\[([\w,]+)\]", " ".join(rest))
        assert rest[0] == "install" and {name for names in asked for name in names.split(",")} <= set(extras), words
        assert all((ROOT / word).exists() for word in rest if word.endswith(".txt")), words
    elif program == "python" and rest[:2] != ["-m", "venv"]:
        assert (ROOT / rest[0]).is_file(), words
    return None


def run_shell(text: str, folder: Path) -> None:
    notes = folder / ".notes"
    notes.unlink(missing_ok=True)
    functions = "".join(f'{name}() {{ "$PYTHON" -I -S -c "$NOTE" {name} "$@"; }}\n' for name in NOTED)
    before = {**os.environ, "PYTHON": sys.executable, "NOTE": NOTE, "NOTES": str(notes)}
    script = f"set -eu\n{functions}{text}"
    found = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=before, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    piped: dict[int, str] = {}
    for line in notes.read_text(encoding="utf-8").splitlines() if notes.exists() else ():
        note = json.loads(line)
        words = done_otherwise(note["words"])
        if words is None:
            continue
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(note["cwd"])
            for name, value in note["env"].items():
                if before.get(name) != value:
                    patch.setenv(name, value)
            said = call(small(words), piped.get(note["from"], note["fed"]))
        piped[note["to"]] = said
        if note["file"]:
            Path(note["file"]).write_text(said, encoding="utf-8")


def run_page(page: str, name: str, folder: Path, world: Path) -> dict[str, typing.Any]:
    """Do what `page` shows, in order, in `folder`; returns the names that its programs leave. Fails where that fails."""
    furnish(folder, world, name)
    module = types.ModuleType("a_page")
    if name in GIVEN:
        module.model, module.tokenizer = expunge.load_model(world / "tiny", dtype="float32")  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(sys.modules, "a_page", module)
        for registry in (METHODS, SCORERS):
            patch.setattr(registry, "_entries", dict(registry._entries))
        patch.setenv("EXPUNGE_DATA", str(world / "data"))
        patch.setenv("EXPUNGE_CACHE", str(world / "cache"))
        patch.setenv("EXPUNGE_PERSPECTIVE_CACHE", str(world / "perspective.jsonl"))
        for block in blocks(page):
            assert block.kind in KINDS, f"{name}:{block.line}: a block of kind {block.kind!r}"
            if block.kind == "sh":
                run_shell(block.text, folder)
            elif block.kind == "python":
                for large, less in SMALLER.items():
                    block.text = block.text.replace(large, less)
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(compile("\n" * block.line + block.text, name, "exec"), module.__dict__)
            elif block.kind == "json":
                assert all(json.loads(line) for line in block.text.splitlines())
            elif block.kind == "yaml":
                write(folder / "page.yaml", block.text)
                load_config(RunConfig, [folder / "page.yaml"], [])
            elif block.kind == "toml":
                tomllib.loads(block.text)
    return vars(module)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_what_a_page_shows_runs(path, tmp_path, world):
    text = path.read_text(encoding="utf-8")
    names = run_page(text, path.name, tmp_path, world)
    if path.name == "start.md":  # its table of what lies in OUT
        left = re.findall(r"^\| `([\w./*-]+)` \|", text, re.MULTILINE)
        assert len(left) > 8
        assert [name for name in left if not list((tmp_path / "runs/first").glob(name))] == []
    if path.name == "add-a-method.md":
        assert {"forget", "anchor", "share"} <= set(names["trainer"].state.log_history[0])


WRONG = {
    "option": ("sh", "expunge list --no-such-option methods", "no-such-option"),
    "command": ("sh", "expunge lst methods", "lst"),
    "key": ("sh", "expunge run --dry-run training.learning_rat=1", "did you mean 'learning_rate'"),
    "file": ("sh", "expunge score nowhere.jsonl", "nowhere.jsonl"),
    "in a loop": ("sh", "for what in methods thods; do expunge list $what; done", "nothing called 'thods'"),
    "through a pipe": ("sh", "echo 'no JSON' | expunge score -", "not valid JSON"),
    "program": ("sh", "no-such-program", "not found"),
    "make target": ("sh", "make tests", "make"),
    "extra": ("sh", "pip install '.[no_such_extra]'", "no_such_extra"),
    "launcher": ("sh", "accelerate launch -m expang list methods", "expang"),
    "Python": ("python", "from expunge import load_pears", "load_pears"),
    "YAML": ("yaml", "methd: {name: repo}", "did you mean 'method'"),
    "JSON": ("json", '{"prompt": }', "Expecting value"),
    "kind": ("", "expunge list methods", "a block of kind"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_page_that_is_wrong_fails(case, tmp_path, world):
    kind, text, expected = WRONG[case]
    with pytest.raises((AssertionError, ImportError, ValueError, ExpungeError), match=expected):
        run_page(f"```{kind}\n{text}\n```\n", "wrong.md", tmp_path, world)


def test_a_block_of_shell_is_the_shells(tmp_path, world):
    """A loop, a variable, a redirection and pipes do what they do in a terminal."""
    page = "```sh\nfor name in ngram wordvec; do\n  expunge score texts.jsonl --scorer $name > $name.jsonl  # kept\ndone\n"
    page += 'echo \'{"text": "calm"}\' | expunge score - | expunge score - > twice.jsonl\n```\n'
    run_page(page, "shell.md", tmp_path, world)
    scores = [(tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("ngram", "wordvec")]
    assert [len(found) for found in scores] == [3, 3] and scores[0] != scores[1]
    assert json.loads((tmp_path / "twice.jsonl").read_text())["text"] == "calm"


# --- what stands between the blocks


def exists(key: str) -> bool:
    """Is this a key of a configuration: `training.bf16`, `method.weight`, `data.limit`?"""
    section, _, name = key.partition(".")
    owners: dict[str, list[typing.Any]] = {
        "method": [METHODS.get(method) for method in METHODS.names()],
        "training": [UnlearnConfig],
    }
    classes = owners.get(section) or [typing.get_type_hints(RunConfig)[section]]
    return name in {"name", *(field.name for cls in classes for field in dataclasses.fields(cls))}


def unknown_words(text: str) -> list[str]:
    """What of commands, options and keys in the running text does not exist."""
    program: Any = typer.main.get_command(app)
    commands = program.commands
    everywhere = {"--help", *(option for parameter in program.params for option in parameter.opts)}
    sections = "|".join(name for name, hint in typing.get_type_hints(RunConfig).items() if dataclasses.is_dataclass(hint))
    unknown = []
    for span in re.findall(r"`([^`\n]+)`", prose(text)):
        words = span.split()
        command, *rest = [*words[words.index("expunge") + 1 :], ""] if "expunge" in words else [""]
        if command.isalpha():
            if command not in commands:
                unknown.append(span)
            else:
                known = {*everywhere, *(option for parameter in commands[command].params for option in parameter.opts)}
                unknown += [f"{span}: {word}" for word in rest if word.startswith("-") and word not in known]
        keys = [re.fullmatch(rf"((?:method|training|{sections})\.(?!jsonl|py)\w+)(?:=.*)?", word) for word in words]
        unknown += [key[1] for key in keys if key and not exists(key[1])]
    return unknown


def anchors(path: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(path: Path, text: str) -> list[str]:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        if target.startswith("https://"):
            continue
        if not there.exists() or (anchor and anchor not in anchors(there)):
            dead.append(target)
    return dead


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_commands_and_keys_in_the_text_exist(path):
    text = path.read_text(encoding="utf-8")
    assert dead_links(path, text) == []
    assert unknown_words(text) == []


def test_what_does_not_exist_is_found():
    text = "[a](docs/nowhere.md) [b](docs/data.md#no-such-heading) [c](docs/data.md#named-sets)\n```sh\n[d](e)\n```\n"
    assert dead_links(ROOT / "README.md", text) == ["docs/nowhere.md", "docs/data.md#no-such-heading"]
    text = "`expunge rum`, `expunge run --modle gpt2`, `training.bf17=true`, `data.limit`, `expunge run -m a method.weigt=1`"
    assert unknown_words(text) == ["expunge rum", "expunge run --modle gpt2: --modle", "training.bf17", "method.weigt"]


def test_the_readme_links_every_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[2:] if f"(docs/{page.name})" not in text] == []


# --- tables that must not drift


def section(page: str, heading: str) -> str:
    [found] = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return found


def table(text: str, columns: int) -> dict[str, list[str]]:
    """Rows of the tables of so many columns by their first cell, where that is code: the other cells."""
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in rows if len(row) == columns}


METHODS_PAGE = (ROOT / "docs/methods.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", METHODS.names())
def test_every_hyper_parameter_is_on_the_page_with_its_default_and_source(name):
    about, cls = section(METHODS_PAGE, f"`{name}`"), METHODS.get(name)
    rows = table(about, columns=4)
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    assert {key: parse_value(cells[0].strip("`")) for key, cells in rows.items()} == defaults
    assert all(re.match("(paper|ours)", cells[1]) for cells in rows.values())
    tuned = json.loads((PACKAGE / "assets/defaults.json").read_text(encoding="utf-8")).get(name, {})
    named = {f"{part}.{key}": value for part, values in tuned.items() for key, value in values.items()}
    shown = dict(re.findall(r"`((?:method|training)\.\w+)=(\S+)`", about))
    assert {key: parse_value(value) for key, value in shown.items()} == named
    source = Path(importlib.import_module(cls.__module__).__file__ or "").read_text(encoding="utf-8")
    assert [figure for figure in re.findall(r'step\.log\("(\w+)"', source) if f"`{figure}`" not in about] == []


def test_the_defaults_of_training_are_on_the_page():
    fields = {field.name: field for field in dataclasses.fields(UnlearnConfig)}
    for key, (default, *_) in table(section(METHODS_PAGE, "Training"), columns=3).items():
        assert parse_value(default.strip("`")) == fields[key].default, key


PAPERS_PAGE = (ROOT / "docs/papers.md").read_text(encoding="utf-8")
ROOMS = ("methods", "attacks", "analyses", "metrics", "losses")


def missing(reference: str) -> bool:
    """Is there no such `path` or `path::name`, below src/expunge or the root?"""
    path, _, name = reference.partition("::")
    file = next((base / path for base in (PACKAGE, ROOT) if (base / path).exists()), None)
    if file is None:
        return True
    tree = ast.parse(file.read_text(encoding="utf-8")) if name else ast.Module([], [])
    for part in filter(None, name.split(".")):
        inside = [node for node in getattr(tree, "body", []) if part in names_of(node)]
        if not inside:
            return True
        tree = inside[0]
    return False


def names_of(node: ast.AST) -> set[str]:
    targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
    return {getattr(node, "name", "")} | {target.id for target in targets if isinstance(target, ast.Name)}


def built(name: str) -> bool:
    return name in (*METHODS.names(), *SCORERS.names()) or any((PACKAGE / room / f"{name}.py").exists() for room in ROOMS)


def test_the_index_of_papers_names_what_there_is_and_what_there_is_not():
    rows = [line.strip("|").split("|") for line in PAPERS_PAGE.splitlines() if line.startswith("| ")]
    references = [code for *_, where in rows for code in re.findall(r"`([\w/.]+\.\w+(?:::[\w.]+)?)`", where)]
    pending = [name for *_, where in rows for name in re.findall(r"not yet: `(\w+)`", where)]
    assert len(references) > 40 and [each for each in references if missing(each)] == []
    assert len(pending) > 7 and [name for name in pending if built(name)] == []
    files = {f"{room}/{path.name}" for room in ("methods", "attacks") for path in (PACKAGE / room).glob("[!_]*.py")}
    assert files - {"methods/base.py", "attacks/base.py"} <= {each.partition("::")[0] for each in references}


def test_the_index_of_papers_can_fail():
    assert missing("methods/rmu_.py") and missing("methods/repo.py::RIPO") and missing("methods/repo.py::REPO.wait")
    assert not missing("methods/repo.py::REPO.weight") and not missing("recipes/tune.py")
    assert built("repo") and built("stats") and not built("no_such_thing")
