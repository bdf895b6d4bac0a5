"""Whose folder it is: of one run, and of one process at a time.

with claimed(Path("runs/first"), settings):
    ...                                         # a second process is refused; what fails at once leaves nothing behind

`OUT/.lock` names the process. It is the system's lock on it that counts, which ends with the process however that ends.
"""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from expunge.errors import ExpungeError
from expunge.whole import cannot_write, remove, write_text

CONFIG, LOCK, DATE = "config.yaml", ".lock", ".date"
OURS = (CONFIG, LOCK, DATE)
"""What is there before a run has done anything: `DATE` has the day on which it began, which chat templates are told."""


@contextlib.contextmanager
def claimed(folder: Path, settings: Mapping[str, Any], may_change: Sequence[str] = ()) -> Iterator[None]:
    """Hold `folder`, in which `settings` are kept, for this process.

    may_change: dotted keys in which the settings that lie there may differ. Where the block raises before it has left a
    file, the folder is as it was. Raises ExpungeError where it holds another run or something else, where another process
    holds it, and where it cannot be written to.
    """
    _check(folder, settings, may_change)
    with contextlib.ExitStack() as held:
        held.callback(_remove_empty, [path for path in (folder, *folder.parents) if not path.exists()])
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(_locked(folder))
        except OSError as error:
            raise cannot_write(folder, error) from None
        _check(folder, settings, may_change)  # another may have come and gone
        for unfinished in list(folder.rglob("*.tmp")):  # of a process that was killed
            remove(unfinished)
        first = not (folder / CONFIG).exists()
        write_text(folder / CONFIG, yaml.safe_dump(dict(settings), sort_keys=False))
        try:
            yield
        except BaseException:
            if first and not any(path.is_file() and path.name not in OURS for path in folder.rglob("*")):
                _empty(folder)
            raise


def _remove_empty(folders: Sequence[Path]) -> None:
    """From the inside out, up to one that is not empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != LOCK:
            remove(path)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    path = folder / LOCK
    with _open_locked(path) as file:
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _open_locked(path: Path) -> Any:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "unknown"
            file.close()
            raise ExpungeError(
                f"{path.parent}: process {holder} is writing there: wait until it ends, or choose another --out"
            ) from None
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            return file
        file.close()  # its holder has just removed it


def _check(folder: Path, settings: Mapping[str, Any], may_change: Sequence[str]) -> None:
    path = folder / CONFIG
    if path.is_file():
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            raise ExpungeError(f"{path}: not valid YAML: choose another --out, or remove the folder") from None
        if difference := _first_difference(found, settings, "", may_change):
            raise ExpungeError(f"{folder} holds another run ({difference}): choose another --out, or remove the folder")
    elif folder.is_dir() and any(
        inside.name not in (LOCK, DATE) and not inside.match(f"{CONFIG}.*.tmp") for inside in folder.iterdir()
    ):
        raise ExpungeError(f"{folder} is not empty and holds no run: choose another --out")


def _is_begun(path: Path) -> bool:
    """Is this what a process leaves that was killed at once?"""
    return path.name in (LOCK, DATE) or path.match(f"{CONFIG}.*.tmp") or path.match(f"{DATE}.*.tmp")


def _first_difference(there: Any, here: Any, path: str, ignore: Sequence[str]) -> str | None:
    if path in ignore:
        return None
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**there, **here}:
            found = _first_difference(there.get(key), here.get(key), f"{path}.{key}".lstrip("."), ignore)
            if found:
                return found
        return None
    return None if there == here else f"{path or CONFIG} is {there!r} there and {here!r} here"
