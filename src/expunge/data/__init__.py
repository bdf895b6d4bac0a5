"""Preference pairs, prompts and running text: by name (docs/data.md), from a file or from a hub.

    pairs = load_pairs("builtin")
    prompts = load_prompts("builtin-challenge")
    text = load_corpus("wikitext2")

`expunge.data.builders` makes pairs with a model; it is imported by its own name, as it alone needs torch.
"""

from expunge.data.corpora import load_corpus
from expunge.data.named import NAMED, NamedSet, named_sets
from expunge.data.pairs import Pair, load_pairs
from expunge.data.prompts import Prompt, load_prompts
from expunge.data.tokenize import TokenizedPair, Truncation, tokenize_pairs

__all__ = [
    "NAMED",
    "NamedSet",
    "Pair",
    "Prompt",
    "TokenizedPair",
    "Truncation",
    "load_corpus",
    "load_pairs",
    "load_prompts",
    "named_sets",
    "tokenize_pairs",
]
