from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from expunge.errors import ExpungeError
from expunge.scorers import load_scorer
from expunge.scorers.assets import FOLDER, read_asset, write_asset
from expunge.scorers.ngram import CHARACTERS, FACTOR, MIXER, NgramScorer, chunks, ngrams, raw_scores, words

MASK = (1 << 64) - 1
NEUTRAL = "The river runs north through the valley and meets the sea near the old harbour."
RUDE = "you are a stupid idiot"
TEXTS = [
    NEUTRAL,
    RUDE,
    "",
    "   \n",
    "a",
    "Ünïcödé — 漢字 🙂🙂 d*mn",
    "\ud800 lone surrogate",
    "x" * 300,
    "a. b! c's",
    "\n\n a\n b",
]


@pytest.fixture(scope="module")
def scorer() -> NgramScorer:
    return NgramScorer()


def slow_buckets(text: str, bits: int) -> list[int]:
    """The definition, in plain integers: one n-gram at a time."""

    def fold(codes: list[int]) -> int:
        value = 0
        for code in codes:
            value = (value * int(FACTOR) + code) & MASK
        return value

    def bucket(value: int, salt: int) -> int:
        value = ((value ^ salt) * int(MIXER)) & MASK
        value = ((value ^ (value >> 32)) * int(MIXER)) & MASK
        return value >> (64 - bits)

    found, hashes = [], []
    for word in words(text):
        padded = [ord(c) for c in f" {word} "]
        for n in CHARACTERS:
            found += [bucket(fold(padded[i : i + n]), n) for i in range(len(padded) - n + 1)]
        hashes.append(fold([ord(c) for c in reversed(word)]))
    found += [bucket(value, 1) for value in hashes]
    found += [bucket(((left * int(FACTOR) + right) * int(FACTOR)) & MASK, 0) for left, right in pairwise(hashes)]
    return sorted(found)


def test_features_equal_the_slow_form():
    owner, bucket = ngrams(TEXTS, bits=20)
    for i, text in enumerate(TEXTS):
        assert sorted(bucket[owner == i].tolist()) == slow_buckets(text, 20)


def test_planted_weights_give_the_value_by_hand():
    # 'ab': character n-grams ' a' 'ab' 'b ' ' ab' 'ab ' ' ab ' and one word, so G = 7; 'ab ab': twice that and a pair
    weights = np.zeros(1 << 20, np.float16)
    weights[slow_buckets("ab", 20)] = 0.5
    z, count = raw_scores(["ab", "ab ab", ""], weights)
    assert count.tolist() == [7, 15, 0]
    assert z == pytest.approx([7 * 0.5 / 7**0.5, 14 * 0.5 / 15**0.5, 0.0], abs=1e-12)


def test_chunks_cover_all_texts_in_order():
    texts = ["a" * size for size in (10, 300_000, 0, 200_000, 100_000, 5)]
    assert [text for chunk in chunks(texts) for text in chunk] == texts
    assert [len(chunk) for chunk in chunks(texts)] == [1, 1, 2, 2]


def test_score_is_a_probability_and_blank_is_zero(scorer):
    score = scorer.score(TEXTS)
    assert score.dtype == np.float64 and score.shape == (len(TEXTS),)
    assert ((score >= 0) & (score <= 1)).all()
    assert score[2] == score[3] == 0.0
    assert scorer.score([]).shape == (0,)


def test_score_does_not_depend_on_the_batch(scorer):
    texts = [f"{text} {i}" for i in range(300) for text in TEXTS]
    whole = scorer.score(texts)
    assert (whole == scorer.score(texts[::-1])[::-1]).all()
    assert (whole[:40] == np.concatenate([scorer.score([text]) for text in texts[:40]])).all()


def test_rude_text_scores_above_neutral_text(scorer):
    neutral, rude = scorer.score([NEUTRAL, RUDE])
    assert neutral < 0.2 and rude > 0.7


def test_very_long_text(scorer):
    assert scorer.score([RUDE * 5000, "x" * 100_000]).shape == (2,)


def test_calibration_rises(scorer):
    assert (np.diff(scorer.knots, axis=0) > 0).all()
    assert scorer.knots[0, 1] == 0 and scorer.knots[-1, 1] == 1


def test_digest_follows_the_files(tmp_path):
    arrays, facts, digest = read_asset("ngram")
    assert digest == load_scorer("ngram").digest and len(digest) == 64
    write_asset("ngram", arrays, facts | {"bias": facts["bias"] + 1}, tmp_path)
    assert read_asset("ngram", tmp_path)[2] != digest


def test_missing_and_damaged_assets_say_what_to_do(tmp_path):
    with pytest.raises(ExpungeError, match=r"recipes/builtin/scorer_ngram\.py"):
        read_asset("ngram", tmp_path)
    (tmp_path / "ngram.safetensors").write_bytes(b"not a tensor file")
    (tmp_path / "ngram.json").write_text("{}")
    with pytest.raises(ExpungeError, match="damaged"):
        read_asset("ngram", tmp_path)


def test_asset_is_small():
    assert sum((FOLDER / f"ngram{end}").stat().st_size for end in (".safetensors", ".json")) < 2.5e6


def test_agrees_with_perspective_on_unseen_continuations(scorer, rtp):
    arrays, facts, _ = read_asset("ngram")
    fitted = set(arrays["fitted_prompts"].tolist())
    unseen = [row["continuation"] for key, row in rtp.items() if key not in fitted]
    toxicity = np.array([row["toxicity"] for row in unseen])
    score = scorer.score([row["text"] for row in unseen])
    figures = facts["figures"]["test_continuations"]

    assert len(fitted) + len(unseen) == len(rtp)  # every fitted prompt is one of the set, by hash
    assert figures["spearman"]["n"] == len(unseen) > 600
    assert spearmanr(score, toxicity)[0] >= 0.80
    assert roc_auc_score(toxicity > 0.5, score) >= 0.91
    assert figures["spearman"]["value"] == pytest.approx(spearmanr(score, toxicity)[0], abs=1e-3)
