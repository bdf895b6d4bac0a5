from pathlib import Path

import pytest

from expunge.config import BUDGETS, RunConfig, load_config, merge, parse_value
from expunge.errors import ExpungeError


def config_of(*overrides: str, files: list[Path] | None = None, base: dict | None = None) -> RunConfig:
    return load_config(RunConfig, files or [], list(overrides), base)


def written(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_need_nothing():
    assert config_of() == RunConfig()


def test_dotted_overrides_reach_every_level():
    config = config_of("seed=3", "data.limit=10", "method.weight=0.3", "training.learning_rate=1e-4", "lora.r=8")
    assert config.seed == 3
    assert config.data.limit == 10
    assert config.method == {"weight": 0.3}
    assert config.training == {"learning_rate": 1e-4}
    assert config.lora == {"r": 8}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2.5e-3", -2.5e-3),
        ("3", 3),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        ("[1e-4, 2]", [1e-4, 2]),
        ("{a: 1e-4}", {"a": 1e-4}),
        ("repo", "repo"),
        ("eager", "eager"),
        ("1e-4x", "1e-4x"),
        ("[open", "[open"),
        ("", None),
    ],
)
def test_values_are_yaml_and_exponents_are_numbers(text, value):
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_rank_is_base_then_files_then_overrides(tmp_path):
    low = written(tmp_path, "seed: 1\ndata: {limit: 5, train: mine}\n", "low.yaml")
    high = written(tmp_path, "data:\n  limit: 6\ntraining:\n  learning_rate: 3e-4\n", "high.yaml")
    base = {"data": {"limit": 4, "corpus": None}, "evaluation": {"samples": 5}}
    config = config_of("data.train=theirs", files=[low, high], base=base)
    assert (config.data.limit, config.data.train, config.data.corpus) == (6, "theirs", None)
    assert config.evaluation.samples == 5
    assert config.training == {"learning_rate": 3e-4}
    assert config.seed == 1
    assert base["data"]["limit"] == 4  # not touched


def test_merging_replaces_leaves_and_null_takes_a_section_away():
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}
    assert merge({"a": {"b": 1}}, {"a": None}) == {"a": None}
    assert config_of("lora=null", base={"lora": {"rank": 4}}).lora is None


def test_an_empty_file_changes_nothing(tmp_path):
    assert config_of(files=[written(tmp_path, "# nothing\n")]) == RunConfig()


def test_one_value_is_a_list_of_one_and_whole_numbers_widen():
    config = config_of("data.prompts=rtp-challenge", "evaluation.forced=0", "evaluation.samples=5.0")
    assert config.data.prompts == ["rtp-challenge"]
    assert config.evaluation.forced == [0]
    assert config.evaluation.samples == 5
    assert type(config.evaluation.samples) is int


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sede=3", r"unknown key 'sede' \(did you mean 'seed'\?\)"),
        ("evaluation.sample=3", r"unknown key 'evaluation.sample' \(did you mean 'samples'\?\)"),
        ("monitor.sample=3", r"unknown key 'monitor.sample' \(did you mean 'samples'\?\)"),
        ("quantization=3bit", r"quantization='3bit': expected 4bit or 8bit or null"),
        ("device_map=3", r"device_map=3: expected text or a section of keys or null"),
        ("seed=abc", r"seed='abc': expected a whole number"),
        ("seed=1.5", r"seed=1.5: expected a whole number"),
        ("seed=true", r"seed=True: expected a whole number"),
        ("seed=null", r"seed=None: expected a whole number"),
        ("model=7", r"model=7: expected text"),
        ("trust_remote_code=1", r"trust_remote_code=1: expected true or false"),
        ("data.limit=many", r"data.limit='many': expected a whole number or null"),
        ("evaluation.forced=[0, x]", r"evaluation.forced='x': expected a whole number"),
        ("lora=16", r"lora=16: expected a section of keys or null"),
        ("data=mine", r"data='mine': expected keys such as data.train"),
        ("method=repo", r"method='repo': expected a section of keys"),
        ("seed", r"'seed': an override is key=value"),
        ("=3", r"'=3': an override is key=value"),
    ],
)
def test_a_bad_override_is_one_clear_line(override, message):
    with pytest.raises(ExpungeError, match=f"^{message}") as caught:
        config_of(override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\ndata: [unclosed\nmodel: x\n", r"run.yaml:3: not valid YAML"),
        ("- a\n- b\n", r"run.yaml: expected a mapping of keys, found list"),
        ("1: a\n", r"unknown key '1'"),
        ("data:\n", r"data=None: expected keys such as data.train"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path, text, message):
    with pytest.raises(ExpungeError, match=message) as caught:
        config_of(files=[written(tmp_path, text)])
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_one_clear_line(tmp_path):
    with pytest.raises(ExpungeError, match=r"none.yaml: no such file"):
        config_of(files=[tmp_path / "none.yaml"])
    with pytest.raises(ExpungeError, match=r"cannot be read \(Is a directory\)"):
        config_of(files=[tmp_path])
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9\n")
    with pytest.raises(ExpungeError, match=r"latin.yaml:1: not UTF-8 text"):
        config_of(files=[tmp_path / "latin.yaml"])


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_budget_is_a_valid_configuration(budget):
    assert config_of(base=BUDGETS[budget]).model == "builtin"
