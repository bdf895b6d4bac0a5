"""The scorer of multiple choice: against a plain form, on models whose answers are known, and whatever the batches."""

import itertools

import numpy as np
import pytest
import torch

from expunge.adapters import add_lora
from expunge.data.multiple_choice import Question
from expunge.errors import ExpungeError
from expunge.metrics import multiple_choice
from expunge.metrics.evaluation import EvaluationData, EvaluationPlan, evaluate_model
from expunge.metrics.figures import Evaluation, Key, rows
from expunge.metrics.multiple_choice import chance, choice_logps, is_right
from expunge.models import check_model

LETTERS = (" A", " B", " C", " D")
QUESTIONS = [
    Question("The river runs past the old mill.\nAnswer:", LETTERS, 2),
    Question("She carried the kind letter home", (" and read it by the window.", " in the rain", " é"), 0),
    Question("A cold wind ", ("came over the hill", "sat down, and was kind to the apple trees"), 1),
    Question("Before", LETTERS, 0),
    Question("Two\nlong rows\n", ("of wind", "of apple trees"), 1),
]


def plain(model, tokenizer, question: Question) -> list[float]:
    """log p of each choice in double precision, one at a time, straight from the definition."""
    model = model.double()
    found = []
    for choice in question.choices:
        prompt = tokenizer(question.prompt.rstrip())["input_ids"]
        ids = [*prompt, *tokenizer(question.prompt + choice)["input_ids"][len(prompt) :]]
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append(sum(logits[t - 1, ids[t]].item() for t in range(len(prompt), len(ids))))
    model.float()
    return found


@pytest.mark.parametrize("bos", [False, True], ids=["gpt2", "llama with bos"])
def test_it_is_the_definition(tiny_model, tokenizer, bos_tokenizer, bos):
    model, tokenizer = tiny_model("llama" if bos else "gpt2"), bos_tokenizer if bos else tokenizer
    logps, cut = choice_logps(model, tokenizer, QUESTIONS)
    for values, question in zip(logps, QUESTIONS, strict=True):
        assert values == pytest.approx(plain(model, tokenizer, question), abs=1e-4)
    assert not cut.any()


def test_an_eos_that_the_tokenizer_appends_stands_nowhere(tiny_model, family):
    """Only what it puts before a text is there: the same figures as without it."""
    model = tiny_model()
    model.resize_token_embeddings(420)
    (plain, _), (appending, _) = (
        choice_logps(model, family("byte-level", around), QUESTIONS) for around in ("plain", "eos")
    )
    assert family("byte-level", "eos")("a")["input_ids"][-1] == 0
    assert all(np.array_equal(a, b) for a, b in zip(plain, appending, strict=True))


def test_an_id_that_the_model_does_not_know_is_one_line(tiny_model, family):
    tokenizer = family("byte-level")
    with pytest.raises(ExpungeError, match=r"the token '.*', id \d+, and the model's embedding has 320 rows"):
        choice_logps(tiny_model(), tokenizer, [Question("The apple trees behind", (" the window", " é"), 0)])


def test_batches_padding_chunks_and_order_change_nothing(tiny_model, tokenizer, monkeypatch):
    model = tiny_model()
    logps, _ = choice_logps(model, tokenizer, QUESTIONS)
    monkeypatch.setattr(multiple_choice, "BATCH_TOKENS", 1)  # a row at a time
    monkeypatch.setattr(multiple_choice, "LOGITS_AT_ONCE", 3 * 320)
    monkeypatch.setattr(multiple_choice, "QUESTIONS_AT_ONCE", 2)
    alone, _ = choice_logps(model, tokenizer, QUESTIONS[::-1])
    for values, others in zip(logps, alone[::-1], strict=True):
        assert values == pytest.approx(others, abs=1e-5)


def test_letters_share_one_forward(tiny_model, tokenizer):
    model, seen = tiny_model(), []
    check_model(model)
    model.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    choice_logps(model, tokenizer, [QUESTIONS[0]] * 3)
    assert [shape[0] for shape in seen] == [3]


def test_what_exceeds_the_context_is_cut_from_the_left_and_counted(tiny_model, tokenizer):
    model = tiny_model()  # 64 positions
    long = Question("The river runs. " * 40 + QUESTIONS[1].prompt, QUESTIONS[1].choices, 0)
    logps, cut = choice_logps(model, tokenizer, [long, QUESTIONS[0]])
    assert cut.tolist() == [True, False]
    for choice, value in zip(long.choices, logps[0], strict=True):
        prompt = tokenizer(long.prompt)["input_ids"]
        tokens = tokenizer(long.prompt + choice)["input_ids"][len(prompt) :]
        ids = (prompt + tokens)[-65:]
        logits = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
        wanted = sum(logits[len(ids) - len(tokens) - 1 + i, token].item() for i, token in enumerate(tokens))
        assert value == pytest.approx(wanted, abs=1e-4)


