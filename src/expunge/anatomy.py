"""Where things are in a causal LM of any architecture, by name and never by index: each block's MLP, and weights to train.

    mlp_output(model, 3)                                    # the linear layer whose columns (rows in GPT-2) are values
    mlp_inputs(model, 3)["up"].vectors                      # keys [neurons, d]; of a gated MLP there is "gate" too
    nearest_values(model, direction, 7)                     # of all neurons those that add most nearly `direction`
    parameters_in(model, [1, 2, 3], "mlp_out")              # names of weights, as in model.named_parameters()

An MLP is a memory of keys and values (Geva et al. 2021): neuron i adds a_i v_i to the residual stream, where a_i hangs on
k_i . x, or in a gated MLP on both of its keys.

A weight's place in a flat list means another thing in each architecture: parameter 6 of a block is the MLP's output in
Llama, the attention's in Qwen 2, a norm in GPT-2.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from expunge.errors import ExpungeError
from expunge.models import blocks, inner_model, width

MLP_OUT = re.compile(r"(^|\.)(down_proj|dense_4h_to_h|fc2|fc_out|mlp\.c_proj|ffn_output|mlp\.proj|w2)(\.|$)")
"""The linear map from an MLP's neurons to the residual stream: Llama and its kin, GPT-NeoX, OPT, Phi, GPT-J, GPT-2, ..."""
GATE = re.compile(r"gate|^w1$")
"""Of the two maps to the neurons of a gated MLP the one under the activation."""
PER_BLOCK = 100
"""Value vectors that a block may bring to the ranking of all."""


def block_names(model: nn.Module) -> list[str]:
    """The dotted name of each block, as `model.named_modules()` has it: of a PEFT model too."""
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(block)] for block in blocks(model)]


def parameters_in(model: nn.Module, which: Sequence[int], role: str) -> list[str]:
    """Names of the trainable weights of blocks `which` that `role` means; with an adapter, of the adapter's.

    role: "mlp_out", the output matrix of the MLP; "all_block"; or a part of the names below the block, between dots.
    Raises ExpungeError, with what there is, for a block that does not exist and where nothing matches.
    """
    prefixes = block_names(model)
    check_blocks(which, len(prefixes))
    matches = _matcher(role)
    found, there = [], set()
    for name, parameter in model.named_parameters():
        for block in which:
            inside = name.removeprefix(f"{prefixes[block]}.")
            if inside == name or not parameter.requires_grad:
                continue
            there.add(inside.rpartition(".")[0])
            if matches(inside):
                found.append(name)
    if not found:
        numbers = ", ".join(map(str, which))
        raise ExpungeError(
            f"method.parameters={role!r}: no trainable weight of blocks {numbers} is called so; expected all, "
            f"mlp_out, all_block, or a part of: {', '.join(sorted(there)) or 'none, as all are frozen'}"
        )
    return found


