"""Where a figure comes from: versions, the state of the source, hashes of what went in, seconds and peak memory."""

import contextlib
import hashlib
import json
import platform
import resource
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
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
    """Hex sha256 of anything made of dataclasses, mappings, sequences and scalars."""
    return hashlib.sha256(json.dumps(thing, sort_keys=True, default=_plain).encode()).hexdigest()


def digest_all(things: Iterable[Any]) -> str:
    """Hex sha256 of many things in order, without holding their text at once."""
    total = hashlib.sha256()
    for thing in things:
        total.update(json.dumps(thing, sort_keys=True, default=_plain).encode() + b"\n")
    return total.hexdigest()


def _plain(thing: Any) -> Any:
    if is_dataclass(thing) and not isinstance(thing, type):
        return asdict(thing)
    return str(thing)


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
