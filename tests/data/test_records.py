"""Files row by row: what is held of a large one, and one clear line for each thing that can be wrong with a file."""

import json
import os
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


def message_of(path) -> str:
    with pytest.raises(ExpungeError) as error:
        list(read_records(path))
    assert "\n" not in str(error.value)
    return str(error.value)


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
    assert load_corpus(tmp_path / "a.txt").startswith("one\r\n")


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
    "UTF-16": ("a.jsonl", LINE.encode("utf-16"), ":1: a NUL byte, so not UTF-8 text but UTF-16 or a binary file"),
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
