"""Continuations of token prompts: greedy, or keyed top-p samples that are the same whatever the batch.

A sample is the winner of an exponential race, an exact draw from the nucleus (the same as log p + Gumbel noise):

    token = argmax_v  p(v) / E(v),   E(v) = -log u(v),   u(v) = hash(seed, prompt, sample, position, v) in (0, 1)

The noise hangs on the token, not on the batch or the device, so a reference and an edited model meet the same noise.

    generate(model, tokenizer, [[5, 17, 9]], Decoding(samples=25))[0]        # 25 lists of up to 20 new token ids
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count, groupby, takewhile
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from expunge.errors import ExpungeError
from expunge.ids import check_known, with_start
from expunge.models import (
    Batching,
    batching,
    check_model,
    context_length,
    evaluating,
    in_batches,
    inner_model,
    known_tokens,
)

TOP = 1024
"""Logits that are sorted at every step; a row whose nucleus is wider is raced in full, without sorting."""

Row = tuple[int, int]
"""What is generated in one row of a batch: (number of the distinct prompt, number of the sample)."""


@dataclass(frozen=True)
class Decoding:
    """How to continue a prompt. samples = 0 is greedy: one continuation, for which the last three play no part."""

    max_new_tokens: int = 20
    samples: int = 0
    top_p: float = 0.9
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.samples < 0 or not 0 < self.top_p <= 1 or self.temperature <= 0:
            raise ExpungeError(f"{self}: need max_new_tokens >= 1, samples >= 0, 0 < top_p <= 1, temperature > 0")


def generate(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[list[int]]]:
    """New token ids per prompt and sample, in input order, cut before the first of `end_tokens`.

    So a continuation of fewer than `max_new_tokens` ids has ended. prompts: token ids; an empty prompt starts from the
    tokenizer's bos (or eos). batch_size: rows at once, chosen by memory if None, halved when the device runs out of it.
    progress: called with (rows done, rows in all). Of the model's own `generation_config` the end tokens alone play a part
    (no penalties, top_k, forced tokens, ...).
    Raises ExpungeError for a prompt that does not leave room for `max_new_tokens` in the context, and for an id that the
    model does not know.
    """
    keys = [tuple(with_start(tokenizer, prompt)) for prompt in prompts]
    check_room(model, keys, decoding.max_new_tokens, tokenizer)
    distinct = sorted(set(keys), key=len, reverse=True)
    rows = [(number, sample) for number in range(len(distinct)) for sample in range(decoding.samples or 1)]
    done: dict[Row, list[int]] = {}
    ends = end_tokens(model, tokenizer)
    check_model(model)
    way = batching(model)
    with _quiet_inference(model) as inner:
        size = batch_size or _rows_that_fit(inner, max(map(len, distinct), default=0) + decoding.max_new_tokens)

        def work(batch: Sequence[Row]) -> None:
            done.update(zip(batch, _continue_rows(inner, ends, distinct, batch, decoding, way), strict=True))
            if progress:
                progress(len(done), len(rows))

        for _, alike in groupby(rows, key=lambda row: way == "shared" or len(distinct[row[0]])):
            in_batches(list(alike), lambda _: size, work)
    number_of = {key: number for number, key in enumerate(distinct)}
    return [[done[number_of[key], sample] for sample in range(decoding.samples or 1)] for key in keys]


def end_tokens(model: torch.nn.Module, tokenizer: Any) -> list[int]:
    """Every token at which a continuation ends: those of the model's `generation_config`, and the tokenizer's eos.

    A chat model ends its turn with another token than a text, and its `generation_config` names both.
    """
    named = getattr(getattr(inner_model(model), "generation_config", None), "eos_token_id", None)
    named = named if isinstance(named, (list, tuple)) else [named]
    return sorted({token for token in (*named, tokenizer.eos_token_id) if token is not None})


def until_end(ids: Sequence[int], ends: Collection[int]) -> list[int]:
    """`ids` before the first that is one of `ends`."""
    return list(takewhile(lambda token: token not in ends, ids))


def check_room(model: torch.nn.Module, prompts: Sequence[Sequence[int]], new: int, tokenizer: Any = None) -> None:
    """Raise ExpungeError for a prompt that leaves no room for `new` tokens, and for an id that the model does not know."""
    check_known(prompts, known_tokens(model), tokenizer)
    context = context_length(model)
    for index, prompt in enumerate(prompts):
        if len(prompt) + new > context:
            raise ExpungeError(
                f"prompt {index}: {len(prompt)} tokens and {new} new ones exceed the context of {context}; shorten it"
            )


@contextlib.contextmanager
def _quiet_inference(model: torch.nn.Module) -> Iterator[PreTrainedModel]:
    """The transformers model in evaluation mode, with a blank generation_config; both are put back afterwards.

    An explicit GenerationConfig is not enough: transformers 5 fills what it leaves open from the model's own.
    """
    inner = inner_model(model)
    own, inner.generation_config = inner.generation_config, GenerationConfig()
    try:
        with evaluating(model), torch.inference_mode():
            yield inner
    finally:
        inner.generation_config = own


def _rows_that_fit(model: PreTrainedModel, length: int) -> int:
    """Rows for which logits (four float32 copies) and keys and values (two copies) stay within a bound."""
    config = model.config.get_text_config()
    kv_values = 2 * config.num_hidden_layers * config.hidden_size * length
    row_bytes = 16 * config.vocab_size + 2 * kv_values * model.dtype.itemsize
    free = torch.cuda.mem_get_info(model.device)[0] // 3 if model.device.type == "cuda" else 2**28
    return max(1, min(1024, free // row_bytes))


def _continue_rows(
    model: PreTrainedModel,
    ends: list[int],
    prompts: list[tuple[int, ...]],
    rows: Sequence[Row],
    decoding: Decoding,
    way: Batching,
) -> list[list[int]]:
    """New ids of each row of one batch, all of one length unless `way` is "shared": then samples share a prefill."""
    first = rows[0][0]
    ids, mask = _left_padded(prompts[first : rows[-1][0] + 1], model.device)
    prompt_of = torch.tensor([number - first for number, _ in rows], device=model.device)
    last = set(ids[:, -2:].flatten().tolist())
    pad = next(token for token in count() if token not in last)  # else transformers takes a last token for padding
    settings = {"eos_token_id": ends or None, "pad_token_id": pad, "do_sample": False, "use_cache": way != "whole"}
    processors = LogitsProcessorList()
    if decoding.samples:
        keys = [sample_key(decoding.seed, prompts[number], sample) for number, sample in rows]
        processors.append(_KeyedTopP(torch.tensor(keys, device=model.device), ids.shape[1], decoding))
    cache = _prefill(model, ids[:, :-1], mask[:, :-1], settings) if way == "shared" and ids.shape[1] > 1 else None
    if cache is not None:
        cache.batch_select_indices(prompt_of)
        cache.layers = [_Roomy.of(layer, decoding.max_new_tokens) for layer in cache.layers]
    output = model.generate(  # type: ignore[operator]
        input_ids=ids[prompt_of],
        attention_mask=mask[prompt_of],
        past_key_values=cache,
        generation_config=GenerationConfig(max_new_tokens=decoding.max_new_tokens, **settings),
        logits_processor=processors,
    )
    new = output[:, ids.shape[1] :].tolist()
    return [until_end(row, ends) for row in new]


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask `[B, T]`, the mask from the lengths: a padding id may be any token."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    return ids, (torch.arange(width, device=device) >= width - lengths[:, None]).long()


def _prefill(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, settings: dict[str, Any]) -> Any:
    """The keys and values of all prompt tokens but the last, one row per prompt."""
    config = GenerationConfig(max_new_tokens=1, return_dict_in_generate=True, **settings)
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)  # type: ignore[operator]
    return output.past_key_values


class _Roomy(DynamicLayer):
    """Keys and values with room for the tokens to come. transformers' own layer copies all of them at every token."""

    room: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def of(cls, layer: Any, room: int) -> Any:
        """`layer` with `room` more places; one with a sliding window is left as it is."""
        if type(layer) is not DynamicLayer or not layer.get_seq_length():
            return layer
        keys: Any = layer.keys
        values: Any = layer.values
        roomy = cls()
        roomy.lazy_initialization(keys, values)
        more = (*keys.shape[:2], room)
        roomy.room = (
            torch.cat([keys, keys.new_empty(*more, keys.shape[3])], dim=2),
            torch.cat([values, values.new_empty(*more, values.shape[3])], dim=2),
        )
        roomy.keys, roomy.values = (buffer[:, :, : keys.shape[2]] for buffer in roomy.room)
        return roomy

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple:
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        keys, values = self.room
        keys[:, :, start:end], values[:, :, start:end] = key_states, value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values


