import pytest

from expunge.assembly import ANCHOR, explained, resolve
from expunge.config import RunConfig, load_config
from expunge.errors import ExpungeError
from expunge.models import load_outline


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


@pytest.mark.parametrize("key", ["data.corpus", "data.neutral"])
def test_neutral_text_that_is_reported_is_refused(key):
    with pytest.raises(ExpungeError, match=r"^training.anchor_text=builtin-neutral: it is reported on too"):
        resolved("data.corpus=null", "data.neutral=null", f"{key}=builtin-neutral", "training.anchor_text=builtin-neutral")


def test_the_plan_says_where_neutral_text_comes_from():
    outline, _ = load_outline("builtin")
    assert explained(RunConfig(), outline)[1]["training.anchor_text"] == f"{ANCHOR} (ours: neutral text under the KL)"
    assert "training.anchor_text" not in explained(resolved("training.anchor_text=null"), outline)[1]
