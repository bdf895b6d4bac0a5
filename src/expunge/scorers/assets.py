"""Where the built-in scorers' numbers lie, and how they are read: one safetensors file and one JSON file each, no code.

arrays, facts, digest = read_asset("ngram")
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from expunge.errors import ExpungeError

FOLDER = Path(__file__).parent.parent / "assets" / "scorers"


def read_asset(name: str, folder: Path = FOLDER) -> tuple[dict[str, np.ndarray], dict[str, Any], str]:
    """Arrays and facts of `<name>.safetensors` and `<name>.json`, and the hex sha256 of both files' bytes.

    Raises `ExpungeError` where a file is missing or is not what its name says.
    """
    paths = [folder / f"{name}.safetensors", folder / f"{name}.json"]
    try:
        weights, facts = (path.read_bytes() for path in paths)
        return load(weights), json.loads(facts), hashlib.sha256(weights + facts).hexdigest()
    except OSError as error:
        raise ExpungeError(f"{error.filename}: cannot be read; run recipes/builtin/scorer_{name}.py") from None
    except (SafetensorError, ValueError) as error:
        raise ExpungeError(f"{folder / name}.*: damaged ({error}); run recipes/builtin/scorer_{name}.py") from None


def write_asset(name: str, arrays: dict[str, np.ndarray], facts: dict[str, Any], folder: Path = FOLDER) -> None:
    """The files that `read_asset` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.safetensors").write_bytes(save(arrays))
    (folder / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
