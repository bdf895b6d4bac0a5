"""What a model keeps of the tokens before: may rows of unequal length share a batch, and samples the keys of their prompt?

    if batches_unequal(model):      # else: rows of one length at a time, each computed whole
        ...

Keys and values of attention may be copied from row to row, and what stands left of a text may be masked out. A recurrent
state takes padding in; other caches (of an indexer, of convolutions, of fixed size) are not copied by what copies keys.
"""

import weakref
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from expunge.errors import is_out_of_memory
from expunge.models.forward import body, inner_model
from expunge.models.head import tolerance
from expunge.models.reference import evaluating

TOKENS = 9
PADDING = 5

_UNEQUAL: "weakref.WeakKeyDictionary[nn.Module, bool]" = weakref.WeakKeyDictionary()


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


def batches_unequal(model: nn.Module) -> bool:
    """Is a text after padding, from keys and values computed beforehand, continued as it is alone? Tried once a model.

    Never where the model keeps anything but keys and values.
    """
    inner = inner_model(model)
    if inner not in _UNEQUAL:
        with evaluating(inner):
            _UNEQUAL[inner] = keeps_keys(inner) and _continues_alike(inner)
    return _UNEQUAL[inner]


@torch.no_grad()
def _continues_alike(inner: Any) -> bool:
    """Two next tokens' logits: of a text alone without a cache, and beside a longer one after a shared prefill."""
    ids = _tokens(inner, TOKENS)
    mask = torch.ones(2, TOKENS, dtype=torch.long, device=ids.device)
    mask[1, :PADDING] = 0
    both = torch.stack([ids, ids])
    own, inner.generation_config = inner.generation_config, GenerationConfig()
    settings = {"do_sample": False, "pad_token_id": int(ids[-1]) + 1, "return_dict_in_generate": True, "output_logits": True}
    try:
        one = GenerationConfig(max_new_tokens=1, use_cache=True, **settings)
        cache = inner.generate(input_ids=both[:, :-1], attention_mask=mask[:, :-1], generation_config=one).past_key_values
        cache.batch_select_indices(torch.tensor([1, 0], device=ids.device))
        rows = {"input_ids": both.flip(0), "attention_mask": mask.flip(0), "past_key_values": cache}
        batched = inner.generate(**rows, generation_config=GenerationConfig(max_new_tokens=2, use_cache=True, **settings))
        for row, begin in ((0, PADDING), (1, 0)):
            text = {"input_ids": ids[None, begin:], "attention_mask": torch.ones_like(ids[None, begin:])}
            alone = inner.generate(**text, generation_config=GenerationConfig(max_new_tokens=2, use_cache=False, **settings))
            for found, wanted in zip(batched.logits, alone.logits, strict=True):
                if not (found[row] - wanted[0]).abs().mean() <= tolerance(inner) * wanted[0].abs().mean():
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
