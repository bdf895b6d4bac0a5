"""Where a figure comes from: versions, the state of the source, hashes of what went in, seconds and peak memory."""

import contextlib
import hashlib
import json
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "tokenizers",
    "safetensors",
    "scikit-learn",
    "numpy",
    "scipy",
)


STATUS = Path("/proc/self/status")
_earlier_peak = 0  # that was forgotten since


def digest(thing: Any) -> str:
    """Hex sha256 of anything made of dataclasses, mappings, sequences and scalars. Raises TypeError for anything else."""
    return hashlib.sha256(_canonical(thing)).hexdigest()


def data_digest(data: Any) -> str:
    """Hex sha256 of data: the rows themselves, in order, and the names that figures on them bear.

    data: rows (dataclasses, or tuples of scalars), a text, or a dataclass of these, such as Unpaired or EvaluationData.
    Where they were read from is not in it. Their text is not held twice.
    """
    total = hashlib.sha256()
    for part in _parts(data):
        total.update(_canonical(part) + b"\n")
    return total.hexdigest()


def _parts(data: Any) -> Iterator[Any]:
    """Rows one by one, and between them what tells a list from what stands beside it."""
    if is_dataclass(data) and not isinstance(data, type) and any(_is_many(value) for value in vars(data).values()):
        for name, value in vars(data).items():
            yield {"field": name}
            yield from _parts(value)
    elif isinstance(data, Mapping):
        for name, value in data.items():
            yield {"name": name}
            yield from _parts(value)
    elif isinstance(data, Sequence) and not isinstance(data, str):
        yield {"rows": len(data)}
        yield from data
    else:
        yield data


def _is_many(thing: Any) -> bool:
    return isinstance(thing, (Mapping, Sequence)) and not isinstance(thing, str)


def software() -> dict[str, str]:
    """What turns a model and data into figures, for keys of what is kept for good: ours, and the models' code."""
    return {name: version(name) for name in ("expunge", "transformers")}


def _canonical(thing: Any) -> bytes:
    return json.dumps(thing, sort_keys=True, default=_plain).encode()


def _plain(thing: Any) -> Any:
    if is_dataclass(thing) and not isinstance(thing, type):
        return asdict(thing)
    if isinstance(thing, (Path, Enum)):
        return str(thing)
    if isinstance(thing, (set, frozenset)):
        return sorted(thing)
    if isinstance(thing, Mapping):
        return dict(thing)
    raise TypeError(f"{type(thing).__name__} has no lasting form, so no hash")


def environment() -> dict[str, Any]:
    """Versions of what ran, and the commit of this package's source where it is a checkout."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "expunge": version("expunge"),
        "source": git.stdout.strip() or None,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "platform": platform.platform(),
    }


def peak_memory_bytes() -> int:
    """The most host memory that this process has held."""
    return max(_earlier_peak, recent_peak_bytes())


def recent_peak_bytes() -> int:
    """The same since the last `forget_peak`. `ru_maxrss`, in kibibytes, on macOS in bytes, may on Linux be the parent's."""
    for line in STATUS.read_text().splitlines() if STATUS.exists() else []:
        if line.startswith("VmHWM:"):  # which some containers leave out
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """Begin `recent_peak_bytes` anew with what is held now, on Linux: other systems let no process do so."""
    global _earlier_peak
    _earlier_peak = peak_memory_bytes()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
