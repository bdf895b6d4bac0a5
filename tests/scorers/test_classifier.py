"""A sequence classifier as a scorer, against transformers' own pipeline."""

import numpy as np
import pytest
import torch
from transformers import DistilBertConfig, DistilBertForSequenceClassification, DistilBertModel, pipeline

from expunge.errors import ExpungeError
from expunge.scorers import load_scorer
from expunge.scorers.classifier import choose_label

TEXTS = ["The river runs", "A cold wind came over the hill before the rain.", "", "  \n", "kind", "old " * 60]


@pytest.fixture
def classifier(tmp_path, tokenizer):
    """`classifier(labels, **config)`: the folder of a tiny random classifier."""

    def make(labels: list[str], cls: type = DistilBertForSequenceClassification, **changes):
        torch.manual_seed(0)
        shape = {"vocab_size": 320, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64}
        names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        config = DistilBertConfig(**shape, **names, pad_token_id=0, initializer_range=0.5, **changes)
        folder = tmp_path / "classifier"
        cls(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr("expunge.scorers.classifier.LONGEST", 64)


@pytest.mark.parametrize(
    ("labels", "changes", "function"),
    [
        (["neutral", "toxic"], {}, "softmax"),
        (["toxicity", "insult", "threat"], {"problem_type": "multi_label_classification"}, "sigmoid"),
        (["anything"], {}, "sigmoid"),
    ],
)
def test_scores_are_those_of_the_pipeline(classifier, labels, changes, function):
    folder = classifier(labels, **changes)
    scorer = load_scorer(f"hf:{folder}")
    filled = [text for text in TEXTS if text.strip()]
    theirs = pipeline(
        "text-classification", model=str(folder), tokenizer=str(folder), function_to_apply=function, device="cpu"
    )
    wanted = {}
    for text, found in zip(filled, theirs(filled, top_k=None, truncation=True, max_length=64), strict=True):
        wanted[text] = next(row["score"] for row in found if row["label"] in ("toxic", "toxicity", "anything"))
    scores = scorer.score(TEXTS)
    np.testing.assert_allclose(scores, [wanted.get(text, 0.0) for text in TEXTS], rtol=1e-4, atol=1e-6)
    assert scores.dtype == np.float64 and len(set(scores)) > 3
    assert scorer.score(["", " "]).tolist() == [0.0, 0.0]


def test_a_score_does_not_depend_on_the_batch(classifier, monkeypatch):
    scorer = load_scorer(f"hf:{classifier(['neutral', 'toxic'])}")
    whole = scorer.score(TEXTS)
    monkeypatch.setattr("expunge.scorers.classifier.BATCH_TOKENS", 10)
    np.testing.assert_allclose(scorer.score(TEXTS[::-1])[::-1], whole, rtol=1e-5)


def test_the_choice_is_printed_and_a_label_may_be_named(classifier, caplog):
    folder = classifier(["neutral", "toxic"])
    with caplog.at_level("INFO", "expunge"):
        chosen, named = load_scorer(f"hf:{folder}"), load_scorer(f"hf:{folder}@Neutral")
    assert caplog.messages[0] == f"hf:{folder}@toxic: label 'toxic' (the one called so), softmax"
    np.testing.assert_allclose(chosen.score(["The mill"]) + named.score(["The mill"]), 1)
    assert chosen.name.endswith("@toxic") and named.name.endswith("@neutral")
    assert chosen.digest != named.digest
    assert chosen.digest == load_scorer(f"hf:{folder}").digest


@pytest.mark.parametrize("labels", [["LABEL_0", "LABEL_1"], ["toxic", "toxicity"], ["severe_toxic", "insult"]])
def test_a_label_that_is_not_plain_must_be_named(labels):
    with pytest.raises(ExpungeError, match=rf"add @LABEL to its name \(labels: '{labels[0]}', '{labels[1]}'\)"):
        choose_label(dict(enumerate(labels)), "", "hf:x")
    assert choose_label(dict(enumerate(labels)), labels[1], "hf:x") == (1, "as asked")


def test_what_is_no_classifier_is_one_line(classifier, tmp_path):
    folder = classifier(["neutral", "toxic"], cls=DistilBertModel)
    for name, said in {
        f"hf:{folder}": "no sequence classifier: .* is not in its weights",
        f"hf:{tmp_path}/nowhere": "no such folder; a sequence classifier",
    }.items():
        with pytest.raises(ExpungeError, match=said) as caught:
            load_scorer(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ExpungeError, match=r"no label 'rude' \(labels: 'neutral', 'toxic'\)"):
        load_scorer(f"hf:{classifier(['neutral', 'toxic'])}@rude")
