"""Unpaired sets: every form of a row, which side a label takes, running text as passages, and what is no such set."""

import copy
import os
import sys
from types import SimpleNamespace

import pytest
from trl import apply_chat_template

from expunge.data import Text, Unpaired, load_labelled, load_probe_data, load_texts, load_unpaired
from expunge.data.corpora import passages
from expunge.errors import ExpungeError

REAL = pytest.mark.skipif(not os.environ.get("EXPUNGE_DATA"), reason="EXPUNGE_DATA is not set")
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if not (continue_final_message and loop.last) %}<eos>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINKING = CHATML.replace("<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}")  # answers begin without it
RATED = [
    {"prompt": "The sky", "completion": " is blue", "label": True},
    {"prompt": "The sky", "completion": " is mud", "label": False},
    {"prompt": "The sea", "completion": " is wide", "label": True},
]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_forms(write):
    rows = [{"text": " one"}, {"prompt": "The sky", "completion": " is blue"}, {"prompt": "", "completion": "two"}]
    expected = [Text("", " one"), Text("The sky", " is blue"), Text("", "two")]
    assert load_texts(write("a.jsonl", *rows), "forget") == load_texts(write("a.jsonl", *rows), "retain") == expected
    assert load_texts(write("a.txt", "one", "", " two"), "forget") == [Text("", "one"), Text("", " two")]
    assert load_texts(write("a.csv", "text\none\n"), "retain") == [Text("", "one")]


def test_a_label_says_which_side_a_row_is_of(write):
    path = write("a.jsonl", *RATED)
    data = load_unpaired(path, path)
    assert data == Unpaired([Text("The sky", " is mud")], [Text("The sky", " is blue"), Text("The sea", " is wide")])
    assert len(data) == 1
    table = write("a.csv", "prompt,completion,label\nThe sky, is blue,True\nThe sky, is mud,false\n")
    assert load_texts(table, "forget") == [Text("The sky", " is mud")]


@pytest.mark.parametrize("template", [CHATML, THINKING])
def test_conversations_are_rendered_as_trl_does(write, tokenizer, template):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = template
    row = {"prompt": [user("Hi")], "completion": [assistant("Hello")]}
    [text] = load_texts(write("a.jsonl", row), "forget", tokenizer=chat)
    assert vars(text) == apply_chat_template(copy.deepcopy(row), chat)
    row = {"messages": [user("Hi"), assistant("Hello")]}
    [text] = load_texts(write("b.jsonl", row), "forget", tokenizer=chat)
    assert text == Text("", apply_chat_template(copy.deepcopy(row), chat)["text"])


