"""Requests to Google's Perspective: at a rate, tried again with back-off, and refused answers named.

    with Client(URL, key, "en") as client:
        client.ask("a kind word", ["TOXICITY", "INSULT"])           # {"TOXICITY": 0.02, "INSULT": 0.01}

    wait before try i + 1 = max(Retry-After, backoff 2^(i - 1) u),      u uniform in [0.5, 1.5]

Throttling (429), failures of the server, lost connections and silence are tried again; nothing else is. The key goes into a
header, since addresses are logged, and is blotted out of whatever the service says. API: developers.perspectiveapi.com.
"""

import random
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx2

PASSING = {408, 429, 500, 502, 503, 504}
LONGEST_WAIT = 120.0  # seconds; a service that asks for more is not waited for


class Failed(Exception):
    """There is no score; one line says why."""


class Client:
    """One connection to the service. rate: requests a second; timeout, backoff: seconds."""

    def __init__(
        self,
        url: str,
        key: str,
        language: str,
        rate: float = 1.0,
        timeout: float = 20.0,
        tries: int = 6,
        backoff: float = 1.0,
    ):
        self.url, self.language, self.rate, self.tries, self.backoff = url, language, rate, tries, backoff
        self._key = key
        self._http = httpx2.Client(headers={"X-Goog-Api-Key": key}, timeout=timeout)
        self._next = 0.0  # when another request may start, by time.monotonic()
        self._chance = random.Random()  # not the one that runs are seeded by

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def ask(self, text: str, attributes: Sequence[str]) -> dict[str, float]:
        """The score in [0, 1] of each of `attributes`; `Failed` unless all are there."""
        body = {
            "comment": {"text": text, "type": "PLAIN_TEXT"},
            "languages": [self.language],
            "requestedAttributes": {name: {} for name in attributes},
            "doNotStore": True,
        }
        for tried in range(1, self.tries + 1):
            time.sleep(max(0.0, self._next - time.monotonic()))
            self._next = time.monotonic() + 1 / self.rate
            asked = 0.0
            try:
                answer = self._http.post(self.url, json=body)
            except httpx2.RequestError as error:
                problem = f"no answer ({type(error).__name__})"
            else:
                if answer.status_code not in PASSING:
                    return self._read(answer, attributes)
                problem = self._said(answer)
                asked = retry_after(answer.headers.get("Retry-After", ""))
            if asked > LONGEST_WAIT:
                raise Failed(f"{problem}; it asks to wait {asked:.0f} s")
            if tried < self.tries:
                time.sleep(max(asked, self.backoff * 2 ** (tried - 1) * self._chance.uniform(0.5, 1.5)))
        raise Failed(f"{problem}, after {self.tries} tries")

    def _read(self, answer: httpx2.Response, attributes: Sequence[str]) -> dict[str, float]:
        said = self._said(answer)
        if answer.status_code in (401, 403) or (answer.status_code == 400 and "api key" in said.lower()):
            raise Failed(f"the key in PERSPECTIVE_API_KEY is refused ({said})")
        if answer.status_code == 400:
            raise Failed(f"refused ({said}): leave this text out, or choose another scorer")
        if answer.status_code != 200:
            raise Failed(f"unexpected answer ({said})")
        try:
            found = answer.json()["attributeScores"]
            scores = {name: found[name]["summaryScore"]["value"] for name in attributes}
        except KeyError as error:
            raise Failed(f"no {error} in the answer") from None
        except (ValueError, TypeError):
            raise Failed("the answer is not Perspective's JSON") from None
        for name, value in scores.items():
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise Failed(f"{name} is {value!r} in the answer, no score in [0, 1]")
        return scores

    def _said(self, answer: httpx2.Response) -> str:
        """`HTTP 400, LANGUAGE_NOT_SUPPORTED_BY_ATTRIBUTE: ...`, printable and of some length, without the key."""
        try:
            error = answer.json()["error"]
            kinds = [detail["errorType"] for detail in error.get("details", []) if "errorType" in detail]
            said = ": ".join([*kinds[:1], error["message"]]).replace(self._key, "***")
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"HTTP {answer.status_code}"
        printable = "".join(c if c.isprintable() else " " for c in said)
        return f"HTTP {answer.status_code}, {' '.join(printable.split())[:300]}"


def retry_after(header: str) -> float:
    """Seconds, from seconds or a date; 0 for anything else."""
    if header.isascii() and header.isdigit():
        return float(header)
    try:
        return (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):
        return 0.0