def test_a_choice_that_cannot_be_scored_is_an_error(tiny_model, tokenizer):
    with pytest.raises(ExpungeError, match=r"question 2: its choice 1 has \d+ tokens, more than the context of 64"):
        choice_logps(tiny_model(), tokenizer, [QUESTIONS[0], Question("The", (" river", " river" * 100), 0)])


@pytest.mark.parametrize("letter", range(4))
def test_a_model_that_knows_is_right_and_one_that_does_not_at_chance(tiny_model, tokenizer, letter):
    """Positive control: the answer is the letter that the model prefers; shuffled answers are met one time in four."""
    token = tokenizer("Answer:" + LETTERS[letter])["input_ids"][-1]
    assert len({tokenizer("Answer:" + other)["input_ids"][-1] for other in LETTERS}) == 4
    model = tiny_model()
    model.lm_head.bias = torch.nn.Parameter(50.0 * torch.nn.functional.one_hot(torch.tensor(token), 320).float())
    known = [Question(f"Number {i}\nAnswer:", LETTERS, letter) for i in range(8)]
    shuffled = [Question(f"Number {i}\nAnswer:", LETTERS, answer) for i in range(2) for answer in range(4)]
    found = evaluate_model(model, tokenizer, EvaluationData(questions={"known": known, "all": shuffled}), PLAN, [])
    assert float(found[Key("accuracy", "known", mode="acc")].statistic()) == 1.0
    assert float(found[Key("accuracy", "all", mode="acc")].statistic()) == 0.25


PLAN = EvaluationPlan(greedy=False, samples=0)


def test_acc_norm_divides_by_the_characters():
    questions = [Question("?", (" a", " abcdefghi"), 1), Question("?", (" a", " abcdefghi"), 0)]
    logps = [np.array([-2.0, -5.0])] * 2  # -1 and -0.5 a character
    assert is_right(questions, logps, "acc").tolist() == [0, 1]
    assert is_right(questions, logps, "acc_norm").tolist() == [1, 0]
    accents = [Question("?", (" ééé", " abcdef"), 1)]  # 4 and 7 characters, 7 bytes each
    assert is_right(accents, [np.array([-4.0, -6.9])], "acc_norm").tolist() == [1]


def test_a_broken_model_knows_nothing():
    assert is_right([Question("?", LETTERS, 0)], [np.full(4, np.nan)], "acc").tolist() == [0]


def test_guessing_depends_on_how_many_choices_there_are():
    assert chance([QUESTIONS[0], QUESTIONS[2]]).tolist() == [0.25, 0.5]


def test_an_adapter_is_scored_as_it_is(tiny_model, tokenizer):
    model = add_lora(tiny_model(), None, r=2)
    before, _ = choice_logps(model, tokenizer, QUESTIONS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    after, _ = choice_logps(model, tokenizer, QUESTIONS)
    with model.disable_adapter():
        again, _ = choice_logps(model, tokenizer, QUESTIONS)
    assert all(np.abs(a - b).max() < 1e-4 for a, b in zip(before, again, strict=True))
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(before, after, strict=True))


def test_accuracy_is_a_figure_with_an_interval_chance_and_a_pair(tiny_model, tokenizer, tmp_path):
    data = EvaluationData(questions={"mine": QUESTIONS * 4, "letters": [QUESTIONS[0], QUESTIONS[3]]})
    found = evaluate_model(tiny_model(), tokenizer, data, PLAN, [], parts=tmp_path / "parts")
    found.save(tmp_path / "kept")
    found = Evaluation.load(tmp_path / "kept")
    modes = {(f.key.dataset, f.key.mode) for f in found.figures if f.key.metric == "accuracy"}
    assert modes == {("mine", "acc"), ("mine", "acc_norm"), ("letters", "acc")}
    other = evaluate_model(tiny_model(seed=1), tokenizer, data, PLAN, [])
    by_role = {
        (row.metric, row.paired): row
        for row in rows(other, reference=found)
        if row.dataset == "mine" and row.mode in ("acc", None)
    }
    row = by_role["accuracy", False]
    assert row.chance == pytest.approx((2 * 0.25 + 1 / 3 + 2 * 0.5) / 5) and row.n == 20
    assert row.ci_low <= row.value <= row.ci_high
    assert by_role["accuracy", True].chance is None
    before, after = (float(e[Key("accuracy", "mine", mode="acc")].statistic()) for e in (found, other))
    assert by_role["accuracy", True].value == pytest.approx(after - before)
    assert by_role["truncated_share", False].value == 0


def test_every_question_keeps_its_place(tiny_model, tokenizer):
    """Questions of one length are told apart: each order of them gives the same values in that order."""
    some = QUESTIONS[:3]
    one, _ = choice_logps(tiny_model(), tokenizer, some)
    for order in itertools.permutations(range(3)):
        values, _ = choice_logps(tiny_model(), tokenizer, [some[i] for i in order])
        assert all(values[at] == pytest.approx(one[i], abs=1e-5) for at, i in enumerate(order))
