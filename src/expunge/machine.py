"""What this machine offers, as far as it can be said at once, without torch: the first part of `expunge doctor`.

machine()["memory"]          # "23.4 GB are free"
"""

import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
from huggingface_hub.constants import HF_HUB_OFFLINE

from expunge.config import cache_folder
from expunge.paths import expand
from expunge.provenance import environment


def machine() -> dict[str, str]:
    """What there is to work with, by name, each in a line."""
    found = environment()
    cache = cache_folder("")
    at = next(path for path in (cache, *cache.parents) if path.exists())
    held = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    data = os.environ.get("EXPUNGE_DATA")
    if not data:
        data = "EXPUNGE_DATA is not set: sets that are not built in are read from the hub"
    elif not Path(expand(data)).is_dir():
        data = f"EXPUNGE_DATA={data}, which is no folder"
    return {
        "expunge": f"{found['expunge']}, Python {found['python']}",
        "libraries": ", ".join(f"{name} {number}" for name, number in found["packages"].items()),
        "memory": f"{psutil.virtual_memory().available / 1e9:.1f} GB are free",
        "cache": f"{cache}: {held / 1e9:.1f} GB, {shutil.disk_usage(at).free / 1e9:.0f} GB are free there",
        "data": data,
        "quantization": _bitsandbytes(),
        "offline": "yes" if HF_HUB_OFFLINE else "no",
    }


def _bitsandbytes() -> str:
    try:
        return f"bitsandbytes {version('bitsandbytes')}"
    except PackageNotFoundError:
        return "bitsandbytes is not installed: no 4bit or 8bit (pip install 'expunge[quant]')"