class _KeyedTopP(LogitsProcessor):
    """Leaves one token per row: the keyed top-p sample. keys: int64 `[B]`; width: tokens of the padded prompt."""

    def __init__(self, keys: torch.Tensor, width: int, decoding: Decoding):
        self.keys, self.width, self.decoding = keys, width, decoding

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise_keys = splitmix64(self.keys + (input_ids.shape[1] - self.width))
        if self.decoding.temperature != 1:
            scores = scores / self.decoding.temperature
        tokens = keyed_top_p(scores, noise_keys, self.decoding.top_p)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


def keyed_top_p(logits: torch.Tensor, keys: torch.Tensor, top_p: float, top: int = TOP) -> torch.Tensor:
    """One exact sample per row from the nucleus, the smallest set of most likely tokens whose mass is at least `top_p`.

    logits: `[B, V]`; keys: int64 `[B]`, equal keys give equal noise; top: logits sorted before the rest.
    Returns int64 `[B]`. Raises ExpungeError for logits that are not numbers.
    """
    total = logits.logsumexp(-1, keepdim=True)
    if not torch.isfinite(total).all():
        raise ExpungeError("the model's logits are not finite numbers, so nothing can be sampled; load it in float32")
    values, tokens = logits.topk(min(top, logits.shape[-1]), dim=-1)
    probs = (values - total).exp()
    chosen = _race(probs, tokens, keys, top_p)
    wide = (probs.sum(-1) < top_p).nonzero().flatten()
    if top < logits.shape[-1] and len(wide):
        chosen[wide] = _race_of_all((logits[wide] - total[wide]).exp(), keys[wide], top_p)
    return chosen


