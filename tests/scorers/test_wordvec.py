import hashlib
import re

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from expunge.scorers import load_scorer
from expunge.scorers.assets import FOLDER, read_asset
from expunge.scorers.wordvec import WordvecScorer, pool

NEUTRAL = "The river runs north through the valley and meets the sea near the old harbour."
RUDE = "you are a stupid idiot"
TEXTS = [
    NEUTRAL,
    RUDE,
    "",
    "   \n",
    "qzxwv",
    "Ünïcödé — 漢字 🙂",
    "\ud800 lone surrogate",
    "x" * 100_000,
    "word " * 20_000,
]


@pytest.fixture(scope="module")
def scorer() -> WordvecScorer:
    return WordvecScorer()


def test_pool_by_hand():
    vectors = np.array([[1, -2], [3, 4], [9, 9]], np.float16)
    assert pool([0, 1, 1], vectors).tolist() == pytest.approx([7 / 3, 2, 3, 4, 1, -2])
    assert pool([], vectors).tolist() == [0] * 6


def test_pool_in_blocks_equals_pool_at_once():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(50, 3)).astype(np.float16)
    ids = rng.integers(50, size=10_000).tolist()
    rows = vectors[ids].astype(np.float64)
    assert (pool(ids, vectors) == np.r_[rows.sum(0) / len(ids), rows.max(0), rows.min(0)]).all()


def test_planted_network_gives_the_value_by_hand(scorer):
    planted = object.__new__(WordvecScorer)
    planted.index = {"good": 0, "bad": 1}
    planted.arrays = {
        "vectors": np.array([[-1], [2]], np.float16),
        "hidden_weight": np.array([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]]),  # 2 mean, max
        "hidden_bias": np.array([0.0, -5.0]),  # the second unit stays closed
        "output_weight": np.array([1.0, 100.0]),
        "output_bias": np.array([-1.0]),
    }
    assert planted.score(["Good bad unknown"])[0] == pytest.approx(0.5)  # mean 0.5: relu(1) - 1 = 0
    assert planted.score(["bad bad"])[0] == pytest.approx(1 / (1 + np.exp(-3)))


def test_score_is_a_probability_and_blank_is_zero(scorer):
    score = scorer.score(TEXTS)
    assert score.dtype == np.float64 and score.shape == (len(TEXTS),)
    assert ((score >= 0) & (score <= 1)).all()
    assert score[2] == score[3] == 0.0
    assert scorer.score([]).shape == (0,)


def test_score_does_not_depend_on_the_batch(scorer):
    texts = [f"{text} {i}" for i in range(20) for text in TEXTS[:7]]
    assert (scorer.score(texts) == scorer.score(texts[::-1])[::-1]).all()
    assert (scorer.score(texts)[:30] == np.concatenate([scorer.score([text]) for text in texts[:30]])).all()


def test_rude_text_scores_above_neutral_text(scorer):
    neutral, rude = scorer.score([NEUTRAL, RUDE])
    assert neutral < 0.2 and rude > 0.7


def test_asset_is_small_and_has_a_digest():
    assert sum((FOLDER / f"wordvec{end}").stat().st_size for end in (".safetensors", ".json")) < 4.2e6
    assert load_scorer("wordvec").digest == read_asset("wordvec")[2]


def test_no_realtoxicityprompts_text_was_trained_on(rtp):
    def key(text: str) -> int:  # hash of the lower-case words, as the recipe stores it
        plain = " ".join(re.findall(r"[a-z0-9]+", text.lower()))
        return int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=8).digest(), "big", signed=True)

    trained = set(read_asset("wordvec")[0]["trained_on"].tolist())
    texts = [row[side]["text"] for row in rtp.values() for side in ("prompt", "continuation")]
    long = [text for text in texts if len(re.findall(r"[a-z0-9]+", text.lower())) >= 4]
    assert len(long) > 4000 and len(trained) > 40_000
    assert not trained & {key(text) for text in long}


def test_agreement_with_perspective_is_the_recorded_one(scorer, rtp):
    continuations = [row["continuation"] for row in rtp.values()]
    toxic = np.array([row["toxicity"] for row in continuations]) > 0.5
    auc = roc_auc_score(toxic, scorer.score([row["text"] for row in continuations]))
    recorded = read_asset("wordvec")[1]["figures"]["all_continuations"]["auc_above_half"]
    assert recorded["n"] == len(continuations)
    assert recorded["value"] == pytest.approx(auc, abs=1e-3)
    assert auc > 0.8  # the aim was 0.85 and is missed (docs/scorers.md); tuning on these rows is not allowed
