"""Prompts from a model's own text: sample documents, cut them at sentences and words.

    texts = sample_texts(model, tokenizer, "The", count=100)
    prompts = [head for text in texts for head, rest in cuts(text, tokenizer, tokens=range(8, 25), seed=0)]

A prompt that the model wrote itself is one that it meets: no text of others enters the pairs or their evaluation.
"""

import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from expunge.generation import Decoding, generate
from expunge.ids import encode, prompt_ids

SENTENCE_START = re.compile(r"(?:^ ?|(?<=[.!?] )|(?<=[.!?][\"'] ))(?=[\"'(]?[A-Za-z])", re.MULTILINE)


def sample_texts(
    model: nn.Module, tokenizer: Any, beginning: str, count: int, tokens: int = 96, top_p: float = 0.9, seed: int = 0
) -> list[str]:
    """`count` documents that begin with `beginning` (included; "" starts from the tokenizer's bos or eos)."""
    [start] = prompt_ids(tokenizer, [beginning])
    decoding = Decoding(max_new_tokens=tokens, samples=count, top_p=top_p, seed=seed)
    [continuations] = generate(model, tokenizer, [start], decoding)
    return [tokenizer.decode([*start, *ids], skip_special_tokens=True) for ids in continuations]


def cuts(text: str, tokenizer: Any, tokens: Sequence[int], rest: int = 8, seed: int = 0) -> Iterator[tuple[str, str]]:
    """(head, rest) of each sentence start whose line goes on far enough; both are of one line, cut between words.

    tokens: lengths of a head, one drawn for each. rest: tokens that must follow; the heads of a text do not overlap.
    """
    rng = random.Random(f"{seed}/{text}")
    used = 0
    for match in SENTENCE_START.finditer(text):
        if match.end() < used:
            continue
        line = text[match.end() :].split("\n", 1)[0].rstrip()
        ids = encode(tokenizer, line)
        length = rng.choice(tokens)
        if len(ids) < length + rest:
            continue
        head = tokenizer.decode(ids[:length])
        end = len(head) if line[len(head) : len(head) + 1].isspace() else head.rfind(" ")
        if end > 0 and line.startswith(head):
            used = match.end() + end
            yield line[:end], line[end:]
