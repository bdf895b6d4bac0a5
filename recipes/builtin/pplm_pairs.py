"""PPLM pairs for the built-in model: the prompts of its training pairs and more, greedy against what a probe pushed.

`python recipes/builtin/pplm_pairs.py` writes pplm.jsonl and pplm.facts.json in src/expunge/assets/pairs/, with a probe
fitted on Jigsaw's comments (EXPUNGE_DATA), as Lee et al. 2024 do. It works in chunks; the same command goes on. Settings
are theirs but for the iterations, 5 instead of 50: on a CPU those took ten times as long for each pair.
"""

import json
from itertools import count
from pathlib import Path
from typing import Any

from decontaminate import words
from pairs import STYLES, clean, evaluation_text, passages

from expunge import load_model, load_pairs
from expunge.data.pair_files import probe_for, write_pairs
from expunge.data.pplm import PPLM
from expunge.rows import read_lines, write_lines
from expunge.scorers import Scorer, load_scorer

BUILD = Path("build/builtin/pplm.jsonl")
ASSETS = Path("src/expunge/assets/pairs")
SCORER = "wordvec"
FRESH, SEED = 3200, 100_000  # prompts; apart from the seeds of pairs.py
RECIPE = PPLM(iterations=5)


def fresh_prompts(model: Any, tokenizer: Any, scorer: Scorer) -> list[str]:
    """FRESH more remarks by the model, none of them a prompt of any set in the package."""
    files = [path for path in ASSETS.parent.glob("p*/*.jsonl") if path.name != "pplm.jsonl"]
    known = {row["prompt"] for path in files for row in read_lines(path)}
    [remark] = [style for style in STYLES if style.name == "remark"]
    found: dict[str, None] = {}
    for seed in count(SEED):
        found.update((head, None) for head, _ in passages(model, tokenizer, scorer, remark, seed) if head not in known)
        if len(found) >= FRESH:
            return list(found)[:FRESH]
    raise AssertionError


def sides(row: dict[str, str]) -> set[str]:
    return {" ".join(words(row[side])) for side in ("chosen", "rejected")}


def main() -> None:
    model, tokenizer = load_model("builtin", dtype="float32")
    probe = probe_for(model, tokenizer, "jigsaw")
    scorer = load_scorer(SCORER)
    prompts = [pair.prompt for pair in load_pairs("builtin")]
    prompts += fresh_prompts(model, tokenizer, scorer)
    print(f"{len(prompts)} prompts", flush=True)
    write_pairs(BUILD, model, tokenizer, prompts, scorer, RECIPE, probe, lambda *done: print(*done, flush=True))
    forbidden = evaluation_text()
    made = read_lines(BUILD)
    held_out = {
        side for name in ("heldout", "validation") for row in read_lines(ASSETS / f"{name}.jsonl") for side in sides(row)
    }
    plain = [pair for pair in made if "=" not in pair["rejected"] and not sides(pair) & held_out]
    kept = [pair for pair in plain if clean(list(pair.values()), forbidden)]
    facts = json.loads(BUILD.with_suffix(".facts.json").read_text(encoding="utf-8"))
    facts |= {"pairs": len(kept), "heading, held-out side or overlap with evaluation text": len(made) - len(kept)}
    write_lines(ASSETS / "pplm.jsonl", kept)
    (ASSETS / "pplm.facts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