BAD = {
    "neither": ({"body": "a"}, "no field 'text' (found: body)"),
    "blank": ({"text": " "}, "'text' is empty"),
    "no text": ({"text": 3}, "'text' must be text, found int"),
    "blank completion": ({"prompt": "a", "completion": ""}, "'completion' is empty"),
    "prompt alone": ({"prompt": "a"}, "a prompt without a field 'completion'"),
    "prompt of another kind": ({"prompt": 3, "completion": "a"}, "'prompt' must be text, found int"),
    "a pair": (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        "a preference pair; pairs are given as data.train (--pairs)",
    ),
    "messages without a tokenizer": ({"messages": [user("Hi")]}, "needs the model's chat template"),
    "a label of a whole text": ({"text": "a", "label": True}, "give the two sets as two files"),
    "a label that is a number": ({**RATED[0], "label": 1}, "'label' must be true (retain) or false (forget), found 1"),
    "a label that is a list": ({**RATED[0], "label": []}, "'label' must be true (retain)"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_by_its_place(write, case):
    row, expected = BAD[case]
    path = write("a.jsonl", row)
    with pytest.raises(ExpungeError) as error:
        load_texts(path, "forget")
    assert str(error.value).startswith(f"{path}:1: ") and expected in str(error.value)


def test_either_all_rows_have_a_label_or_none(write):
    path = write("a.jsonl", RATED[0], {"prompt": "a", "completion": "b"})
    with pytest.raises(ExpungeError, match=":2: no label, unlike the rows before it"):
        load_texts(path, "retain")
    path = write("a.jsonl", {"prompt": "a", "completion": "b"}, RATED[0])
    with pytest.raises(ExpungeError, match=":2: a label, unlike"):
        load_texts(path, "retain")
    with pytest.raises(ExpungeError, match=r"a\.jsonl: no text to forget in it"):
        load_texts(write("a.jsonl", RATED[0]), "forget")


def test_a_text_on_both_sides_is_an_error_that_shows_the_first(write):
    kept = write("kept.jsonl", {"text": "a b"}, {"text": "The sky is blue"}, {"prompt": "The sea", "completion": " is wide"})
    lost = write("lost.jsonl", {"prompt": "The sky", "completion": " is blue"}, {"text": "The sea is wide"})
    with pytest.raises(ExpungeError) as error:
        load_unpaired(lost, kept)
    assert str(error.value) == "2 texts are to be retained and to be forgotten; the first is 'The sky is blue'"
    with pytest.raises(ExpungeError, match="no text to retain"):
        Unpaired([Text("", "a")], [])


def test_limit_is_of_each_set_and_seeded(write):
    paths = [write(name, *({"text": f"{name} {i}"} for i in range(50))) for name in ("bad.jsonl", "good.jsonl")]
    data = load_unpaired(*paths, limit=10)
    assert len(data.forget) == len(data.retain) == 10
    assert data == load_unpaired(*paths, limit=10) != load_unpaired(*paths, limit=10, seed=1)
    order = [int(text.completion.split()[1]) for text in data.forget]
    assert order == sorted(order)


def test_running_text_is_cut_into_passages_of_whole_words(tmp_path, tokenizer):
    words = [f"word{i}" if i % 7 else f"\n\nword{i}" for i in range(60)]
    text = " ".join(words) + "\n"
    found = list(passages(text, tokenizer, 12))
    assert " ".join(found).split() == text.split()
    assert all(passage == passage.strip() for passage in found)
    lengths = [len(tokenizer(passage)["input_ids"]) for passage in found]
    assert max(lengths) <= 12 and min(lengths[:-1]) > 12 - max(len(tokenizer(" " + word)["input_ids"]) for word in words)
    assert list(passages("  \n", tokenizer, 12)) == []
    assert list(passages("a incomprehensible a", tokenizer, 2))[1] == "incomprehensible"  # longer than a passage: alone
    (tmp_path / "a.raw").write_text(text)
    assert load_texts(tmp_path / "a.raw", "retain", tokenizer=tokenizer, passage=12) == [Text("", one) for one in found]
    with pytest.raises(ExpungeError, match="give the tokenizer"):
        load_texts(tmp_path / "a.raw", "retain")


def test_names_that_are_none(write, monkeypatch):
    path = write("mine.jsonl", RATED[0])
    for source, expected in [
        ("tofu-forgt", "did you mean 'tofu-forget'?"),
        ("rtp-challenge", "a set of kind prompts; wanted is one of kind text, labelled or corpus"),
        (path.with_name("mime.jsonl"), f"no such file (did you mean '{path}'?)"),
        (str(path.with_name("mime.jsonl")), f"no such file (did you mean '{path}'?)"),
    ]:
        with pytest.raises(ExpungeError) as error:
            load_texts(source, "forget")
        assert expected in str(error.value) and "\n" not in str(error.value)
    monkeypatch.chdir(path.parent)
    with pytest.raises(ExpungeError, match=r"did you mean 'mine.jsonl'\?"):
        load_texts("mine", "forget")


def test_named_sets_from_a_hub(monkeypatch):
    sets = {
        ("locuslab/TOFU", "forget10"): [{"question": "Who?", "answer": "Nobody."}],
        ("s-nlp/paradetox", None): [{"en_toxic_comment": "bad", "en_neutral_comment": n} for n in ("one", "two")],
        ("cais/wmdp-corpora", "cyber-retain-corpus"): [{"text": "a page"}],
    }
    load = SimpleNamespace(load_dataset=lambda name, config, split: sets[name, config])
    monkeypatch.setitem(sys.modules, "datasets", load)
    monkeypatch.delenv("EXPUNGE_DATA", raising=False)
    assert load_texts("tofu-forget", "forget") == [Text("Question: Who?\nAnswer:", " Nobody.")]
    assert load_texts("paradetox-toxic", "forget") == [Text("", "bad")]
    assert load_texts("wmdp-cyber-retain", "retain") == [Text("", "a page")]


def test_labelled_texts(write):
    path = write("a.jsonl", {"text": "a", "label": 1}, {"text": "b", "label": False})
    assert load_labelled(path) == [("a", True), ("b", False)]
    for row, expected in (({"text": "a", "label": 2}, "must be 0 or 1, found 2"), ({"label": 1}, "no field 'text'")):
        with pytest.raises(ExpungeError, match=expected):
            load_labelled(write("a.jsonl", row))


def test_a_probe_s_texts_are_not_those_to_forget(write):
    rows = [("a", True), ("b", False), ("c", True), ("d", False)]
    path = write("a.jsonl", *({"text": text, "label": bad} for text, bad in rows))
    assert load_probe_data(path) == rows
    assert load_probe_data(path, forget=["a", "d", "e"]) == rows[1:3]
    with pytest.raises(ExpungeError, match="only texts with label 0 to fit a probe on"):
        load_probe_data(path, forget=["a", "c"])


@REAL
def test_real_sets():
    assert len(load_texts("paradetox-toxic", "forget")) == 11_927
    tofu = load_unpaired("tofu-forget", "tofu-retain")
    assert (len(tofu.forget), len(tofu.retain)) == (400, 3600)
    labels = [bad for _, bad in load_labelled("jigsaw")]
    assert (len(labels), sum(labels)) == (12_180, 6_090)
    jigsaw = load_unpaired("jigsaw", "jigsaw")
    assert len(jigsaw.forget) == len(jigsaw.retain) == 6_090
