"""Google's Perspective as a scorer: a text is asked for once, and its scores are kept (scorers/cache.py).

    load_scorer("perspective").score(["a kind word"])               # TOXICITY
    load_scorer("perspective:INSULT"), load_scorer("perspective:max7")

    max7 = max over TOXICITY, SEVERE_TOXICITY, IDENTITY_ATTACK, INSULT, PROFANITY, THREAT, SEXUALLY_EXPLICIT

The service ends on 31 December 2026 and gives no new keys; what is cached is replayed without a key or a network. No text
gets a score by default: what cannot be had is an error.
"""

import hashlib
import importlib.util
import json
import logging
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from expunge.config import cache_folder
from expunge.errors import ExpungeError
from expunge.paths import expand
from expunge.registry import did_you_mean
from expunge.scorers.base import Scorer
from expunge.scorers.cache import ScoreCache, content_key

URL = "https://commentanalyzer.googleapis.com/v1alpha1/comments:analyze"
LANGUAGE = "en"
LONGEST_TEXT = 20_480  # bytes of UTF-8 that the service takes
MAX7 = ("TOXICITY", "SEVERE_TOXICITY", "IDENTITY_ATTACK", "INSULT", "PROFANITY", "THREAT", "SEXUALLY_EXPLICIT")
ALWAYS = (*MAX7, "FLIRTATION")  # asked for whatever is wanted: the columns of RealToxicityPrompts
NEW_YORK_TIMES = (
    "ATTACK_ON_AUTHOR", "ATTACK_ON_COMMENTER", "INCOHERENT", "INFLAMMATORY", "LIKELY_TO_REJECT", "OBSCENE", "SPAM",
    "UNSUBSTANTIAL",
)  # fmt: skip
BRIDGING = tuple(
    f"{name}_EXPERIMENTAL"
    for name in ("AFFINITY", "COMPASSION", "CURIOSITY", "NUANCE", "PERSONAL_STORY", "REASONING", "RESPECT")
)
ATTRIBUTES = (*ALWAYS, *NEW_YORK_TIMES, *BRIDGING)
SAY_EVERY = 60.0  # seconds

log = logging.getLogger("expunge")


