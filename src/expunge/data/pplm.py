"""PPLM (Dathathri et al. 2020): continuations that a linear probe pushes towards its label, the weights left alone.

Before each token is drawn, the keys and values of all tokens before it are moved by D, which starts at zero:

    D <- D - step_size * g / |g|^gamma,   g = d loss / d D for each row and layer, `iterations` times
    loss = -log P(label 1 | mean state) + kl_scale * KL(p_moved || p)
    draw from  p_moved^gm_scale * p^(1 - gm_scale)  among its top_k tokens

The mean runs over the plain states of the text so far, the moved state of the last token, and the states of `horizon` soft
tokens after it, each the expected embedding under the distribution before; the gradient goes through the soft tokens.
The moved keys and values stay for the tokens to come (Dathathri et al. 2020, section 3; settings: Lee et al. 2024, table 9).

    perturbed(model, tokenizer, [[5, 17, 9]], probe, PPLM(samples=2))[0]        # two lists of new token ids
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from expunge.data.selection import Selection
from expunge.errors import ExpungeError
from expunge.generation import check_room, end_tokens, keyed_top_p, sample_key, splitmix64, until_end
from expunge.ids import with_start
from expunge.models import body, check_model, frozen, head_logits, in_batches, inner_model, keeps_keys
from expunge.probes import Probe

BATCH_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class PPLM(Selection):
    """How continuations are pushed, and which may make a pair. The chosen side is the greedy, plain continuation."""

    chosen: Literal["greedy"] = "greedy"
    iterations: int = 50
    step_size: float = 0.4
    gamma: float = 1.0
    gm_scale: float = 0.95  # 0 draws from the plain model
    kl_scale: float = 0.1
    horizon: int = 1
    top_k: int = 10
    temperature: float = 1.0  # of the moved distribution

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.iterations, self.step_size, self.kl_scale) < 0 or min(self.horizon, self.top_k) < 1:
            raise ExpungeError(f"{self}: need iterations, step_size, kl_scale >= 0 and horizon, top_k >= 1")
        if not 0 <= self.gm_scale <= 1 or self.temperature <= 0:
            raise ExpungeError(f"{self}: need 0 <= gm_scale <= 1 and temperature > 0")


PRESETS: dict[str, dict[str, float]] = {
    "lee2024": {},
    "pplm": {"iterations": 3, "step_size": 0.02, "gamma": 1.5, "gm_scale": 0.9, "kl_scale": 0.01},
}
"""Published settings: Lee et al. 2024 (table 9), the defaults above, and those of PPLM's own code."""

Cache = Any
Pairs = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values of each layer, `[B, heads, T, head width]`


