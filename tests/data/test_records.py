"""Files row by row: what is held of a large one, and one clear line for each thing that can be wrong with a file."""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import random
import subprocess
import sys

import pyarrow
import pytest
from pyarrow import parquet

from expunge.data import load_corpus, load_pairs, load_prompts
from expunge.data.records import read_records, selected
from expunge.errors import ExpungeError

ROW = {"prompt": "The sky", "chosen": " is blue", "rejected": " is mud"}
LINE = json.dumps(ROW)
MEGABYTES = 40


def zstd(data: bytes) -> bytes:
    packed = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(data)
    return packed.getvalue().to_pybytes()


def random_lines() -> bytes:
    """JSON lines that are as long packed."""
    draw = random.Random(0)
    return b"".join(b'{"text": "%d"}\n' % draw.getrandbits(60) for _ in range(2000))


def spoilt(packed: bytes) -> bytes:
    return packed[:2000] + b"here it is spoilt" + packed[2017:]


def message_of(path) -> str:
    with pytest.raises(ExpungeError) as error:
        list(read_records(path))
    assert "\n" not in str(error.value)
    return str(error.value)


ROWS = [
    {"prompt": "The sky", "chosen": " is blue.", "rejected": " is\u2028\x85mud\x0b."},
    {"prompt": 'He said "hello", and', "chosen": " left; 'so' it was", "rejected": " stayed, and\\n went\\"},
    {"prompt": "  日本 é \U0001f642", "chosen": '"', "rejected": '" and "'},
]
COMMAS = {  # a cell with a line end in it is possible in these two alone
    "prompt": "Of two\nlines", "chosen": ' the "second\n"', "rejected": "\tnone"
}  # fmt: skip


def as_jsonl(rows: list[dict]) -> str:
    return "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"


def as_csv(rows: list[dict], separator: str = ",", always: bool = False) -> str:
    out = io.StringIO()
    quoting = csv.QUOTE_ALL if always else csv.QUOTE_MINIMAL
    csv.writer(out, delimiter=separator, quoting=quoting, lineterminator="\n").writerows(
        [[*ROW], *(r.values() for r in rows)]
    )
    return out.getvalue()


WRITTEN = {  # what is in the file: its ending, its text, its rows
    "JSON lines": ("jsonl", as_jsonl([*ROWS, COMMAS]), [*ROWS, COMMAS]),
    "JSON lines with escapes": ("jsonl", "\n".join(json.dumps(row) for row in ROWS), ROWS),
    "JSON": ("json", json.dumps(ROWS, indent=1, ensure_ascii=False), ROWS),
    "JSON lines called JSON": ("json", as_jsonl(ROWS), ROWS),
    "CSV": ("csv", as_csv([*ROWS, COMMAS]), [*ROWS, COMMAS]),
    "CSV that quotes all": ("csv", as_csv([*ROWS, COMMAS], always=True), [*ROWS, COMMAS]),
    "CSV with semicolons": ("csv", as_csv([*ROWS, COMMAS], ";"), [*ROWS, COMMAS]),
    "TSV": ("tsv", "\n".join("\t".join(row) for row in [[*ROW], *(row.values() for row in ROWS)]), ROWS),
    "TSV that quotes some": ("tsv", as_csv([*ROWS, COMMAS], "\t"), [*ROWS, COMMAS]),
    "TSV that quotes all": ("tsv", as_csv(ROWS, "\t", always=True), ROWS),
    "text": ("txt", "\n\n".join(row["prompt"] for row in ROWS), [{"text": row["prompt"]} for row in ROWS]),
}
PACKINGS = {"": lambda data: data, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32")  # all but the first with a byte order mark
BIG = {"utf-16": (b"\xfe\xff", "utf-16-be"), "utf-32": (b"\0\0\xfe\xff", "utf-32-be")}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", WRITTEN)
def test_rows_are_the_same_however_a_file_is_written(kind, packing, tmp_path, monkeypatch):
    """Encoding, byte order mark, line ends, compression, quoting, file or standard input: none of it changes a row."""
    ending, text, rows = WRITTEN[kind]
    for encoding, line_end, last in itertools.product(ENCODINGS, ("\n", "\r\n", "\r"), ("", "\n")):
        shown = (text.rstrip("\n") + last).replace("\n", line_end)
        plain = [shown.encode(encoding)]
        if encoding in BIG:
            mark, big = BIG[encoding]
            plain.append(mark + shown.encode(big))
        for data in map(PACKINGS[packing], plain):
            path = tmp_path / f"a.{ending}{packing}"
            path.write_bytes(data)
            assert [row for _, row in read_records(path)] == rows, (encoding, line_end, last)
            for declared in (f"{ending}:-", *(["-"] if ending in ("json", "jsonl", "txt") else [])):
                monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
                assert [row for _, row in read_records(declared)] == rows
                assert [row for _, row in read_records(declared)] == rows  # it is gone over twice where a part is chosen


def test_parquet_packed_and_from_standard_input(tmp_path, monkeypatch):
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress(data))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    for source in (tmp_path / "a.parquet", tmp_path / "b.parquet.gz", "parquet:-", "-"):
        assert [row for _, row in read_records(source)] == ROWS
    assert next(read_records("-"))[0] == "standard input: row 1"


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    for name in ("a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.parquet", "a.jsonl.gz"):
        assert message_of(tmp_path / name) == f"{tmp_path / name}: no such file"


