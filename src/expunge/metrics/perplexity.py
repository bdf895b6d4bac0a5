"""Perplexity: of running text in windows, and of continuations after their prompts.

exact     PPL = exp( sum nll / predicted tokens )
lee2024   PPL = exp( sum_i mean_nll_i len_i / sum_i len_i ), window i predicts len_i - 1 tokens   (methods.md 4)

nll, tokens = row_nll(model, [([5, 17, 9], 1)])      # -log p of each row's tokens from index 1 on
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from expunge.errors import ExpungeError
from expunge.ids import check_known, encode, leading_tokens
from expunge.models import check_model, context_length, head_logits, hidden_states, in_batches, known_tokens, vocabulary

LONGEST_WINDOW = 1024
BATCH_TOKENS = 8192
LOGITS_AT_ONCE = 2**25  # values: 128 MiB in float32

Row = tuple[list[int], int]
"""Token ids, and the index of the first one that is scored (at least 1)."""


@dataclass(frozen=True)
class Windows:
    """A text's windows: nll and predicted tokens of each `[N]`, and the words of all that was scored."""

    nll: np.ndarray
    tokens: np.ndarray
    words: int


@torch.inference_mode()
def row_nll(
    model: torch.nn.Module, rows: Sequence[Row], progress: Callable[[int, int], None] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Summed -log p of the scored tokens of each row, and how many they are; float64 and int64 `[N]`.

    Raises ExpungeError for an id that the model does not know.
    """
    check_known((ids for ids, _ in rows), known_tokens(model))
    check_model(model)
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]), reverse=True)
    nll = np.zeros(len(rows))
    count = np.array([len(ids) - first for ids, first in rows])

    def work(batch: Sequence[int]) -> None:
        longest = len(rows[batch[0]][0])
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        scored = torch.zeros(len(batch), longest, dtype=torch.bool)
        attention = torch.zeros(len(batch), longest, dtype=torch.long)
        for i, (tokens, first) in enumerate(rows[j] for j in batch):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            attention[i, : len(tokens)] = 1
            scored[i, first : len(tokens)] = True
        states = hidden_states(model, ids.to(device), attention.to(device), ["final"])["final"]
        row_of, position = scored.nonzero(as_tuple=True)
        predicting = states[row_of.to(states.device), position.to(states.device) - 1]  # a device map may end elsewhere
        losses = _token_nll(model, predicting, ids[row_of, position])
        nll[batch] = torch.zeros(len(batch), dtype=torch.float64).index_add_(0, row_of, losses.double().cpu()).numpy()

    in_batches(order, lambda first: BATCH_TOKENS // len(rows[first][0]), work, progress)
    return nll, count


def _token_nll(model: torch.nn.Module, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p of `targets` `[N]`, on any device, after `states` `[N, d]`; over chunks of tokens: `[N, V]` is never whole."""
    size = max(1, LOGITS_AT_ONCE // vocabulary(model))
    chunks = []
    for start in range(0, len(states), size):
        logits = head_logits(model, states[start : start + size]).float()
        chunks.append(F.cross_entropy(logits, targets[start : start + size].to(logits.device), reduction="none"))
    return torch.cat(chunks) if chunks else states.new_zeros(0)


def text_windows(
    model: torch.nn.Module,
    tokenizer: Any,
    text: str,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Windows:
    """The nll of `text`, tokenised once and cut into windows of the context (at most 1,024 tokens) without overlap.

    A tokenizer that begins texts with a bos gives one to each window, not scored itself; without one the first token
    of a window is not predicted. Raises ExpungeError for a text of fewer than two tokens.
    """
    start = leading_tokens(tokenizer)
    ids = encode(tokenizer, text)[:max_tokens]
    size = min(context_length(model), LONGEST_WINDOW) - len(start)
    first = len(start) or 1
    rows = [(start + ids[i : i + size], first) for i in range(0, len(ids), size)]
    rows = [row for row in rows if len(row[0]) > first]
    if not rows:
        raise ExpungeError("perplexity: the text has fewer than two tokens")
    nll, tokens = row_nll(model, rows, progress)
    return Windows(nll, tokens, words=len(tokenizer.decode(ids).split()))
