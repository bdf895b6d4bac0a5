"""What recipes/pairs_and_anchor.yaml reads, in build/texts/: two more texts for perplexity, and PPLM pairs.

`EXPUNGE_DATA=... python recipes/builtin/texts.py`. The articles are those that the built-in model's corpus left out, which
recipes/builtin/corpus.py draws with a seed; recipes/builtin/pplm_wikipedia.py leaves them out. Reviews of IMDb were part of
its pre-training. The pairs are the first of builtin-pplm-wikipedia, so that they stay the same while that set grows.
"""

from dataclasses import asdict
from itertools import islice
from pathlib import Path

from sources import imdb, unseen_articles

from expunge.data import load_pairs
from expunge.rows import write_lines

OUT = Path("build/texts")
CHARACTERS = 400_000
PAIRS = 2_000


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    for name, texts in (("wikipedia", (row["text"] for row in unseen_articles())), ("imdb", islice(imdb(), 400))):
        (OUT / f"{name}.txt").write_text("\n\n".join(texts)[:CHARACTERS], encoding="utf-8")
        print(OUT / f"{name}.txt")
    write_lines(OUT / "pplm.jsonl", map(asdict, load_pairs("builtin-pplm-wikipedia")[:PAIRS]))
    print(OUT / "pplm.jsonl")


if __name__ == "__main__":
    main()