def test_a_carriage_return_in_a_file_of_other_line_ends_is_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rand more\nthree\r")
    assert [row["text"] for _, row in read_records(tmp_path / "a.txt")] == ["one", "two\rand more", "three"]


def test_standard_input_is_read_as_what_it_is(monkeypatch):
    """The prompts of a conversation's template begin with a bracket, and are no JSON."""

    def rows(text: str, source: str = "-") -> list[dict]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        return [row for _, row in read_records(source)]

    assert rows('\n {"text": "a"}\n') == rows('[{"text": "a"}]') == rows('[\n{"text": "a"}\n]') == [{"text": "a"}]
    assert rows("[INST] a [/INST]\n{a} b") == [{"text": "[INST] a [/INST]"}, {"text": "{a} b"}]
    assert rows('{"text": "a"}', "txt:-") == [{"text": '{"text": "a"}'}]
    with pytest.raises(ExpungeError, match="standard input:2: not valid JSON"):
        rows('{"text": "a"}\n{"text": b}')


def test_a_declared_format_goes_over_the_name(write, monkeypatch):
    path = write("a.log", LINE)
    assert [row for _, row in read_records(f"jsonl:{path}")] == [ROW]
    monkeypatch.chdir(path.parent)
    write("csv:a.txt", "one")  # a file of exactly this name is meant
    assert [row for _, row in read_records("csv:a.txt")] == [{"text": "one"}]


@pytest.mark.parametrize("text", [LINE + "\n", LINE + "\r\n", "\ufeff" + LINE, f"\ufeff[{LINE}]", f"[\r\n{LINE}\r\n]"])
def test_line_ends_and_a_byte_order_mark_are_no_part_of_a_row(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode())
    assert [row for _, row in read_records(path)] == [ROW]


def test_the_same_of_tables_and_text(tmp_path):
    for name, text in (("a.csv", "\ufeffa,b\r\n1,2\r\n"), ("a.tsv", "a\tb\n1\t2")):
        (tmp_path / name).write_bytes(text.encode())
        assert list(read_records(tmp_path / name)) == [(f"{tmp_path / name}:2", {"a": "1", "b": "2"})]
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\ntwo\u2028still two".encode())
    places = [(f"{tmp_path}/a.txt:1", {"text": "one"}), (f"{tmp_path}/a.txt:3", {"text": "two\u2028still two"})]
    assert list(read_records(tmp_path / "a.txt")) == places
    assert load_corpus(tmp_path / "a.txt").startswith("one\n")


