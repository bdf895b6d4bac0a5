"""Running text: how WikiText's lines are joined, and where a corpus comes from."""

import sys
from types import SimpleNamespace

import pytest

from expunge.data import load_corpus
from expunge.data.corpora import passages
from expunge.errors import ExpungeError
from expunge.ids import encode

LINES = [" ", " = Title = ", " ", " A sentence . "]
ROWS = ["", " = Title = \n", "", " A sentence . \n"]  # what the hub set makes of these lines


@pytest.fixture
def wikitext(tmp_path, monkeypatch):
    (tmp_path / "wikitext-103-valtest").mkdir()
    (tmp_path / "wikitext-103-valtest/wiki.test.tokens").write_text("\n".join(LINES) + "\n")
    monkeypatch.setenv("EXPUNGE_DATA", str(tmp_path))


def test_wikitext_lines_become_the_hub_sets_rows(wikitext):
    assert load_corpus("wikitext2") == "\n\n".join(ROWS) == "\n\n = Title = \n\n\n\n\n A sentence . \n"


def test_wikitext_from_a_hub(monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return [{"text": row} for row in ROWS]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.delenv("EXPUNGE_DATA", raising=False)
    assert load_corpus("wikitext2") == "\n\n".join(ROWS)
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test")]


def test_a_file_is_text_as_it_is(write):
    assert load_corpus(write("a.txt", "one\r\n\n two")) == "one\r\n\n two"


@pytest.mark.parametrize("kind", ["byte-level", "prepend"])
def test_a_passage_is_as_long_as_its_tokens_allow(family, kind):
    """A word is counted as it stands after another: SentencePiece gives one that stands alone a token more."""
    tokenizer = family(kind)
    text = "The river runs past the old mill and on to the sea. " * 8
    found = list(passages(text, tokenizer, 12))
    sizes = [len(encode(tokenizer, passage)) for passage in found]
    assert " ".join(found) == text.strip() and max(sizes) <= 12
    assert all(size + len(encode(tokenizer, "a sea.")) > 12 for size in sizes[:-1])


def test_bad_sources(write, monkeypatch):
    monkeypatch.delenv("EXPUNGE_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source, part in [
        ("wikitext", "did you mean 'wikitext2'?"),
        ("wikitext2", "set EXPUNGE_DATA"),
        (write("blank.txt", " \n"), "no text in it"),
        ("gone.txt", "no such file"),
    ]:
        with pytest.raises(ExpungeError) as error:
            load_corpus(source)
        assert part in str(error.value) and "\n" not in str(error.value)
