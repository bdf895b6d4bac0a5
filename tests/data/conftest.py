"""A tiny byte-level tokenizer and a tiny random GPT-2, and ways to write files."""

import json
import string
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

END = "<|endoftext|>"
TEXT = ["The river runs to the sea. It is wide, and the boats are slow.", "A film about a man. It was good."]
ALPHABET = [*string.ascii_letters, *string.digits, *".,!?='", "Ġ", "Ċ"]  # byte-level BPE's space and line end


def byte_level(bos: bool = False) -> PreTrainedTokenizerFast:
    """100 entries, so that any tokens are text; with `bos`, bos goes before every text, as Llama's and Gemma's do."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=100, special_tokens=[END], initial_alphabet=ALPHABET, show_progress=False)
    )
    if bos:
        inner.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=END, eos_token=END)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level()


@pytest.fixture(scope="session")
def tokenizer_with_bos() -> PreTrainedTokenizerFast:
    return byte_level(bos=True)


@pytest.fixture(scope="session")
def model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=160, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write("a.jsonl", row, row)` or `write("a.txt", "text")`: a file of these rows, or of this text."""

    def write_file(name: str, *content: dict | str) -> Path:
        lines = [line if isinstance(line, str) else json.dumps(line) for line in content]
        path = tmp_path / name
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return write_file
