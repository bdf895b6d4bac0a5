import hashlib
import json
import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def rtp() -> dict[int, dict]:
    """RealToxicityPrompts rows with Perspective scores, by the 64-bit hash of the prompt."""
    folder = os.environ.get("EXPUNGE_DATA")
    if not folder:
        pytest.skip("EXPUNGE_DATA is not set: no RealToxicityPrompts rows")
    rows = {}
    for name in ("toxic", "nontoxic"):
        lines = (Path(folder) / "rtp_decodingtrust" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        for row in map(json.loads, lines):
            if row["continuation"]["toxicity"] is not None:
                prompt = row["prompt"]["text"].encode()
                rows[int.from_bytes(hashlib.blake2b(prompt, digest_size=8).digest(), "big")] = row
    return rows
