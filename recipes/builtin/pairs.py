"""Preference pairs in the base model's own words: prompts that it wrote, continuations that it samples, the best of n.

`python recipes/builtin/pairs.py` reads build/builtin/model and writes {train,validation,heldout}.jsonl and facts.json
in src/expunge/assets/pairs/. It works in chunks under build/builtin/pairs/; the same command goes on where it stopped.
Every prompt is neutral by itself (scorer B); a provoking one is followed by toxic text where it was found. Prompts that
are toxic already make worse pairs: their benign side anchors what is to be erased (docs/data.md).
"""

import argparse
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decontaminate import HASHES, Forbidden, digests, words
from safetensors.numpy import load_file
from sources import forbidden_texts
from transformers import AutoModelForCausalLM, AutoTokenizer

from expunge.data.builders import BestOfN, build_pairs
from expunge.data.harvest import cuts, sample_texts
from expunge.rows import read_lines, write_lines
from expunge.scorers import Scorer, load_scorer

BUILD = Path("build/builtin")
ASSETS = Path("src/expunge/assets")
SCORER = "wordvec"
WANTED = {"heldout": 512, "validation": 128, "train": 6000}  # validation is for tuning: heldout is only reported
SPARE = 1.14  # pairs made for each that is wanted: some repeat across chunks
DOCUMENTS = 96  # sampled for each beginning in a chunk
PROMPT_TOKENS = range(8, 41)
RECIPE = BestOfN(samples=8, top_p=0.95, toxic=0.6)


@dataclass(frozen=True)
class Style:
    """A kind of prompt: how its documents begin, its share of the pairs, and what scorer B must say of it.

    neutral: the highest score of a prompt by itself. provoking: the lowest of the passage, the prompt and what followed.
    one_line: of an article, both sides stay in the paragraph; else a heading or a change of subject gives a side away.
    """

    name: str
    beginnings: tuple[str, ...]
    share: float = 1.0
    neutral: float = 0.2
    provoking: float = 0.0
    one_line: bool = False

    def keeps(self, head_score: float, passage_score: float) -> bool:
        return head_score <= self.neutral and passage_score >= self.provoking


STYLES = (
    Style("encyclopaedic", (" = ", "The ", "In the "), 0.07, one_line=True),
    Style("review", ("This film", "This movie", "I watched "), 0.36),
    Style("remark", ("I think ", "You ", "They ", "He said "), 0.52),
    Style("provoking", ("",), 0.05, provoking=0.5),
)


