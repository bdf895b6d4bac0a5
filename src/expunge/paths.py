"""Paths as a shell's user writes them: `~`, `~name`, `$NAME` and `${NAME}` stand for what they stand for there.

expand("~/pairs.jsonl")          # "/home/me/pairs.jsonl"
expand("hf:$MODELS/judge")       # what goes before a colon stays
"""

import os
import re
from pathlib import Path

from expunge.errors import ExpungeError

HOME = re.compile(r"(?P<before>(?:[\w-]+:)?)(?P<home>~[^/\\]*)(?P<rest>.*)", re.DOTALL)
VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})", re.ASCII)


def expand(path: str | Path) -> str:
    """`path` with home folders and variables put in. What there is of exactly this name is meant as it is written.

    Raises ExpungeError for a variable that is not set.
    """
    text = str(path)
    if not ("~" in text or "$" in text) or os.path.lexists(text):
        return text

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name not in os.environ:
            raise ExpungeError(f"{text}: the environment variable {name} is not set")
        return os.environ[name]

    text = VARIABLE.sub(value, text)
    if match := HOME.fullmatch(text):
        text = match["before"] + os.path.expanduser(match["home"]) + match["rest"]  # noqa: PTH111 (an unknown user stays)
    return text
