"""Keys and values that all rows of a batch share, and how many rows fit in memory beside them.

    known = keys_and_values(model, prompt)                     # [T] ids; None where a layer does not keep them all
    body(model)(input_ids=rows, past_key_values=shared_cache(known), ...)

They are joined to a row's own keys one layer at a time, and kept for none.
"""

from typing import Any

import torch
from psutil import virtual_memory
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from expunge.models import body, copies_rows

KeysValues = list[tuple[torch.Tensor, torch.Tensor]]
"""Of each layer, `[1, heads, T, width]`."""


@torch.no_grad()
def keys_and_values(model: nn.Module, ids: torch.Tensor) -> KeysValues | None:
    """Of ids `[T]`; None where a layer keeps something else, as a recurrent one does, or dropped what left its window."""
    output = body(model)(input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), use_cache=True)
    cache: Any = getattr(output, "past_key_values", None)
    if not copies_rows(cache) or any(layer.keys.shape[-2] != len(ids) for layer in cache.layers):
        return None
    return [(layer.keys, layer.values) for layer in cache.layers]


class _Shared(DynamicLayer):
    """Keys and values that every row of a batch attends to before its own, which are not kept."""

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor) -> "_Shared":
        layer = cls()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        return layer

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple:
        pairs = ((self.keys, key_states), (self.values, value_states))
        return tuple(torch.cat([known.expand(len(new), -1, -1, -1), new], dim=-2) for known, new in pairs)  # type: ignore[union-attr]


def shared_cache(known: KeysValues) -> DynamicCache:
    """Keys and values before all rows of a batch, which stay as they are."""
    cache = DynamicCache()
    cache.layers.extend(_Shared.of(*layer) for layer in known)
    return cache


def free_bytes(device: torch.device) -> int:
    """Of the device's memory, what a batch may take; of a CPU's always as much, since sizes of batches decide roundings."""
    return torch.cuda.mem_get_info(device)[0] // 3 if device.type == "cuda" else min(2**30, virtual_memory().total // 8)


def block_bytes(model: PreTrainedModel, length: int, new: int) -> int:
    """What one block makes of a row of `length` tokens, `new` of them to be computed."""
    config = model.config.get_text_config()
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    heads = getattr(config, "num_attention_heads", 0)  # a recurrent model has none
    return (new * (8 * width + 4 * inner) + 2 * length * width + 2 * heads * new * length) * model.dtype.itemsize
