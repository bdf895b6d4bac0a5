"""Scores that cost a request, kept for good: one append-only file of JSON lines, addressed by content.

    cache = ScoreCache(Path("scores.jsonl"))
    cache.add(content_key("service v1", "a kind word"), {"TOXICITY": 0.02})
    cache.get(content_key("service v1", "a kind word"))                         # {"TOXICITY": 0.02}

    key = sha256(service, newline, text)

So the file holds hashes and numbers, no text; it can be copied, or joined to another by `cat`. Where two lines have a score
for one key and attribute, the first stands. Several processes may read and append at once.
"""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from expunge.errors import ExpungeError

HEAD = b'{"key": "'  # how every line begins
LONGEST = 1 << 16  # bytes of a line


def content_key(service: str, text: str) -> str:
    """Hex sha256 of what is scored, and by what."""
    return hashlib.sha256(f"{service}\n{text}".encode()).hexdigest()


class ScoreCache:
    """Scores in [0, 1] by attribute, under keys; `path` need not exist yet."""

    def __init__(self, path: Path):
        self.path = path
        self._scores: dict[str, dict[str, float]] = {}
        self._bytes = self._lines = 0  # read so far
        self.refresh()

    def __len__(self) -> int:
        return len(self._scores)

    def get(self, key: str) -> Mapping[str, float]:
        """The scores by attribute, as of the last `refresh` or `add`; empty where there are none."""
        return self._scores.get(key, {})

    def refresh(self) -> None:
        """Read what was appended since the last time, by whomever.

        A last line that a crash tore off is passed over. Raises ExpungeError for any other broken line.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self._bytes)
                *whole, tail = file.read().split(b"\n")
        except FileNotFoundError:
            return
        except OSError as error:
            raise ExpungeError(f"{self.path}: cannot be read ({error.strerror})") from None
        for number, line in enumerate(whole, self._lines + 1):
            self._take(line, number)
        self._bytes += sum(len(line) + 1 for line in whole)
        self._lines += len(whole)
        if tail and not _is_torn(tail):
            self._take(tail, self._lines + 1)

    def add(self, key: str, scores: Mapping[str, float]) -> None:
        """Append scores, with today's date, and refresh. Raises ExpungeError where the file cannot be written."""
        date = datetime.now(UTC).date().isoformat()
        line = json.dumps({"key": key, "scores": dict(scores), "date": date}).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
                _mend(file)
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise ExpungeError(f"{self.path}: cannot be written ({error.strerror})") from None
        self.refresh()

    def _take(self, line: bytes, number: int) -> None:
        if not line.strip():
            return
        entry = _entry(line)
        if entry is None:
            raise ExpungeError(f"{self.path}:{number}: no line of a score cache; remove it, or name another file")
        key, scores = entry
        self._scores[key] = {**scores, **self.get(key)}


def _entry(line: bytes) -> tuple[str, dict[str, float]] | None:
    try:
        entry = json.loads(line)
        key, scores = entry["key"], entry["scores"]
        sound = len(key) == 64 and all(type(score) in (int, float) and 0 <= score <= 1 for score in scores.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return (key, scores) if sound else None


def _is_torn(tail: bytes) -> bool:
    """Is this, after the last newline, the beginning of a line of ours, and not all of it?"""
    return tail[: len(HEAD)] == HEAD[: len(tail)] and _entry(tail) is None


def _mend(file: BinaryIO) -> None:
    """Remove a line that was torn off, so that the next one begins a line."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - LONGEST))
    tail = file.read().rsplit(b"\n", 1)[-1]
    if _is_torn(tail):
        file.truncate(end - len(tail))
    elif tail:
        file.write(b"\n")