def test_a_table_without_a_header_is_given_one(write):
    path = write("a.csv", 'yes,1\n"a, b",0\n')
    rows = [row for _, row in read_records(path, ("text", "label"))]
    assert rows == [{"text": "yes", "label": "1"}, {"text": "a, b", "label": "0"}]


MISTAKES = {
    "a key twice": (
        "a.jsonl",
        f'{LINE}\n{{"prompt": "a", "b": {{"c": 1, "c": 2}}}}',
        ":2: not valid JSON (the key 'c' stands",
    ),
    "a key twice in a list": (
        "a.json",
        f'[{LINE}, {{"prompt": "a", "prompt": "b"}}]',
        ": item 2: not valid JSON (the key 'prom",
    ),
    "a column twice": ("a.csv", "prompt,chosen,prompt\n1,2,3", ":1: the header names 'prompt' twice"),
    "NaN": ("a.jsonl", f'{LINE}\n{{"prompt": NaN}}', ":2: not valid JSON (NaN is not a value of JSON)"),
    "infinity": ("a.json", '[{"prompt": -Infinity}]', ": item 1: not valid JSON (-Infinity is not"),
    "UTF-16 without a mark": ("a.jsonl", LINE.encode("utf-16-le"), ":1: a NUL byte, so not UTF-8 text but UTF-16"),
    "half a character of UTF-16": (
        "a.txt",
        "one\ntwo".encode("utf-16") + b"\x00",
        ":2: not the UTF-16-LE that its byte order mark says (truncated data); convert",
    ),
    "half a surrogate pair in UTF-16": (
        "a.txt",
        b"\xfe\xff" + "one\ntwo\n".encode("utf-16-be") + b"\xd8\x00\0a",
        ":3: not the UTF-16-BE that its byte order mark says (illegal UTF-16 surrogate)",
    ),
    "beyond Unicode in UTF-32": ("a.txt", "one".encode("utf-32") + b"\xff" * 4, ":1: not the UTF-32-LE that"),
    "a NUL in UTF-16": ("a.txt", "one\nt\0wo".encode("utf-16"), ":2: a NUL byte"),
    "a name that says gzip": ("a.jsonl.gz", LINE, ": its name ends in .gz, its content does not begin so; rename it"),
    "half a gzip file": ("a.jsonl.gz", gzip.compress(random_lines())[:-400], ": compressed data that is damaged or cut off"),
    "half a bzip2 file": ("a.jsonl.bz2", bz2.compress(random_lines())[:-400], ": compressed data that is damaged or cut"),
    "half an xz file": ("a.jsonl.xz", lzma.compress(random_lines())[:-400], ": compressed data that is damaged or cut off"),
    "half a zstd file": ("a.jsonl.zst", zstd(random_lines())[:-400], ": compressed data that is damaged or cut off"),
    "a spoilt gzip file": ("a.jsonl.gz", spoilt(gzip.compress(random_lines())), ": compressed data that is damaged"),
    "half a packed Parquet file": (
        "a.parquet.gz",
        gzip.compress(random_lines())[:-400],
        ": compressed data that is damaged",
    ),
    "weights": ("a.gguf", b"GGUF", ": weights of a model, no text; a model is given as --model"),
    "an archive": ("a.jsonl.zip", b"PK", ": .zip is not read; unpack it, or pack it as .gz, .bz2, .xz, .zst"),
    "an archive in gzip": ("a.tar.gz", gzip.compress(b"x"), ": .tar is not read; unpack it"),
    "a name that says nothing": ("a.log", LINE, ": unknown kind of file; use .jsonl, "),
    "running text for rows": ("a.tokens", "one", ": running text, which has no rows; for one row a line it is txt:"),
    "binary": ("a.csv", b"a,b\n1,\x002", ":2: a NUL byte"),
    "Latin-1": ("a.txt", b"one\ncaf\xe9", ":2: not UTF-8 text (byte 4 of the line)"),
    "nested without end": ("a.jsonl", '{"a": ' + "[" * 100_000, ":1: JSON nested too deep"),
    "a number without end": ("a.jsonl", '{"a": ' + "1" * 5_000 + "}", ":1: not valid JSON ("),
    "a list without end": ("a.json", f"[{LINE},\n {LINE}", ":2: not valid JSON (after item 2"),
    "text after a list": ("a.json", f"[{LINE}]\n{LINE}", ":1: not valid JSON (after item 1"),
    "a comma too many": ("a.json", f"[{LINE},]", ":1: not valid JSON (Expecting value"),
    "a quote without end": ("a.csv", 'a,b\n1,"2\n', ":2: not valid CSV"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_with_its_place(tmp_path, case):
    name, content, expected = MISTAKES[case]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message_of(path).startswith(f"{path}{expected}")


def test_an_empty_list_is_none_and_an_empty_file_is_an_error(write):
    assert list(read_records(write("a.json", "[ ]"))) == []
    for name in ("a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt"):
        for load in (load_pairs, load_prompts):
            with pytest.raises(ExpungeError, match=r"no (pair|prompt) in it"):
                load(write(name, ""))


def test_a_subset_is_that_of_the_whole_list_and_every_row_is_checked(write):
    rows = [{"prompt": str(i), "chosen": "a", "rejected": "b"} for i in range(100)]
    read: list[int] = []

    def source():
        for i in range(100):
            read.append(i)
            yield i

    assert selected(source, None, lambda n, few: [], "row") == list(range(100))
    assert selected(source, 3, lambda n, few: [n - 50, 7, 2], "row") == [2, 7, 50]
    assert len(read) == 100 + 100 + 51
    with pytest.raises(ExpungeError, match=":101: "):
        load_pairs(write("a.jsonl", *rows, {"prompt": "no more"}), limit=1)


def test_parquet_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("expunge.data.records.PARQUET_ROWS", 2)
    parquet.write_table(pyarrow.Table.from_pylist([{"a": i} for i in range(5)]), tmp_path / "a.parquet")
    assert list(read_records(tmp_path / "a.parquet")) == [(f"{tmp_path}/a.parquet: row {i + 1}", {"a": i}) for i in range(5)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the process itself from /proc")
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_a_large_file_with_a_limit_is_never_held(tmp_path, name):
    path, words = tmp_path / name, " the river runs past the old mill" * 30
    with path.open("w") as file:
        file.write("prompt,chosen,rejected\n" if name == "a.csv" else "")
        while file.tell() < MEGABYTES * 2**20:
            i = file.tell()
            forms = {"a.jsonl": f'{{"prompt": "{i}", "chosen": "{words}", "rejected": " no"}}', "a.csv": f"{i},{words}, no"}
            file.write(forms.get(name, words) + "\n")
    load = "load_prompts" if name == "a.txt" else "load_pairs"
    peak = "int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    code = f"from expunge.data import {load}\nbefore = {peak}\n"
    code += f"n = len({load}({str(path)!r}, limit=10))\nprint(n, {peak} - before)"
    n, grown = map(int, subprocess.check_output([sys.executable, "-c", code], env=os.environ, text=True).split())
    assert n == 10 and grown * 1024 < MEGABYTES * 2**20 / 4


def test_local_data_never_imports_datasets(write):
    """The control: a hub name does ask for it."""
    files = [str(write("a.jsonl", ROW)), str(write("b.csv", "text\none\n")), str(write("c.txt", "one"))]
    code = f"""
import sys
from expunge.data import load_corpus, load_pairs, load_prompts, load_texts
load_pairs("builtin", limit=3), load_pairs({files[0]!r}), load_prompts("builtin-challenge")
load_texts({files[1]!r}, "forget"), load_corpus({files[2]!r})
print("datasets" in sys.modules, "torch" in sys.modules)
sys.modules["datasets"] = None
try:
    load_pairs("some/pairs")
except Exception as error:
    print(error)
"""
    found = subprocess.check_output([sys.executable, "-c", code], env=os.environ, text=True).splitlines()
    assert found[0] == "False False"
    wanted = "some/pairs: no file of this name, and hub sets need the package 'datasets'; pip install datasets"
    assert found[1] == wanted
