"""Running text: how WikiText's lines are joined, and where a corpus comes from."""

import io
import json
import sys
from types import SimpleNamespace

import pyarrow
import pytest
from pyarrow import parquet

from expunge.data import load_corpus
from expunge.data.corpora import passages
from expunge.data.named import ASSETS
from expunge.errors import ExpungeError
from expunge.ids import encode
from expunge.rows import read_lines

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


def test_a_file_is_text_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\n two")
    assert load_corpus(tmp_path / "a.txt") == "one\n\n two"


def test_rows_are_the_text_that_their_lines_would_be(write, tmp_path, monkeypatch):
    """Not the file as it is: braces, ids and commas are no text."""
    texts = ["The river, and the sea.", 'He said "so".', "", " = Title = "]
    table = pyarrow.Table.from_pylist([{"text": text, "id": i} for i, text in enumerate(texts)])
    parquet.write_table(table, tmp_path / "a.parquet")
    lines = [json.dumps({"text": text, "id": i}) for i, text in enumerate(texts)]
    sources = [
        write("a.txt", *texts, ""),
        write("a.jsonl", *lines),
        write("a.json", f"[{','.join(lines)}]"),
        write("a.csv", "id,text", '1,"The river, and the sea."', '2,"He said ""so""."', "3,", "4, = Title = "),
        write("a.tsv", "id\ttext", *(f"{i}\t{text}" for i, text in enumerate(texts))),
        tmp_path / "a.parquet",
        "-",
    ]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
    assert {load_corpus(source) for source in sources} == {"\n".join(texts) + "\n"}


def test_a_row_without_text_is_an_error_with_its_place(write):
    for row in ({"txt": "a"}, {"text": 3}, {"text": None}):
        with pytest.raises(ExpungeError, match=r"a.jsonl:2: no field 'text' with text in it \(found: "):
            load_corpus(write("a.jsonl", {"text": "one"}, row))


def test_no_kind_of_file_is_taken_for_text_that_says_nothing_of_it(write):
    with pytest.raises(ExpungeError, match=r"a.html: unknown kind of file; .* txt:a.html"):
        load_corpus(path := write("a.html", "one"))
    assert load_corpus(f"txt:{path}") == "one"


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


def test_neutral_text_in_the_built_in_models_words_is_long_enough_for_a_kl():
    text = load_corpus("builtin-anchor")
    assert len(text) > 400_000
    reported = [row["prompt"] for row in read_lines(ASSETS / "prompts" / "neutral.jsonl")]
    assert not [prompt for prompt in reported if prompt.strip() in text]
