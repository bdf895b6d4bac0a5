"""Edits of a model's activations that are no part of its weights: attached, detached, saved beside them, loaded.

    shift   h <- h - v                          v [d], the same at every position
    erase   h <- h - L R^T (h - mu)             L, R [d, k], mu [d]

    steering = Steering([Shift("transformer.h.11", vector)])
    steering.attach(model)                      # model.save_pretrained(folder) now writes steering.* too
    detach(model)                               # the model is what it was

An edit changes what a module gives out: a block, or the body after its final norm, which `expunge.models.hidden_states` then
reads (transformers' own `output_hidden_states` are those before the change). While one is attached, it is a part of
the model with a name (`expunge_steering`), so that the model moves, copies and hashes as one. What loads the weights alone
does not know of it, so the configuration says that there is one, and `load_model` attaches it or fails.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils import cached_file

from expunge.errors import ExpungeError

NAME = "expunge_steering"
"""Of the submodule, and of the mark in the configuration."""
SETTINGS, TENSORS = "steering.json", "steering.safetensors"


class Edit(nn.Module):
    """One change of what `at` gives out, the dotted name of a module of the model. Holds buffers only."""

    kind: ClassVar[str]

    def __init__(self, at: str):
        super().__init__()
        self.at = at

    def hook(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """A forward hook: the same output with other states in it."""
        if isinstance(output, torch.Tensor):
            return self(output)
        if isinstance(output, tuple):
            return (self(output[0]), *output[1:])
        return type(output)(**{**output, "last_hidden_state": self(output.last_hidden_state)})


class Shift(Edit):
    """h - v."""

    kind = "shift"
    vector: torch.Tensor

    def __init__(self, at: str, vector: torch.Tensor):
        super().__init__(at)
        self.register_buffer("vector", vector)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states - self.vector.to(states)


class Erase(Edit):
    """h - L R^T (h - mu), in the precision of the buffers where that is the higher one."""

    kind = "erase"
    left: torch.Tensor
    right: torch.Tensor
    mean: torch.Tensor

    def __init__(self, at: str, left: torch.Tensor, right: torch.Tensor, mean: torch.Tensor):
        super().__init__(at)
        for name, tensor in (("left", left), ("right", right), ("mean", mean)):
            self.register_buffer(name, tensor)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        left, right, mean = (tensor.to(states.device) for tensor in (self.left, self.right, self.mean))
        with torch.autocast(states.device.type, enabled=False):
            coordinates = (states.to(torch.promote_types(states.dtype, mean.dtype)) - mean) @ right  # [..., k]
            return (states - coordinates @ left.T).to(states.dtype)


KINDS: Mapping[str, type[Edit]] = {edit.kind: edit for edit in (Shift, Erase)}


class Steering(nn.Module):
    """Edits in the order in which they are made, and `about`: where they come from, in JSON's types."""

    def __init__(self, edits: Sequence[Edit], about: Mapping[str, Any] | None = None):
        super().__init__()
        # by place, so that the same numbers elsewhere have another digest
        self.by_place = nn.ModuleDict({_key(number, edit.at): edit for number, edit in enumerate(edits)})
        self.about = dict(about or {})
        self._handles: list[RemovableHandle] = []

    @property
    def edits(self) -> list[Edit]:
        return list(self.by_place.values())  # type: ignore[arg-type]

    def attach(self, model: PreTrainedModel) -> None:
        """Make the edits part of every forward of `model`. Raises ExpungeError where it is steered already."""
        if hasattr(model, "disable_adapter"):
            raise ExpungeError("a model with an adapter cannot be steered: merge the adapter first")
        if hasattr(model, NAME):
            raise ExpungeError("the model is steered already; start from the one that it was made of")
        try:
            modules = [model.get_submodule(edit.at) for edit in self.edits]
        except AttributeError as error:
            raise ExpungeError(f"{SETTINGS}: {error}; this steering is another model's") from None
        self.to(model.device)
        model.add_module(NAME, self)
        self._handles = [module.register_forward_hook(edit.hook) for module, edit in zip(modules, self.edits, strict=True)]
        model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *_keys(self)}
        model.config.expunge_steering = True
        model.save_pretrained = MethodType(_save_both, model)

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[None]:
        """Attached inside the block."""
        self.attach(model)
        try:
            yield
        finally:
            detach(model)

    def save(self, folder: Path) -> None:
        """Write steering.json and steering.safetensors."""
        settings = {"edits": [{"kind": edit.kind, "at": edit.at} for edit in self.edits], "about": self.about}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / TENSORS)
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2), encoding="utf-8")

    @classmethod
    def at(cls, source: str, revision: str | None = None) -> "Steering":
        """What lies in a folder or on a hub. Raises ExpungeError, one line, where that is not whole."""
        files = [
            cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
            for name in (SETTINGS, TENSORS)
        ]
        if None in files:
            raise ExpungeError(
                f"{source}: config.json says that it is steered, but {SETTINGS} and {TENSORS} are not beside it: copy them "
                f'there, or remove "{NAME}" from config.json for the model without'
            )
        settings_file, tensors_file = (Path(str(file)) for file in files)
        try:
            settings = json.loads(settings_file.read_text(encoding="utf-8"))
            tensors, edits = load_file(tensors_file), []
            for number, edit in enumerate(settings["edits"]):
                prefix = f"by_place.{_key(number, edit['at'])}."
                own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
                edits.append(KINDS[edit["kind"]](edit["at"], **own))
            return cls(edits, settings["about"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ExpungeError(
                f"{settings_file}: not what a steered model leaves ({error!r}); save the model again"
            ) from None


def detach(model: PreTrainedModel) -> Steering | None:
    """Leave nothing of it in `model`; returns what was attached."""
    steering: Steering | None = getattr(model, NAME, None)
    if steering is None:
        return None
    for handle in steering._handles:
        handle.remove()
    steering._handles = []
    delattr(model, NAME)
    model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ())} - _keys(steering)
    vars(model.config).pop(NAME, None)
    vars(model).pop("save_pretrained", None)
    return steering


def steer_further(model: PreTrainedModel, edits: Sequence[Edit], about: Mapping[str, Any] | None = None) -> None:
    """Attach more edits, after those that are attached already; errors as of `Steering.attach`."""
    before = detach(model)
    known = (before.edits, before.about) if before else ([], {})
    Steering([*known[0], *edits], {**known[1], **(about or {})}).attach(model)


def is_steered(config: Any) -> bool:
    """Does the configuration say that something lies beside the weights?"""
    return getattr(config, NAME, False) is True


def _key(number: int, at: str) -> str:
    return f"{number}-{at.replace('.', '-')}"


def _keys(steering: Steering) -> set[str]:
    return {f"{NAME}.{name}" for name in steering.state_dict()}


def _save_both(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """In place of `save_pretrained` while steering is attached: weights without buffers, and the steering beside."""
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    if kwargs.get("is_main_process", True):
        getattr(model, NAME).save(Path(save_directory))
