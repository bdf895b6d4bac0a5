"""Recipes under `--budget paper`: the papers' data, models, settings and greedy protocol, and nothing that is built in.

The papers' models are not here: in their place, and under their names, lie folders with tiny weights and the papers' depths.
"""

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import GemmaConfig, GPT2Config, LlamaConfig, MistralConfig, Olmo3Config, Qwen2Config

from expunge.cli import main
from expunge.config import RunConfig
from expunge.plan import Plan, build_method, explained
from expunge.redteam import check_ahead
from expunge.sweep import Sweep

ROOT = Path(__file__).parents[1]
REPO = [f"repo/{name}" for name in ("methods", "table1", "figure3", "robustness")]
VARY = [f"objectives_vary/{name}" for name in ("knowledge", "toxicity")]
JUDGE = "hf:unitary/unbiased-toxic-roberta"


@pytest.fixture(autouse=True, scope="module")
def place(tmp_path_factory, tokenizer, bos_tokenizer) -> Iterator[Path]:
    """Where the recipes are run: your copy of Lee et al.'s pairs, named sets of a few rows, models of the papers' depths."""
    folder = tmp_path_factory.mktemp("papers")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("EXPUNGE_DATA", str(folder / "data"))
        patch.setenv("EXPUNGE_CACHE", str(folder / "cache"))
        things = ("river", "mill", "house", "hill", "letter")
        rows = [
            {"prompt_text": f"The {thing} {i}", "unpert_gen_text": f" is {i}", "pert_gen_text": f" was {i}"}
            for i in range(240)
            for thing in things
        ]
        lines("pairs.jsonl", rows)
        lines("data/dpo_toxic_eval_prompts/challenge_prompts.jsonl", [{"prompt": f"A cold wind {i}"} for i in range(4)])
        lines("data/dpo_toxic_eval_prompts/wiki_samples.jsonl", [{"prompt": "In rows", "gold": " the trees grew."}])
        toxic = [{"prompt": {"text": f"They {i}", "toxicity": 0.9}, "challenging": False} for i in range(600)]
        lines("data/realtoxicityprompts-data/prompts.jsonl", toxic)
        for split in ("test", "valid"):
            text(f"data/wikitext-103-valtest/wiki.{split}.tokens", f"The {split} of the old mill and the sea . " * 40)
        sizes = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        small = {**sizes, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
        for name, config in {
            "gpt2": GPT2Config(n_embd=16, n_head=2, n_layer=12, n_positions=1024, **sizes),
            "gpt2-medium": GPT2Config(n_embd=16, n_head=2, n_layer=24, n_positions=1024, **sizes),
            "google/gemma-2b": GemmaConfig(num_hidden_layers=18, head_dim=8, **small),
            "meta-llama/Llama-3.1-8B": LlamaConfig(num_hidden_layers=32, **small),
            "mistralai/Mistral-7B-v0.1": MistralConfig(num_hidden_layers=32, **small),
            "Qwen/Qwen2.5-7B": Qwen2Config(num_hidden_layers=28, **small),
            "allenai/Olmo-3-1025-7B": Olmo3Config(num_hidden_layers=32, **small),
        }.items():
            config.save_pretrained(name)
            (tokenizer if name.startswith("gpt2") else bos_tokenizer).save_pretrained(name)
        yield folder
    planned.cache_clear()


def lines(name: str, rows: list[dict[str, Any]]) -> None:
    text(name, "".join(json.dumps(row) + "\n" for row in rows))


def text(name: str, content: str) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(content, encoding="utf-8")


@cache
def planned(recipe: str) -> Sweep:
    return Sweep(ROOT / f"recipes/{recipe}.yaml", Path("out"), "paper")


def finals(recipe: str) -> dict[str, RunConfig]:
    """What each line of the table is a run of, at the first setting that it tries."""
    return {group.name: group.final("0", (group.settings or [{}])[0]).config for group in planned(recipe).groups}


def every(recipe: str) -> list[RunConfig]:
    return [*finals(recipe).values(), *(trial.config for group in planned(recipe).groups for trial in group.trials)]


@pytest.mark.parametrize("recipe", [*REPO, *VARY])
def test_nothing_is_built_in(recipe):
    def leaves(tree: Any) -> Iterator[str]:
        values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
        yield from (leaf for value in values for leaf in leaves(value))
        if isinstance(tree, str):
            yield tree

    for config in every(recipe):
        assert [leaf for leaf in leaves(asdict(config)) if leaf.startswith("builtin")] == []
    for wanted in planned(recipe).recipe.wanted.values():
        assert not (wanted.dataset or "").startswith("builtin")


@pytest.mark.parametrize("recipe", REPO)
def test_repos_data_and_its_greedy_protocol(recipe):
    for config in finals(recipe).values():
        data, plan, team = config.data, config.evaluation, config.redteam
        assert data.train == "pair-toxicity-train:pairs.jsonl" and data.heldout == "pair-toxicity-heldout:pairs.jsonl"
        assert (data.prompts, data.neutral, data.corpus, data.limit) == (["rtp-challenge"], "wiki-f1", "wikitext2", None)
        assert (plan.samples, plan.max_new_tokens, plan.prompt_tokens, plan.truncate) == (0, 20, 32, "lee2024")
        assert (plan.prompts, plan.heldout, plan.perplexity_tokens, plan.scorers[0]) == (None, None, None, JUDGE)
        assert config.training["adam_beta1"] == 0.9 and config.training["warmup_steps"] == 100
        if team:
            searched = ("pair-toxicity-validation:pairs.jsonl", "rtp-tuning", "wikitext2-valid")
            assert (team.budget, team.validation, team.search, team.neutral) == ("paper", *searched)
    for group in planned(recipe).groups:
        for trial in group.trials:
            plan = trial.config.evaluation
            assert (trial.config.data.prompts, trial.config.data.corpus) == (["rtp-tuning"], "wikitext2-valid")
            assert (plan.samples, plan.truncate, trial.config.redteam) == (0, "lee2024", None)
    tuned = planned(recipe).recipe.tune
    assert tuned is None or tuned.by.decode == "greedy"


@pytest.mark.parametrize("recipe", [*REPO, *VARY])
def test_every_column_of_toxicity_is_greedy_and_some_are_of_realtoxicityprompts(recipe):
    columns = planned(recipe).recipe.wanted.values()
    toxic = [wanted for wanted in columns if wanted.metric.startswith("toxicity")]
    assert {wanted.decode for wanted in toxic} <= {"greedy"} and "sampled" not in {wanted.decode for wanted in columns}
    assert recipe.endswith("knowledge") or "rtp-challenge" in {wanted.dataset for wanted in toxic}
    assert all(wanted.scorer is None for wanted in columns)  # the judge's


TABLES_5_AND_6 = {  # model: epochs, batch, weight decay, weights of each method
    "gpt2": (10, 128, 1e-3, {"repo": 0.2, "dpo": 0.5, "npo": (0.2, 0.5), "circuit_breakers": 100}),
    "gpt2-medium": (10, 64, 1e-2, {"repo": 0.2, "dpo": 0.5, "npo": (0.4, 0.5), "circuit_breakers": 100}),
    "google/gemma-2b": (5, 16, 1e-2, {"repo": 0.5, "dpo": 0.2, "npo": (0.8, 0.5), "circuit_breakers": 1000}),
}


WEIGHTS = {"repo": ("weight",), "dpo": ("beta",), "npo": ("alpha", "beta"), "circuit_breakers": ("gamma",)}


@pytest.mark.parametrize("recipe", ["repo/methods", "repo/table1", "repo/figure3"])
def test_each_model_has_the_papers_settings(recipe):
    found = set()
    for config in finals(recipe).values():
        epochs, batch, decay, weights = TABLES_5_AND_6[config.model]
        training = config.training
        assert (training["num_train_epochs"], training["per_device_train_batch_size"]) == (epochs, batch)
        assert training["weight_decay"] == decay and (config.lora is not None) == (config.model == "google/gemma-2b")
        method: Any = build_method(config.method)
        if method.name in weights:
            named = WEIGHTS[method.name]
            own = tuple(getattr(method, name) for name in named)
            assert (own if len(own) > 1 else own[0]) == weights[method.name], (config.model, method.name)
        if method.name == "repo":
            assert method.anchor_on == "all"
        if method.name == "rmu":
            assert (method.alpha, method.c) == (0.95, 500)
        found.add((config.model, method.name))
    five = ("repo", "npo", "dpo", "rmu", "circuit_breakers")
    wanted = {
        "repo/table1": {(model, name) for model in ("gpt2-medium", "google/gemma-2b") for name in five},
        "repo/figure3": {("gpt2", name) for name in ("repo", "dpo", "npo")},
        "repo/methods": {(model, name) for model in TABLES_5_AND_6 for name in five}
        | {("gpt2", name) for name in ("ce", "sure", "tvi")},
    }
    assert found == wanted[recipe]


RATES = {
    ("gpt2", "repo"): [3e-6, 1e-5, 3e-5, 1e-4],
    ("gpt2-medium", "repo"): [1.5e-6, 5e-6, 1.5e-5, 5e-5],
    ("google/gemma-2b", "repo"): [3e-5, 1e-4, 3e-4, 1e-3],
    ("gpt2-medium", "dpo"): [5e-7, 1.5e-6, 5e-6, 1.5e-5],
    ("google/gemma-2b", "dpo"): [1e-5, 3e-5, 1e-4, 3e-4],
}


@pytest.mark.parametrize("recipe", ["repo/methods", "repo/table1", "repo/figure3"])
def test_rates_are_tried_four_for_each_method_and_model(recipe):
    """The paper gives none."""
    for group in planned(recipe).groups:
        config = group.final("0", group.settings[0]).config
        tried = [trial.config.training.get("learning_rate") for trial in group.trials]
        assert len(tried) == 4
        assert tried == RATES.get((config.model, config.method["name"]), tried)


def test_table_1_has_the_attacks_of_the_paper_and_a_column_for_each_rate():
    columns = planned("repo/table1").recipe.wanted
    for name in ("pairs", "RealToxicityPrompts"):
        overs = [columns[f"{name}, relearn {side} at {rate}"] for side in ("forget", "retain") for rate in RELEARNED]
        assert [wanted.over for wanted in overs] == [f"learning_rate={rate}" for rate in RELEARNED] * 2
        assert columns[f"{name}, orthogonalize"].attack == "orthogonalize"
        assert columns[f"{name}, best of three forms"].attack == "orthogonalize_best"
        assert columns[f"{name}, enhanced GCG"].attack == "enhanced_gcg"
    for config in finals("repo/table1").values():
        assert config.attack and config.attack["relearn_retain"] == {"samples": 100}
        stronger = {"static": 10, "floor": None} if config.method["name"] in ("npo", "dpo") else {}
        assert config.attack.get("enhanced_gcg", {}) == stronger


RELEARNED = ("1e-05", "5e-05", "0.0001")


@pytest.mark.parametrize("recipe", VARY)
def test_paper_2_has_its_four_models_and_its_rate(recipe):
    configs = finals(recipe).values()
    assert {config.model for config in configs} == {
        *("meta-llama/Llama-3.1-8B", "mistralai/Mistral-7B-v0.1", "Qwen/Qwen2.5-7B", "allenai/Olmo-3-1025-7B")
    }
    for config in configs:
        assert (config.training["learning_rate"], config.training["num_train_epochs"]) == (5e-5, 2)
        assert config.data.retain == "wikitext2-unk-train" and "mmlu" in config.data.questions
    methods = {config.method["name"] for config in configs}
    if recipe.endswith("knowledge"):
        assert methods == {"rmu", "adaptive_rmu", "cosine_rmu"}
        assert {config.data.forget for config in configs} == {"wmdp-bio-forget", "wmdp-cyber-forget"}
    else:
        assert methods == {"rmu", "adaptive_rmu", "cosine_rmu", "probe_directions"}
        assert {(config.data.forget, *config.data.prompts) for config in configs} == {("paradetox-toxic", "rtp-challenge")}


@pytest.mark.parametrize("recipe", [*REPO, *VARY])
def test_methods_fit_the_papers_models(recipe):
    for config in finals(recipe).values():
        fields, _ = explained(Plan.of(config, Path("out")))
        assert fields["name"] == config.method["name"]


@pytest.mark.parametrize("recipe", ["repo/table1", "repo/figure3", "repo/robustness"])
def test_attacks_have_all_that_they_need_and_nothing_that_is_reported(recipe):
    seen = {}
    for config in finals(recipe).values():
        seen.setdefault(config.model, config)
    for config in seen.values():  # the papers' classifier is not here
        known = replace(config, evaluation=replace(config.evaluation, scorers=["ngram"]))
        check_ahead(Plan.of(known, Path("out")))


def test_a_dry_run_names_the_cells(capsys, monkeypatch):
    words = ["sweep", str(ROOT / "recipes/repo/table1.yaml"), "--budget", "paper", "--dry-run", "--json"]
    monkeypatch.setattr(sys, "argv", ["expunge", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    found = json.loads(capsys.readouterr().out)
    titles = [cell["title"] for cell in found["cells"]]
    assert titles[0] == "gpt2-medium repo, trial training.learning_rate=1.5e-06" and len(titles) == 50
    assert titles[-1] == "gemma-2b circuit_breakers, seed 0"


def test_readmes_table_is_that_of_the_committed_rows(monkeypatch):
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("acceptance", ROOT / "recipes/acceptance.py")
    assert spec and spec.loader
    acceptance = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(acceptance)
    table = acceptance.table()
    assert table in (ROOT / "README.md").read_text(encoding="utf-8") and table.count("\n") > 12
    assert set(acceptance.PAPERS) <= {line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()}
