"""The model's card, read back by the hub's own library."""

import json
import re
from dataclasses import replace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData

from expunge.report import write_report
from expunge.report.card import MARK, public
from expunge.report.tables import headline_rows
from expunge.rows import Row


@pytest.fixture
def card_of(make_run, tmp_path):
    """`card_of(**make_run's)`: the card of a run with a model folder."""

    def make(config=None, adapter=False, **changes) -> ModelCard:
        folder = make_run(tmp_path, **changes)
        (folder / "model").mkdir(exist_ok=True)
        if adapter:
            (folder / "model" / "adapter_config.json").write_text("{}", encoding="utf-8")
        if config:
            (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        write_report(folder)
        return ModelCard.load(folder / "model" / "README.md")

    return make


def test_results_are_the_rows(card_of, run_rows, tmp_path):
    card = card_of()
    assert card.data.model_name == tmp_path.name
    wanted = [roles[role] for _, roles in headline_rows(run_rows()) for role in ("unlearned", "ratio")]
    assert len(wanted) == 6
    found = {(r.dataset_name, r.metric_type): r for r in card.data.eval_results}
    assert len(card.data.eval_results) == len(found) == 6
    for row in wanted:
        result = found[row.dataset, row.metric]
        assert (result.task_type, result.metric_value) == ("text-generation", row.value)
        for name in ("decode", "side", "k", "mode", "scorer", "n", "ci_low", "ci_high"):
            assert result.metric_args.get(name) == getattr(row, name)
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


@pytest.mark.parametrize(
    ("model", "base"),
    [
        ("openai-community/gpt2", "openai-community/gpt2"),
        ("gpt2", "gpt2"),
        ("builtin", None),
        ("builtin:facts", None),
        ("/srv/models/gpt2", None),
    ],
)
def test_the_base_is_named_where_a_hub_has_it(card_of, model, base):
    card = card_of(config={"model": model, "method": {"name": "dpo", "beta": 0.5}})
    assert card.data.base_model == base
    assert card.data.tags == ["unlearning", "expunge", "dpo"]
    assert card.data.library_name == "transformers"
    assert "/srv" not in str(card)
    assert "| method.beta | 0.5 |" in card.text


@pytest.mark.parametrize(("model", "local"), [("gpt2", False), ("builtin", True)])
def test_an_adapter_is_loaded_by_peft(card_of, model, local):
    card = card_of(config={"model": model, "method": {"name": "repo"}}, adapter=True)
    assert card.data.library_name == "peft"
    assert "from peft import AutoPeftModelForCausalLM" in card.text
    assert ("needs the original" in card.text) is local


def test_the_prose_has_the_table_and_the_limits(card_of):
    text = card_of().text
    assert (
        "| perplexity, wikitext2, exact | 64.00 [63.88, 64.12] | 80.00 [79.88, 80.12] | 1.250 [0.250, 0.750] | 4 |" in text
    )
    assert "Not measured under attack" in text
    assert "in the eyes of ngram." in text


def test_attacks_that_were_made_are_not_denied(card_of, run_rows):
    attack = Row("attack", "unlearned", "toxicity", 0.5, n=4, attack="relearn_forget", dataset="challenge", scorer="ngram")
    assert "Not measured under attack" not in card_of(rows=[*run_rows(), attack]).text


def test_hashes_and_versions_without_the_machine(make_run, tmp_path):
    folder = make_run(tmp_path)
    (folder / "model").mkdir()
    facts = {
        "environment": {"expunge": "0.1.0", "platform": "Linux-of-somebody"},
        "scorers": {"hf:/home/me/judge": "abc"},
        "stages": {"train": {"key": "k", "reference_sha256": "def"}},
    }
    (folder / "provenance.json").write_text(json.dumps(facts), encoding="utf-8")
    write_report(folder)
    text = (folder / "model" / "README.md").read_text(encoding="utf-8")
    assert "| stages.train.reference_sha256 | def |" in text
    assert "| scorers.hf:judge | abc |" in text
    assert "somebody" not in text and "/home" not in text


def test_paths_are_not_published_and_stay_apart(card_of, run_rows):
    rows = [replace(row, dataset=f"/home/{row.decode}/set.jsonl") for row in run_rows()]
    card = card_of(rows=rows)
    assert "/home" not in str(card)
    assert {result.dataset_name for result in card.data.eval_results} == {"set.jsonl", "set.jsonl (2)"}
    assert {result.dataset_type for result in card.data.eval_results} == {"set.jsonl", "set.jsonl-2-"}


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("org/name", "org/name"),
        ("/a/b.jsonl", "b.jsonl"),
        ("./b/", "b"),
        ("data/b.csv", "b.csv"),
        ("hf:org/judge@toxic", "hf:org/judge@toxic"),
        ("hf:/a/judge@toxic", "hf:judge@toxic"),
        ("csv:/a/export.dat", "csv:export.dat"),
        (r"C:\sets\b.jsonl", "b.jsonl"),
        ("x" * 5000, "x" * 5000),
    ],
)
def test_public_names(name, shown):
    assert public(name) == shown


