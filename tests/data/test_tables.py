"""TSV: a quotation mark is text, unless only quoting makes sense of the table; and no row is lost or merged in silence."""

import csv
import io
import logging

import pytest

from expunge.data import load_pairs
from expunge.data.tables import read_csv, read_tsv
from expunge.errors import ExpungeError

DIALOGUE = [  # one field opens a quotation, another closes one
    ("He turned and said", " something kind.", '"Go away, he said'),
    ("The day", " was mild.", " was cold."),
    ("She answered", " with a smile.", 'no"'),
    ("The last", ' "mild" one', ' is "cold"'),
]


def rows_of(path) -> list[tuple[str, ...]]:
    return [tuple(row.values()) for _, row in read_tsv(path)]


def as_table(rows, quoting=csv.QUOTE_NONE) -> str:
    out = io.StringIO()
    writer = csv.writer(out, delimiter="\t", quoting=quoting, lineterminator="\n")
    if quoting == csv.QUOTE_NONE:
        return "".join("\t".join(row) + "\n" for row in [("prompt", "chosen", "rejected"), *rows])
    writer.writerows([("prompt", "chosen", "rejected"), *rows])
    return out.getvalue()


def test_quotation_marks_are_text(write, caplog):
    path = write("a.tsv", as_table(DIALOGUE))
    assert rows_of(path) == DIALOGUE
    assert [pair.rejected for pair in load_pairs(path)] == [rejected for _, _, rejected in DIALOGUE]
    assert next(read_tsv(path))[0] == f"{path}:2"
    assert not caplog.records


@pytest.mark.parametrize("field", ['"All of it in quotes"', '"', '""', '"a" and "b"', "it's 5\" long"])
def test_fields_in_quotes_keep_them(write, field, caplog):
    """Where a whole column is in quotes, that is said."""
    for other, said in ((field, field in ('"All of it in quotes"', '""')), ("plain", False)):
        rows = [(field, "a", "b"), (other, "c", "d")]
        assert rows_of(write(f"{said}.tsv", as_table(rows))) == rows
        assert ("every field of a column stands in quotation marks" in caplog.text) == said
        caplog.clear()


@pytest.mark.parametrize("fields", [('of "two"', "a", "b"), ("of\ttabs", "a", "b"), ("of\nlines", '"', "b")])
def test_a_table_that_only_quoting_makes_sense_of(write, fields):
    rows = [("plain", "a", "b"), fields, ("plain too", "a", "b")]
    assert rows_of(write("a.tsv", as_table(rows, csv.QUOTE_MINIMAL))) == rows
    assert rows_of(write("b.tsv", as_table(rows, csv.QUOTE_ALL))) == rows


def test_rows_of_several_lines_are_said(write, caplog):
    rows = [("of\nlines", "a", "b"), ("plain", "a", "b")]
    with caplog.at_level(logging.WARNING):
        path = write("a.tsv", as_table(rows, csv.QUOTE_MINIMAL))
        assert rows_of(path) == rows_of(path) == rows
    [record] = caplog.records
    assert "quoted fields with tabs or line ends in them, read by the rules of CSV: 2 rows" in record.getMessage()


def test_quotes_of_both_kinds_are_kept_and_said(write, caplog):
    rows = [('"He said ""go"""', "a", "b"), ('5" long', "a", "b")]
    assert rows_of(path := write("a.tsv", as_table(rows))) == rows
    assert f"{path}: 1 fields look quoted, others do not" in caplog.text


@pytest.mark.parametrize("line", ["a\tb", "a\tb\tc\td", '"a\tb"', '"a\tb"\tc\t"d'])
def test_a_ragged_line_is_an_error(write, line):
    path = write("a.tsv", as_table(DIALOGUE) + line + "\n")
    with pytest.raises(ExpungeError, match=r"a.tsv:\d: not as many fields as the header names \(\d instead of 3\)"):
        rows_of(path)


def test_a_header_of_its_own(write):
    path = write("a.tsv", '"one\t1\ntwo"\t0')
    assert list(read_tsv(path, ("text", "label"))) == [
        (f"{path}:1", {"text": '"one', "label": "1"}),
        (f"{path}:2", {"text": 'two"', "label": "0"}),
    ]


def test_semicolons_where_the_header_has_no_comma(write):
    assert [row for _, row in read_csv(write("a.csv", "text;id", "one, two;1"))] == [{"text": "one, two", "id": "1"}]
    assert [row for _, row in read_csv(write("b.csv", "text,a;b", "one;two,1"))] == [{"text": "one;two", "a;b": "1"}]
