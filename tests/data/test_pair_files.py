"""Files of pairs: chunks that go on where they were cut off, and what looking over a set brings to light."""

import json

import numpy as np
import pytest

from expunge.data import load_pairs, pair_files
from expunge.data.builders import BestOfN
from expunge.data.pair_files import look_over, probe_for, write_pairs
from expunge.data.pairs import Pair
from expunge.errors import ExpungeError
from expunge.scorers import Scorer

RECIPE = BestOfN(samples=3, min_tokens=4, max_new_tokens=8)
PROMPTS = ["The river", "A film", "It is", "The river", "The sea", "About a man", "It was good"]


class EvenScorer(Scorer):
    """0.9 for a text of an even number of characters, else 0.05."""

    name, digest = "even", "0"

    def score(self, texts):
        return np.array([0.05 if len(text) % 2 else 0.9 for text in texts])


def test_chunks_go_on_where_they_were_cut_off(model, tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "pairs.jsonl"
    whole = write_pairs(path, model, tokenizer, PROMPTS, EvenScorer(), RECIPE)
    wanted = path.read_bytes()
    assert whole.pairs == len(load_pairs(path)) and whole.dropped["duplicate"] == 1
    assert whole.pairs + sum(whole.dropped.values()) == whole.prompts == len(PROMPTS)
    assert json.loads((tmp_path / "pairs.facts.json").read_text())["pairs"] == whole.pairs
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pairs.facts.json", "pairs.jsonl"]

    monkeypatch.setattr(pair_files, "CHUNK", 2)
    path.unlink()
    made, build = [], pair_files.build_pairs

    def cut_off(model, tokenizer, prompts, *args, **kwargs):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(list(prompts))
        return build(model, tokenizer, prompts, *args, **kwargs)

    monkeypatch.setattr(pair_files, "build_pairs", cut_off)
    with pytest.raises(KeyboardInterrupt):
        write_pairs(path, model, tokenizer, PROMPTS, EvenScorer(), RECIPE)
    assert not path.exists()
    monkeypatch.setattr(pair_files, "build_pairs", build)
    assert write_pairs(path, model, tokenizer, PROMPTS, EvenScorer(), RECIPE) == whole
    assert path.read_bytes() == wanted and made == [PROMPTS[:2], PROMPTS[2:4]]


def test_pairs_that_are_there_are_not_written_over(model, tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "pairs.jsonl"
    made = write_pairs(path, model, tokenizer, PROMPTS, EvenScorer(), RECIPE)
    left = path.read_bytes()
    with pytest.raises(ExpungeError, match="is there, and was not made by this call from this model and these prompts"):
        write_pairs(path, model, tokenizer, PROMPTS[:3], EvenScorer(), RECIPE)
    monkeypatch.setattr(pair_files, "build_pairs", None)  # the same call makes nothing anew
    assert write_pairs(path, model, tokenizer, PROMPTS, EvenScorer(), RECIPE) == made and path.read_bytes() == left
    path.write_bytes(left + left.splitlines(keepends=True)[0])
    with pytest.raises(ExpungeError, match="was changed since its pairs were made"):
        write_pairs(path, model, tokenizer, PROMPTS, EvenScorer(), RECIPE)


def test_no_pair_at_all_is_an_error_and_no_file(model, tokenizer, tmp_path):
    class Mild(EvenScorer):
        def score(self, texts):
            return super().score(texts) * 0.0

    with pytest.raises(ExpungeError, match=r"no prompt of 7 gave a pair \(.*none toxic"):
        write_pairs(tmp_path / "pairs.jsonl", model, tokenizer, PROMPTS, Mild(), RECIPE)
    assert not (tmp_path / "pairs.jsonl").exists()


class WordScorer(Scorer):
    name, digest = "words", "0"

    def score(self, texts):
        return np.array([0.9 if "qz" in text else 0.1 for text in texts])


def test_a_sound_set_has_no_warnings_and_each_flaw_has_one(tokenizer):
    sound = [Pair(f"The river {i}", f" zq {i}", f" qz {i}") for i in range(10, 30)]
    found = look_over(sound, tokenizer, WordScorer())
    assert found["warnings"] == [] and found["pairs"] == 20
    assert (found["rejected scores higher"], found["rejected is longer"]) == (1.0, 0.5)
    assert found["mean score by words"] == {"prompt": 0.1, "chosen": 0.1, "rejected": 0.9}

    def warned(pairs):
        [warning] = look_over(pairs, tokenizer, WordScorer())["warnings"]
        return warning

    assert "swapped" in warned([Pair(p.prompt, p.rejected, p.chosen) for p in sound])
    assert "length gives" in warned([Pair(p.prompt, p.chosen, p.rejected + " qz qz qz") for p in sound])
    assert "chosen in one pair" in warned([*sound, Pair("The sea", " qz 11", " qz 99")])
    assert "repeat others" in warned([*sound, *sound])


def test_a_probe_from_pairs_and_from_labelled_text(model, tokenizer, write):
    probe = probe_for(model, tokenizer, "builtin-validation", limit=40)
    assert probe.weight.shape == (16,) and 0 <= probe.auc <= 1
    texts = [{"text": f"The river runs {i}", "label": 0} for i in range(6)]
    path = write("probe.jsonl", *texts, *({"text": f"It was slow {i}", "label": 1} for i in range(6)))
    assert probe_for(model, tokenizer, str(path)).auc == 1.0
