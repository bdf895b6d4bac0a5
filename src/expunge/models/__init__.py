"""Models of any architecture: load, find the body, the blocks and the head, read hidden states, freeze a reference.

model, tokenizer = load_model("builtin")      # or a hub name, or a folder, LoRA adapters included
"""

from expunge.models.forward import (
    Layer,
    blocks,
    body,
    context_length,
    context_of,
    depth,
    head_logits,
    head_scaling,
    hidden_states,
    in_batches,
    inner_model,
    known_of,
    known_tokens,
    width,
)
from expunge.models.loading import (
    BUILTIN,
    BUILTINS,
    is_adapter,
    load_model,
    load_outline,
    loading_options,
    local_folders,
    reading,
)
from expunge.models.reference import (
    Reference,
    evaluating,
    frozen,
    only_training,
    original,
    sharing_copy,
    weights_digest,
    without_dropout,
)

__all__ = [
    "BUILTIN",
    "BUILTINS",
    "Layer",
    "Reference",
    "blocks",
    "body",
    "context_length",
    "context_of",
    "depth",
    "evaluating",
    "frozen",
    "head_logits",
    "head_scaling",
    "hidden_states",
    "in_batches",
    "inner_model",
    "is_adapter",
    "known_of",
    "known_tokens",
    "load_model",
    "load_outline",
    "loading_options",
    "local_folders",
    "only_training",
    "original",
    "reading",
    "sharing_copy",
    "weights_digest",
    "width",
    "without_dropout",
]
