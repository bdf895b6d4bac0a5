"""A model's parts, whatever its architecture, and its forward from ids to hidden states; on to logits: `head.py`."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from expunge.errors import ExpungeError, is_out_of_memory

Layer = int | Literal["final", "pre_norm"]
"""A residual state: l in 0..L-1 is the stream entering block l (0 = embeddings), "pre_norm" the last block's raw
output, "final" the same after the final norm, in which the logits are linear."""


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, return-value]


def body(model: nn.Module) -> nn.Module:
    """The decoder without its head: input ids to the final hidden states. Raises ExpungeError where it is not found."""
    inner = inner_model(model)
    found = getattr(inner, inner.base_model_prefix, None)
    if found is None:
        raise ExpungeError(
            f"{type(inner).__name__} is not supported: it has no {inner.base_model_prefix!r}, as its body is called"
        )
    return found


def blocks(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks in order: the one list of `num_hidden_layers` modules in the decoder, no tower for images."""
    inner = inner_model(model)
    depth = inner.config.get_text_config().num_hidden_layers
    for part in (inner.get_decoder(), body(model)):  # what ModernBERT calls so is its head
        if part is not None and part is not inner:
            for module in part.modules():
                if isinstance(module, nn.ModuleList) and len(module) == depth:
                    return module
    raise ExpungeError(f"{type(inner).__name__}: no list of {depth} blocks found in its body")


def width(model: nn.Module) -> int:
    """d, the width of the residual stream."""
    return inner_model(model).config.get_text_config().hidden_size


def depth(model: nn.Module) -> int:
    """L, the number of blocks."""
    return inner_model(model).config.get_text_config().num_hidden_layers


def context_length(model: nn.Module) -> int:
    """The most tokens that the model takes at once; no bound where its positions are relative."""
    return context_of(inner_model(model).config)


def context_of(config: PreTrainedConfig) -> int:
    """The context length of a model of this configuration."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def known_tokens(model: nn.Module) -> int:
    """How many token ids the model's embedding has rows for."""
    embedding: Any = inner_model(model).get_input_embeddings()
    return getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0]


def known_of(config: PreTrainedConfig) -> int | None:
    """The same of a model of this configuration; None where it does not say."""
    return getattr(config.get_text_config(), "vocab_size", None)


def hidden_states(
    model: nn.Module,
    ids: torch.Tensor,
    attention_mask: torch.Tensor,
    layers: Sequence[Layer],
    position_ids: torch.Tensor | None = None,
    cache: Cache | None = None,
) -> dict[Layer, torch.Tensor]:
    """Residual states `[B, T, d]` at each of `layers` for right-padded `ids` `[B, T]`.

    The forward ends below the first block that none of them needs: neither it nor its hooks run.

    attention_mask: `[B, T]`; or bool `[B, 1, T, T]`, who sees whom, with `position_ids` `[B, T]`.
    cache: keys and values of what is before `ids`, which `attention_mask` covers too; those of `ids` are put in.
    Raises ExpungeError for a layer that the model does not have.
    """
    kept: dict[Layer, torch.Tensor] = {}
    stack = blocks(model)
    placed: dict[str, Any] = {} if position_ids is None else {"position_ids": position_ids}
    placed |= {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
    if attention_mask.ndim == 4 and inner_model(model).config._attn_implementation == "eager":  # adds its mask
        dtype = inner_model(model).dtype
        least = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
        attention_mask = torch.where(attention_mask, 0.0, least).to(dtype)
    for layer in layers:
        if isinstance(layer, int) and not 0 <= layer < len(stack):
            raise ExpungeError(f"layer {layer}: the model has {len(stack)} blocks; 0 to {len(stack) - 1}, or 'final'")

    def keep_input(layer: Layer) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            kept[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    def keep_output(module: nn.Module, args: tuple, output: Any) -> None:
        kept["pre_norm"] = output if isinstance(output, torch.Tensor) else output[0]

    numbers = {layer for layer in layers if isinstance(layer, int)}
    last = max(numbers, default=None) if numbers >= set(layers) else None
    handles = [stack[layer].register_forward_pre_hook(keep_input(layer), with_kwargs=True) for layer in numbers - {last}]
    if "pre_norm" in layers:
        handles.append(stack[-1].register_forward_hook(keep_output))
    try:
        with contextlib.nullcontext() if last is None else _stop_before(stack, last):
            output = body(model)(input_ids=ids, attention_mask=attention_mask, **placed)
        kept["final"] = output.last_hidden_state
    except _Reached as reached:
        kept[last] = reached.states  # type: ignore[index]
    finally:
        for handle in handles:
            handle.remove()
    return {layer: kept[layer] for layer in layers}


class _Reached(Exception):
    """The forward got to the first block that nobody needs; `states` would have entered it."""

    def __init__(self, states: torch.Tensor):
        self.states = states


class _End(nn.Module):
    """Stands in for a block: what enters it ends the forward. Raised from a hook, that would leave open what
    gradient checkpointing or FSDP2 had begun for the block."""

    def __init__(self, block: nn.Module):
        super().__init__()
        object.__setattr__(self, "block", block)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)  # a body may ask a block for its kind of attention

    def forward(self, *args: Any, **kwargs: Any) -> None:
        raise _Reached(args[0] if args else kwargs["hidden_states"])


@contextlib.contextmanager
def _stop_before(stack: nn.ModuleList, layer: int) -> Iterator[None]:
    block = stack[layer]
    stack[layer] = _End(block)
    try:
        yield
    finally:
        stack[layer] = block


def in_batches(
    items: Sequence[Any],
    size: Callable[[Any], int],
    work: Callable[[Sequence[Any]], None],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """`work` on runs of items, as many as `size` says of the run's first; half as many where memory runs out.

    progress: called with (items done, items in all). Raises ExpungeError where not even one item fits.
    """
    done, part = 0, 1
    while done < len(items):
        batch = items[done : done + max(1, size(items[done]) // part)]
        try:
            work(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise ExpungeError("out of memory with a single row; use a smaller model, or shorter text") from None
            part *= 2
            continue
        done += len(batch)
        if progress:
            progress(done, len(items))