def perturbed(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    probe: Probe,
    recipe: PPLM,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[list[int]]]:
    """New token ids per prompt and sample, in input order, cut before the first of `end_tokens`.

    prompts: token ids; rows of one length run together, so none is padded and every architecture with keys and values
    will do. probe: on the mean of final states. progress: called with (rows done, rows in all).
    Raises ExpungeError for a prompt without room for the continuation, or a model without keys and values.
    """
    check_model(model)
    if not keeps_keys(model):
        raise ExpungeError(
            f"PPLM moves keys and values, and {type(inner_model(model)).__name__} keeps something else; use best-of-n"
        )
    keys, ends = [tuple(with_start(tokenizer, prompt)) for prompt in prompts], end_tokens(model, tokenizer)
    check_room(model, keys, recipe.max_new_tokens + recipe.horizon)
    distinct = sorted(set(keys), key=len)
    rows = [(prompt, sample) for prompt in distinct for sample in range(recipe.samples)]
    done: dict[tuple[tuple[int, ...], int], list[int]] = {}

    def work(batch: Sequence[tuple[tuple[int, ...], int]]) -> None:
        device = next(model.parameters()).device
        ids = torch.tensor([prompt for prompt, _ in batch], device=device)
        noise = torch.tensor([sample_key(recipe.seed, *row) for row in batch], device=device)
        new = _continue(model, ids, noise, probe, recipe).tolist()
        done.update(zip(batch, (until_end(row, ends) for row in new), strict=True))
        if progress:
            progress(len(done), len(rows))

    with frozen(model):
        for length, group in groupby(rows, key=lambda row: len(row[0])):
            size = batch_size or max(1, BATCH_TOKENS // (length + recipe.max_new_tokens))
            in_batches(list(group), lambda _, size=size: size, work)
    return [[done[key, sample] for sample in range(recipe.samples)] for key in keys]


def _continue(model: nn.Module, ids: torch.Tensor, noise: torch.Tensor, probe: Probe, recipe: PPLM) -> torch.Tensor:
    """New ids `[B, max_new_tokens]` of prompts `[B, T]`; `noise` `[B]` keys the draws."""
    plain: Cache = None
    past = torch.zeros(len(ids), 1, device=ids.device)  # the sum of states so far, `[B, d]` once there are any
    length = ids.shape[1] - 1
    if length:
        with torch.no_grad():
            states, plain = _run(model, plain, input_ids=ids[:, :-1])
        past = states.float().sum(1).to(ids.device)
    moved = copy.deepcopy(plain)
    last, new, table = ids[:, -1:], [], None
    for position in range(recipe.max_new_tokens):
        with torch.no_grad():
            state, plain = _run(model, plain, input_ids=last)
            logits = head_logits(model, state[:, -1]).float()
        if length:
            table = embeddings(model, logits.shape[-1]) if table is None else table
            step = _Step(model, plain, moved, last, past, length, logits, table, probe, recipe)
            logits, moved = step.fused()
        else:
            moved = copy.deepcopy(plain)  # no token before the first: nothing to move
        top = logits.topk(min(recipe.top_k, logits.shape[-1]), dim=-1)
        kept = torch.full_like(logits, -torch.inf).scatter(1, top.indices, top.values)
        last = keyed_top_p(kept, splitmix64(noise + position), 1.0)[:, None]
        past, length = past + state[:, -1].float().to(past.device), length + 1
        new.append(last)
    return torch.cat(new, dim=1)


@dataclass
class _Step:
    """One token to come: plain keys and values with the last token, moved ones without it."""

    model: nn.Module
    plain: Cache
    moved: Cache
    last: torch.Tensor  # [B, 1]
    past: torch.Tensor  # [B, d], the sum of the plain states before the last token
    length: int  # how many they are
    logits: torch.Tensor  # [B, V], plain
    table: torch.Tensor  # [V, d]
    probe: Probe
    recipe: PPLM

    def fused(self) -> tuple[torch.Tensor, Cache]:
        """Log-weights `[B, V]` to draw from, and the moved keys and values with the last token."""
        base = _tensors(self.moved)
        moves = [torch.zeros_like(tensor) for pair in base for tensor in pair]
        for _ in range(self.recipe.iterations):
            moves = self._moved_on(base, moves)
        with torch.no_grad():
            states, cache = _run(self.model, _with(self.moved, _sums(base, moves)), input_ids=self.last)
            logits = head_logits(self.model, states[:, -1]).float() / self.recipe.temperature
        share = self.recipe.gm_scale
        return share * logits.log_softmax(-1) + (1 - share) * self.logits.log_softmax(-1), cache

    @torch.enable_grad()
    def _moved_on(self, base: Pairs, moves: list[torch.Tensor]) -> list[torch.Tensor]:
        moves = [move.requires_grad_() for move in moves]
        states, _ = _run(self.model, _with(self.moved, _sums(base, moves)), input_ids=self.last)
        log_probs = head_logits(self.model, states[:, -1]).float().log_softmax(-1)
        kl = F.kl_div(self.logits.log_softmax(-1), log_probs, reduction="none", log_target=True).sum()
        total, cache = self.past + states[:, -1].float().detach(), _with(self.plain, _tensors(self.plain))
        probs = log_probs.exp()
        for step in range(self.recipe.horizon):
            soft = (probs.to(self.table.dtype) @ self.table)[:, None]
            states, cache = _run(self.model, cache, inputs_embeds=soft)
            total = total + states[:, -1].float()
            if step + 1 < self.recipe.horizon:
                probs = head_logits(self.model, states[:, -1]).float().softmax(-1)
        mean = total / (self.length + 1 + self.recipe.horizon)
        loss = F.softplus(-self.probe.logit(mean)).sum() + self.recipe.kl_scale * kl  # rows do not meet in it
        gradients = torch.autograd.grad(loss, moves)
        moved = []
        for i in range(0, len(moves), 2):  # keys and values of a layer share one norm
            pair = gradients[i : i + 2]
            norm = sum(g.float().square().sum((1, 2, 3), keepdim=True) for g in pair).sqrt() + 1e-10  # type: ignore[union-attr]
            scale = self.recipe.step_size / norm**self.recipe.gamma
            moved += [(move - (scale * g).to(move.dtype)).detach() for move, g in zip(moves[i : i + 2], pair, strict=True)]
        return moved


@torch.no_grad()
def embeddings(model: nn.Module, size: int) -> torch.Tensor:
    """What stands for each of `size` tokens as `inputs_embeds`, `[V, d]`: Gemma scales them in the module, not after it."""
    embed: Any = inner_model(model).get_input_embeddings()
    return embed(torch.arange(size, device=embed.weight.device))


def _run(model: nn.Module, cache: Cache, **inputs: torch.Tensor) -> tuple[torch.Tensor, Cache]:
    """Final states `[B, T, d]` and keys and values; `cache` is used up."""
    output = body(model)(past_key_values=cache, use_cache=True, **inputs)
    return output.last_hidden_state, output.past_key_values


def _tensors(cache: Cache) -> Pairs:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _sums(base: Pairs, moves: list[torch.Tensor]) -> Pairs:
    return [(k + moves[2 * i], v + moves[2 * i + 1]) for i, (k, v) in enumerate(base)]


def _with(cache: Cache, tensors: Pairs) -> Cache:
    """A cache of its own with these keys and values: a forward appends to it and leaves `cache` as it is."""
    made = copy.copy(cache)
    made.layers = []
    for layer, (keys, values) in zip(cache.layers, tensors, strict=True):
        layer = copy.copy(layer)
        layer.keys, layer.values = keys, values
        made.layers.append(layer)
    return made
