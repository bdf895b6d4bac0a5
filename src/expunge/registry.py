"""A small typed registry: names to classes, imported only when asked for.

    METHODS = Registry("method", {"repo": "expunge.methods.repo:REPO"})
    METHODS.get("repo")          # imports the module, returns the class

Plug-ins register by decorator (`@METHODS.register("mine")`) or by an entry point in the group `expunge.methods`.
"""

import difflib
import importlib
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import Generic, TypeVar

T = TypeVar("T")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'repo'?)"`, or the list of what is known where nothing is close."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(known)})"


class UnknownName(KeyError):
    """A name that is not registered; `str()` is one line with a suggestion."""

    def __str__(self) -> str:
        return self.args[0]


class Registry(Generic[T]):
    """Names of one kind of thing. Values are classes, or `"module:Class"` until first use."""

    def __init__(self, kind: str, builtin: dict[str, str]):
        self.kind = kind
        self._entries: dict[str, str | type[T]] = dict(builtin)

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        def add(cls: type[T]) -> type[T]:
            cls.name = name  # type: ignore[attr-defined]
            self._entries[name] = cls
            return cls

        return add

    def names(self) -> list[str]:
        plugged = {point.name for point in entry_points(group=f"expunge.{self.kind}s")}
        return sorted(set(self._entries) | plugged)

    def get(self, name: str) -> type[T]:
        """The class called `name`; raises `UnknownName` with the nearest known name."""
        entry = self._entries.get(name)
        if entry is None:
            for point in entry_points(group=f"expunge.{self.kind}s", name=name):
                return point.load()
            raise UnknownName(f"unknown {self.kind} {name!r}{did_you_mean(name, self.names())}")
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = self._entries[name] = getattr(importlib.import_module(module), attribute)
        return entry  # type: ignore[return-value]
