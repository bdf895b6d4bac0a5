"""Keep evaluation text out of training text: whole lines, and runs of 13 words, compared by hash.

Thirteen-word overlap is the rule of Brown et al. 2020 (GPT-3), appendix C.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator

RUN = 13


def words(text: str) -> list[str]:
    """Lower-case letters and digits only, so that tokenisation and `<unk>` marks do not hide a copy."""
    return re.findall(r"[a-z0-9]+", text.lower().replace("<unk>", " "))


def digest(text: str) -> int:
    """64-bit hash of a text's words, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(" ".join(words(text)).encode(), digest_size=8).digest(), "big", signed=True)


class Forbidden:
    """A set of texts that nothing may repeat: `touches(document)` is true where one would."""

    def __init__(self, texts: Iterable[str]):
        self.lines: set[str] = set()
        self.runs: set[str] = set()
        for text in texts:
            tokens = words(text)
            if len(tokens) >= 4:  # shorter lines are headings and common phrases
                self.lines.add(" ".join(tokens))
            self.runs.update(_runs(tokens))

    def touches(self, document: str) -> bool:
        if any(" ".join(words(line)) in self.lines for line in document.split("\n")):
            return True
        return any(run in self.runs for run in _runs(words(document)))


def _runs(tokens: list[str]) -> Iterator[str]:
    for start in range(len(tokens) - RUN + 1):
        yield " ".join(tokens[start : start + RUN])
