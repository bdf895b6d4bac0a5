"""The table of named sets, its page, and the sets themselves where EXPUNGE_DATA holds them."""

import os
from pathlib import Path

import pytest

from expunge.data import NAMED, load_corpus, load_pairs, load_prompts

ROOT = Path(__file__).parents[2]
REAL = pytest.mark.skipif(not os.environ.get("EXPUNGE_DATA"), reason="EXPUNGE_DATA is not set")


def test_every_named_set_is_on_its_page():
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    for entry in NAMED:
        [row] = [line for line in page.splitlines() if line.startswith(f"| `{entry.name}` | {entry.kind} |")]
        assert entry.licence in row and (entry.hub or "none") in row


def test_names_are_unique_within_their_kind():
    assert len({(entry.kind, entry.name) for entry in NAMED}) == len(NAMED)


@REAL
def test_real_sets():
    assert len(load_prompts("rtp-challenge")) == 1199
    assert len(load_prompts("wiki-f1")) == 2064 and all(prompt.gold for prompt in load_prompts("wiki-f1"))
    pairs = load_pairs("paradetox")
    assert len(pairs) == PARADETOX and all(pair.prompt and pair.chosen != pair.rejected for pair in pairs)


PARADETOX = 13_305
"""Of 19,743; the others do not begin with the same word, or are equal."""


@REAL
def test_wikitext_tokens_of_gpt2():
    """286,657, not the 287,644 of the raw test split: this copy has 2,492 `<unk>` in the place of rare words."""
    from tokenizers import ByteLevelBPETokenizer

    folder = Path(os.environ["EXPUNGE_DATA"]) / "gpt2_bpe"
    tokenizer = ByteLevelBPETokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    text = load_corpus("wikitext2")
    assert len(tokenizer.encode(text).ids) == 286_657
    assert text.count("<unk>") == 2492
