"""What every trained method is: a dataclass of hyper-parameters with a loss on a `Step`.

@method("mine")
class Mine(Method):
    '''One line that `expunge list methods` prints.'''
    weight: float = 1.0
    def loss(self, step): return {"anchor": self.weight * step.token_kl("retain")}
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, dataclass_transform, get_type_hints

from expunge.config import convert
from expunge.errors import ExpungeError
from expunge.registry import Registry

if TYPE_CHECKING:  # names are listed and completed without waiting for torch
    import torch
    from torch import nn

    from expunge.engine import Step
    from expunge.models import Layer


class Method:
    """Hyper-parameters as annotated fields (defaults: the paper's) and a loss. Fields are YAML keys and overrides."""

    name: ClassVar[str]
    family: ClassVar[str] = "output"  # output | representation
    paper: ClassVar[str] = ""
    reference: ClassVar[bool] = True  # does the loss look at the reference?
    ref_sides: ClassVar[tuple[str, ...] | None] = None  # on which sides of a batch; None: all
    data: ClassVar[Literal["pairs", "any"]] = "pairs"  # "any": the two sides of a row need not share a prompt
    max_grad_norm: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        """Hold every field to its annotation; a method that checks ranges calls this first. Raises ExpungeError."""
        hints = get_type_hints(type(self))
        for field in fields(self):  # type: ignore[arg-type]
            value = convert(hints[field.name], getattr(self, field.name), f"method.{field.name}")
            setattr(self, field.name, value)

    @property
    def layers(self) -> Sequence["Layer"]:
        """The states of the trained model that the loss reads."""
        return ("final",)

    @property
    def ref_layers(self) -> Sequence["Layer"]:
        """The states of the reference that the loss reads."""
        return ("final",) if self.reference else ()

    def check_data(self, paired: bool) -> None:
        """Raise ExpungeError where the method cannot train on what it is given."""
        if self.data == "pairs" and not paired:
            raise ExpungeError(
                f"{self.name} compares the two sides of a pair: give pairs (data.train, --pairs), not two sets"
            )

    def heads(self, width: int) -> "Mapping[str, nn.Module]":
        """Modules trained beside a model of residual width `width`, and left out of the exported model."""
        return {}

    def loss(self, step: "Step") -> "Mapping[str, torch.Tensor]":
        """Scalars by name. Each is logged; their sum is trained."""
        raise NotImplementedError


METHODS: Registry[Method] = Registry("method", {"repo": "expunge.methods.repo:REPO", "dpo": "expunge.methods.dpo:DPO"})

C = TypeVar("C", bound=type[Any])


@dataclass_transform(kw_only_default=True)
def method(name: str) -> Callable[[C], C]:
    """Make a class a dataclass and register it under `name`."""

    def register(cls: C) -> C:
        return METHODS.register(name)(dataclass(kw_only=True)(cls))  # type: ignore[return-value]

    return register


def check(condition: bool, method_name: str, key: str, value: object, wanted: str) -> None:
    """Raise one line where a hyper-parameter is out of range."""
    if not condition:
        raise ExpungeError(f"method.{key}={value!r}: {method_name} wants {wanted}")
