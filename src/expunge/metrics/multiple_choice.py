"""Accuracy on multiple-choice questions: is the right choice the likeliest continuation of the prompt?

    log p(choice | prompt) = sum_t log p(choice_t | prompt, choice_<t)
    acc        argmax of log p
    acc_norm   argmax of log p / characters of the choice

As lm-evaluation-harness scores them, item by item: prompt and choice are tokenised together, spaces that end the prompt
with the choice, and what exceeds the context is cut from the left. A token that holds the prompt's end and the choice's
beginning is the choice's (`expunge.ids.split`). Choices that differ in their last token alone, such as letters, share one
forward.

    logps, cut = choice_logps(model, tokenizer, load_questions("wmdp-cyber"))
    is_right(questions, logps, "acc").mean()
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch

from expunge.data.multiple_choice import Question
from expunge.errors import ExpungeError
from expunge.ids import check_known, leading_tokens, split
from expunge.models import check_model, context_length, head_logits, hidden_states, in_batches, known_tokens, vocabulary

Mode = Literal["acc", "acc_norm"]

BATCH_TOKENS = 8192
LOGITS_AT_ONCE = 2**25  # values: 128 MiB in float32
QUESTIONS_AT_ONCE = 256  # tokenised together


@dataclass
class _Row:
    """What runs through the model once: `ids` `[T]`, and the choices whose tokens its last states predict."""

    ids: np.ndarray
    choices: list[tuple[int, list[int]]] = field(default_factory=list)  # place among all choices, and its tokens

    @property
    def states(self) -> int:
        return max(len(tokens) for _, tokens in self.choices)


@torch.inference_mode()
def choice_logps(
    model: torch.nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Of each question log p of its choices, float64 `[C]`; and whether its prompt was cut to fit the context, bool `[N]`.

    progress: called with (rows done, rows in all). Raises ExpungeError for a choice without tokens, or beyond the context.
    """
    check_model(model)
    starts = np.cumsum([0, *(len(question.choices) for question in questions)])
    rows, cut = _rows(tokenizer, questions, starts, context_length(model), known_tokens(model))
    rows.sort(key=lambda row: len(row.ids), reverse=True)
    logps = np.zeros(starts[-1])

    def work(batch: Sequence[_Row]) -> None:
        for place, value in _batch_logps(model, batch):
            logps[place] = value

    in_batches(rows, lambda row: BATCH_TOKENS // len(row.ids), work, progress)
    return np.split(logps, starts[1:-1]), cut


def is_right(questions: Sequence[Question], logps: Sequence[np.ndarray], mode: Mode) -> np.ndarray:
    """1 where the right choice is the likeliest, else 0, float64 `[N]`; of equals the first counts, and NaN never."""
    scores = logps
    if mode == "acc_norm":
        scores = [
            values / [len(choice) for choice in question.choices] for question, values in zip(questions, logps, strict=True)
        ]
    return np.array(
        [
            not np.isnan(values).any() and int(values.argmax()) == question.answer
            for question, values in zip(questions, scores, strict=True)
        ],
        dtype=np.float64,
    )


def chance(questions: Sequence[Question]) -> np.ndarray:
    """The probability of guessing each answer, `[N]`."""
    return np.array([1 / len(question.choices) for question in questions])


def lengths_differ(questions: Sequence[Question]) -> bool:
    """Whether acc_norm can be another figure than acc: letters are all of one length."""
    return any(len({len(choice) for choice in question.choices}) > 1 for question in questions)


def _rows(
    tokenizer: Any, questions: Sequence[Question], starts: np.ndarray, context: int, known: int
) -> tuple[list[_Row], np.ndarray]:
    """What is to be run for all questions, and which of them were cut."""
    rows: list[_Row] = []
    cut = np.zeros(len(questions), dtype=bool)
    for first in range(0, len(questions), QUESTIONS_AT_ONCE):
        some = questions[first : first + QUESTIONS_AT_ONCE]
        for number, choices in enumerate(_encoded(tokenizer, some), first):
            shared: dict[tuple[int, ...], _Row] = {}
            for place, (prompt, tokens) in enumerate(choices):
                if not 0 < len(tokens) <= context:
                    what = f"{len(tokens)} tokens, more than the context of {context}" if tokens else "no token of its own"
                    raise ExpungeError(f"question {number + 1}: its choice {place} has {what}: write it in other words")
                ids = prompt + tokens
                check_known([ids], known, tokenizer)
                cut[number] |= len(ids) > context + 1
                ids = ids[-(context + 1) :][:-1]  # the last token is predicted, not read
                row = shared.setdefault(tuple(ids), _Row(np.array(ids, dtype=np.int32)))
                row.choices.append((starts[number] + place, tokens))
            rows += shared.values()
    return rows, cut


def _encoded(tokenizer: Any, questions: Sequence[Question]) -> list[list[tuple[list[int], list[int]]]]:
    """Of each choice: ids of the prompt, with the tokenizer's own bos, and its own."""
    lead = leading_tokens(tokenizer)
    prompts = [question.prompt.rstrip() for question in questions for _ in question.choices]
    wholes = [question.prompt + choice for question in questions for choice in question.choices]
    choices = [whole[len(prompt) :] for prompt, whole in zip(prompts, wholes, strict=True)]
    found = iter(split(tokenizer, prompts, choices))
    return [[(lead + prompt, choice) for prompt, (choice,), _ in islice(found, len(q.choices))] for q in questions]


def _batch_logps(model: torch.nn.Module, batch: Sequence[_Row]) -> list[tuple[int, float]]:
    """log p of each choice of these rows, with its place."""
    device = next(model.parameters()).device
    lengths = torch.tensor([len(row.ids) for row in batch])
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row.ids, dtype=torch.long) for row in batch], batch_first=True)
    attention = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    states = hidden_states(model, ids.to(device), attention.to(device), ["final"])["final"]
    kept = [states[i, len(row.ids) - row.states : len(row.ids)] for i, row in enumerate(batch)]
    asked: list[tuple[int, int]] = []  # state, token
    ends: list[int] = []
    offset = 0
    for row in batch:
        for _, tokens in row.choices:
            first = offset + row.states - len(tokens)
            asked += [(first + i, token) for i, token in enumerate(tokens)]
            ends.append(len(asked))
        offset += row.states
    values = _token_logps(model, torch.cat(kept), torch.tensor(asked))
    places = [place for row in batch for place, _ in row.choices]
    return [(place, part.sum()) for place, part in zip(places, np.split(values, ends[:-1]), strict=True)]


def _token_logps(model: torch.nn.Module, states: torch.Tensor, asked: torch.Tensor) -> np.ndarray:
    """log p of tokens after `states` `[S, d]`, over chunks of states. asked: `[A, 2]`, state and token."""
    size = max(1, LOGITS_AT_ONCE // vocabulary(model))
    values = torch.zeros(len(asked), dtype=torch.float64)
    for start in range(0, len(states), size):
        logps = head_logits(model, states[start : start + size]).float().log_softmax(-1)
        here = (asked[:, 0] >= start) & (asked[:, 0] < start + size)
        state, token = (asked[here] - torch.tensor([start, 0])).to(logps.device).unbind(1)
        values[here] = logps[state, token].double().cpu()
    return values.numpy()
