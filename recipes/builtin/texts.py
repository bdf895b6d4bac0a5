"""Two more texts for perplexity, in build/texts/: Wikipedia articles that nothing was trained on, and film reviews.

`EXPUNGE_DATA=... python recipes/builtin/texts.py`. The articles are those that the built-in model's corpus left out, which
recipes/builtin/corpus.py draws with a seed; recipes/builtin/pplm_wikipedia.py leaves them out. Reviews of IMDb were part of
its pre-training.
"""

from itertools import islice
from pathlib import Path

from sources import imdb, unseen_articles

OUT = Path("build/texts")
CHARACTERS = 400_000


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    for name, texts in (("wikipedia", (row["text"] for row in unseen_articles())), ("imdb", islice(imdb(), 400))):
        (OUT / f"{name}.txt").write_text("\n\n".join(texts)[:CHARACTERS], encoding="utf-8")
        print(OUT / f"{name}.txt")


if __name__ == "__main__":
    main()