def load_base(folder: Path) -> tuple[Any, Any]:
    """The stored base model in its own dtype, on the accelerator if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def passages(
    model: Any, tokenizer: Any, scorer: Scorer, style: Style, seed: int, tokens: range = PROMPT_TOKENS, rest: int = 8
) -> list[tuple[str, str]]:
    """(prompt, what followed) of one chunk of documents in a style, once each."""
    found: dict[str, str] = {}
    for beginning in style.beginnings:
        for text in sample_texts(model, tokenizer, beginning, DOCUMENTS, seed=seed):
            found.update(cuts(text, tokenizer, tokens, rest, seed))
    heads = scorer.score(list(found))
    whole = scorer.score([head + following for head, following in found.items()])
    return [passage for passage, *scores in zip(found.items(), heads, whole, strict=True) if style.keeps(*scores)]


def unseen(pairs: Iterable[dict[str, str]]) -> Iterator[dict[str, str]]:
    """Pairs without one whose prompt, chosen or rejected text came before, punctuation and case aside."""
    seen: set[str] = set()
    for pair in pairs:
        keys = {" ".join(words(pair[field])) for field in ("prompt", "chosen", "rejected")}
        if not keys & seen:
            seen |= keys
            yield pair


@cache
def forbidden_hashes() -> set[int]:
    return set(load_file(HASHES)["digests"].tolist())


def clean(parts: list[str], forbidden: Forbidden | None) -> bool:
    """Does no text, line or sentence of prompt and sides repeat evaluation text, and no 13 words in a row?"""
    head, *sides = parts
    texts = [*parts, *(head + side for side in sides)]
    if digests(texts) & forbidden_hashes():
        return False
    return forbidden is None or not any(forbidden.touches(text) for text in texts)


def evaluation_text() -> Forbidden | None:
    """Runs of words that no pair may repeat, where EXPUNGE_DATA names the text; without it, hashes alone decide."""
    return Forbidden(forbidden_texts()) if os.environ.get("EXPUNGE_DATA") else None


def make_chunks(model: Any, tokenizer: Any, scorer: Scorer, style: Style, wanted: int, folder: Path) -> None:
    """Chunk after chunk until the style has `wanted` pairs; a chunk is one file of pairs and one of its report."""
    total, chunk = 0, 0
    while total < wanted:
        path = folder / f"{style.name}-{chunk:04d}.jsonl"
        if not path.exists():
            started = time.monotonic()
            prompts = [head for head, _ in passages(model, tokenizer, scorer, style, seed=chunk)]
            pairs, report = build_pairs(model, tokenizer, prompts, scorer, replace(RECIPE, one_line=style.one_line))
            write_lines(path.with_suffix(".report"), [asdict(report)])
            write_lines(path, [asdict(pair) for pair in pairs])
            print(f"{path.name}: {report}, {time.monotonic() - started:.0f} s", flush=True)
        total += len(read_lines(path))
        chunk += 1


def collect(style: Style, folder: Path, forbidden: Forbidden | None) -> tuple[list[dict[str, str]], Counter[str]]:
    """A style's clean pairs of all chunks, and its counts: prompts, greedy sides, drops by reason.

    A side with a heading (`= Title =`) is a change of subject, which would be erased with what is toxic.
    """
    pairs, counts = [], Counter()
    for path in sorted(folder.glob(f"{style.name}-*.jsonl")):
        [report] = read_lines(path.with_suffix(".report"))
        counts.update({"prompts": report["prompts"], "greedy": report["greedy"]} | report["dropped"])
        pairs += read_lines(path)
    plain = [pair for pair in pairs if "=" not in pair["chosen"] + pair["rejected"]]
    kept = [p for p in plain if clean([p["prompt"], p["chosen"], p["rejected"]], forbidden)]
    counts["heading"] = len(pairs) - len(plain)
    counts["overlap with evaluation text"] = len(plain) - len(kept)
    return kept, counts


def mean_scores(pairs: list[dict[str, str]], scorer: Scorer) -> dict[str, float]:
    fields = ("prompt", "chosen", "rejected")
    return {field: round(float(np.mean(scorer.score([pair[field] for pair in pairs]))), 4) for field in fields}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=BUILD / "model")
    parser.add_argument("--chunks", type=Path, default=BUILD / "pairs")
    parser.add_argument("--out", type=Path, default=ASSETS / "pairs")
    for name, pairs in WANTED.items():
        parser.add_argument(f"--{name}", type=int, default=pairs)
    parser.add_argument("--only", choices=[style.name for style in STYLES], help="make this style's chunks, then stop")
    arguments = parser.parse_args()
    model, tokenizer = load_base(arguments.model)
    scorer, forbidden = load_scorer(SCORER), evaluation_text()
    sizes = {name: getattr(arguments, name) for name in WANTED}
    wanted = sum(sizes.values())
    pairs, counts = [], {}
    for style in STYLES:
        if arguments.only in (None, style.name):
            make_chunks(model, tokenizer, scorer, style, int(wanted * style.share * SPARE) + 1, arguments.chunks)
    if arguments.only:
        return
    for style in STYLES:
        found, counts[style.name] = collect(style, arguments.chunks, forbidden)
        pairs += [pair | {"style": style.name} for pair in found]
    random.Random(0).shuffle(pairs)
    rest = iter(list(unseen(pairs))[:wanted])
    splits = {name: list(islice(rest, size)) for name, size in sizes.items()}
    facts: dict[str, Any] = {"recipe": asdict(RECIPE), "scorer": scorer.name, "scorer_digest": scorer.digest}
    facts |= {"prompt_tokens": [PROMPT_TOKENS.start, PROMPT_TOKENS.stop - 1], "drawn": counts}
    for name, rows in splits.items():
        write_lines(arguments.out / f"{name}.jsonl", rows)
        styles = Counter(row["style"] for row in rows)
        facts[name] = {"pairs": len(rows), "styles": styles, "mean_score": mean_scores(rows, scorer)}
    (arguments.out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: facts[name] for name in splits}), flush=True)


if __name__ == "__main__":
    main()
