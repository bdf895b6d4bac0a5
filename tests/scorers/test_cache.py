"""The cache of scores: what is added is found again, by other processes too; crashes and foreign files."""

import json
import subprocess
import sys

import pytest

from expunge.errors import ExpungeError
from expunge.scorers.cache import ScoreCache, content_key

KEYS = [content_key("service", text) for text in "abcd"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "scores.jsonl"


def test_what_is_added_is_found_again(path):
    cache = ScoreCache(path)
    assert len(cache) == 0 and cache.get(KEYS[0]) == {}
    cache.add(KEYS[0], {"TOXICITY": 0.25, "INSULT": 1})
    other = ScoreCache(path)
    assert other.get(KEYS[0]) == cache.get(KEYS[0]) == {"TOXICITY": 0.25, "INSULT": 1}
    other.add(KEYS[1], {"TOXICITY": 0.5})
    assert cache.get(KEYS[1]) == {}
    cache.refresh()
    assert cache.get(KEYS[1]) == {"TOXICITY": 0.5}
    with path.open("a") as file:
        file.write("not a line\n")
    with pytest.raises(ExpungeError, match=r"scores\.jsonl:3: "):
        cache.refresh()


def test_a_key_follows_from_service_and_text_alone():
    assert content_key("a", "b") == "7e18f737311b2dc3b2f269dd78396b0351f14fb66efa879f768cb23181883c78"
    assert len({content_key("a", "b"), content_key("a", "b "), content_key("a2", "b")}) == 3


def test_the_first_score_stands_and_attributes_add_up(path):
    cache = ScoreCache(path)
    cache.add(KEYS[0], {"TOXICITY": 0.25})
    cache.add(KEYS[0], {"TOXICITY": 0.75, "SPAM": 0.5})
    assert cache.get(KEYS[0]) == ScoreCache(path).get(KEYS[0]) == {"TOXICITY": 0.25, "SPAM": 0.5}


def test_caches_are_joined_by_cat(path, tmp_path):
    joined = tmp_path / "joined.jsonl"
    for i in (0, 1):
        ScoreCache(tmp_path / f"{i}.jsonl").add(KEYS[i], {"TOXICITY": i / 2})
    joined.write_bytes(b"".join((tmp_path / f"{i}.jsonl").read_bytes() for i in (0, 1)))
    assert [ScoreCache(joined).get(KEYS[i])["TOXICITY"] for i in (0, 1)] == [0, 0.5]


def test_a_line_torn_off_anywhere_is_passed_over_and_mended(path):
    cache = ScoreCache(path)
    cache.add(KEYS[0], {"TOXICITY": 0.25})
    before = path.read_bytes()
    cache.add(KEYS[1], {"TOXICITY": 0.5, "INSULT": 0.125})
    whole = path.read_bytes()
    for end in range(len(before), len(whole)):
        path.write_bytes(whole[:end])
        after_crash = ScoreCache(path)
        found = whole[end:] == b"\n"  # nothing is lost but the newline
        assert (len(after_crash.get(KEYS[1])) == 2) == found, end
        after_crash.add(KEYS[2], {"TOXICITY": 0.75})
        lines = [json.loads(line)["key"] for line in path.read_text().splitlines()]
        assert lines == [KEYS[0], *([KEYS[1]] if found else []), KEYS[2]], end
        assert after_crash.get(KEYS[2]) == {"TOXICITY": 0.75}


@pytest.mark.parametrize(
    "broken",
    [
        '{"key": "' + KEYS[1][:9],
        "[]",
        '{"key": 1, "scores": {}}',
        '{"key": "short", "scores": {"A": 0.5}}',
        json.dumps({"key": KEYS[1], "scores": {"A": float("nan")}}),
        json.dumps({"key": KEYS[1], "scores": {"A": 1.5}}),
        json.dumps({"key": KEYS[1], "scores": {"A": None}}),
        json.dumps({"key": KEYS[1], "scores": [0.5]}),
    ],
)
def test_a_broken_line_in_the_middle_is_an_error_with_its_place(path, broken):
    ScoreCache(path).add(KEYS[0], {"TOXICITY": 0.25})
    good = path.read_text()
    path.write_text(f"{good}\n{broken}\n{good}")
    with pytest.raises(ExpungeError, match=r"scores\.jsonl:3: no line of a score cache"):
        ScoreCache(path)
    assert path.read_text() == f"{good}\n{broken}\n{good}"


def test_another_file_is_not_taken_for_a_cache_and_not_touched(path):
    path.parent.mkdir()
    for content in (b"a note without a newline", b'{"text": "a record"', b"\x00\xff\x80"):
        path.write_bytes(content)
        with pytest.raises(ExpungeError, match=":1: no line of a score cache"):
            ScoreCache(path)
        assert path.read_bytes() == content


def test_several_processes_append_at_once(path):
    count, work = 60, (
        "import sys; from pathlib import Path; from expunge.scorers.cache import ScoreCache, content_key\n"
        "cache = ScoreCache(Path(sys.argv[1]))\n"
        "for i in range(int(sys.argv[3])): cache.add(content_key(sys.argv[2], str(i)), {'A' * 3000: i / 100})"
    )  # fmt: skip
    workers = [subprocess.Popen([sys.executable, "-c", work, str(path), name, str(count)]) for name in "xyz"]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    cache = ScoreCache(path)
    assert len(cache) == 3 * count and len(path.read_bytes().splitlines()) == 3 * count
    assert cache.get(content_key("y", "7")) == {"A" * 3000: 0.07}


def test_a_place_that_cannot_be_read_or_written_is_one_line(tmp_path):
    with pytest.raises(ExpungeError, match=r"cannot be read \(Is a directory\)"):
        ScoreCache(tmp_path)
    cache = ScoreCache(tmp_path / "folder" / "scores.jsonl")
    (tmp_path / "folder").write_text("no folder")
    with pytest.raises(ExpungeError, match=r"scores\.jsonl: cannot be written"):
        cache.add(KEYS[0], {"TOXICITY": 0.5})
