"""Paths in what a run keeps of its settings: so that it is found from another working directory, and after it was moved.

    portable({"model": "m", "data": {"train": "pairs.jsonl"}})          # {"model": "/home/me/m", ...}
    restored(kept, Path("moved/first"))                                 # what was moved with the run is found beside it

Names of sets, of built-in models and of the hub stay as they are.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from expunge.claim import found_again
from expunge.data.named import FORMATS, NAMED
from expunge.models import BUILTINS

KEYS = (
    "model", "data", "monitor.prompts", "monitor.corpus", "redteam.validation", "redteam.search", "redteam.neutral",
    "attack", "training.anchor_text", "evaluate", "attacked", "evaluation.scorers",
)  # fmt: skip
"""Where names of models and data stand in the settings of a run; a section stands for all in it."""
KNOWN = {*BUILTINS, *(entry.name for entry in NAMED)}
PREFIXES = tuple(f"{name}:" for name in ("hf", *FORMATS, *(entry.name for entry in NAMED if entry.kind == "pairs")))
"""What may stand before a path: `hf:` of a classifier, a declared format (`csv:PATH`), a set whose file is the user's."""


def portable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run as its folder is to keep them: with absolute paths."""

    def kept(name: str) -> str:
        head, path, tail = name_parts(name)
        there = Path(path).expanduser()
        return head + str(there.resolve()) + tail if path and name not in KNOWN and there.exists() else name

    return with_names(settings, kept)


def restored(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The settings that the run in `folder` kept, every path as it is now: it may have been moved with what it names."""

    def found(name: str) -> str:
        head, path, tail = name_parts(name)
        return head + found_again(path, folder) + tail

    return with_names(settings, found)


def with_names(settings: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """The settings with every name of a model or of data as `change` gives it."""
    return _changed(dict(settings), "", change)


def name_parts(name: str) -> tuple[str, str, str]:
    """What says how it is read (`PREFIXES`), the path or name itself, and a classifier's label (`@toxic`)."""
    head = "" if Path(name).exists() else next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    path = name.removeprefix(head)
    source, at, label = path.rpartition("@") if head == "hf:" else ("", "", "")
    return (head, source, at + label) if at else (head, path, "")


def _changed(tree: Any, path: str, change: Callable[[str], str]) -> Any:
    if isinstance(tree, Mapping):
        return {key: _changed(value, f"{path}.{key}".lstrip("."), change) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_changed(value, path, change) for value in tree]
    wanted = any(path == key or path.startswith(f"{key}.") for key in KEYS)
    return change(tree) if wanted and isinstance(tree, str) else tree
