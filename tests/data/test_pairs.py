"""Pairs: every form they come in, and one clear line for each thing that can be wrong."""

import json
import sys
from types import SimpleNamespace

import pyarrow
import pytest
from pyarrow import parquet
from trl import extract_prompt

from expunge.data import Pair, load_pairs
from expunge.data.pairs import common_prefix
from expunge.errors import ExpungeError

ROW = {"prompt": "The sky", "chosen": " is blue", "rejected": " is mud"}


def lee(number: int, prompt: str | None = None) -> dict[str, str]:
    return {
        "prompt_text": prompt or f"The sky {number}",
        "unpert_gen_text": f" is {number}",
        "pert_gen_text": f" was {number}",
    }


def test_the_parts_of_lees_pairs_are_disjoint_whole_and_do_not_hang_on_the_order(write):
    rows = [lee(number) for number in range(2000)]
    path, turned = write("pairs.jsonl", *rows), write("turned.jsonl", *rows[::-1])
    parts = [load_pairs(f"pair-toxicity-{part}:{path}") for part in ("train", "validation", "heldout")]
    assert [len(part) / 2000 for part in parts] == pytest.approx([0.89, 0.01, 0.1], abs=0.02)
    every = load_pairs(f"pair-toxicity:{path}")
    assert sorted(repr(pair) for part in parts for pair in part) == sorted(map(repr, every)) and len(every) == 2000
    assert load_pairs(f"pair-toxicity-heldout:{turned}") == parts[2][::-1]


def test_pairs_of_one_prompt_are_in_one_part(write):
    path = write("pairs.jsonl", *(lee(number, f"The sky {number // 4}") for number in range(400)))
    prompts = [{pair.prompt for pair in load_pairs(f"pair-toxicity-{part}:{path}")} for part in ("train", "heldout")]
    assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]


def test_explicit_prompt_in_every_kind_of_file(write):
    table = "prompt,chosen,rejected\nThe sky, is blue, is mud\n"
    expected = [Pair("The sky", " is blue", " is mud")]
    assert load_pairs(write("a.jsonl", ROW)) == expected
    assert load_pairs(write("b.json", json.dumps([ROW], indent=2))) == expected
    assert load_pairs(write("lines.json", ROW)) == expected
    assert load_pairs(write("c.csv", table)) == expected
    assert load_pairs(write("d.tsv", table.replace(",", "\t"))) == expected
    assert load_pairs(str(write("e.jsonl", "", ROW, ""))) == expected


def test_parquet(tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist([ROW]), tmp_path / "a.parquet")
    assert load_pairs(tmp_path / "a.parquet") == [Pair(**ROW)]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue", "The sky is grey", "The sky is"),  # the space belongs to the continuation
        ("The sky is blue", "The sky is black", "The sky is bl"),
        ("yes", "no", ""),
        ("The sky", "The sky is blue", "The sk"),  # neither side is empty
        ("no space ", "no", "n"),
    ],
)
def test_implicit_prompt(write, chosen, rejected, prompt):
    [pair] = load_pairs(write("a.jsonl", {"chosen": chosen, "rejected": rejected}))
    assert pair == Pair(prompt, chosen.removeprefix(prompt), rejected.removeprefix(prompt))
    assert pair.chosen and pair.rejected


def test_implicit_prompt_is_trls():
    for chosen, rejected in [
        ("The sky is blue", "The sky is grey"),
        ("The sky is blue", "The sky is black"),
        ("The sky", "The sky is blue"),
        ("a b c", "a b d e"),
        ("yes", "no"),
    ]:
        cut = common_prefix(chosen, rejected)
        ours = {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}
        assert ours == extract_prompt({"chosen": chosen, "rejected": rejected})


def test_texts_that_differ_at_once_keep_all_their_characters():
    assert common_prefix("yes ", "no") == 0  # TRL 1.16 looks at the last character here and cuts there


def test_pair_toxicity(write):
    row = {"prompt_text": "The sky", "unpert_gen_text": " is blue", "pert_gen_text": " is mud", "prompt_input_ids": [1]}
    assert load_pairs(f"pair-toxicity:{write('split_0.jsonl', row)}") == [Pair("The sky", " is blue", " is mud")]


