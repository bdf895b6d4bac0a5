"""Architectures with peculiarities, tiny: perplexity, states, generation, attacks and a step are transformers' own.

All of the installed transformers: `python benchmarks/architectures.py`.
"""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "architectures.py"


@pytest.fixture(scope="module")
def walk():
    spec = importlib.util.spec_from_file_location("architectures", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EQUAL = {
    "bert": "a head of several layers",
    "cohere": "a scale",
    "falcon_h1": "a multiplier, and states beside keys",
    "gemma2": "a cap",
    "granite": "a divisor",
    "hyperclovax": "a scale of another name",
    "jamba": "recurrent layers and experts",
    "lfm2": "convolutions",
    "mamba": "no keys at all",
    "qwen3_5_text": "linear attention",
    "recurrent_gemma": "recurrent layers, a cap and a window",
    "rwkv": "a cache that is wrong in batches, and weights that change in place",
}


@pytest.mark.parametrize("kind", EQUAL)
def test_an_architecture_equals_transformers(walk, kind):
    found = walk.line(kind)
    assert walk.equal(found), found
    recurrent = kind in ("falcon_h1", "jamba", "lfm2", "mamba", "qwen3_5_text", "recurrent_gemma", "rwkv")
    assert (found["batching"] == "shared") == (not recurrent)


def test_an_architecture_that_cannot_be_read_is_refused_before_any_work(walk):
    found = walk.line("deepseek_v4")  # its stream is several wide
    assert "is no residual stream of its width" in found["refused"]
    assert "\n" not in found["refused"]