def test_names_are_not_markup(card_of, run_rows):
    hostile = "x\n---\n<script>alert(1)</script> | [y](z): {a: 1}"
    rows = [replace(row, dataset=hostile) for row in run_rows()]
    config = {"model": hostile, "method": {"name": hostile, "key": "`|<b>"}}
    card = card_of(rows=rows, config=config)
    assert "<script>" not in re.sub(r"\\[<>]", "", card.text)
    assert card.data.tags[-1] == hostile
    assert all(len(line.replace(r"\|", "").split("|")) == 4 for line in card.text.splitlines() if "method.key" in line)


def test_a_card_of_somebody_else_stays(make_run, tmp_path):
    folder = make_run(tmp_path)
    (folder / "model").mkdir()
    path = folder / "model" / "README.md"
    path.write_text("---\nlicense: mit\n---\n# Mine\n", encoding="utf-8")
    before = path.read_bytes()
    write_report(folder)
    assert path.read_bytes() == before


def test_ours_and_the_empty_form_are_replaced(make_run, tmp_path):
    folder = make_run(tmp_path)
    (folder / "model").mkdir()
    path = folder / "model" / "README.md"
    form = ModelCard.from_template(ModelCardData(library_name="peft", tags=["lora"]))
    form.text += "\n### Framework versions\n\n- PEFT 0.21.2\n"
    path.write_text(str(form), encoding="utf-8")
    write_report(folder)
    first = path.read_bytes()
    assert MARK.encode() in first
    path.write_bytes(first.replace(b"64.00", b"1"))
    write_report(folder)
    assert path.read_bytes() == first
    path.write_text(str(form).replace("# Model Card for Model ID", "# Model Card for mine"), encoding="utf-8")
    write_report(folder)
    assert "for mine" in path.read_text(encoding="utf-8")


def test_a_run_without_a_model_has_no_card(make_run, tmp_path):
    write_report(make_run(tmp_path))
    assert not list(tmp_path.rglob("README.md"))


@pytest.mark.parametrize("kind", ["plain", "adapter", "steered"])
def test_the_snippet_runs(make_run, tiny_model, tokenizer, tmp_path, monkeypatch, capsys, kind):
    folder = make_run(tmp_path / "run")
    model = tiny_model()
    if kind == "adapter":
        from expunge.adapters import add_lora

        model.save_pretrained(tmp_path / "base")
        model = add_lora(type(model).from_pretrained(tmp_path / "base"), r=2)
    if kind == "steered":
        from expunge.steering import Shift, Steering

        Steering([Shift("transformer.h.2", torch.ones(32))]).attach(model)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_report(folder)
    text = (folder / "model" / "README.md").read_text(encoding="utf-8")
    assert MARK in text and ("This model is steered" in text) == (kind == "steered")
    (snippet,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.chdir(folder / "model")
    exec(snippet, {})
    assert capsys.readouterr().out.startswith("The weather today")
