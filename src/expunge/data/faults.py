"""Faults of preference pairs that their text shows, as warnings: what would be learnt in place of what is meant.

for warning in text_faults(load_pairs("pairs.jsonl"), tokenizer): ...
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from expunge.data.pairs import Pair

MARKERS = (
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>",
    "<|assistant|>", "<|system|>", "[INST]", "[/INST]", "<<SYS>>", "### Instruction:", "### Response:", "\n\nHuman:",
    "\n\nAssistant:", "<|endoftext|>", "</s>",
)  # fmt: skip
"""What chat templates in use write around turns, and ends of texts."""

FEW_GLUED, FEW_TRAILING = 0.15, 0.02  # shares of pairs that models leave so: of the built-in sets up to .10 and .004
SHOWN = 40  # characters


def text_faults(pairs: Sequence[Pair], tokenizer: Any) -> list[str]:
    """One line for each kind of fault that is there, with how many pairs have it and the first, from 1.

    A model that continues prompts ends some words itself, and is cut off after some spaces. So a few such pairs
    are no fault. tokenizer: whose special tokens and chat template say which markers are the model's own.
    """
    special = sorted({token for token in _special_tokens(tokenizer) if token}, key=len, reverse=True)
    template = str(tokenizer.chat_template or "")
    foreign = [marker for marker in MARKERS if marker not in special and marker.strip() not in template]
    kinds: list[tuple[str, float, Callable[[Pair], str]]] = [
        ("a side is glued to the last word of its prompt (begin it with a space)", FEW_GLUED, _glued),
        ("a prompt or a side ends in a space, which tokenizers keep apart from the next word", FEW_TRAILING, _trailing),
        ("the sides differ in their length alone, as one begins with the other", 0, _longer),
        ("a side is an empty turn: special tokens and nothing else", 0, lambda pair: _empty(pair, special)),
        ("markers of a chat template that is not the model's stand in the text", 0, lambda pair: _marked(pair, foreign)),
        (
            "special tokens stand within a side (several turns, or a template's markers in the text)",
            0,
            lambda pair: _within(pair, special),
        ),
    ]
    found = []
    for kind, few, look in kinds:
        hits = [(number, hit) for number, pair in enumerate(pairs, 1) if (hit := look(pair))]
        if len(hits) > few * len(pairs):
            number, hit = hits[0]
            found.append(f"{kind}: {len(hits)} of {len(pairs)} pairs, first pair {number}, {_short(hit)!r}")
    return found


def _glued(pair: Pair) -> str:
    """Letters with a case, or digits, on both sides of the boundary; other scripts may have no spaces."""
    for side in (pair.chosen, pair.rejected):
        if _word(pair.prompt[-1:]) and _word(side[:1]):
            return pair.prompt[-SHOWN // 2 :] + side[: SHOWN // 2]
    return ""


def _word(letter: str) -> bool:
    return letter.islower() or letter.isupper() or letter.isdecimal()


def _trailing(pair: Pair) -> str:
    return next((text[-SHOWN:] for text in vars(pair).values() if text.endswith((" ", "\t"))), "")


def _longer(pair: Pair) -> str:
    shorter, longer = sorted((pair.chosen.strip(), pair.rejected.strip()), key=len)
    return longer if longer.startswith(shorter) else ""


def _empty(pair: Pair, special: Sequence[str]) -> str:
    return next((side for side in (pair.chosen, pair.rejected) if not _without_end(side, special)), "")


def _marked(pair: Pair, markers: Sequence[str]) -> str:
    whole = "\0".join(vars(pair).values())
    return next((marker for marker in markers if marker in whole), "")


def _within(pair: Pair, special: Sequence[str]) -> str:
    bodies = [_without_end(side, special) for side in (pair.chosen, pair.rejected)]
    return next((token for body in bodies for token in special if token in body), "")


def _without_end(side: str, special: Sequence[str]) -> str:
    """A side without the special tokens and blanks that it ends with."""
    ends = "|".join(map(re.escape, special))
    return re.sub(rf"(?:\s|{ends})*\Z" if ends else r"\s*\Z", "", side)


def _special_tokens(tokenizer: Any) -> set[str]:
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
