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
    width,
)
from expunge.models.identity import Identity, facts_digest, identity_of, loaded_identity, tokenizer_digest, weights_digest
from expunge.models.loading import (
    BUILTIN,
    BUILTINS,
    is_adapter,
    is_local,
    load_model,
    load_outline,
    loading_options,
    reading,
)
from expunge.models.reference import (
    Reference,
    evaluating,
    frozen,
    only_training,
    original,
    sharing_copy,
    without_dropout,
)

__all__ = [
    "BUILTIN",
    "BUILTINS",
    "Identity",
    "Layer",
    "Reference",
    "blocks",
    "body",
    "context_length",
    "context_of",
    "depth",
    "evaluating",
    "facts_digest",
    "frozen",
    "head_logits",
    "head_scaling",
    "hidden_states",
    "identity_of",
    "in_batches",
    "inner_model",
    "is_adapter",
    "is_local",
    "load_model",
    "load_outline",
    "loaded_identity",
    "loading_options",
    "only_training",
    "original",
    "reading",
    "sharing_copy",
    "tokenizer_digest",
    "weights_digest",
    "width",
    "without_dropout",
]
