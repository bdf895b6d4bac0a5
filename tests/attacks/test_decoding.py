"""Attacks by decoding: their plans go through the evaluation, 0 forced tokens are the plain one, more samples hold fewer."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from expunge.attacks import AttackData, Budget, cases
from expunge.attacks.decoding import Prefill, Sampling
from expunge.errors import ExpungeError
from expunge.metrics.evaluation import EvaluationData, EvaluationPlan, evaluate_model
from expunge.metrics.figures import Key

PLAN = EvaluationPlan(
    samples=3, max_new_tokens=6, prompt_tokens=5, ks=(0,), perplexity_tokens=60, perplexity_modes=("exact",)
)


class Letters:
    """Counts as toxic what holds many vowels."""

    name = digest = "judge"

    def score(self, texts):
        return np.array([min(1.0, sum(text.count(x) for x in "aeiou") / max(1, len(text)) * 2) for text in texts])


@pytest.fixture
def data(pairs):
    prompts = ["The river runs past the old mill", "A cold wind", "She"]
    return EvaluationData({"challenge": prompts}, pairs[:4], corpora={"corpus": "The river runs past the old mill. " * 5})


@pytest.fixture
def attacked(tiny_model, tokenizer, data):
    """Evaluate an attack, with fields of the plan besides; None is no attack."""
    model = tiny_model()

    def evaluated(attack, **more):
        result = attack.run(model, None, AttackData(tokenizer), Budget()) if attack else None
        assert result is None or (result.model is model and result.steps == result.queries == 0)
        plan = replace(replace(PLAN, **more), **(result.plan if result else {}))
        return evaluate_model(model, tokenizer, data, plan, [Letters()])

    return evaluated


def figures(evaluation):
    return {figure.key: figure.columns.tolist() for figure in evaluation.figures}


def test_nothing_forced_is_the_plain_evaluation(attacked):
    found, plain = attacked(Prefill(k=0)), attacked(None)
    assert figures(found) == figures(plain) and found.samples == plain.samples
    assert found.samples and Prefill(k=0).run(None, None, AttackData(None), Budget()).idle == "k=0 forces nothing"


def test_forced_tokens_are_those_of_the_side_and_only_what_follows_is_judged(attacked, tokenizer, pairs):
    found, plain = attacked(Prefill(k=3)), attacked(None)
    for side in ("rejected", "chosen"):
        for decode, samples in (("greedy", 1), ("sampled", 3)):
            assert found[Key("toxicity", "heldout", decode, side, 3, scorer="judge", samples=samples)].n == 4
    rows = [one for one in found.samples if one["dataset"] == "heldout" and one["side"] == "rejected"]
    for row in rows:
        pair = pairs[row["prompt_id"]]
        forced = tokenizer.decode(tokenizer(pair.rejected)["input_ids"][:3])
        assert row["prompt"] == pair.prompt + forced and row["k"] == 3
    assert {row["prompt_id"] for row in rows} == {0, 1, 2, 3}
    assert not any(one["k"] == 0 for one in found.samples if one["dataset"] == "heldout")
    challenge = [one for one in found.samples if one["dataset"] == "challenge"]  # nothing is forced there
    assert challenge == [one for one in plain.samples if one["dataset"] == "challenge"]


def test_a_temperature_near_zero_is_greedy(attacked):
    found = attacked(Sampling(temperature=1e-4, samples=2, top_p=1.0)).samples
    greedy = {(s["dataset"], s["prompt_id"]): s["continuation"] for s in found if s["decode"] == "greedy"}
    sampled = [s for s in found if s["decode"] == "sampled"]
    assert len(sampled) == 2 * 7 and all(s["continuation"] == greedy[s["dataset"], s["prompt_id"]] for s in sampled)
    warm = attacked(Sampling(temperature=1.5, samples=2, top_p=1.0)).samples
    sampled = [s for s in warm if s["decode"] == "sampled"]
    assert any(s["continuation"] != greedy[s["dataset"], s["prompt_id"]] for s in sampled)


def test_the_worst_of_more_samples_is_no_better_as_they_hold_the_fewer(attacked):
    worst, kept = [], []
    for n in (2, 4, 8):
        found = attacked(Sampling(temperature=1.5, samples=n))
        key = Key("expected_max_toxicity", "challenge", "sampled", scorer="judge", samples=n)
        worst.append(found[key].columns[:, 0])
        sampled = [s for s in found.samples if s["decode"] == "sampled"]
        kept.append({(s["dataset"], s["prompt_id"], s["sample"]): s["continuation"] for s in sampled})
    assert all((more >= fewer).all() for fewer, more in pairwise(worst))
    assert worst[-1].mean() > worst[0].mean()
    assert kept[0].items() < kept[1].items() < kept[2].items()


def test_temperature_nucleus_and_seed_reach_the_evaluation(attacked):
    def drawn(**settings):
        found = attacked(Sampling(samples=4, **settings)).samples
        return [s["continuation"] for s in found if s["decode"] == "sampled"]

    one = drawn()
    assert one == drawn(seed=0) and one == [
        s["continuation"] for s in attacked(None, samples=4).samples if s["decode"] == "sampled"
    ]
    for other in ({"temperature": 1.5}, {"top_p": 0.3}, {"seed": 1}):
        assert drawn(**other) != one


def test_at_temperature_1_it_draws_what_the_evaluation_draws_whatever_its_seed(attacked):
    """Else a rise would be another draw."""
    found, plain = attacked(Sampling(samples=4), seed=3), attacked(None, samples=4, seed=3)
    assert found.samples == plain.samples != attacked(None, samples=4).samples


@pytest.mark.parametrize("budget", ["small", "paper", "large"])
def test_every_budget_sweeps_k_and_temperature(budget):
    ks = [one.run(None, None, AttackData(None), Budget()).plan["ks"] for one in cases("prefill", budget)]
    assert ks[:1] == [(0,)] and {(4,), (8,)} < set(ks) and len(set(ks)) == len(ks)
    plans = [one.run(None, None, AttackData(None), Budget()).plan for one in cases("sampling", budget)]
    assert len({plan["temperature"] for plan in plans}) == len(plans) >= 3
    assert {1.0, 1.5} < {plan["temperature"] for plan in plans} and all(plan["samples"] >= 10 for plan in plans)


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (Prefill, {"k": -1}, r"attack\.prefill\.k=-1: expected 0 or more"),
        (Prefill, {"k": 1.5}, r"attack\.prefill\.k=1\.5"),
        (Sampling, {"temperature": 0.0}, r"attack\.sampling\.temperature=0\.0: expected more than 0"),
        (Sampling, {"temperature": -1.0}, r"attack\.sampling\.temperature=-1\.0"),
        (Sampling, {"samples": 0}, r"attack\.sampling\.samples=0: expected 1 or more"),
        (Sampling, {"top_p": 0.0}, r"attack\.sampling\.top_p=0\.0"),
        (Sampling, {"top_p": 1.1}, r"attack\.sampling\.top_p=1\.1: expected more than 0 and at most 1"),
        (Sampling, {"seed": -1}, r"attack\.sampling\.seed=-1"),
    ],
)
def test_bad_values_are_one_line(cls, settings, message):
    with pytest.raises(ExpungeError, match=message) as caught:
        cls(**settings)
    assert "\n" not in str(caught.value)
