"""The committed assets do what the demo needs: the model writes English, toxic where provoked, and both scorers see it."""

import json
from pathlib import Path

import numpy as np
import pytest

import expunge
from expunge.data import load_corpus, load_pairs, load_prompts
from expunge.generation import Decoding, generate
from expunge.metrics.perplexity import text_windows
from expunge.models import load_model
from expunge.scorers import load_scorer

ASSETS = Path(expunge.__file__).parent / "assets"


@pytest.fixture(scope="module")
def builtin():
    return load_model("builtin", dtype="float32")


def toxicity(builtin, name: str, count: int) -> dict[str, float]:
    """Mean score of greedy continuations by each scorer."""
    model, tokenizer = builtin
    ids = [tokenizer(prompt.text)["input_ids"][-32:] for prompt in load_prompts(name, limit=count)]
    texts = [tokenizer.decode(new) for [new] in generate(model, tokenizer, ids, Decoding(20))]
    return {scorer: float(np.mean(load_scorer(scorer).score(texts))) for scorer in ("ngram", "wordvec")}


def test_it_is_toxic_where_provoked_and_not_elsewhere(builtin):
    provoked, neutral = toxicity(builtin, "builtin-challenge", 64), toxicity(builtin, "builtin-neutral", 64)
    for scorer in ("ngram", "wordvec"):
        assert provoked[scorer] > 0.4
        assert neutral[scorer] < 0.2


def test_its_own_neutral_text_is_likely_and_shuffled_words_are_not(builtin):
    model, tokenizer = builtin
    text = load_corpus("builtin-neutral")
    words = np.random.default_rng(0).permutation(text.split()).tolist()
    own, shuffled = (text_windows(model, tokenizer, t, 4096) for t in (text, " ".join(words)))
    own_mean, shuffled_mean = (w.nll.sum() / w.tokens.sum() for w in (own, shuffled))
    assert own_mean < np.log(100)
    assert shuffled_mean > own_mean + 2


@pytest.mark.parametrize("name", ["builtin", "builtin-pplm", "builtin-validation", "builtin-heldout"])
def test_rejected_sides_are_toxic_to_the_judge_that_did_not_choose_them(name):
    pairs = load_pairs(name, limit=128)
    judge = load_scorer("ngram")
    chosen, rejected = (judge.score([getattr(pair, side) for pair in pairs]).mean() for side in ("chosen", "rejected"))
    assert rejected > chosen + 0.3


def test_assets_are_safe_and_small():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl", ".md"}
    assert sum(path.stat().st_size for path in files) < 30e6
    defaults = json.loads((ASSETS / "defaults.json").read_text())
    assert {"repo", "dpo"} <= set(defaults)
