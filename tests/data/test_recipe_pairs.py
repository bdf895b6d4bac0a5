"""The recipes of the built-in pairs and prompts on a tiny random model; and the committed files against the hashes."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from expunge.data.builders import BestOfN
from expunge.rows import read_lines

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "src/expunge/assets"
RECIPES = ROOT / "recipes/builtin"


@pytest.fixture
def recipes(monkeypatch) -> Iterator[SimpleNamespace]:
    """The recipe modules, imported as their scripts import each other, small enough for a test."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes/builtin"))
    import decontaminate
    import pairs
    import prompts

    yield SimpleNamespace(decontaminate=decontaminate, pairs=pairs, prompts=prompts)
    for name in ("decontaminate", "sources", "pairs", "prompts"):
        sys.modules.pop(name, None)


class LetterScorer:
    """A stand-in: 0.9 for a text with an even number of the letter that is tested, else 0.05."""

    name, digest = "letters", "0"

    def score(self, texts):
        return np.array([0.05 if len(re.findall("[a-m]", text)) % 2 else 0.9 for text in texts])


def test_recipes_end_to_end(recipes, model, tokenizer, tmp_path, monkeypatch):
    small = BestOfN(samples=3, min_tokens=4, max_new_tokens=8)
    styles = (
        recipes.pairs.Style("neutral", ("The river",), 0.5),
        recipes.pairs.Style("provoking", ("A",), 0.5, neutral=1.0, provoking=0.5),
    )
    monkeypatch.setattr(recipes.prompts, "PROVOKING", styles[1])
    monkeypatch.setattr(recipes.prompts, "ARTICLES_AND_REVIEWS", [styles[0]])
    for module in (recipes.pairs, recipes.prompts):
        monkeypatch.setattr(module, "load_scorer", lambda name: LetterScorer())
        monkeypatch.setattr(module, "RECIPE", small)
        monkeypatch.setattr(module, "evaluation_text", lambda: None)
    monkeypatch.setattr(recipes.pairs, "STYLES", styles)
    monkeypatch.setattr(recipes.pairs, "DOCUMENTS", 8)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = ["pairs.py", "--model", tmp_path / "model", "--chunks", tmp_path / "chunks", "--out", tmp_path / "pairs"]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--train", "6", "--validation", "2", "--heldout", "4"])
    recipes.pairs.main()
    train, heldout = (read_lines(tmp_path / f"pairs/{name}.jsonl") for name in ("train", "heldout"))
    assert (len(train), len(heldout)) == (6, 4)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in heldout}
    facts = json.loads((tmp_path / "pairs/facts.json").read_text())
    assert facts["train"]["mean_score"]["chosen"] == 0.05 and facts["train"]["mean_score"]["rejected"] == 0.9

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "chunks").iterdir()}
    recipes.pairs.main()  # goes on from its chunks: nothing is made again, the result is the same
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "chunks").iterdir()} == before
    assert read_lines(tmp_path / "pairs/train.jsonl") == train

    command = [
        "prompts.py",
        "--model",
        tmp_path / "model",
        "--pairs",
        tmp_path / "pairs",
        "--out",
        tmp_path / "prompts",
    ]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--challenge", "3", "--tuning", "2", "--neutral", "2"])
    recipes.prompts.main()
    challenge = read_lines(tmp_path / "prompts/challenge.jsonl")
    neutral = read_lines(tmp_path / "prompts/neutral.jsonl")
    assert len(challenge) == 3 and all(row["score"] >= 0.4 for row in challenge)
    assert len(neutral) == 2 and all(row["gold"] and LetterScorer().score([row["gold"]]) == 0.05 for row in neutral)
    prompts = [row["prompt"] for row in [*train, *heldout, *challenge, *neutral]]
    assert len(set(prompts)) == len(prompts)


