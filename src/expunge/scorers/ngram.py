"""Scorer A, the judge: a linear model over hashed n-grams, calibrated to Perspective's TOXICITY.

    z(text) = bias + sum_g w[bucket(g)] / sqrt(G),      score = calibration(z)

over the G n-grams g of the text: characters 2-5 within words (a word is padded with one space on each side), words 1-2.
Calibration is monotone and piecewise linear. Weights are float16, so their float64 sum is exact, whatever its order.

    NgramScorer().score(["a kind word"])
"""

import re
from collections.abc import Iterator, Sequence

import numpy as np

from expunge.scorers.assets import read_asset
from expunge.scorers.base import Scorer

CHARACTERS = (2, 3, 4, 5)
WORD = re.compile(r"[\w*@$']+|[^\w\s*@$']")  # masked words such as d*mn stay whole
CHUNK_CHARACTERS = 1 << 18  # texts are scored in chunks of about so many characters: some 50 MB of work space
FACTOR = np.uint64(0x9E3779B97F4A7C15)
MIXER = np.uint64(0xD6E8FEB86659FD93)
SPACE, NEWLINE = ord(" "), ord("\n")


def words(text: str) -> list[str]:
    """Lower-case words and single punctuation marks."""
    return WORD.findall(text.lower().replace("’", "'"))


def _mix(values: np.ndarray, salt: int, bits: int) -> np.ndarray:
    """uint64 hashes of one kind of n-gram (`salt`) to buckets in `[0, 2^bits)`."""
    values = (values ^ np.uint64(salt)) * MIXER
    values = (values ^ (values >> np.uint64(32))) * MIXER
    return (values >> np.uint64(64 - bits)).astype(np.int64)


def ngrams(texts: Sequence[str], bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Every n-gram of every text as `(text index [M], bucket [M])`, repeats included.

    Before mixing, n characters c_1..c_n hash to sum_i c_i F^(n-i) modulo 2^64, a word c_1..c_m to sum_i c_i F^(i-1),
    and a pair of words u v to h(u) F^2 + h(v) F. The salt of the mixing is n for characters, 1 for words, 0 for pairs.
    """
    lines = [" " + " ".join(words(text)) + " " for text in texts]
    code = np.frombuffer("\n".join(lines).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    edge = (code == SPACE) | (code == NEWLINE)
    owner = np.cumsum(code == NEWLINE)
    code = code.astype(np.uint64)
    owners, buckets = [], []

    value = code.copy()
    inside = code != NEWLINE  # may an n-gram that starts here be lengthened: no edge after its first character
    for n in range(2, max(CHARACTERS) + 1):
        last = slice(n - 1, None)
        value = value[: len(code) - n + 1] * FACTOR + code[last]
        inside = inside[: len(value)]
        whole = inside & (code[last] != NEWLINE)
        if n == 2:
            whole &= ~(edge[:-1] & edge[1:])
        at = np.flatnonzero(whole)
        owners.append(owner[at])
        buckets.append(_mix(value[at], n, bits))
        inside = inside & ~edge[last]

    start = np.flatnonzero(~edge & np.r_[True, edge[:-1]])
    end = np.flatnonzero(~edge & np.r_[edge[1:], True]) + 1
    if len(start):
        power = np.cumprod(np.r_[np.uint64(1), np.full(int((end - start).max()), FACTOR)], dtype=np.uint64)
        place = np.arange(len(code)) - np.repeat(np.r_[0, start], np.diff(np.r_[0, start, len(code)]))
        weighted = np.where(edge, np.uint64(0), code * power[np.minimum(place, len(power) - 1)])
        word = np.add.reduceat(weighted, start)
        same = owner[start[1:]] == owner[start[:-1]]
        owners += [owner[start], owner[start[1:]][same]]
        buckets += [_mix(word, 1, bits), _mix((word[:-1] * FACTOR + word[1:])[same] * FACTOR, 0, bits)]
    return np.concatenate(owners), np.concatenate(buckets)


def chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Consecutive slices of some `CHUNK_CHARACTERS`; a longer text is alone."""
    start = size = 0
    for stop, text in enumerate(texts):
        if stop > start and size + len(text) > CHUNK_CHARACTERS:
            yield texts[start:stop]
            start, size = stop, 0
        size += len(text)
    if start < len(texts):
        yield texts[start:]


def raw_scores(texts: Sequence[str], weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`sum_g w[bucket(g)] / sqrt(G)` as float64 `[N]`, and G `[N]`; `weights` is `[2^bits]`."""
    bits = len(weights).bit_length() - 1
    sums: list[np.ndarray] = [np.zeros(0)]
    counts: list[np.ndarray] = [np.zeros(0)]
    for chunk in chunks(texts):
        owner, bucket = ngrams(chunk, bits)
        sums.append(np.bincount(owner, weights=weights[bucket], minlength=len(chunk)))
        counts.append(np.bincount(owner, minlength=len(chunk)))
    count = np.concatenate(counts)
    return np.concatenate(sums) / np.sqrt(np.maximum(count, 1)), count


class NgramScorer(Scorer):
    """P(toxic) by Perspective's scale, from n-grams alone; reads words, not meaning (docs/scorers.md)."""

    name = "ngram"

    def __init__(self) -> None:
        arrays, facts, self.digest = read_asset(self.name)
        self.weights = arrays["weights"]
        self.bias = float(facts["bias"])
        self.knots = np.array(facts["calibration"])  # [K, 2]: z, score

    def score(self, texts: Sequence[str]) -> np.ndarray:
        z, count = raw_scores(texts, self.weights)
        return np.where(count > 0, np.interp(z + self.bias, *self.knots.T), 0.0)
