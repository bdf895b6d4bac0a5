"""Neutral text in the base model's own words, for the KL of methods that have one (`data.anchor`).

`python recipes/builtin/anchor.py` writes anchor.jsonl and anchor.facts.json in src/expunge/assets/: articles and reviews as
the model samples them, one a row. A document is left out if either scorer finds it toxic, or if it repeats evaluation text.
No prompt or pair of another set begins here: those are cut from documents with other seeds.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from pairs import ASSETS, STYLES, clean, evaluation_text

from expunge import load_model
from expunge.data.harvest import sample_texts
from expunge.ids import encode
from expunge.rows import write_lines
from expunge.scorers import load_scorer

SEED = 500_000  # pairs.py and prompts.py count up from 0 and 100,000
DOCUMENTS, TOKENS = 32, 192  # sampled for each beginning in a chunk, and how long
WANTED = 120_000  # tokens: about 1,900 windows of 64
SHARES = {"encyclopaedic": 0.8, "review": 0.2}
BENIGN, SHORTEST = 0.2, 64  # the highest score, and the fewest tokens, of a document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--tokens", type=int, default=WANTED)
    arguments = parser.parse_args()
    model, tokenizer = load_model("builtin", dtype="float32")
    scorers, forbidden = [load_scorer(name) for name in ("wordvec", "ngram")], evaluation_text()
    rows: list[dict[str, str]] = []
    facts: dict[str, Any] = {"seed": SEED, "benign": BENIGN, "scorers": {s.name: s.digest for s in scorers}, "styles": {}}
    for style in (style for style in STYLES if style.name in SHARES):
        kept, sampled, seed = [], 0, SEED
        while sum(len(encode(tokenizer, text)) for text in kept) < arguments.tokens * SHARES[style.name]:
            for beginning in style.beginnings:
                texts = sample_texts(model, tokenizer, beginning, DOCUMENTS, tokens=TOKENS, seed=seed)
                sampled += len(texts)
                scores = [max(found) for found in zip(*(scorer.score(texts) for scorer in scorers), strict=True)]
                long = [len(encode(tokenizer, text)) >= SHORTEST for text in texts]
                kept += [
                    text.strip()
                    for text, score, enough in zip(texts, scores, long, strict=True)
                    if enough and score <= BENIGN and clean([text, ""], forbidden)
                ]
            seed += 1
            print(f"{style.name}: {len(kept)} documents of {sampled}", flush=True)
        rows += [{"text": text} for text in kept]
        facts["styles"][style.name] = {"sampled": sampled, "kept": len(kept)}
    facts["tokens"] = sum(len(encode(tokenizer, row["text"])) for row in rows)
    write_lines(arguments.out / "anchor.jsonl", rows)
    (arguments.out / "anchor.facts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