def test_paradetox_by_name(tmp_path, monkeypatch, caplog):
    rows = [
        ["toxic", "neutral1", "neutral2", "neutral3"],
        ["it is a rotten day", "It is a bad day", "This day is bad", ""],
        ["same words", "same words", "", ""],
        ["one", "one two", "", ""],
    ]
    (tmp_path / "paradetox").mkdir()
    (tmp_path / "paradetox/paradetox.tsv").write_text("\n".join("\t".join(row) for row in rows))
    monkeypatch.setenv("EXPUNGE_DATA", str(tmp_path))
    assert load_pairs("paradetox") == [Pair("it is a", " bad day", " rotten day")]
    assert "1 of 4 pairs" in caplog.text


def test_hub_set(monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return [ROW]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_pairs("some/pairs") == load_pairs("some/pairs", split="test") == [Pair(**ROW)]
    assert asked == [("some/pairs", None, "train"), ("some/pairs", None, "test")]


def test_hub_that_does_not_answer(monkeypatch):
    def load_dataset(name, config, split):
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    fails("some/pairs", "some/pairs", "no route")
    monkeypatch.delenv("EXPUNGE_DATA", raising=False)
    fails("paradetox", "EXPUNGE_DATA", "no route")


def test_datasets_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    fails("some/pairs", "pip install datasets")


def test_limit_is_a_seeded_subset_in_order(write):
    path = write("a.jsonl", *({"prompt": str(i), "chosen": "a", "rejected": "b"} for i in range(50)))
    few = load_pairs(path, limit=10)
    order = [int(pair.prompt) for pair in few]
    assert order == sorted(order) and len(set(order)) == 10
    assert few == load_pairs(path, limit=10) != load_pairs(path, limit=10, seed=1)
    assert load_pairs(path, limit=99) == load_pairs(path)
    with pytest.raises(ExpungeError, match="limit 0"):
        load_pairs(path, limit=0)


def fails(source, *parts):
    """Loading `source` is an error of one line that holds all of `parts`."""
    with pytest.raises(ExpungeError) as error:
        load_pairs(source)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ('{"prompt": "a", ', "not valid JSON"),
        ('{"prompt": "\\ud83d", "chosen": " b", "rejected": " c"}', r"\ud83d is half of a surrogate pair"),
        ("[1, 2]", "expected a JSON object"),
        ({"prompt": "a", "chosen": "b"}, "no field 'rejected' (found: prompt, chosen)"),
        (ROW | {"chosen": "  "}, "'chosen' is empty"),
        (ROW | {"prompt": ""}, "'prompt' is empty"),
        (ROW | {"rejected": 3}, "'rejected' must be text, found int"),
        (ROW | {"rejected": " is blue"}, "chosen and rejected are equal"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(write, row, part):
    path = write("a.jsonl", ROW, "", row, ROW)
    fails(path, f"{path}:3: ", part)


def test_bad_files(write, tmp_path):
    fails(write("empty.jsonl", ""), "empty.jsonl: no pair in it")
    fails(tmp_path / "gone.jsonl", "gone.jsonl: no such file")
    fails("gone.csv", "gone.csv: no such file")
    fails(tmp_path, "a folder")
    fails(write("a.pdf", "x"), "unknown kind of file")
    fails(write("bad.json", f"[{json.dumps(ROW)},\n oops]"), "bad.json:2: not valid JSON")
    fails(write("half.json", '[{"prompt": "\\ud83d"}]'), "half.json: item 1: ")
    fails(write("numbers.json", "[1]"), "numbers.json: item 1: expected a JSON object")
    fails(write("short.csv", "prompt,chosen,rejected\na,b\n"), "short.csv:2: not as many fields")
    fails(write("bad.parquet", "x"), "not valid Parquet")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    fails(tmp_path / "latin.jsonl", "not UTF-8")


def test_bad_names(write):
    fails("paradetx", "did you mean 'paradetox'?")
    fails("pair-toxicity", "pair-toxicity:PATH")
    fails("pair-toxicity-heldout", "pair-toxicity-heldout:PATH")
    fails("pair-toxicity:gone.jsonl", "gone.jsonl: no such file")
    with pytest.raises(ExpungeError, match="for hub sets"):
        load_pairs(write("a.jsonl", ROW), split="test")
