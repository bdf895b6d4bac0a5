"""Methods that are fitted and applied in place of training: what `expunge.training` is to the others.

    about = fit_and_apply(model, tokenizer, TVI(alpha=20), probe_data=load_probe_data("builtin-pplm"))
    model.save_pretrained("out/model")

What the method makes goes into the weights where that is exact, and else stays attached and is saved beside them.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from expunge.data import Pair, Unpaired, tokenize_pairs, tokenize_unpaired
from expunge.data.rows import PairRows
from expunge.data.tokenize import TokenizedText, tokenize_labelled
from expunge.errors import ExpungeError
from expunge.folding import fold
from expunge.ids import check_known
from expunge.methods import Material, Method
from expunge.models import context_length, depth, inner_model, known_tokens

log = logging.getLogger("expunge")


def fit_and_apply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    train_dataset: Sequence[Pair] | Unpaired = (),
    probe_data: Sequence[tuple[str, bool]] = (),
    perplexity: Callable[[], float] | None = None,
    max_prompt_tokens: int = 64,
    max_continuation_tokens: int = 64,
) -> dict[str, Any]:
    """Change `model`, in place, as `method` says; returns where the change comes from, and whether it was `folded`.

    train_dataset: what is to be forgotten and retained, for a method that looks at it; probe_data: (text, is it of the kind
    to be rid of), all of which is used: leave out what is to be forgotten, as `load_probe_data(forget=...)` does;
    perplexity: of `model` as it is when called. Raises ExpungeError for a model with an adapter, one that is steered
    already, and whatever the method lacks.
    """
    if not method.applied:
        raise ExpungeError(f"{method.name} is trained: expunge.UnlearnTrainer, or expunge run")
    if inner_model(model) is not model:
        raise ExpungeError(f"{method.name}: merge the model's adapter first (model.merge_and_unload())")
    limits = max_prompt_tokens, max_continuation_tokens
    placed = method.placed(depth(model))
    labelled = tokenize_labelled(probe_data, tokenizer, min(sum(limits), context_length(model)))
    sides = _sides(train_dataset, tokenizer, *limits) if train_dataset else {"forget": [], "retain": []}
    rows = [prompt + continuation for side in sides.values() for prompt, continuation in side]
    check_known([*rows, *(ids for ids, _ in labelled)], known_tokens(model), tokenizer)
    with torch.random.fork_rng():
        steering = placed.fit(Material(model, sides["forget"], labelled, sides["retain"], perplexity))
    folded = fold(model, steering)
    if not folded:
        steering.attach(model)
    log.info(
        "%s: %s", method.name, "folded into the weights" if folded else "kept beside the weights, which stay as they are"
    )
    return {**steering.about, "folded": folded}


def _sides(
    data: Sequence[Pair] | Unpaired, tokenizer: PreTrainedTokenizerBase, max_prompt: int, max_continuation: int
) -> dict[str, list[TokenizedText]]:
    if isinstance(data, Unpaired):
        return tokenize_unpaired(data, tokenizer, max_prompt, max_continuation)[0]
    rows = PairRows(tokenize_pairs(data, tokenizer, max_prompt, max_continuation)[0])
    return {side: [rows[at][side] for at in range(len(rows))] for side in ("forget", "retain")}
