"""Models of any architecture: load, find the body, the blocks and the head, read hidden states, freeze a reference.

model, tokenizer = load_model("builtin")      # or a hub name, or a folder, LoRA adapters included
"""

from expunge.models.caches import Batching, batching, copies_rows, keeps_keys
from expunge.models.checks import check_model
from expunge.models.description import Description, describe
from expunge.models.forward import (
    Layer,
    blocks,
    body,
    context_length,
    context_of,
    depth,
    hidden_states,
    in_batches,
    inner_model,
    known_of,
    known_tokens,
    width,
)
from expunge.models.head import Form, alike, check_copied_head, head_form, head_logits, output_layer, tolerance, vocabulary
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
    "Batching",
    "Description",
    "Form",
    "Identity",
    "Layer",
    "Reference",
    "alike",
    "batching",
    "blocks",
    "body",
    "check_copied_head",
    "check_model",
    "context_length",
    "context_of",
    "copies_rows",
    "depth",
    "describe",
    "evaluating",
    "facts_digest",
    "frozen",
    "head_form",
    "head_logits",
    "hidden_states",
    "identity_of",
    "in_batches",
    "inner_model",
    "is_adapter",
    "is_local",
    "keeps_keys",
    "known_of",
    "known_tokens",
    "load_model",
    "load_outline",
    "loaded_identity",
    "loading_options",
    "only_training",
    "original",
    "output_layer",
    "reading",
    "sharing_copy",
    "tokenizer_digest",
    "tolerance",
    "vocabulary",
    "weights_digest",
    "width",
    "without_dropout",
]
