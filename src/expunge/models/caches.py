"""What a model keeps of the tokens before: may rows of unequal length share a batch, and samples the keys of their prompt?

    batching(model)      # "shared", "equal" or "whole": how its rows may be continued, tried once

Keys and values of attention may be copied from row to row, and what stands left of a text may be masked out. A recurrent
state takes padding in; other caches (of an indexer, of convolutions, of fixed size) are not copied by what copies keys.
"""

from typing import Any, Literal

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from expunge.errors import is_out_of_memory
from expunge.models.forward import body, inner_model
from expunge.models.head import alike, tolerance
from expunge.models.reference import evaluating

TOKENS = 9
PADDING = 5

Batching = Literal["shared", "equal", "whole"]
"""shared: unequal rows, padded on the left, after one prefill of each prompt. equal: rows of one length, with the model's
own cache. whole: rows of one length, all of it computed at every token."""

KNOWN = "_expunge_batching"
"""Set on a model that was tried; a copy of it has it too."""


def copies_rows(cache: Any) -> bool:
    """Does every layer of `cache` hold keys and values, row by row, and nothing else? A kind that is not known does not."""
    layers: list[Any] = cache.layers if type(cache) is DynamicCache else []
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    return bool(layers) and all(type(layer) in known and layer.is_initialized for layer in layers)


@torch.no_grad()
def keeps_keys(model: nn.Module) -> bool:
    """Does the model keep keys and values of every layer, and nothing else? Found by running two tokens."""
    ids = _tokens(model, 2)[None]
    output = body(model)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    return copies_rows(getattr(output, "past_key_values", None))


def batching(model: nn.Module) -> Batching:
    """The quickest way in which a batch gives each row the next tokens' logits that it has alone, without a cache.

    Never "shared" where the model keeps anything but keys and values.
    """
    inner = inner_model(model)
    if KNOWN not in vars(inner):
        with evaluating(inner):
            if keeps_keys(inner) and _continues_alike(inner, "shared"):
                way = "shared"
            else:
                way = "equal" if _continues_alike(inner, "equal") else "whole"
        setattr(inner, KNOWN, way)
    return vars(inner)[KNOWN]


@torch.no_grad()
def _continues_alike(inner: Any, way: Batching) -> bool:
    """Are two next tokens' logits those of each text alone? Of two texts, the second begins within the first if shared."""
    ids, start = _tokens(inner, 2 * TOKENS).view(2, TOKENS), PADDING if way == "shared" else 0
    mask = torch.ones_like(ids)
    mask[1, :start] = 0
    own, inner.generation_config = inner.generation_config, GenerationConfig()
    pad = next(id for id in range(len(ids.unique()) + 1) if id not in ids)
    settings = {"do_sample": False, "pad_token_id": pad, "return_dict_in_generate": True, "output_logits": True}

    def continued(ids: torch.Tensor, mask: torch.Tensor, new: int = 2, use_cache: bool = True, cache: Any = None) -> Any:
        config = GenerationConfig(max_new_tokens=new, use_cache=use_cache, **settings)
        return inner.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, generation_config=config)

    try:
        cache, order = None, torch.tensor([1, 0], device=ids.device)
        if way == "shared":
            cache = continued(ids[:, :-1], mask[:, :-1], new=1).past_key_values
            cache.batch_select_indices(order)
        batched = continued(ids[order], mask[order], cache=cache).logits
        for place, row in enumerate(order.tolist()):
            begin = int(mask[row].argmax())
            alone = continued(ids[row : row + 1, begin:], mask[row : row + 1, begin:], use_cache=False).logits
            near = tolerance(inner)
            if not all(alike(found[place], wanted[0], near) for found, wanted in zip(batched, alone, strict=True)):
                return False
    except Exception as error:  # whatever an architecture makes of a cache that it is given
        if is_out_of_memory(error):
            raise
        return False
    finally:
        inner.generation_config = own
    return True


def _tokens(model: nn.Module, number: int) -> torch.Tensor:
    """Some ids `[number]`, on the device that takes them."""
    embedding: Any = inner_model(model).get_input_embeddings()
    size = inner_model(model).config.get_text_config().vocab_size
    return torch.tensor([(7 + 13 * i) % (size - 1) for i in range(number)], device=embedding.weight.device)
