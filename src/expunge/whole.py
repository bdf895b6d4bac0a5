"""Files and folders that are whole or not there: written under a temporary name, then renamed.

with whole(Path("out/model")) as temporary:
    model.save_pretrained(temporary)
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from expunge.errors import ExpungeError


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` for a file or a folder, which takes its place at the end of the block, and else is removed.

    Raises ExpungeError where the place cannot be written to or has no room.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    remove(temporary)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if temporary.is_dir():
            remove(path)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from None
    finally:
        remove(temporary)


def write_text(path: Path, text: str) -> None:
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def cannot_write(path: Path, error: Exception) -> ExpungeError:
    """The error for the user; libraries put the system's reason into words of their own."""
    reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
    return ExpungeError(f"{path}: cannot be written ({reason}): make room there, or name another folder")


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it; nothing where it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(NotADirectoryError):
            path.unlink(missing_ok=True)
