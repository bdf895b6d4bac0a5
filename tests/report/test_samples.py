import math
from pathlib import Path

import pytest

from expunge.errors import ExpungeError
from expunge.report.samples import SPREAD, WORST, choose

SOURCE = Path("samples.jsonl")


def shown(records):
    found = choose(records, SOURCE)
    return {s.prompt.body: s for s in found.spread + found.worst}


def test_both_models_meet_on_the_same_prompt_and_sample(one_sample):
    records = [one_sample("reference", 1, 0.1), one_sample("reference", 0, 0.1), one_sample("unlearned", 0, 0.1)]
    records.append(one_sample("unlearned", 1, 0.1))
    for number in (0, 1):
        bodies = {who: text.body for who, text in shown(records)[f"prompt {number}"].continuations.items()}
        assert bodies == {"reference": f"reference {number}", "unlearned": f"unlearned {number}"}


@pytest.mark.parametrize(
    ("scores", "veiled"),
    [
        ({"ngram": 0.49, "wordvec": 0.49}, False),
        ({"ngram": 0.49, "wordvec": 0.5}, True),
        ({"ngram": 0.5, "wordvec": 0.1}, True),
        ({}, True),
        ({"ngram": math.nan}, True),
        ({"ngram": None}, True),
    ],
)
def test_text_is_veiled_unless_every_scorer_finds_it_harmless(one_sample, scores, veiled):
    found = shown([one_sample("unlearned", 0, 0.0, scores=scores)])["prompt 0"]
    assert found.continuations["unlearned"].veiled is veiled


def test_a_prompt_is_veiled_for_any_of_its_continuations_and_no_other(one_sample):
    records = [one_sample("unlearned", number, 0.1) for number in (0, 1)]
    records.append(one_sample("reference", 1, 0.9, sample=7))
    found = choose(records, SOURCE).spread
    assert {s.prompt.body: s.prompt.veiled for s in found} == {"prompt 0": False, "prompt 1": True}
    assert not found[1].continuations["unlearned"].veiled


@pytest.mark.parametrize(("side", "k", "veiled"), [("rejected", 8, True), ("rejected", 0, False), ("chosen", 8, False)])
def test_a_prompt_that_ends_in_rejected_tokens_is_veiled(one_sample, side, k, veiled):
    (found,) = choose([one_sample("unlearned", 0, 0.1, side=side, k=k)], SOURCE).spread
    assert found.prompt.veiled is veiled
    assert (f"{side} side, k = {k}" in found.origin) is (k > 0)


def test_the_worst_of_the_rest_are_shown_in_order(one_sample):
    records = [one_sample("unlearned", number, number / 1000) for number in range(160)]
    found = choose(records, SOURCE)
    assert found.total == 160
    assert [s.prompt.body for s in found.spread] == [f"prompt {i}" for i in range(0, 160, 160 // SPREAD)]
    worst = [f"prompt {i}" for i in range(159, 0, -1) if i % (160 // SPREAD)][:WORST]
    assert [s.prompt.body for s in found.worst] == worst


def test_a_missing_field_is_named(one_sample):
    record = one_sample("reference", 0, 0.1)
    del record["scores"]
    with pytest.raises(ExpungeError, match=r"samples\.jsonl: record 1 has no field 'scores'"):
        choose([record], SOURCE)


def test_no_samples_at_all():
    assert choose([], SOURCE).total == 0
