"""How likely fixed continuations are after a prompt and each of many strings: the hot path of searches over suffixes.

    row = prompt | string | target,    loss(string) = mean over prompts of  -1/n sum_i log p(target_i | what is before it)

    with frozen(model):
        objective = TargetLosses(model, targets)
        losses = objective.losses(strings, current)     # [N], of strings [N, S] that differ from `current` in some places
        loss, slope = objective.gradient(current)       # [] and d loss / d one-hot [S, V]

The keys and values of the prompt are computed once, those of `current` once a call. Strings go in order of the first place
where they differ from it, and all rows of a batch share what lies before: it is joined to a row's own keys one layer at a
time, and kept for none. Only positions that predict the target reach the head, some of them at a time.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from expunge.attacks.search.shared_keys import KeysValues, block_bytes, free_bytes, keys_and_values, shared_cache
from expunge.attacks.search.targets import Target
from expunge.models import body, check_model, head_logits, in_batches, inner_model

Loss = Literal["cross_entropy", "mellowmax"]
LOGITS = 2**22
"""Values of the head's output at once."""
EMBEDDINGS = 2**13
"""Rows of the embedding at once."""


def mellowmax(x: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """(1/alpha) (logsumexp(alpha x) - log n) over the last dimension: between mean and maximum (Asadi and Littman 2017)."""
    return ((alpha * x).logsumexp(-1) - math.log(x.shape[-1])) / alpha


def token_losses(logits: torch.Tensor, ids: torch.Tensor, loss: Loss) -> torch.Tensor:
    """`[n]` of logits `[n, V]` and ids `[n]`: -log p of each id, or its -logit, of which mellowmax is taken."""
    if loss == "mellowmax":
        return -logits.gather(1, ids[:, None]).squeeze(1)
    return F.cross_entropy(logits, ids, reduction="none")


def target_losses(values: torch.Tensor, loss: Loss) -> torch.Tensor:
    """`token_losses` of targets `[B, n]` as one figure each, `[B]`: their mean, or their mellowmax with alpha 1."""
    return mellowmax(values) if loss == "mellowmax" else values.mean(1)


def first_changes(strings: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
    """int64 `[N]`: the first place where each of `strings` `[N, S]` differs from `current` `[S]`; the last if nowhere."""
    same_so_far = (strings == current).long().cumprod(1)
    return same_so_far.sum(1).clamp(max=strings.shape[1] - 1)


@torch.no_grad()
def by_token(model: nn.Module, slope: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """`[S, vocabulary]`, the derivative by one-hot rows, of that by what the input embedding gives out, `[S, d]`.

    By what the module gives out, not by its weight: some scale it.
    """
    embed, ids = model.get_input_embeddings(), torch.arange(vocabulary, device=slope.device)  # type: ignore[operator]
    return torch.cat([slope @ embed(part).to(slope).T for part in ids.split(EMBEDDINGS)], dim=1)


class TargetLosses:
    """The mean over `targets` of each one's loss, with a string between its prompt and it. Use inside `frozen(model)`.

    share: keys and values where every layer keeps all of them; otherwise, or if False, every row is computed whole.
    """

    def __init__(self, model: nn.Module, targets: Sequence[Target], loss: Loss = "cross_entropy", share: bool = True):
        check_model(model)
        self.model = inner_model(model)
        self.each = [_TargetLoss(self.model, target, loss, share) for target in targets]

    @property
    def shares(self) -> bool:
        """Are keys and values shared?"""
        return all(one.context is not None for one in self.each)

    def losses(self, strings: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
        """float32 `[N]` of `strings` `[N, S]`. current: `[S]`, any string; the later they differ from it, the quicker."""
        return torch.stack([one.losses(strings, current) for one in self.each]).mean(0)

    def gradient(self, string: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of `string` `[S]`, and its derivative by the string's one-hot rows, float32 `[S, V]`."""
        found = [one.gradient(string) for one in self.each]
        loss, slope = (torch.stack(column).mean(0) for column in zip(*found, strict=True))
        return loss, by_token(self.model, slope, _vocabulary(self.model))


class _TargetLoss:
    """The same of one target, with the keys and values of its prompt."""

    def __init__(self, model: PreTrainedModel, target: Target, loss: Loss, share: bool):
        self.model = model
        self.loss: Loss = loss
        self.prompt, self.target = (torch.tensor(ids, device=model.device) for ids in (target.prompt, target.ids))
        self.context = keys_and_values(model, self.prompt) if share else None

    @torch.no_grad()
    def losses(self, strings: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
        strings, current = strings.to(self.prompt), current.to(self.prompt)
        shared = self._keys_up_to_last(current)
        first = strings.new_zeros(len(strings)) if shared is None else first_changes(strings, current)
        places, found = first.tolist(), torch.empty(len(strings), device=strings.device)
        length, free = len(self.prompt) + strings.shape[1] + len(self.target), free_bytes(strings.device)

        def rows(row: int) -> int:
            known = 0 if shared is None else len(self.prompt) + places[row]
            return _rows_that_fit(self.model, length, length - known, free)

        def work(batch: Sequence[int]) -> None:
            start = places[batch[0]]
            ids = torch.cat([strings[batch, start:], self.target[:-1].expand(len(batch), -1)], dim=1)
            if shared is None:
                found[batch] = self._loss(None, input_ids=torch.cat([self.prompt.expand(len(batch), -1), ids], dim=1))
            else:
                end = len(self.prompt) + start
                known = [(keys[..., :end, :], values[..., :end, :]) for keys, values in shared]
                found[batch] = self._loss(shared_cache(known), input_ids=ids)

        in_batches(first.argsort(stable=True).tolist(), rows, work)
        return found

    def gradient(self, string: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and its derivative by the embeddings of the string, float32 `[S, d]`."""
        embed = self.model.get_input_embeddings()
        with torch.no_grad():
            before, leaf, after = (embed(ids[None]) for ids in (self.prompt, string.to(self.prompt), self.target[:-1]))
        with torch.enable_grad():
            leaf.requires_grad_()
            if self.context is None:
                loss = self._loss(None, inputs_embeds=torch.cat([before, leaf, after], dim=1))
            else:
                loss = self._loss(shared_cache(self.context), inputs_embeds=torch.cat([leaf, after], dim=1))
            (slope,) = torch.autograd.grad(loss[0], leaf)
        return loss[0].detach(), slope[0].float()

    def _loss(self, cache: DynamicCache | None, **inputs: torch.Tensor) -> torch.Tensor:
        """float32 `[B]` of rows that end before the last id of the target, and begin after what `cache` holds."""
        states = _forward(self.model, cache, **inputs).last_hidden_state[:, -len(self.target) :]
        ids = self.target.expand(len(states), -1).flatten()
        chunk = max(1, LOGITS // _vocabulary(self.model))
        parts = zip(states.flatten(0, 1).split(chunk), ids.split(chunk), strict=True)
        logits = ((head_logits(self.model, some).float().to(wanted.device), wanted) for some, wanted in parts)
        values = [token_losses(found, wanted, self.loss) for found, wanted in logits]
        return target_losses(torch.cat(values).view(len(states), -1), self.loss)

    def _keys_up_to_last(self, string: torch.Tensor) -> KeysValues | None:
        """Of the prompt and all of `string` but its last id, which no row has to itself."""
        if self.context is None or len(string) == 1:
            return self.context
        cache = DynamicCache()
        for layer, known in enumerate(self.context):
            cache.update(*known, layer)
        _forward(self.model, cache, input_ids=string[None, :-1])
        return [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[misc]


def _forward(model: PreTrainedModel, cache: DynamicCache | None, **inputs: torch.Tensor) -> Any:
    """What the body gives out for rows without padding, after what `cache` holds."""
    (given,) = inputs.values()
    known: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
    length = given.shape[1] + (cache.get_seq_length() if cache is not None else 0)
    mask = torch.ones(len(given), length, dtype=torch.long, device=given.device)
    return body(model)(attention_mask=mask, use_cache=cache is not None, **inputs, **known)


def _vocabulary(model: PreTrainedModel) -> int:
    return len(model.get_input_embeddings().weight)  # type: ignore[arg-type]


def _rows_that_fit(model: PreTrainedModel, length: int, new: int, free: int) -> int:
    """Rows of `length` tokens, `new` of them to be computed, that stay within `free` bytes.

    No more than keep the device busy either: a batch shares what its first row knows.
    """
    busy = 8192 if model.device.type == "cuda" else 1024
    return max(1, min(free // block_bytes(model, length, new), busy // new))
