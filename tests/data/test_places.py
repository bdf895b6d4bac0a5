import json
import lzma
import os

import pytest

from expunge.data import load_pairs
from expunge.data.named import ASSETS, named_sets
from expunge.data.places import WIKIPEDIA, WIKITEXT, Place, check_digits, lines_of, placed_pairs
from expunge.data.records import read_records
from expunge.errors import ExpungeError

WIKITEXT_LINES = [" ", " = A river = ", " ", " The river rises in the hills . It is short . "]
ARTICLES = [{"id": "12", "text": "Mills.\n\nA mill grinds corn."}, {"id": "31", "text": "Bread is old."}]


@pytest.fixture
def public_text(tmp_path, monkeypatch):
    """A folder of public text of which every word is known."""
    (tmp_path / "wikitext-2").mkdir()
    (tmp_path / "wikitext-2" / "wiki.train.tokens").write_text("\n".join(WIKITEXT_LINES) + "\n", encoding="utf-8")
    (tmp_path / "wikipedia_en_2015").mkdir()
    with lzma.open(tmp_path / "wikipedia_en_2015" / "part0.jsonl.xz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(article) + "\n" for article in ARTICLES)
    monkeypatch.setenv("EXPUNGE_DATA", str(tmp_path))


def row(place: Place, text: str, chosen: str = " on .", rejected: str = " off .") -> dict:
    return place.row() | {"check": check_digits(text), "chosen": chosen, "rejected": rejected}


ROWS = [
    ("pairs:1", row(Place(WIKIPEDIA, "12/2", 2, 13), "mill grinds")),
    ("pairs:2", row(Place(WIKITEXT, 3, 31, 36), "It is", " long .")),
    ("pairs:3", row(Place(WIKITEXT, 3, 0, 9), "The river")),
    ("pairs:4", row(Place(WIKIPEDIA, "31/0", 0, 5), "Bread")),
]


def test_prompts_come_from_their_places_in_the_order_of_the_rows(public_text):
    assert placed_pairs(ROWS) == [
        ("mill grinds", " on .", " off ."),
        ("It is", " long .", " off ."),
        ("The river", " on .", " off ."),
        ("Bread", " on .", " off ."),
    ]


def test_lines_are_numbered_as_the_hub_numbers_its_rows(public_text, monkeypatch):
    here = list(lines_of(WIKITEXT))
    monkeypatch.delenv("EXPUNGE_DATA")
    hub = [("row", {"text": f"{line}\n" if line.strip() else ""}) for line in WIKITEXT_LINES]
    monkeypatch.setattr("expunge.data.places.named_records", lambda entry: iter(hub))
    assert list(lines_of(WIKITEXT)) == here
    assert here[1] == (1, "= A river =")


@pytest.mark.parametrize("change", [{"end": 10}, {"line": 99}, {"check": "00000000"}])
def test_another_text_is_refused_with_the_rows_place(public_text, change):
    bad = [*ROWS[:2], ("pairs:3", ROWS[2][1] | change)]
    with pytest.raises(ExpungeError, match=rf"^pairs:3: {WIKITEXT} has another text at line \d+ than"):
        placed_pairs(bad)


def test_without_the_articles_a_line_says_what_is_missing(monkeypatch):
    monkeypatch.delenv("EXPUNGE_DATA", raising=False)
    with pytest.raises(ExpungeError, match=r"^wikipedia-2015: not on this machine; set EXPUNGE_DATA"):
        placed_pairs(ROWS[:1])


def test_no_prompt_of_the_built_in_set_is_in_the_package():
    entry = named_sets("pairs")["builtin-pplm-wikipedia"]
    for _, found in read_records(ASSETS / str(entry.asset)):
        assert found.keys() == {"source", "line", "start", "end", "check", "chosen", "rejected"}
        assert found["source"] in (WIKITEXT, WIKIPEDIA)


@pytest.mark.skipif("EXPUNGE_DATA" not in os.environ, reason="needs the real data")
def test_the_built_in_set_is_whole():
    pairs = load_pairs("builtin-pplm-wikipedia")
    assert len({pair.prompt for pair in pairs}) == len(pairs)
    assert not any("<unk>" in pair.prompt for pair in pairs)
