"""What the probe, the iterations and the step size of PPLM give: lines of benchmarks/results/pplm-iterations.jsonl.

`EXPUNGE_DATA=... python recipes/builtin/pplm_iterations.py`, resumable. Prompts are sentence starts of Wikipedia of 16
tokens whose greedy continuation may be a chosen side. Lee et al. 2024 take 50 iterations of step .4 and a probe fitted on
Jigsaw. A line has the share of prompts whose pushed continuation may be a rejected side, with its 95 % interval by prompt,
the mean score by both scorers, nats per token under the plain model, and seconds of a core a prompt.
"""

import json
import random
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
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
SETTINGS = (  # probe, iterations, step size
    *(("jigsaw", iterations, 0.4) for iterations in (1, 3, 5, 10, 20, 50)),
    *(("builtin", iterations, 0.4) for iterations in (3, 5, 10)),
    *(("builtin", iterations, 1.0) for iterations in (1, 2, 3, 5)),
    ("builtin", 3, 2.0),
    ("jigsaw", 3, 1.0),
)
PROMPTS, TOKENS = 128, 16


def main() -> None:
    model, tokenizer = load_model("builtin", dtype="float32")
    scorer, other = load_scorer("wordvec"), load_scorer("ngram")
    probes = {name: probe_for(model, tokenizer, name) for name in ("jigsaw", "builtin")}
    heads = [head for text in islice(wikipedia(), 60) for head, _ in cuts(text, tokenizer, (TOKENS,), 8, 0)]
    heads = [head for head in dict.fromkeys(heads) if len(prompt_ids(tokenizer, [head])[0]) == TOKENS]
    random.Random(0).shuffle(heads)
    heads = heads[: 4 * PROMPTS]  # about half have a greedy side that may be chosen
    greedy = draw(model, tokenizer, heads, scorer, PPLM(iterations=0), probe=probes["jigsaw"])
    prompts = [head for head, found in zip(heads, greedy, strict=True) if len(found) > 1][:PROMPTS]
    ids = prompt_ids(tokenizer, prompts)
    done = [(line["probe"], line["iterations"], line["step_size"]) for line in read_lines(OUT)] if OUT.exists() else []
    for name, iterations, step in (setting for setting in SETTINGS if setting not in done):
        recipe, started = PPLM(iterations=iterations, step_size=step), time.process_time()
        new = [group[0] for group in perturbed(model, tokenizer, ids, probes[name], recipe)]
        seconds = (time.process_time() - started) / len(ids)
        texts = [continuation_text(tokenizer, prompt, tokens) for prompt, tokens in zip(ids, new, strict=True)]
        scores = scorer.score(texts)
        found = [Candidate(tuple(t), text, float(s)) for t, text, s in zip(new, texts, scores, strict=True)]
        toxic = np.array([is_usable(one, recipe) and one.score >= recipe.toxic for one in found], dtype=float)
        low, high = interval(resample_counts(len(toxic)) @ toxic / len(toxic))
        line = {"probe": name, "iterations": iterations, "step_size": step, "n": len(ids), "seed": recipe.seed}
        line |= {"toxic": round(toxic.mean(), 4), "ci_low": round(low, 4), "ci_high": round(high, 4)}
        line |= {"wordvec": round(float(scores.mean()), 4), "ngram": round(float(other.score(texts).mean()), 4)}
        line |= {"usable": round(float(np.mean([is_usable(one, recipe) for one in found])), 4)}
        line |= {"nats": round(nats(model, ids, new), 4), "cpu_seconds": round(seconds, 3)}
        with OUT.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def nats(model: torch.nn.Module, prompts: list[list[int]], new: list[list[int]]) -> float:
    """Mean -log p of all the new tokens under the plain model."""
    found = []
    for prompt, tokens in zip(prompts, new, strict=True):
        ids = torch.tensor([[*prompt, *tokens]])
        with torch.inference_mode():
            scores = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        found.append(-scores.gather(1, ids[0, len(prompt) :, None])[:, 0])
    return float(torch.cat(found).mean())


if __name__ == "__main__":
    main()
