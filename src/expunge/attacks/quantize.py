"""Quantization: round the unlearned model's weights to a few bits. Unlearning that moved them by less than a step is undone.

    s = max |w| / (2^(b-1) - 1)        w <- s clamp(round(w / s), -(2^(b-1) - 1), 2^(b-1) - 1)

Round to nearest, symmetric, with one step s for each output channel of a linear layer, or for each group of its inputs. The
rounded weights stay in the model's dtype: what is simulated is what is computed with them.

    result = Quantize(bits=4).run(unlearned, None, data, Budget())

Zhang et al., ICLR 2025, "Catastrophic Failure of LLM Unlearning via Quantization".
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from expunge.attacks.base import Attack, AttackData, AttackResult, Budget, Meter, attack
from expunge.errors import ExpungeError
from expunge.models import blocks, inner_model, sharing_copy
from expunge.ranges import NonNegativeInt, Range


@attack("quantize")
class Quantize(Attack):
    """Round the weights to 8 or 4 bits."""

    paper: ClassVar[str] = "Zhang et al. 2025, Catastrophic Failure of LLM Unlearning via Quantization"
    budgets: ClassVar[dict[str, dict[str, list[Any]]]] = {
        "small": {"bits": [8, 4]},
        "paper": {"bits": [8, 4]},
        "large": {"bits": [8, 6, 5, 4, 3], "group": [0, 64]},
    }

    bits: Annotated[int, Range(ge=2, le=16)] = 4
    """2 to 16."""
    group: NonNegativeInt = 0
    """Inputs that share a step; 0: all of an output channel."""
    head: bool = False
    """The head too, which is then no longer tied to the embedding."""

    def run(self, unlearned: Any, reference: Any, data: AttackData, budget: Budget) -> AttackResult:
        self.check_loaded(unlearned, reference, data)
        meter = Meter(budget)
        model: Any = sharing_copy(unlearned, []).eval()
        moved = whole = 0.0
        matrices = block_matrices(model)
        if self.head:
            matrices.append(Matrix(model.get_output_embeddings(), "weight"))
            for config in (model.config, model.config.get_text_config()):
                config.tie_word_embeddings = False
        for matrix in matrices:
            before = matrix.weight.detach()
            rounded = round_to_nearest(before.mT if matrix.transposed else before, self.bits, self.group)
            after = rounded.mT.contiguous() if matrix.transposed else rounded
            moved += float((after.float() - before.float()).square().sum())
            whole += float(before.float().square().sum())
            matrix.put(after)
        error = (moved / max(whole, 1e-30)) ** 0.5
        meter.step(error=error)
        weights = sum(matrix.weight.numel() for matrix in matrices)
        about = {"matrices": len(matrices), "weights": weights, "relative_error": error}
        return meter.result(model, about=about, idle=None if moved else "the weights lie on the grid already")


def round_to_nearest(weight: torch.Tensor, bits: int, group: int = 0) -> torch.Tensor:
    """`weight` `[..., out, in]` on its grid of 2^bits - 1 values, in its dtype; computed in at least float32.

    group: so many inputs of a row share a step (of the last group, what is left); 0: the whole row. The largest weight of
    a group stays bit for bit, so that rounding again changes nothing.
    """
    most = 2 ** (bits - 1) - 1
    parts = weight.to(torch.promote_types(weight.dtype, torch.float32)).split(group or weight.shape[-1], dim=-1)
    return torch.cat([_on_grid(part, most) for part in parts], dim=-1).to(weight.dtype)


def _on_grid(part: torch.Tensor, most: int) -> torch.Tensor:
    largest = part.abs().amax(dim=-1, keepdim=True)
    largest = largest.where(largest > 0, 1.0)  # a row of zeros stays one
    steps = (part / largest * most).round().clamp(-most, most)
    return steps / most * largest


@dataclass(frozen=True)
class Matrix:
    """A weight `[..., out, in]` of a module, or `[..., in, out]` if transposed; of experts, one for each."""

    module: nn.Module
    name: str
    transposed: bool = False

    @property
    def weight(self) -> nn.Parameter:
        return getattr(self.module, self.name)

    def put(self, weight: torch.Tensor) -> None:
        """Another in its place: changed where it lies, it would be the victim's too."""
        setattr(self.module, self.name, nn.Parameter(weight, self.weight.requires_grad))


def block_matrices(model: nn.Module) -> list[Matrix]:
    """The matrices of the blocks, in order: of nn.Linear, of GPT-2's Conv1D, and of experts, `[E, ...]`.

    Raises ExpungeError where there are none.
    """
    found = []
    for module in blocks(model).modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            found.append(Matrix(module, "weight", isinstance(module, Conv1D)))
        elif not isinstance(module, nn.Conv1d):
            own = [name for name, weight in module.named_parameters(recurse=False) if weight.ndim == 3]
            found += [Matrix(module, name, getattr(module, "is_transposed", False)) for name in own]
    if not found:
        raise ExpungeError(f"{type(inner_model(model)).__name__}: no linear layers in its blocks")
    return found
