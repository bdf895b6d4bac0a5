"""Keep evaluation text out of training text: whole lines, and runs of 13 words, compared by hash.

Thirteen-word overlap is the rule of Brown et al. 2020 (GPT-3), appendix C.
`python recipes/builtin/decontaminate.py` writes src/expunge/assets/forbidden.safetensors: the hashes by which a test
checks what is committed on machines without the evaluation text.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

RUN = 13
LEAST = 4  # words; shorter lines are headings and common phrases
HASHES = Path("src/expunge/assets/forbidden.safetensors")


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
            if len(tokens) >= LEAST:
                self.lines.add(" ".join(tokens))
            self.runs.update(_runs(tokens))

    def touches(self, document: str) -> bool:
        if any(" ".join(words(line)) in self.lines for line in document.split("\n")):
            return True
        return any(run in self.runs for run in _runs(words(document)))


def _runs(tokens: list[str]) -> Iterator[str]:
    for start in range(len(tokens) - RUN + 1):
        yield " ".join(tokens[start : start + RUN])


def digests(texts: Iterable[str]) -> set[int]:
    """The hash of every text, of its lines and of its sentences that have at least `LEAST` words."""
    found = set()
    for text in texts:
        parts = {text, *text.split("\n"), *re.split(r"(?<=[.!?])\s+|\n", text)}
        found.update(digest(part) for part in parts if len(words(part)) >= LEAST)
    return found


def main() -> None:
    import numpy as np
    from safetensors.numpy import save
    from sources import forbidden_texts

    texts = forbidden_texts()
    whole = {digest(text) for text in texts if len(words(text)) >= LEAST}  # prompts, continuations and lines as they are
    found = {"digests": digests(texts), "whole": whole}
    HASHES.write_bytes(save({name: np.array(sorted(some), dtype=np.int64) for name, some in found.items()}))
    print(f"{HASHES}: " + ", ".join(f"{len(some)} {name}" for name, some in found.items()))


if __name__ == "__main__":
    main()
