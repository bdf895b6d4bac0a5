r"""Text that a user gives, from a file or standard input: opened, decompressed, decoded and cut into lines, here alone.

    for place, line in read_lines("notes.txt.gz"): ...            # ("notes.txt.gz:1", "The river\n")

Compression is told by the first bytes, the encoding by a byte order mark; without one it is UTF-8. A line ends in `\n` or
`\r\n`, and `\r` alone ends one where it does so in the first line; every end is given as `\n`.
"""

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import re
import sys
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from expunge.errors import ExpungeError

STDIN = "-"
BUFFER = 1 << 16

BOMS = (  # the longer ones first: UTF-32's little one begins as UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
PACKED = {  # a name's ending: what a file of it begins with
    ".gz": re.compile(rb"\x1f\x8b"),
    ".bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    ".xz": re.compile(rb"\xfd7zXZ\0"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd"),
}
LINE = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")

_given: "weakref.WeakKeyDictionary[Any, bytes]" = weakref.WeakKeyDictionary()


def read_lines(path: str | Path) -> Iterator[tuple[str, str]]:
    """`(place, line)` of a text file, or of standard input for `-`; each line with its end, the last perhaps without one.

    Raises ExpungeError, one line with the place, where there is no file, the data is damaged, it is not text of its
    encoding, or it holds a NUL.
    """
    name, number, mac = called(path), 0, None
    with unpacked(path) as file:
        try:
            for part in _as_utf8(file):
                if mac is None:
                    mac = b"\r" in part.removesuffix(b"\n").removesuffix(b"\r")
                for line in LINE.findall(part) if mac else [part]:
                    number += 1
                    yield f"{name}:{number}", _text(line, f"{name}:{number}")
        except UnicodeDecodeError as error:  # of UTF-16 or 32, while the next line was read
            reason = f"not the {error.encoding.upper()} that its byte order mark says ({error.reason})"
            raise ExpungeError(f"{name}:{number + 1}: {reason}; convert the file to UTF-8") from None


def read_text(path: str | Path) -> str:
    """The whole of a text file or of standard input; errors as of `read_lines`."""
    return "".join(line for _, line in read_lines(path))


@contextlib.contextmanager
def unpacked(path: str | Path) -> Iterator[io.BufferedReader]:
    """The bytes of a file or of standard input, decompressed. Raises ExpungeError where they cannot be read."""
    with _clearly(called(path)), contextlib.ExitStack() as stack:
        standard = str(path) == STDIN
        raw: Any = io.BytesIO(_standard_input()) if standard else stack.enter_context(Path(path).open("rb", buffering=0))
        file: io.BufferedReader = stack.enter_context(io.BufferedReader(raw, BUFFER))
        ending, head = Path(path).suffix.lower(), file.peek(16)[:16]
        packing = next((ending for ending, magic in PACKED.items() if magic.match(head)), None)
        if ending in PACKED and packing != ending:
            raise ExpungeError(f"{path}: its name ends in {ending}, its content does not begin so; rename it")
        if packing:
            file = stack.enter_context(io.BufferedReader(_decompressed(file, packing), BUFFER))
        yield file


def called(path: str | Path) -> str:
    """What messages call it."""
    return "standard input" if str(path) == STDIN else str(path)


def _standard_input() -> bytes:
    """All of it, read once: loaders that check before they choose go over it twice."""
    if sys.stdin is None:
        raise ExpungeError("standard input: closed; name a file")
    if sys.stdin not in _given:
        buffer = getattr(sys.stdin, "buffer", None)  # what stands in for it may have text alone
        _given[sys.stdin] = buffer.read() if buffer else sys.stdin.read().encode("utf-8", "surrogatepass")
    return _given[sys.stdin]


def _decompressed(file: io.BufferedReader, packing: str) -> Any:
    if packing == ".zst":
        import pyarrow

        return pyarrow.CompressedInputStream(file, "zstd")
    forms: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return forms[packing](file)


def _as_utf8(file: io.BufferedReader) -> io.BufferedReader:
    """Without a byte order mark; what it says is UTF-16 or 32 is recoded on the way."""
    head = file.peek(4)[:4]
    for mark, encoding in BOMS:
        if head.startswith(mark):
            file.read(len(mark))
            return file if encoding == "utf-8" else io.BufferedReader(_Recoded(file, encoding), BUFFER)
    return file


class _Recoded(io.RawIOBase):
    """Bytes of an encoding as those of UTF-8; what stands before an error is given before it is raised."""

    def __init__(self, file: io.BufferedReader, encoding: str):
        self.file, self.encoding = file, encoding
        self.decoder = codecs.getincrementaldecoder(encoding)()
        self.ready, self.failure = b"", None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        ended = False
        while not (self.ready or ended):
            if self.failure:
                raise self.failure
            part = self.file.read(BUFFER)
            ended = not part
            try:
                text = self.decoder.decode(part, final=ended)
            except UnicodeDecodeError as error:
                text, self.failure = error.object[: error.start].decode(self.encoding), error
                ended = False
            self.ready = text.encode("utf-8")
        given = self.ready[: len(buffer)]
        self.ready = self.ready[len(given) :]
        buffer[: len(given)] = given
        return len(given)


def _text(line: bytes, place: str) -> str:
    if b"\0" in line:
        raise ExpungeError(
            f"{place}: a NUL byte, so not UTF-8 text but UTF-16 without its mark, or a binary file; convert it"
        )
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ExpungeError(
            f"{place}: not UTF-8 text (byte {error.start + 1} of the line); convert the file to UTF-8"
        ) from None
    body = text.removesuffix("\n").removesuffix("\r")
    return text if len(body) == len(text) else body + "\n"


@contextlib.contextmanager
def _clearly(name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ExpungeError(f"{name}: no such file") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise ExpungeError(f"{name}: cannot be read ({error.strerror})") from None
        raise ExpungeError(f"{name}: compressed data that is damaged or cut off ({error}); make the file anew") from None
