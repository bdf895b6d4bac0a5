"""Whose folder it is: of one run, and of one process at a time.

with claimed(Path("runs/first"), settings):
    ...                                         # a second process is refused; what fails at once leaves nothing behind

`OUT/.lock` names the process. It is the system's lock on it that counts, which ends with the process however that ends.
"""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from expunge.errors import ExpungeError
from expunge.whole import cannot_write, remove, write_text

CONFIG, LOCK, BEGAN = "config.yaml", ".lock", ".began.json"
OURS = (CONFIG, LOCK, BEGAN)
"""What is there before a run has done anything. `BEGAN` says on which day that was, and where."""


@contextlib.contextmanager
def claimed(
    folder: Path,
    settings: Mapping[str, Any],
    may_change: Sequence[str] = (),
    read: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
) -> Iterator[None]:
    """Hold `folder`, in which `settings` are kept, for this process.

    may_change: dotted keys in which the settings that lie there may differ; read: what is done to those before they are
    compared. Where the block raises before it has left a file, the folder is as it was. Raises ExpungeError where it
    holds another run or something else, where another process holds it, and where it cannot be written to.
    """
    _check(folder, settings, may_change, read)
    with contextlib.ExitStack() as held:
        held.callback(_remove_empty, [path for path in (folder, *folder.parents) if not path.exists()])
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(_locked(folder))
        except OSError as error:
            raise cannot_write(folder, error) from None
        _check(folder, settings, may_change, read)  # another may have come and gone
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


def began(folder: Path) -> dict[str, Any]:
    """The `day` on which the work in `folder` began and the `folders` in which it has lain; empty where it has not begun."""
    path = folder / BEGAN
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError):
        raise ExpungeError(f"{path}: not the JSON object that the run left: remove it, and the day is today's") from None


def begin(folder: Path, day: str) -> None:
    """Keep the day, unless there is one, and where the folder is now."""
    known, here = began(folder), str(folder.resolve())
    places = known.get("folders", [])
    if here not in places:
        write_text(folder / BEGAN, json.dumps({"day": known.get("day", day), "folders": [*places, here]}) + "\n")


def found_again(path: str, folder: Path) -> str:
    """`path`, or, where it is gone and `folder` was moved since its work began, what lies there as seen from `folder`."""
    if Path(path).is_absolute() and not Path(path).exists():
        for place in began(folder).get("folders", []):
            moved = (folder.resolve() / os.path.relpath(path, place)).resolve()
            if moved.exists():
                return str(moved)
    return path


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


def _check(
    folder: Path,
    settings: Mapping[str, Any],
    may_change: Sequence[str],
    read: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> None:
    path = folder / CONFIG
    if path.is_file():
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
            found = read(found) if isinstance(found, Mapping) else found
        except (yaml.YAMLError, UnicodeDecodeError):
            raise ExpungeError(f"{path}: not valid YAML: choose another --out, or remove the folder") from None
        if difference := _first_difference(found, settings, "", may_change):
            raise ExpungeError(f"{folder} holds another run ({difference}): choose another --out, or remove the folder")
    elif folder.is_dir() and any(
        inside.name not in (LOCK, BEGAN) and not inside.match(f"{CONFIG}.*.tmp") for inside in folder.iterdir()
    ):
        raise ExpungeError(f"{folder} is not empty and holds no run: choose another --out")


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