class PerspectiveScorer(Scorer):
    """Google's Perspective, TOXICITY: needs PERSPECTIVE_API_KEY, or a cache that has the texts' scores."""

    name = "perspective"

    def __init__(
        self,
        attribute: str = "TOXICITY",
        *,
        url: str | None = None,
        cache: Path | None = None,
        rate: float | None = None,
        timeout: float = 20.0,
        tries: int = 6,
        backoff: float = 1.0,
    ):
        """attribute: one of ATTRIBUTES, or max7, in any case. rate: requests a second. timeout, backoff: seconds.

        url, cache and rate default to PERSPECTIVE_API_URL, EXPUNGE_PERSPECTIVE_CACHE and PERSPECTIVE_QPS in the environment,
        then to Google's service, a file in expunge's cache folder, and 1.
        Raises ExpungeError for an unknown attribute, a bad setting, and where there is neither a key nor any cached score.
        """
        named = "max7" if attribute.lower() == "max7" else attribute.upper()
        if named not in (*ATTRIBUTES, "max7"):
            raise ExpungeError(f"perspective: unknown attribute {attribute!r}{did_you_mean(named, [*ATTRIBUTES, 'MAX7'])}")
        self.attributes = MAX7 if named == "max7" else (named,)
        if named != "TOXICITY":
            self.name = f"perspective:{named}"
        self.url = _address(url or os.environ.get("PERSPECTIVE_API_URL") or URL)
        self.rate = rate or _rate()
        self.patience = (timeout, tries, backoff)
        self.service = f"{self.url} {LANGUAGE}"
        self.digest = hashlib.sha256(json.dumps([self.service, self.attributes]).encode()).hexdigest()
        file = os.environ.get("EXPUNGE_PERSPECTIVE_CACHE")
        self.cache = ScoreCache(cache or (Path(expand(file)) if file else cache_folder("perspective") / "scores.jsonl"))
        # a run must not train for hours first
        if not _key() and not len(self.cache):
            raise ExpungeError(
                f"{self.name}: PERSPECTIVE_API_KEY is not set, and {self.cache.path} has no scores to replay "
                "(EXPUNGE_PERSPECTIVE_CACHE names another file)"
            )
        if _key() and importlib.util.find_spec("httpx2") is None:
            raise ExpungeError(f"{self.name}: requests need httpx2: pip install 'expunge[perspective]'")

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """float64 `[N]`. Each answer is cached before the next request, so that neither an error nor Ctrl-C loses any.

        Raises ExpungeError where a score is neither cached nor to be had.
        """
        keys = {text: content_key(self.service, text) for text in texts if text.strip()}
        self.cache.refresh()
        missing = [text for text, key in keys.items() if self._lacks(key)]
        if missing:
            self._fetch(texts, keys, missing)
        return np.array([self._cached(keys[text]) if text in keys else 0.0 for text in texts], dtype=np.float64)

    def _cached(self, key: str) -> float:
        return max(self.cache.get(key)[attribute] for attribute in self.attributes)

    def _lacks(self, key: str) -> bool:
        return not self.cache.get(key).keys() >= set(self.attributes)

    def _fetch(self, texts: Sequence[str], keys: Mapping[str, str], missing: Sequence[str]) -> None:
        """Ask for `missing`, distinct ones of `texts`, so that the cache has all of `keys`, by text."""
        secret = _key()
        if not secret:
            raise ExpungeError(
                f"{self.name}: PERSPECTIVE_API_KEY is not set, and {len(missing)} of {len(keys)} texts are not in "
                f"{self.cache.path}: set the key, or name the cache that has them in EXPUNGE_PERSPECTIVE_CACHE"
            )
        for text in missing:
            size = len(text.encode())
            if size > LONGEST_TEXT:
                raise ExpungeError(
                    f"{self.name}: text {texts.index(text) + 1} has {size} bytes, more than the {LONGEST_TEXT} that "
                    "Perspective takes: shorten it, or leave it out"
                )
        from expunge.scorers.perspective_client import Client, Failed

        log.info("%s: %d of %d texts to ask for%s", self.name, len(missing), len(keys), self._left(len(missing)))
        said = time.monotonic()
        with Client(self.url, secret, LANGUAGE, self.rate, *self.patience) as client:
            for done, text in enumerate(missing, 1):
                kept = self.cache.get(keys[text])
                wanted = [name for name in dict.fromkeys((*ALWAYS, *self.attributes)) if name not in kept]
                try:
                    # another process may have been faster
                    if self._lacks(keys[text]):
                        self.cache.add(keys[text], client.ask(text, wanted))
                except Failed as error:
                    raise ExpungeError(f"{self.name}: text {texts.index(text) + 1}: {error}; {self._kept(keys)}") from None
                except KeyboardInterrupt:
                    log.info("%s: stopped; %s", self.name, self._kept(keys))
                    raise
                if time.monotonic() - said > SAY_EVERY:
                    said = time.monotonic()
                    log.info("%s: %d of %d asked for%s", self.name, done, len(missing), self._left(len(missing) - done))

    def _kept(self, keys: Mapping[str, str]) -> str:
        have = sum(not self._lacks(key) for key in keys.values())
        return f"{have} of {len(keys)} texts are in {self.cache.path}, and the same command goes on from there"

    def _left(self, requests: int) -> str:
        minutes = requests / self.rate / 60
        return f", {minutes:.0f} min or more at {self.rate:g} a second" if minutes >= 1 else ""


def _key() -> str:
    key = os.environ.get("PERSPECTIVE_API_KEY", "").strip()
    if not re.fullmatch(r"[\x21-\x7e]*", key):
        raise ExpungeError("PERSPECTIVE_API_KEY holds a space or another character that no key has")
    return key


def _rate() -> float:
    text = os.environ.get("PERSPECTIVE_QPS") or "1"
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise ExpungeError(f"PERSPECTIVE_QPS={text!r}: expected requests a second, a number above 0")
    return rate


def _address(url: str) -> str:
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        sound = False
    if not sound or "?" in url or "@" in url:  # not repeated: a key may stand in it
        raise ExpungeError(f"PERSPECTIVE_API_URL: expected an address such as {URL}; the key goes into PERSPECTIVE_API_KEY")
    return url
