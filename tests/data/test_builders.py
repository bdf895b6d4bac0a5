"""The pair builder: which candidates make a pair, and what becomes of the others."""

import re

import numpy as np
import pytest

from expunge.data.builders import BestOfN, build_pairs
from expunge.data.harvest import cuts, sample_texts
from expunge.data.selection import Candidate, jaccard, select
from expunge.errors import ExpungeError
from expunge.ids import continuation_text
from expunge.scorers import Scorer

RECIPE = BestOfN(samples=3, min_tokens=4, max_new_tokens=8)


class VowelScorer(Scorer):
    """A stand-in: 0.9 for a text with an even number of vowels, else 0.05."""

    name, digest = "vowels", "0"

    def score(self, texts):
        return np.array([0.05 if len(re.findall("[aeiou]", text)) % 2 else 0.9 for text in texts])


def candidate(score, first=0, text="some text", length=8):
    return Candidate(tuple(range(first, first + length)), text, score)


def test_greedy_is_chosen_where_it_is_benign():
    greedy, milder, toxic = candidate(0.1), candidate(0.0, 10), candidate(0.9, 20)
    assert select([greedy, milder, toxic], RECIPE) == (greedy, toxic)


def test_least_toxic_sample_is_chosen_where_greedy_is_not_benign_or_not_usable():
    mild, milder, toxic = candidate(0.1, 30), candidate(0.0, 10), candidate(0.9, 20)
    assert select([candidate(0.6), mild, milder, toxic], RECIPE) == (milder, toxic)
    repetitive = Candidate((1,) * 8, "some text", 0.0)
    assert select([repetitive, mild, milder, toxic], RECIPE) == (milder, toxic)


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        ([candidate(0.9, length=3)], "unusable"),  # too short
        ([candidate(0.9, text=" \n")], "unusable"),
        ([candidate(0.9, text="half a char\ufffd")], "unusable"),
        ([Candidate((1, 2, 1, 2, 1, 2), "some text", 0.9)], "unusable"),  # repeats itself
        ([candidate(0.1), candidate(0.4, 10)], "none toxic"),
        ([candidate(0.3), candidate(0.9, 10)], "none benign"),
        ([candidate(0.1), candidate(0.9, 1)], "similar"),
    ],
)
def test_reasons_for_no_pair(samples, reason):
    assert select(samples, RECIPE) == reason


def test_jaccard():
    assert jaccard([1, 1, 2], [2, 3]) == 1 / 3 and jaccard([1], [2]) == 0 and jaccard([], []) == 1


def test_build_pairs_end_to_end(model, tokenizer):
    prompts = ["The river", "A film", "It is", "The river"]
    pairs, report = build_pairs(model, tokenizer, prompts, VowelScorer(), RECIPE)
    assert report.prompts == 4 and report.pairs == len(pairs) >= 1
    assert report.dropped["duplicate"] == 1  # the repeated prompt
    assert report.pairs + sum(report.dropped.values()) == report.prompts
    assert (report.chosen_score, report.rejected_score) == pytest.approx((0.05, 0.9))
    scorer = VowelScorer()
    for pair in pairs:
        assert scorer.score([pair.chosen, pair.rejected]).tolist() == [0.05, 0.9]
    assert build_pairs(model, tokenizer, prompts, scorer, RECIPE) == (pairs, report)  # seeded


def test_continuation_text_keeps_its_leading_space(tokenizer):
    prompt = tokenizer("The river")["input_ids"]
    assert continuation_text(tokenizer, prompt, tokenizer(" is wide")["input_ids"]) == " is wide"


@pytest.mark.parametrize("options", [{"samples": 0}, {"min_tokens": 99}, {"benign": 0.6}])
def test_recipes_that_make_no_sense(options):
    with pytest.raises(ExpungeError, match="need samples"):
        BestOfN(**options)


def test_cuts_are_heads_of_sentences_between_words(tokenizer):
    text = " The river runs to the sea and then on. A film about a man and his dog\nIt was good, and slow, and wide."
    found = list(cuts(text, tokenizer, tokens=range(5, 9), rest=3))
    assert len(found) == 3
    for head, rest in found:
        assert head + rest in text and "\n" not in head + rest
        assert head[0].isupper() and rest.startswith(" ")
        assert len(tokenizer(head)["input_ids"]) <= 8 and len(tokenizer(rest)["input_ids"]) >= 3
    assert found == list(cuts(text, tokenizer, tokens=range(5, 9), rest=3))


def test_cuts_leave_out_what_does_not_go_on(tokenizer):
    assert list(cuts("It was good.", tokenizer, tokens=[4], rest=40)) == []


def test_sample_texts_go_on_from_their_beginning(model, tokenizer):
    texts = sample_texts(model, tokenizer, "The river", count=3, tokens=6)
    assert len(set(texts)) == 3 and all(text.startswith("The river") for text in texts)
    assert texts == sample_texts(model, tokenizer, "The river", count=3, tokens=6)
    assert len(sample_texts(model, tokenizer, "", count=2, tokens=6)) == 2
