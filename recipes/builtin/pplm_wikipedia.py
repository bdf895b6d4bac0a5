"""PPLM pairs after sentences of Wikipedia, as the paper's are: WikiText-2's train split first, then whole articles.

`EXPUNGE_DATA=... python recipes/builtin/pplm_wikipedia.py` adds chunk after chunk to pplm-wikipedia.jsonl in
src/expunge/assets/pairs/ until there are 12,000 pairs; what is there already stays, so the same command goes on, on another
day too. The prompts are not ours to copy: a row names the place where its prompt stands in the public text
(expunge.data.places), and holds the model's two continuations. No prompt is of a text that is reported: WikiText's other
splits, RealToxicityPrompts, the sentences of F1.
"""

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from decontaminate import Forbidden, words
from pairs import clean
from sources import data_folder, forbidden_texts, unseen_articles

from expunge import load_model
from expunge.data.builders import build_pairs
from expunge.data.harvest import cuts
from expunge.data.pair_files import probe_for
from expunge.data.places import SOURCES, WIKIPEDIA, Place, check_digits, lines_of
from expunge.data.pplm import PPLM
from expunge.rows import read_lines, write_lines
from expunge.scorers import load_scorer

ASSETS = Path("src/expunge/assets/pairs")
OUT = ASSETS / "pplm-wikipedia.jsonl"
WANTED = 12_000
CHUNK = 2048  # prompts
BLOCK = 50_000  # lines whose prompts are shuffled together
TOKENS = (12, 16, 20, 24, 28)  # few lengths, since rows of one length run together
SCORER = "wordvec"
PROBE = "builtin"  # fitted on the two sides of these pairs
RECIPE = PPLM(iterations=3, step_size=1.0)  # by benchmarks/results/pplm-iterations.jsonl: the most pairs for the time

Prompt = tuple[Place, str]


def prompts(tokenizer: Any) -> Iterator[Prompt]:
    """Sentence starts of both sources with their places, block by block in a seeded order, each text once."""
    seen: set[str] = set()
    reported = {row["id"] for row in unseen_articles()}
    for source in SOURCES:
        lines = lines_of(source)
        while block := list(islice(lines, BLOCK)):
            found: list[Prompt] = []
            for key, line in block:
                if str(key).partition("/")[0] in reported and source == WIKIPEDIA:
                    continue
                at = 0
                for head, _ in cuts(line, tokenizer, TOKENS, 8, 0):
                    at = line.index(head, at)
                    if "<unk>" not in head and head not in seen:
                        seen.add(head)
                        found.append((Place(source, key, at, at + len(head)), head))
                    at += len(head)
            random.Random(f"{source}/{len(seen)}").shuffle(found)
            yield from found


def reported() -> Forbidden:
    """Every text that is reported, the sentences of F1 with it."""
    path = data_folder() / "dpo_toxic_eval_prompts" / "wiki_samples.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return Forbidden([*forbidden_texts(), *(row["prompt"] for row in rows), *(row["gold"] for row in rows)])


def sides(row: dict[str, str]) -> set[str]:
    return {" ".join(words(row[side])) for side in ("chosen", "rejected")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=WANTED)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no chunk after so many minutes")
    arguments = parser.parse_args()
    started = time.monotonic()
    model, tokenizer = load_model("builtin", dtype="float32")
    scorer, probe, forbidden = load_scorer(SCORER), probe_for(model, tokenizer, PROBE), reported()
    recipe = {"recipe": asdict(RECIPE), "scorer": scorer.digest, "tokens": list(TOKENS)}
    recipe |= {"probe": PROBE, "probe_auc": round(probe.auc, 4)}
    facts_path = OUT.with_suffix(".facts.json")
    rows = read_lines(OUT) if OUT.exists() else []
    facts = (
        json.loads(facts_path.read_text(encoding="utf-8")) if rows else {**recipe, "chunks": 0, "prompts": 0, "dropped": {}}
    )
    if {key: facts[key] for key in recipe} != recipe:
        raise SystemExit(f"{OUT}: made with another recipe ({facts_path}); move both files away to begin anew")
    taken = {side for row in rows for side in sides(row)}
    for name in ("heldout", "validation"):
        taken |= {side for row in read_lines(ASSETS / f"{name}.jsonl") for side in sides(row)}
    source = islice(prompts(tokenizer), facts["chunks"] * CHUNK, None)
    while len(rows) < arguments.pairs and (time.monotonic() - started) / 60 < arguments.minutes:
        chunk = dict((text, place) for place, text in islice(source, CHUNK))
        if not chunk:
            raise SystemExit(f"the sources hold no more prompts: {len(rows)} pairs")
        begun = time.monotonic()
        made, report = build_pairs(model, tokenizer, list(chunk), scorer, RECIPE, probe=probe)
        dropped = Counter(facts["dropped"]) + Counter(report.dropped)
        for pair in made:
            row = asdict(pair)
            if "=" in pair.rejected:
                dropped["heading"] += 1
            elif sides(row) & taken:
                dropped["side of another pair"] += 1
            elif not clean([pair.prompt, pair.chosen, pair.rejected], forbidden):
                dropped["overlap with reported text"] += 1
            else:
                taken |= sides(row)
                at = chunk[pair.prompt].row() | {"check": check_digits(pair.prompt)}
                rows.append({**at, "chosen": pair.chosen, "rejected": pair.rejected})
        facts |= {"chunks": facts["chunks"] + 1, "prompts": facts["prompts"] + len(chunk), "pairs": len(rows)}
        facts["dropped"] = dict(dropped)
        write_lines(OUT, rows)
        facts_path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        print(f"chunk {facts['chunks']}: {len(rows)} pairs, {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