def in_words(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Names of weights in blocks for people: `{"blocks 1, 2, 3": "mlp.c_proj.weight"}`, by the blocks that have them."""
    inside: dict[str, list[int]] = {}
    for block, prefix in enumerate(block_names(model)):
        for name in names:
            if name.startswith(f"{prefix}."):
                inside.setdefault(name.removeprefix(f"{prefix}."), []).append(block)
    told: dict[str, list[str]] = {}
    for name, which in inside.items():
        told.setdefault(f"block{'s' * (len(which) > 1)} {', '.join(map(str, which))}", []).append(name)
    return {which: ", ".join(found) for which, found in told.items()}


def check_blocks(which: Sequence[int], depth: int) -> None:
    """Raise ExpungeError for the number of a block that a model of `depth` blocks does not have."""
    for block in which:
        if not 0 <= block < depth:
            raise ExpungeError(f"block {block}: the model has {depth} blocks, 0 to {depth - 1}")


def _matcher(role: str):
    if role == "all_block":
        return lambda name: True
    if role == "mlp_out":
        return lambda name: MLP_OUT.search(name) is not None and not name.endswith("bias")
    part = re.compile(rf"(^|\.){re.escape(role)}(\.|$)")
    return lambda name: part.search(name) is not None


def mlp_output(model: nn.Module, block: int) -> nn.Module:
    """The linear layer that maps the MLP's neurons of `block` to the residual stream. ExpungeError where none is found."""
    linear = _linear_layers(model, block)
    return linear[_output_name(model, block, linear)]


def _linear_layers(model: nn.Module, block: int) -> dict[str, nn.Module]:
    stack = blocks(model)
    check_blocks([block], len(stack))
    return {name: module for name, module in stack[block].named_modules() if isinstance(module, (nn.Linear, Conv1D))}


def _output_name(model: nn.Module, block: int, linear: Mapping[str, nn.Module]) -> str:
    found = [name for name in linear if MLP_OUT.search(name)]
    if len(found) != 1:
        raise ExpungeError(
            f"{type(inner_model(model)).__name__}: no single output layer of the MLP in block {block}; linear layers: "
            f"{', '.join(linear)}"
        )
    return found[0]


@dataclass(frozen=True)
class Keys:
    """Where the keys of an MLP's neurons lie: `outputs` of `layer`, one for each neuron."""

    layer: nn.Module
    outputs: slice

    @property
    def vectors(self) -> torch.Tensor:
        """`[neurons, d]`: what each neuron answers to, a view of the weight."""
        return _by_output(self.layer)[self.outputs]


def mlp_inputs(model: nn.Module, block: int) -> dict[str, Keys]:
    """The keys of the MLP of `block`: "up", and of a gated MLP also "gate", which the activation is taken of.

    One layer may hold both, the gate first (Phi-3, GLM). Raises ExpungeError, with what there is, where they are not found.
    """
    linear = _linear_layers(model, block)
    name = _output_name(model, block, linear)
    neurons, parent = len(value_vectors(linear[name])), name.rpartition(".")[0]
    beside = {other.rpartition(".")[2]: layer for other, layer in linear.items() if other.rpartition(".")[0] == parent}
    sizes = {other: _by_output(layer).shape for other, layer in beside.items() if layer is not linear[name]}
    whole = [other for other, size in sizes.items() if size == (neurons, width(model))]
    fused = [other for other, size in sizes.items() if size == (2 * neurons, width(model))]
    gates = [other for other in whole if GATE.search(other)]
    if len(fused) == 1 and not whole:
        layer = beside[fused[0]]
        return {"gate": Keys(layer, slice(0, neurons)), "up": Keys(layer, slice(neurons, 2 * neurons))}
    if fused or (len(whole), len(gates)) not in ((1, 0), (2, 1)):
        raise ExpungeError(
            f"{type(inner_model(model)).__name__}: no input layers of the MLP in block {block}; linear layers: "
            f"{', '.join(linear)}"
        )
    return {"gate" if other in gates else "up": Keys(beside[other], slice(0, neurons)) for other in whole}


def _by_output(layer: nn.Module) -> torch.Tensor:
    """`[outputs, inputs]`, a view of the weight."""
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    return weight.T if isinstance(layer, Conv1D) else weight


def value_vectors(layer: nn.Module) -> torch.Tensor:
    """`[neurons, d]`: what each neuron adds to the residual stream (Geva et al. 2022), a view of the weight."""
    return _by_output(layer).T


@dataclass(frozen=True)
class Value:
    """What one neuron adds to the residual stream, `[d]`, and its cosine with the direction that was looked for."""

    cosine: float
    block: int
    neuron: int
    vector: torch.Tensor


@torch.no_grad()
def nearest_values(model: nn.Module, towards: torch.Tensor, count: int) -> list[Value]:
    """The `count` value vectors of the whole model nearest in angle, the nearest first; at most PER_BLOCK of a block
    (Lee et al. 2024, their code)."""
    found: list[Value] = []
    for block in range(len(blocks(model))):
        vectors = added_values(model, block)
        cosines = F.cosine_similarity(vectors, towards[None], dim=-1)
        best = cosines.topk(min(PER_BLOCK, len(cosines)))
        found += [
            Value(cosine, block, neuron, vectors[neuron].clone())
            for cosine, neuron in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
    return sorted(found, key=lambda value: -value.cosine)[:count]


def added_values(model: nn.Module, block: int) -> torch.Tensor:
    """float32 `[neurons, d]`: value vectors as they come into the stream.

    A norm after the MLP (Gemma 2, OLMo 2) scales each coordinate by its weight; what else it does is the same for all.
    Raises ExpungeError where the weights are quantized.
    """
    weights = mlp_output(model, block)
    if weights.weight.ndim != 2 or not weights.weight.is_floating_point():  # type: ignore[union-attr]
        raise ExpungeError("value vectors are read from weights, and these are quantized: load the model without that")
    vectors: torch.Tensor = value_vectors(weights).detach().float()
    for name, norm in blocks(model)[block].named_children():
        if name in ("post_feedforward_layernorm", "post_mlp_layernorm"):
            ones = torch.ones(width(model), device=vectors.device, dtype=weights.weight.dtype)  # type: ignore[arg-type]
            vectors = vectors * norm(ones).float()  # type: ignore[operator]
    return vectors.cpu()
