"""Perplexity against a plain double loop; uniform logits; invariances; the number of tokens of WikiText-2."""

import math
import os
from pathlib import Path

import pytest
import torch

import expunge.metrics.perplexity as module
from expunge.errors import ExpungeError
from expunge.metrics.perplexity import row_nll, text_windows

TEXT = "The river runs past the old mill and on to the sea. She carried the kind letter home. " * 8


def plain_nll(model, ids, first):
    """-log p of each token from `first` on, a full forward per token."""
    total = 0.0
    for i in range(first, len(ids)):
        total -= model(torch.tensor([ids[:i]])).logits[0, -1].log_softmax(-1)[ids[i]].item()
    return total


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2"])
def test_rows_equal_a_plain_loop(architecture, tiny_model):
    model = tiny_model(architecture)
    rows = [([5, 9, 30, 7, 61, 2], 1), ([8, 3], 1), ([4, 100, 11, 9], 3), ([4, 100], 2)]
    nll, count = row_nll(model, rows)
    assert count.tolist() == [5, 1, 1, 0]
    assert nll == pytest.approx([plain_nll(model, *row) for row in rows], rel=1e-4)


def test_windows_are_cut_with_and_without_bos(tiny_model, tokenizer, bos_tokenizer):
    model = tiny_model()
    ids = tokenizer(TEXT).input_ids
    found = text_windows(model, tokenizer, TEXT)
    lengths = [len(ids[i : i + 64]) for i in range(0, len(ids), 64)]
    assert found.tokens.tolist() == [length - 1 for length in lengths]
    assert found.nll[0] == pytest.approx(plain_nll(model, ids[:64], 1), rel=1e-4)
    assert found.words == len(TEXT.split())
    with_bos = text_windows(model, bos_tokenizer, TEXT)
    plain = bos_tokenizer(TEXT, add_special_tokens=False).input_ids
    assert with_bos.tokens.sum() == len(plain)  # bos predicts the first token of each window
    start = [bos_tokenizer.bos_token_id, *plain[:63]]
    assert with_bos.nll[0] == pytest.approx(plain_nll(model, start, 1), rel=1e-4)


def test_uniform_logits_give_the_vocabulary(tiny_model, tokenizer):
    model = tiny_model()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    found = text_windows(model, tokenizer, TEXT)
    assert math.exp(found.nll.sum() / found.tokens.sum()) == pytest.approx(model.config.vocab_size, rel=1e-5)


def test_neither_order_nor_batch_nor_chunk_matters(tiny_model, monkeypatch):
    model = tiny_model()
    rows = [(list(range(3, 3 + n)), 1) for n in (9, 30, 2, 17, 30, 5)]
    wanted = row_nll(model, rows)[0]
    assert row_nll(model, rows[::-1])[0] == pytest.approx(wanted[::-1], rel=1e-5)
    monkeypatch.setattr(module, "BATCH_TOKENS", 40)
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 1000)
    assert row_nll(model, rows)[0] == pytest.approx(wanted, rel=1e-5)


def test_a_limit_of_tokens_and_a_text_too_short(tiny_model, tokenizer):
    found = text_windows(tiny_model(), tokenizer, TEXT, max_tokens=70)
    assert found.tokens.tolist() == [63, 5]
    with pytest.raises(ExpungeError, match="fewer than two tokens"):
        text_windows(tiny_model(), tokenizer, "")


@pytest.mark.skipif("EXPUNGE_DATA" not in os.environ, reason="EXPUNGE_DATA is not set")
def test_wikitext2_is_joined_as_published():
    """Published: 287,644 tokens of wikitext-2-raw-v1. The local copy has rare words as <unk>, and 987 tokens fewer."""
    from tokenizers import ByteLevelBPETokenizer

    folder = Path(os.environ["EXPUNGE_DATA"])
    bpe = ByteLevelBPETokenizer(str(folder / "gpt2_bpe/encoder.json"), str(folder / "gpt2_bpe/vocab.bpe"))
    lines = (folder / "wikitext-103-valtest/wiki.test.tokens").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    joined = "\n\n".join(line + "\n" if line.strip() else "" for line in lines)
    assert len(lines) == 4358
    assert len(bpe.encode(joined).ids) == 286_657