def test_pairs_that_repeat_a_text_are_left_out(recipes):
    rows = [
        {"prompt": "One", "chosen": " two", "rejected": " three"},
        {"prompt": "one.", "chosen": " four", "rejected": " five"},
        {"prompt": "Six", "chosen": " seven", "rejected": " eight"},
        {"prompt": "Nine", "chosen": " ten", "rejected": " Two!"},
    ]
    assert list(recipes.pairs.unseen(rows)) == [rows[0], rows[2]]


def test_digests_find_a_sentence_whatever_its_case_and_marks(recipes):
    digests = recipes.decontaminate.digests
    known = digests(["A heading . \nThe river runs to the sea . It is wide and slow ."])
    assert digests(["the river runs, to the sea!"]) <= known
    assert not digests(["The river runs to the lake."]) & known
    assert not digests(["a heading"])  # too short to tell


def committed() -> list[tuple[Path, dict[str, str]]]:
    files = [*sorted((ASSETS / "pairs").glob("*.jsonl")), *sorted((ASSETS / "prompts").glob("*.jsonl"))]
    return [(path, row) for path in files if path.stem != "pplm-wikipedia" for row in read_lines(path)]


def placed() -> list[dict[str, str]]:
    """The set whose prompts are places in public text."""
    return read_lines(ASSETS / "pairs/pplm-wikipedia.jsonl")


def test_no_evaluation_text_is_committed(recipes):
    """Hashes of RealToxicityPrompts, WikiText-2 validation and test: recipes/builtin/decontaminate.py."""
    forbidden = set(load_file(ASSETS / "forbidden.safetensors")["digests"].tolist())
    assert len(forbidden) > 40_000
    for path, row in committed():
        prompt = row["prompt"]
        sides = [row[side] for side in ("chosen", "rejected", "gold") if side in row]
        found = recipes.decontaminate.digests([prompt, *sides, *(prompt + side for side in sides)])
        assert not found & forbidden, f"{path.name}: {prompt!r}"
    for row in placed():
        assert not recipes.decontaminate.digests([row["chosen"], row["rejected"]]) & forbidden, row
    for row in read_lines(ASSETS / "anchor.jsonl"):
        assert not recipes.decontaminate.digests([row["text"]]) & forbidden, row["text"][:60]


def test_no_evaluation_text_was_trained_on():
    """No whole prompt, continuation or test line; short sentences that English repeats are in both."""
    trained = load_file(RECIPES / "corpus-digests.safetensors")["digests"]
    hashes = load_file(ASSETS / "forbidden.safetensors")
    assert len(trained) > 700_000 and len(hashes["whole"]) > 10_000
    assert not set(trained.tolist()) & set(hashes["whole"].tolist())
    shared = set(trained.tolist()) & set(hashes["digests"].tolist())
    assert 0 < len(shared) < 10  # the control: the two sets of hashes are comparable


def test_committed_sets_are_whole_and_disjoint(recipes):
    prompts: dict[str, list[str]] = {}
    for path, row in committed():
        prompts.setdefault(path.stem, []).append(" ".join(recipes.decontaminate.words(row["prompt"])))
    assert len(prompts["train"]) >= 6000 and len(prompts["heldout"]) >= 512
    assert len(prompts["challenge"]) >= 256 and len(prompts["neutral"]) >= 256
    pushed = prompts.pop("pplm")  # prompts of train, and others
    assert len(set(pushed)) == len(pushed) >= 2000
    sides = {
        name: {row[side] for path, row in committed() if path.stem == name for side in ("chosen", "rejected")}
        for name in ("pplm", "heldout")
    }
    assert not sides["pplm"] & sides["heldout"]
    pushed_too = [row[side] for row in placed() for side in ("chosen", "rejected")]
    assert len(set(pushed_too)) == len(pushed_too) and not set(pushed_too) & sides["heldout"]
    everything = [prompt for group in prompts.values() for prompt in group]
    assert len(set(everything)) == len(everything)
    assert not set(pushed) & (set(everything) - set(prompts["train"]))
