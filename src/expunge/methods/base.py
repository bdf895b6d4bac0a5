"""What every trained method is: a dataclass of hyper-parameters with a loss on a `Step`.

@method("mine")
class Mine(Method):
    '''One line that `expunge list methods` prints.'''
    weight: float = 1.0
    def loss(self, step): return {"anchor": self.weight * step.token_kl("retain")}
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar, dataclass_transform

from expunge.config import hold_fields
from expunge.errors import ExpungeError
from expunge.methods.placement import Default
from expunge.registry import Registry

if TYPE_CHECKING:  # names are listed and completed without waiting for torch
    import torch
    from torch import nn

    from expunge.engine import Step
    from expunge.models import Layer
    from expunge.steering import Steering


@dataclass(frozen=True)
class Material:
    """What a method may look at before training: the model as it was, rows to forget, labelled texts.

    forget, retain: (prompt ids, continuation ids) in the order of the set; labelled: (ids, is it of the kind to be rid of);
    perplexity: of the model as it is when called, on text that is not reported; only a method that is applied has these two.
    """

    model: "nn.Module"
    forget: Sequence[tuple[list[int], list[int]]]
    labelled: Sequence[tuple[list[int], bool]] = ()
    retain: Sequence[tuple[list[int], list[int]]] = ()
    perplexity: Callable[[], float] | None = None


class Method:
    """Hyper-parameters as annotated fields (defaults: the paper's) and a loss. Fields are YAML keys and overrides."""

    name: ClassVar[str]
    family: ClassVar[str] = "output"  # output | representation
    paper: ClassVar[str] = ""
    reference: ClassVar[bool] = True  # does the loss look at the reference?
    ref_sides: ClassVar[tuple[str, ...] | None] = None  # on which sides of a batch; None: all
    sides: ClassVar[tuple[str, ...]] = ("retain", "forget")  # what it reads of a batch; "anchor": neutral text, if given
    scored: ClassVar[tuple[str, ...]] = ("retain", "forget")  # whose tokens go through the head
    data: ClassVar[Literal["pairs", "any", "none"]] = "pairs"  # "any": sides need not share a prompt; "none": not needed
    max_grad_norm: ClassVar[float] = 1.0
    labelled: ClassVar[bool] = False  # does it fit probes on labelled texts (data.probe)?
    applied: ClassVar[bool] = False  # fitted and applied, not trained
    model_depth = 0  # blocks of the model that it was placed in

    def __post_init__(self) -> None:
        """Hold every field to its annotation; a method that checks ranges calls this first. Raises ExpungeError."""
        hold_fields(self, "method")

    @property
    def layers(self) -> Sequence["Layer"]:
        """The states of the trained model that the loss reads."""
        return ("final",)

    @property
    def ref_layers(self) -> Sequence["Layer"]:
        """The states of the reference that the loss reads."""
        return ("final",) if self.reference else ()

    def defaults(self, depth: int) -> Mapping[str, Default]:
        """What fields that are null become in a model of `depth` blocks, and where that comes from."""
        return {}

    def left_open(self, depth: int) -> Mapping[str, Default]:
        """Of `defaults`, those of fields that are null."""
        return {name: default for name, default in self.defaults(depth).items() if getattr(self, name) is None}

    def placed(self, depth: int) -> Self:
        """This method in a model of `depth` blocks, nothing left null that `defaults` knows; a copy."""
        made = copy.copy(self)
        for name, default in self.left_open(depth).items():
            setattr(made, name, default.value)
        made.model_depth = depth
        return made

    def trains(self, model: "nn.Module") -> list[str] | None:
        """Names of the weights that are trained; None: all that are trainable. Raises ExpungeError where it finds none."""
        if self.applied:
            raise ExpungeError(
                f"{self.name} is fitted and applied, not trained: expunge.fitting.fit_and_apply, or expunge run"
            )
        return None

    def prepare(self, heads: "Mapping[str, nn.Module]", material: Material) -> None:
        """Fill the buffers of `heads` with what follows from the model and the data, such as probes; done once."""

    def fit(self, material: Material) -> "Steering":
        """What a method that is applied does to the model, found without training it; nothing stays attached."""
        raise NotImplementedError

    @property
    def observes(self) -> Sequence[str]:
        """Names of logged figures that `after_step` wants."""
        return ()

    def after_step(self, heads: "Mapping[str, nn.Module]", figures: Mapping[str, float]) -> Mapping[str, float]:
        """Called after each optimizer step with the means of `observes` over all its rows; returns figures for the log."""
        return {}

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


METHODS: Registry[Method] = Registry(
    "method",
    {
        "repo": "expunge.methods.repo:REPO",
        "dpo": "expunge.methods.dpo:DPO",
        "npo": "expunge.methods.npo:NPO",
        "simnpo": "expunge.methods.simnpo:SimNPO",
        "grad_diff": "expunge.methods.grad_diff:GradDiff",
        "ce": "expunge.methods.cross_entropy:CrossEntropy",
        "sure": "expunge.methods.sure:SURE",
        "rmu": "expunge.methods.rmu:RMU",
        "adaptive_rmu": "expunge.methods.adaptive_rmu:AdaptiveRMU",
        "cosine_rmu": "expunge.methods.cosine_rmu:CosineRMU",
        "probe_directions": "expunge.methods.probe_directions:ProbeDirections",
        "circuit_breakers": "expunge.methods.circuit_breakers:CircuitBreakers",
        "tvi": "expunge.methods.tvi:TVI",
        "leace": "expunge.methods.leace:LEACE",
    },
)

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
