"""A model beside another: the frozen reference, copies that share weights, modes that are put back."""

import contextlib
import copy
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from expunge.models.head import check_copied_head, output_layer

if TYPE_CHECKING:
    from expunge.states import StoredStates


class Reference:
    """The frozen original: the same model with its adapter off (LoRA), or a frozen copy (full fine-tuning).

    stored: its states, computed before; then no more than its head is copied. `head` is None where an adapter is off.
    trained: names of the weights that will change; the others are not copied. None: all of them will.
    """

    def __init__(self, model: nn.Module, stored: "StoredStates | None" = None, trained: Collection[str] | None = None):
        self.stored = stored
        self.copy: nn.Module | None = None
        self.head: nn.Module | None = None
        if not hasattr(model, "disable_adapter"):
            if stored is None:
                self.copy = _frozen_copy(model, trained)
                self.head = output_layer(self.copy)
            else:
                check_copied_head(model)
                self.head = _frozen_copy(output_layer(model))  # type: ignore[arg-type]

    @contextlib.contextmanager
    def of(self, model: nn.Module) -> Iterator[nn.Module]:
        """The reference of `model`, without gradients, inside the block. ValueError where all there is are its states."""
        if self.copy is not None:
            with torch.no_grad():
                yield self.copy.to(next(model.parameters()).device)
        elif self.head is None:
            with original(model):
                yield model
        else:
            raise ValueError("this reference is stored states and a head; it has no body to run")


@contextlib.contextmanager
def original(model: nn.Module) -> Iterator[None]:
    """Without gradients, and without the adapter if there is one: what an untrained model was."""
    with torch.no_grad(), model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext():  # type: ignore[operator]
        yield


def _frozen_copy(module: nn.Module, changing: Collection[str] | None = None) -> nn.Module:
    """A copy in evaluation mode and without gradients. changing: the only weights that are copied; others are shared."""
    made = sharing_copy(module, changing).eval()
    shared = {id(parameter) for parameter in module.parameters()}
    for parameter in made.parameters():
        if id(parameter) not in shared:
            parameter.requires_grad_(False)
    return made


def sharing_copy(model: nn.Module, changing: Collection[str] | None) -> nn.Module:
    """A model of its own, hooks and buffers too, whose weights are the very tensors of `model` but for those named in
    `changing`, which are copied; None: all are copied."""
    shared = {} if changing is None else {id(p): p for name, p in model.named_parameters() if name not in changing}
    return copy.deepcopy(model, dict(shared))


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; then every submodule is in the mode that it was in."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def frozen(*models: nn.Module) -> Iterator[None]:
    """No weight of the models takes gradients, and they are in evaluation mode, inside the block; then as before."""
    learned = [p for model in models for p in model.parameters() if p.requires_grad]
    with evaluating(*models):
        try:
            for model in models:
                model.requires_grad_(False)
            yield
        finally:
            for parameter in learned:
                parameter.requires_grad_(True)


@contextlib.contextmanager
def only_training(model: nn.Module, names: Collection[str] | None) -> Iterator[None]:
    """Of the trainable weights of the model, only those named take gradients inside the block; None: all."""
    others = [] if names is None else [p for name, p in model.named_parameters() if name not in names and p.requires_grad]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def without_dropout(model: nn.Module) -> nn.Module:
    """Every dropout of the model set to zero, in place: policy and reference must agree at step 0.

    A module may keep its share as a number, for F.dropout: Llama's attention, GPTBigCode's, OPT's blocks.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, 0.0)
    return model