def _race(probs: torch.Tensor, tokens: torch.Tensor, keys: torch.Tensor, top_p: float) -> torch.Tensor:
    """The winning token of each row; probs and tokens `[B, K]` in descending order of probability."""
    inside = probs.cumsum(-1) - probs < top_p
    widest = int(inside.sum(-1).max())
    nucleus = torch.where(inside, probs, 0.0)[:, :widest]
    arrival = nucleus / _exponential(keys, tokens[:, :widest])
    return tokens.gather(1, arrival.argmax(-1, keepdim=True)).squeeze(1)


def _race_of_all(probs: torch.Tensor, keys: torch.Tensor, top_p: float) -> torch.Tensor:
    """The same winners from unsorted probabilities `[B, V]`: the first to arrive that lies in the nucleus.

    A token lies in it where those more likely than it have a mass below `top_p`, which takes one sum and no sort.
    """
    arrival = probs / _exponential(keys, torch.arange(probs.shape[1], device=probs.device)[None])
    while True:
        winner = arrival.argmax(-1, keepdim=True)
        mass_before = torch.where(probs > probs.gather(1, winner), probs, 0.0).sum(-1)
        outside = mass_before >= top_p
        if not outside.any():
            return winner.squeeze(1)
        arrival[outside] = arrival[outside].scatter(1, winner[outside], 0.0)


def _exponential(keys: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Exponential noise `[B, K]` that hangs on the row's key `[B]` and on the token."""
    hashed = splitmix64(keys[:, None] + _GOLDEN * (tokens + 1))
    return -((_shift(hashed, 11).double() + 0.5) * 2.0**-53).log()


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # splitmix64's increment and multipliers (Steele et al. 2014), as signed integers
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def splitmix64(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64: int64 counters to int64 that pass for random bits, alike on every device."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical right shift; torch's own repeats the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def sample_key(seed: int, prompt: Sequence[int], sample: int) -> int:
    """Signed 64-bit key of one continuation."""
    text = f"{seed}/{sample}/{','.join(map(str, prompt))}".encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little", signed=True)
