"""A small typed registry: names to classes, imported only when asked for.

    METHODS = Registry("method", {"repo": "expunge.methods.repo:REPO"})
    METHODS.get("repo")          # imports the module, returns the class
    load_plugin(Path("my.py"))   # runs a file whose classes register themselves

A plug-in registers a class by decorator (`@METHODS.register("mine")`) or by an entry point in the group `expunge.methods`.
Two classes cannot have one name.
"""

import ast
import difflib
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from expunge.errors import ExpungeError

T = TypeVar("T")
OURS = __name__.split(".")[0]


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
        """A class decorator. Raises ExpungeError where another class has the name already."""

        def add(cls: type[T]) -> type[T]:
            self._check_free(name, _place(cls))
            cls.name = name  # type: ignore[attr-defined]
            self._entries[name] = cls
            return cls

        return add

    def names(self) -> list[str]:
        return sorted({*self._entries, *(point.name for point in self._points())})

    def get(self, name: str) -> type[T]:
        """The class called `name`; raises `UnknownName` with the nearest known name."""
        entry = self._entries.get(name)
        if isinstance(entry, type):
            return entry
        points = [point for point in self._points() if point.name == name]
        for point in points:
            self._check_free(name, point.value, points[0].value)
        if entry is None:
            if points:
                return points[0].load()
            raise UnknownName(f"unknown {self.kind} {name!r}{did_you_mean(name, self.names())}")
        module, _, attribute = entry.partition(":")
        found = self._entries[name] = getattr(importlib.import_module(module), attribute)
        return found

    def _points(self) -> Iterable[EntryPoint]:
        return entry_points(group=f"expunge.{self.kind}s")

    def _check_free(self, name: str, place: str, other: str | None = None) -> None:
        """Raise ExpungeError where `name` belongs to a class at another place, `MODULE:CLASS`."""
        entry = self._entries.get(name)
        taken = other if entry is None else entry if isinstance(entry, str) else _place(entry)
        if taken not in (None, place):
            raise ExpungeError(f"two {self.kind}s are called {name!r}: {taken} and {place}; rename one of them")

    def about(self, name: str, constant: str, default: Any = "") -> Any:
        """A constant of the class called `name`, such as its `__doc__`; a built-in one is read, not imported.

        default: where neither it nor a class of ours below it says anything. Raises `UnknownName`.
        """
        entry = self._entries.get(name)
        if not isinstance(entry, str):
            return getattr(self.get(name), constant, None) or default
        module, _, attribute = entry.partition(":")
        found = _read_constant(module, attribute, constant)
        return default if found is None else found


def load_plugin(file: Path) -> ModuleType:
    """Run a Python file, once, so that its classes register themselves. Raises ExpungeError, one line, where that fails."""
    file = file.resolve()
    name = f"expunge_plugin_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}_{file.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise ExpungeError(f"--plugin {file}: not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        line = frames[-1].lineno if frames else getattr(error, "lineno", None)
        reason = str(error) if isinstance(error, ExpungeError) else f"{type(error).__name__}: {error}"
        raise ExpungeError(f"--plugin {file}{f':{line}' if line else ''}: {reason}") from error
    return module


def _place(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _read_constant(module: str, attribute: str, constant: str) -> Any:
    """From the source of a class or, a docstring aside, of our classes that it is made from; None if none has it."""
    waiting = [(module, attribute)]
    while waiting:  # in breadth: what two of them are made from comes after both
        module, attribute = waiting.pop(0)
        found = importlib.util.find_spec(module)
        assert found and found.origin, f"{module}: no such module"
        tree = ast.parse(Path(found.origin).read_text(encoding="utf-8"))
        [body] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == attribute]
        if constant == "__doc__":
            return ast.get_docstring(body)
        for node in body.body:
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == constant and node.value:
                return ast.literal_eval(node.value)
        homes = {
            alias.name: node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
        }
        homes |= {node.name: module for node in tree.body if isinstance(node, ast.ClassDef)}
        bases = [(homes.get(base, ""), base) for base in map(ast.unparse, body.bases)]
        waiting += [(home, base) for home, base in bases if home.startswith(f"{OURS}.")]
    return None
