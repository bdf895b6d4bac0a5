"""What a trainer reads as rows of token ids: pairs or two sets, and neutral text beside them."""

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from expunge.data import Pair, TextTruncation, Truncation, Unpaired, load_corpus, tokenize_pairs, tokenize_unpaired
from expunge.data.rows import PairRows, SetRows
from expunge.errors import ExpungeError
from expunge.ids import check_known, encode, leading_tokens
from expunge.models import context_length, known_tokens
from expunge.training.arguments import UnlearnConfig

log = logging.getLogger("expunge")


def tokenized(
    data: Sequence[Pair] | Unpaired,
    args: UnlearnConfig,
    tokenizer: PreTrainedTokenizerBase,
    anchor_text: str | None = None,
) -> tuple[PairRows | SetRows, Truncation | dict[str, TextTruncation]]:
    """`data` as rows of token ids, and what did not fit, which is said. anchor_text: what `args` names, or it is read."""
    limits = (args.max_prompt_tokens, args.max_continuation_tokens)
    anchor = _windows(args, tokenizer, anchor_text)
    if isinstance(data, Unpaired):
        sides, by_side = tokenize_unpaired(data, tokenizer, *limits)
        rows, truncation = SetRows(sides, args.seed, anchor), by_side
        lines = [f"to {side}, {counts}" for side, counts in by_side.items()]
    else:
        pairs, truncation = tokenize_pairs(data, tokenizer, *limits)
        rows, lines = PairRows(pairs, anchor), [str(truncation)]
    for line in lines if args.process_index == 0 else ():
        log.info("train: %s", line)
    return rows, truncation


def check_room(model: nn.Module, rows: PairRows | SetRows, tokenizer: Any = None) -> None:
    """Raise ExpungeError where a prompt and its continuation are longer than the model's context, or have an id that the
    model does not know."""
    check_known(rows.sequences(None), known_tokens(model), tokenizer)
    context, windows = context_length(model), max(map(len, rows.anchor), default=0)
    if windows > context:
        raise ExpungeError(f"training.anchor_tokens={windows}: more than the model's context of {context}; lower it")
    longest = max(map(len, rows.sequences(("retain", "forget"))))
    if longest > context:
        kind = "pair" if isinstance(rows, PairRows) else "text"
        raise ExpungeError(
            f"the longest {kind} has {longest} tokens, the model's context {context}: lower training.max_prompt_tokens or "
            "training.max_continuation_tokens"
        )


def _windows(args: UnlearnConfig, tokenizer: PreTrainedTokenizerBase, text: str | None) -> list[list[int]]:
    """Full windows of the anchor corpus, as token ids, each with the bos that the tokenizer puts before a text."""
    if not args.anchor_text:
        return []
    ids = encode(tokenizer, load_corpus(args.anchor_text) if text is None else text)
    start = leading_tokens(tokenizer)
    size = args.anchor_tokens - len(start)
    if size < 1:
        raise ExpungeError(f"training.anchor_tokens={args.anchor_tokens}: at least {len(start) + 1} are needed")
    windows = [start + ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
    if not windows:
        raise ExpungeError(f"training.anchor_text={args.anchor_text!r}: shorter than one window of {size} tokens")
    return windows
