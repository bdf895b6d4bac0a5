"""What more iterations of PPLM give: one line for each number in benchmarks/results/pplm-iterations.jsonl, resumable.

`EXPUNGE_DATA=... python recipes/builtin/pplm_iterations.py`. Prompts are sentence starts of Wikipedia of 16 tokens whose
greedy continuation may be a chosen side. Lee et al. 2024 take 50 iterations, PPLM's own code 3. Each line has the share of
prompts whose pushed continuation may be a rejected side, with its 95 % interval by prompt, and seconds of a core a prompt.
"""

import json
import random
import time
from itertools import islice
from pathlib import Path

import numpy as np
from sources import wikipedia

from expunge import load_model
from expunge.data.builders import draw
from expunge.data.harvest import cuts
from expunge.data.pair_files import probe_for
from expunge.data.pplm import PPLM, perturbed
from expunge.data.selection import Candidate, is_usable
from expunge.ids import continuation_text, prompt_ids
from expunge.metrics.stats import interval, resample_counts
from expunge.rows import read_lines
from expunge.scorers import load_scorer

OUT = Path("benchmarks/results/pplm-iterations.jsonl")
ITERATIONS = (1, 3, 5, 10, 20, 50)
PROMPTS, TOKENS = 128, 16


def main() -> None:
    model, tokenizer = load_model("builtin", dtype="float32")
    scorer, probe = load_scorer("wordvec"), probe_for(model, tokenizer, "jigsaw")
    heads = [head for text in islice(wikipedia(), 60) for head, _ in cuts(text, tokenizer, (TOKENS,), 8, 0)]
    heads = [head for head in dict.fromkeys(heads) if len(prompt_ids(tokenizer, [head])[0]) == TOKENS]
    random.Random(0).shuffle(heads)
    heads = heads[: 4 * PROMPTS]  # about half have a greedy side that may be chosen
    done = [line["iterations"] for line in read_lines(OUT)] if OUT.exists() else []
    greedy = draw(model, tokenizer, heads, scorer, PPLM(iterations=0), probe=probe)
    prompts = [head for head, found in zip(heads, greedy, strict=True) if len(found) > 1][:PROMPTS]
    ids = prompt_ids(tokenizer, prompts)
    for iterations in (number for number in ITERATIONS if number not in done):
        recipe, started = PPLM(iterations=iterations), time.process_time()
        new = [group[0] for group in perturbed(model, tokenizer, ids, probe, recipe)]
        seconds = (time.process_time() - started) / len(ids)
        texts = [continuation_text(tokenizer, prompt, tokens) for prompt, tokens in zip(ids, new, strict=True)]
        scores = scorer.score(texts)
        found = [Candidate(tuple(t), text, float(s)) for t, text, s in zip(new, texts, scores, strict=True)]
        toxic = np.array([is_usable(one, recipe) and one.score >= recipe.toxic for one in found], dtype=float)
        low, high = interval(resample_counts(len(toxic)) @ toxic / len(toxic))
        line = {"iterations": iterations, "n": len(ids), "seed": recipe.seed, "toxic": round(toxic.mean(), 4)}
        line |= {"ci_low": round(low, 4), "ci_high": round(high, 4), "mean_score": round(float(scores.mean()), 4)}
        usable = np.mean([is_usable(one, recipe) for one in found])
        line |= {"usable": round(float(usable), 4), "cpu_seconds": round(seconds, 3)}
        with OUT.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
