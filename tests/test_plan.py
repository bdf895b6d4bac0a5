from pathlib import Path

import pytest

from expunge.config import DataConfig, RunConfig, load_config
from expunge.errors import ExpungeError
from expunge.plan import ANCHOR, Plan, explained, resolve


def resolved(*overrides: str) -> RunConfig:
    return resolve(load_config(RunConfig, [], list(overrides)))


@pytest.mark.parametrize(
    ("overrides", "anchor"),
    [
        ([], ANCHOR),
        (["method.name=grad_diff", "method.retain=kl"], ANCHOR),
        (["method.name=npo", "method.retain=kl"], ANCHOR),
        (["method.name=npo", "method.retain=nll"], None),
        (["method.name=dpo"], None),
        (["training.anchor_text=null"], None),
        (["training.anchor_text=wikitext2-unk-train"], "wikitext2-unk-train"),
    ],
)
def test_neutral_text_is_under_the_kl_of_methods_that_have_one(overrides, anchor):
    assert resolved(*overrides).training.get("anchor_text") == anchor


def test_what_was_filled_in_stays_what_it_is():
    once = resolved()
    assert resolve(once) == once


@pytest.mark.parametrize(
    "name", ["data.corpus=builtin-neutral", "data.neutral=builtin-neutral", "data.corpora=[builtin-neutral]"]
)
def test_neutral_text_that_is_reported_is_refused(name):
    with pytest.raises(ExpungeError, match=r"^training.anchor_text=builtin-neutral: it is reported on too"):
        resolved("data.corpus=null", "data.neutral=null", name, "training.anchor_text=builtin-neutral")


def test_perplexity_is_measured_on_every_text_that_is_named(tmp_path):
    for name in ("river", "mill"):
        (tmp_path / f"{name}.txt").write_text(f"The {name} is old.", encoding="utf-8")
    data = DataConfig(
        corpus=str(tmp_path / "river.txt"), corpora=[str(tmp_path / "mill.txt")], prompts=[], heldout=None, neutral=None
    )
    plan = Plan.of_models(RunConfig(data=data), tmp_path, "builtin")
    assert list(plan.evaluation_data.corpora.values()) == ["The river is old.", "The mill is old."]


def test_the_plan_says_where_neutral_text_comes_from():
    told = explained(Plan.of(RunConfig(), Path("out")))[1]
    assert told["training.anchor_text"] == f"{ANCHOR} (ours: neutral text under the KL)"
    assert "training.anchor_text" not in explained(Plan.of(resolved("training.anchor_text=null"), Path("out")))[1]
