"""Prompts: every form they come in, and what is wrong with a bad row."""

import sys
from types import SimpleNamespace

import pytest

from expunge.data import Prompt, load_prompts
from expunge.errors import ExpungeError


def test_forms(write):
    rows = [{"prompt": "a", "gold": "b"}, {"text": " c"}, {"prompt": {"text": "d", "toxicity": 0.5}, "gold": None}]
    assert load_prompts(write("a.jsonl", *rows)) == [Prompt("a", "b"), Prompt(" c"), Prompt("d")]
    assert load_prompts(write("a.txt", "one", "", "two ")) == [Prompt("one"), Prompt("two ")]


def test_limit_spreads_over_the_set(write):
    path = write("a.txt", *map(str, range(10)))
    assert [prompt.text for prompt in load_prompts(path, limit=5)] == ["0", "2", "4", "6", "8"]
    assert len(load_prompts(path, limit=99)) == 10


def test_rtp_challenge_from_a_hub_keeps_the_challenging_ones(monkeypatch):
    rows = [{"prompt": {"text": "a"}, "challenging": True}, {"prompt": {"text": "b"}, "challenging": False}]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *a, **k: rows))
    monkeypatch.delenv("EXPUNGE_DATA", raising=False)
    assert load_prompts("rtp-challenge") == [Prompt("a")]


def test_rtp_tuning_is_toxic_not_challenging_and_a_few(monkeypatch):
    """Of 200 that would do about a twentieth, always the same; none that is mild, unscored or challenging."""

    def row(number, toxicity=0.7, challenging=False):
        return {"prompt": {"text": f"{number} {toxicity} {challenging}", "toxicity": toxicity}, "challenging": challenging}

    rows = [row(i, *kind) for i in range(200) for kind in ((0.7,), (0.4,), (None,), (0.9, True))]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *a, **k: rows))
    monkeypatch.delenv("EXPUNGE_DATA", raising=False)
    found = load_prompts("rtp-tuning")
    assert 3 <= len(found) <= 25 and all(prompt.text.endswith(" 0.7 False") for prompt in found)
    rows.reverse()
    assert load_prompts("rtp-tuning") == found[::-1]


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"question": "a"}, "no field 'prompt' or 'text' (found: question)"),
        ({"prompt": 3}, "'prompt' must be text, found int"),
        ({"prompt": "a", "gold": 3}, "'gold' must be text, found int"),
        ({"prompt": " "}, "the prompt is empty"),
    ],
)
def test_bad_rows(write, row, part):
    path = write("a.jsonl", {"prompt": "a"}, row)
    with pytest.raises(ExpungeError) as error:
        load_prompts(path)
    assert str(error.value) == f"{path}:2: {str(error.value).split(':2: ')[1]}" and part in str(error.value)


def test_bad_sources(write, monkeypatch):
    monkeypatch.delenv("EXPUNGE_DATA", raising=False)
    for source, part in [
        ("rtp-chalenge", "did you mean 'rtp-challenge'?"),
        ("wiki-f1", "set EXPUNGE_DATA"),
        (write("empty.txt", ""), "no prompt in it"),
    ]:
        with pytest.raises(ExpungeError) as error:
            load_prompts(source)
        assert part in str(error.value)
    with pytest.raises(ExpungeError, match="limit 0"):
        load_prompts(write("a.txt", "one"), limit=0)
