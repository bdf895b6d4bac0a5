"""The evaluation of one model: what is measured, that a model equals itself, and that planted toxicity is seen."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from expunge.data import Pair, Prompt
from expunge.data.multiple_choice import Question
from expunge.errors import ExpungeError
from expunge.metrics import evaluation as evaluation_module
from expunge.metrics.evaluation import EvaluationData, EvaluationPlan, check_room, evaluate_model
from expunge.metrics.figures import Evaluation, Key, rows

PLAN = EvaluationPlan(samples=4, max_new_tokens=6, prompt_tokens=5, ks=(0, 2), perplexity_tokens=150)


class LetterScorer:
    """Counts as toxic what holds many of some letters."""

    def __init__(self, name: str, letters: str = "aeiou"):
        self.name, self.letters, self.digest = name, letters, letters

    def score(self, texts):
        return np.array([min(1.0, sum(t.count(x) for x in self.letters) / max(1, len(t)) * 2) for t in texts])


SCORERS = [LetterScorer("judge"), LetterScorer("other", "aeiouy")]


@pytest.fixture
def data(pairs):
    prompts = ["The river runs past the old mill", "A cold wind", "She"]
    neutral = [Prompt("The old house by the sea", "was kept in good order."), Prompt("Before the rain ", "they came.")]
    text = "The river runs past the old mill and on to the sea. " * 20
    return EvaluationData({"challenge": prompts}, pairs, neutral, {"corpus": text})


@pytest.fixture
def evaluation(tiny_model, tokenizer, data):
    return evaluate_model(tiny_model(), tokenizer, data, PLAN, SCORERS)


def value(evaluation, *key, **more):
    figure = evaluation[Key(*key, **more)]
    return float(figure.statistic())


def test_every_figure_is_there(evaluation, data):
    sampled = {"decode": "sampled", "samples": 4}
    for scorer in ("judge", "other"):
        mean = value(evaluation, "toxicity", "challenge", scorer=scorer, **sampled)
        assert value(evaluation, "expected_max_toxicity", "challenge", scorer=scorer, **sampled) >= mean > 0
        assert value(evaluation, "toxicity", "challenge", "greedy", scorer=scorer, samples=1) >= 0
        for side in ("rejected", "chosen"):
            for k in (0, 2):
                assert evaluation[Key("toxicity", "heldout", side=side, k=k, scorer=scorer, **sampled)].n == len(data.pairs)
    assert {f.key.mode for f in evaluation.figures if f.key.metric == "perplexity"} == {"exact", "lee2024"}
    assert {f.key.mode for f in evaluation.figures if f.key.metric == "f1"} == {"continuation", "share", "lee2024"}
    assert {f.key.side for f in evaluation.figures if f.key.metric == "continuation_perplexity"} == {
        "rejected",
        "chosen",
    }
    assert 0.3 < value(evaluation, "truncated_share", "challenge") < 0.4  # one of three
    found = {row.metric for row in rows(evaluation)}
    assert {"distinct_2", "loop_share", "empty_share", "word_perplexity", "scorer_spearman"} <= found


def test_figures_agree_with_the_samples(evaluation):
    scores = {}
    for sample in evaluation.samples:
        if (sample["dataset"], sample["decode"]) == ("challenge", "sampled"):
            scores.setdefault(sample["prompt_id"], []).append(sample["scores"]["judge"])
    wanted = np.mean([np.max(s) for s in scores.values()])
    found = value(evaluation, "expected_max_toxicity", "challenge", "sampled", scorer="judge", samples=4)
    assert found == pytest.approx(wanted, abs=1e-6)
    assert {len(s) for s in scores.values()} == {4}


def test_a_model_equals_itself_exactly(evaluation, tiny_model, tokenizer, data):
    again = evaluate_model(tiny_model(), tokenizer, data, PLAN, SCORERS)
    paired = [row for row in rows(again, reference=evaluation, run="x", seed=3) if row.paired]
    assert {row.metric for row in paired} >= {"toxicity", "toxicity_ratio", "perplexity_ratio", "f1_ratio"}
    for row in paired:
        expected = 1.0 if row.metric.endswith("_ratio") else 0.0
        assert (row.value, row.run, row.seed) == (expected, "x", 3)
        ends = {row.ci_low, row.ci_high} - {None}  # None: a resample in which the reference's share is 0
        assert ends <= {expected}
    assert all(row.ci_low == row.ci_high == 1.0 for row in paired if row.metric == "perplexity_ratio")
    assert any(row.ci_low == row.ci_high == 1.0 for row in paired if row.metric == "toxicity_ratio")


class Watched(LetterScorer):
    """Counts its calls, and is interrupted at one of them."""

    calls, last = 0, 0

    def score(self, texts):
        self.calls += 1
        if self.calls == self.last:
            raise KeyboardInterrupt
        return super().score(texts)


def test_an_interrupted_evaluation_goes_on_where_it_was(tmp_path, evaluation, tiny_model, tokenizer, data):
    judge = Watched("judge")
    judge.last = 4
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(tiny_model(), tokenizer, data, PLAN, [judge, SCORERS[1]], parts=tmp_path)
    judge = Watched("judge")
    again = evaluate_model(tiny_model(), tokenizer, data, PLAN, [judge, SCORERS[1]], parts=tmp_path)
    questions = {(s["dataset"], s["decode"], s["side"], s["k"]) for s in evaluation.samples}
    assert judge.calls == len(questions) - 3
    assert again.samples == evaluation.samples
    assert [row.value for row in rows(again)] == [row.value for row in rows(evaluation)]


def test_planted_toxicity_is_seen(tiny_model, tokenizer, data, evaluation):
    """Positive control: a model that prefers the token of 'a' is more toxic to a scorer that counts it."""
    planted = tiny_model()
    token = tokenizer("a", add_special_tokens=False).input_ids[0]
    planted.lm_head.bias = torch.nn.Parameter(
        torch.zeros(planted.config.vocab_size).index_fill_(0, torch.tensor([token]), 50)
    )
    found = evaluate_model(planted, tokenizer, data, PLAN, SCORERS)
    [ratio] = [
        row
        for row in rows(found, reference=evaluation)
        if (row.metric, row.dataset, row.decode, row.scorer) == ("toxicity_ratio", "challenge", "sampled", "judge")
    ]
    assert ratio.ci_low is not None and ratio.ci_low > 1
    key = {"dataset": "challenge", "decode": "sampled", "samples": 4}
    assert value(found, "toxicity", scorer="judge", **key) == 1.0
    assert value(found, "loop_share", **key) == 1.0 > value(evaluation, "loop_share", **key)
    assert value(found, "distinct_2", **key) < value(evaluation, "distinct_2", **key)


def test_saved_and_loaded_it_is_the_same(evaluation, tmp_path):
    for _ in range(2):  # over an older one too
        evaluation.save(tmp_path / "kept")
    loaded = Evaluation.load(tmp_path / "kept")
    assert rows(loaded) == rows(evaluation)
    assert loaded.samples == evaluation.samples
    assert {path.suffix for path in (tmp_path / "kept").iterdir()} == {".jsonl", ".safetensors"}
    assert not list(tmp_path.glob("*.tmp"))


def test_truncation_keeps_the_last_tokens_or_the_first(tiny_model, tokenizer):
    """The kept part decides the continuation: prompts that share it are continued alike."""
    long, last, first = "A cold wind came over the hill", " the hill", "A cold"
    plan = {"samples": 0, "max_new_tokens": 4, "ks": ()}
    n = len(tokenizer(last).input_ids)
    for truncate, other in (("last", last), ("lee2024", first)):
        n = len(tokenizer(other).input_ids)
        found = evaluate_model(
            tiny_model(), tokenizer, EvaluationData({"c": [long, other]}),
            EvaluationPlan(prompt_tokens=n, truncate=truncate, **plan), SCORERS,
        )  # fmt: skip
        a, b = (sample["continuation"] for sample in found.samples)
        assert a == b


def test_what_was_cut_and_what_is_empty_is_counted(tiny_model, tokenizer, evaluation):
    """The control: a model that writes its end token at once."""
    mute = tiny_model()
    end = torch.zeros(mute.config.vocab_size).index_fill_(0, torch.tensor([tokenizer.eos_token_id]), 50)
    mute.lm_head.bias = torch.nn.Parameter(end)
    prompts = {"c": ["A cold wind came over the hill", "A"], "d": ["A"]}
    plan = EvaluationPlan(prompt_tokens=3, samples=4, max_new_tokens=4)
    found = evaluate_model(mute, tokenizer, EvaluationData(prompts), plan, SCORERS).counts()
    assert found["prompts"] == {"c": 2, "d": 1} and found["prompts_cut"] == {"c": 1, "d": 0}
    assert found["empty_continuations"] == {"c greedy": 2, "c sampled": 8, "d greedy": 1, "d sampled": 4}
    assert found["ended_continuations"] == found["empty_continuations"]
    written = [sample for sample in evaluation.samples if not sample["continuation"].strip()]
    assert sum(evaluation.counts()["empty_continuations"].values()) == len(written)


def test_how_many_answers_ended_is_counted(tiny_model, tokenizer, evaluation):
    """The control: a model that ends at once, with an end token that its `generation_config` alone names."""
    mute = tiny_model()
    other = 77
    mute.generation_config.eos_token_id = [other, tokenizer.eos_token_id]
    end = torch.zeros(mute.config.vocab_size).index_fill_(0, torch.tensor([other]), 50)
    mute.lm_head.bias = torch.nn.Parameter(end)
    found = evaluate_model(mute, tokenizer, EvaluationData({"c": ["A cold wind", "A"]}), PLAN, SCORERS)
    for decode, samples in (("greedy", 1), ("sampled", 4)):
        assert value(found, "ended_share", "c", decode, samples=samples) == 1.0
        assert value(found, "empty_share", "c", decode, samples=samples) == 1.0
    assert all(sample["continuation"] == "" for sample in found.samples)
    short = [s["continuation"] for s in evaluation.samples if s["dataset"] == "challenge" and s["decode"] == "greedy"]
    ended = np.mean([len(tokenizer(text).input_ids) < PLAN.max_new_tokens for text in short])
    assert value(evaluation, "ended_share", "challenge", "greedy", samples=1) == pytest.approx(ended)


@pytest.mark.parametrize("kind", ["byte-level", "prepend"])
def test_forced_tokens_are_those_of_the_joined_text(tiny_model, family, kind):
    """SentencePiece would begin a side that is encoded apart with a space too many; the prompts are read as text."""
    tokenizer = family(kind, "bos and eos")
    model, data = tiny_model("llama"), EvaluationData(pairs=[Pair("The river", " is mild and slow", " is the sea at last")])
    model.resize_token_embeddings(420)
    asked, real = [], evaluation_module.generate

    def watched(model, tokenizer, prompts, *args, **kwargs):
        asked.extend(prompts)
        return real(model, tokenizer, prompts, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation_module, "generate", watched)
        found = evaluate_model(model, tokenizer, data, replace(PLAN, prompt_tokens=32, samples=0), SCORERS)
    whole = tokenizer("The river is", add_special_tokens=False)["input_ids"]
    start = [tokenizer.bos_token_id]
    n = len(tokenizer("The river", add_special_tokens=False)["input_ids"])
    assert asked == [start + whole[:n], start + whole[: n + 2], start + whole[: n + 2]]
    assert {sample["prompt"] for sample in found.samples if sample["k"] == 2} == {tokenizer.decode(whole[: n + 2])}


def test_text_with_ids_beyond_the_embedding_is_refused_before_any_work(tiny_model, tokenizer, pairs):
    """Only text that has them: a tokenizer may know more tokens than the model."""
    wide = copy.deepcopy(tokenizer)
    wide.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    marked = "<|turn|>The river runs"
    evaluate_model(tiny_model(), wide, EvaluationData({"c": ["The river"]}), replace(PLAN, samples=0), SCORERS)
    question = Question("The river", (" runs", "<|turn|>"), 0)
    for data in (
        EvaluationData({"c": [marked]}),
        EvaluationData(pairs=[Pair(marked, " past", " home")]),
        EvaluationData(neutral=[Prompt(marked, "home")]),
        EvaluationData(corpora={"c": "The river runs. " * 30 + marked}),
        EvaluationData(questions={"q": [question]}),
    ):
        with pytest.raises(ExpungeError, match=r"the token '<\|turn\|>', id 320, and the model's embedding has 320 rows"):
            check_room(data, PLAN, wide, 64, 320)
        with pytest.raises(ExpungeError, match="id 320"):
            evaluate_model(tiny_model(), wide, data, PLAN, SCORERS)


def test_forced_tokens_are_given_and_not_scored(tiny_model, tokenizer, data):
    found = evaluate_model(tiny_model(), tokenizer, EvaluationData(pairs=data.pairs), PLAN, SCORERS)
    forced = [s for s in found.samples if s["k"] == 2 and s["side"] == "rejected" and s["decode"] == "greedy"]
    assert len(forced) == len(data.pairs)
    for sample in forced:
        pair = data.pairs[sample["prompt_id"]]
        head = tokenizer.decode(tokenizer(pair.rejected).input_ids[:2])
        assert sample["prompt"] == pair.prompt + head
        assert sample["scores"]["judge"] == pytest.approx(SCORERS[0].score([sample["continuation"]])[0], abs=1e-6)


def test_the_room_that_is_left_is_just_enough(tiny_model, tokenizer):
    data = EvaluationData(challenge={"c": ["The river and the mill", "The sea"]})
    left = check_room(data, PLAN, tokenizer, 64)
    check_room(data, replace(PLAN, prefix=(0,) * left), tokenizer, 64)
    with pytest.raises(ExpungeError, match="exceed the model's context of 64"):
        check_room(data, replace(PLAN, prefix=(0,) * (left + 1)), tokenizer, 64)


def test_errors_are_one_line(tiny_model, tokenizer, evaluation, pairs):
    long = type(pairs[0])(pairs[0].prompt, " river" * 80, " hill")
    with pytest.raises(ExpungeError, match="held-out pair 0: prompt and chosen side have"):
        evaluate_model(tiny_model(), tokenizer, EvaluationData(pairs=[long]), PLAN, SCORERS)
    with pytest.raises(ExpungeError, match="the reference was not measured on the same units"):
        rows(evaluation, reference=Evaluation())
    with pytest.raises(ExpungeError, match="truncate 'middle'"):
        EvaluationPlan(truncate="middle")  # type: ignore[arg-type]
