"""May expunge work with this model? Its states and logits are compared with the model's own forward, once a model.

check_model(model)      # nothing, or an ExpungeError that names the architecture and what differs

Every path that uses states or logits begins with it: a model that is loaded, and one that is handed over in memory.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from expunge.errors import ExpungeError, is_out_of_memory
from expunge.models.forward import Layer, blocks, hidden_states, inner_model, width
from expunge.models.head import alike, head_logits, own_logits, tolerance
from expunge.models.reference import evaluating

TOKENS = 6
CHECKED = "_expunge_checked"
"""Set on a model that has passed; a copy of it has it too."""


def check_model(model: nn.Module) -> None:
    """ExpungeError, one line, unless what expunge reads of this architecture is what its own forward computes.

    Two short rows are run, one of them padded on the right: logits are those of the model's own forward and follow from the
    final states, every state is `[B, T, d]` and the one that transformers calls so, and padding changes nothing before it.
    """
    inner = inner_model(model)
    if CHECKED not in vars(inner):
        with evaluating(inner), torch.no_grad():
            _check(inner)
        setattr(inner, CHECKED, True)


def _check(inner: PreTrainedModel) -> None:
    name, near = type(inner).__name__, tolerance(inner)
    size = inner.config.get_text_config().vocab_size
    device = next(inner.get_input_embeddings().parameters()).device
    ids = torch.tensor([[(7 + 13 * (i + 5 * row)) % size for i in range(TOKENS)] for row in range(2)], device=device)
    mask = torch.ones_like(ids)
    mask[1, TOKENS // 2 :] = 0
    layers: list[Layer] = [*range(len(blocks(inner))), "pre_norm", "final"]
    edited = any(module._forward_hooks or module._forward_pre_hooks for module in inner.modules())
    versions = [parameter._version for parameter in inner.parameters()]
    with torch.autocast(device.type, enabled=False):
        try:
            states = hidden_states(inner, ids, mask, layers)
            alone = hidden_states(inner, ids[1:, : TOKENS // 2], mask[1:, : TOKENS // 2], ["final"])["final"]
            asked = {"input_ids": ids, "attention_mask": mask, "use_cache": False, "output_hidden_states": True}
            with _without_a_trace(inner):
                output = type(inner).forward(inner, **asked)  # without accelerate's autocast
            own, named = output.logits, getattr(output, "hidden_states", None) or ()
        except ExpungeError:
            raise
        except Exception as error:  # whatever an architecture makes of ids and a mask alone
            if is_out_of_memory(error):
                raise
            raise _unsupported(name, f"its forward takes more than ids and a mask ({_first_line(error)})") from None
        if versions != [parameter._version for parameter in inner.parameters()]:
            raise _unsupported(name, "its forward changes its own weights")
        for layer, found in states.items():
            if not isinstance(found, torch.Tensor) or found.shape != (*ids.shape, width(inner)):
                raise _unsupported(name, f"its state {layer!r} is no residual stream of its width, {width(inner)}")
        real = mask.bool()
        final = states["final"]
        for logits in (own_logits(inner, final), head_logits(inner, final)):
            if logits.shape != own.shape or not alike(logits[real.to(logits.device)], own[real.to(own.device)], near):
                raise _unsupported(name, "its logits do not follow from the final states of its body")
    # above rounding, where experts are chosen by batch
    if not alike(final[1:, : TOKENS // 2], alone, max(near, 0.02)):
        raise _unsupported(name, "padding after a text changes its states")
    if len(named) == len(layers) - 1 and not edited:  # what edits a block's output may stand before or after what names it
        ours = [states[layer] for layer in layers]  # RWKV names what leaves a block, the others what enters it
        ways = (zip(some, named[:-1], strict=True) for some in (ours[:-2], ours[1:-1]))
        if not any(all(_same(found, wanted, real, near) for found, wanted in way) for way in ways):
            raise _unsupported(name, "what enters its blocks are not its hidden states")


@contextlib.contextmanager
def _without_a_trace(inner: PreTrainedModel) -> Iterator[None]:
    """Hooks are as before afterwards: transformers leaves its own, which record hidden states, on the model for good."""
    mark = "_output_capturing_hooks_installed"
    before = [(module, module._forward_hooks.copy(), mark in vars(module)) for module in inner.modules()]
    try:
        yield
    finally:
        for module, hooks, marked in before:
            module._forward_hooks.clear()
            module._forward_hooks.update(hooks)
            if not marked:
                vars(module).pop(mark, None)


def _same(found: torch.Tensor, wanted: torch.Tensor, real: torch.Tensor, near: float) -> bool:
    """Are states alike at the real tokens?"""
    return found.shape == wanted.shape and alike(found[real.to(found.device)], wanted[real.to(wanted.device)], near)


def _unsupported(name: str, why: str) -> ExpungeError:
    return ExpungeError(f"{name} is not supported: {why}, and expunge edits and measures by what it reads there")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
