"""LEACE (Belrose et al. 2023): the smallest affine change of states after which no linear probe tells two kinds apart.

    h <- h - W^+ Q W (h - mu)           W = (Sigma_hh^(1/2))^+,  Q the projection onto the columns of W Sigma_hz

Then cov(h, z) = 0 for the label z, on the states that it was fitted on: every linear classifier is as good as a constant.
Closed form, in float64, at one or several layers; a deeper one is fitted on states that the shallower ones have changed.

    LEACE(at=[5, "final"], fit_on="sides")
    left, right = eraser(covariance, cross_covariance)          # h - (h - mu) @ right @ left.T

Only what a probe of these states sees is erased: not what deeper blocks work out anew from what is not linear.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from expunge.anatomy import block_names, check_blocks
from expunge.errors import ExpungeError
from expunge.methods.base import Material, Method, check, method
from expunge.methods.placement import Default, after
from expunge.models import hidden_states, in_batches, inner_model, width
from expunge.steering import Erase, Steering

if TYPE_CHECKING:
    from expunge.models import Layer

BATCH_TOKENS = 8192

log = logging.getLogger("expunge")

Row = tuple[list[int], int, bool]
"""Token ids, the first of them whose state counts, and z."""


@method("leace")
class LEACE(Method):
    """Project out, in closed form, what a linear probe could read of the two kinds of text; nothing is trained."""

    family: ClassVar[str] = "representation"
    paper: ClassVar[str] = "LEACE: Perfect linear concept erasure in closed form (Belrose et al. 2023)"
    data: ClassVar[Literal["pairs", "any", "none"]] = "none"
    reference: ClassVar[bool] = False
    labelled: ClassVar[bool] = True
    applied: ClassVar[bool] = True

    at: list[int | Literal["final"]] | None = None
    """Where: after these blocks, from 0, and after the final norm ("final"); null: final."""
    fit_on: Literal["labelled", "sides"] = "labelled"
    """labelled: the texts of data.probe; sides: what is to be forgotten against what is retained, without the prompts."""
    pool: Literal["tokens", "last", "mean"] = "tokens"
    """A text's states: each token's, the last one's, or their mean."""
    affine: bool = True
    """Leave the mean where it is; false: h <- h - W^+ Q W h, which any head takes into its weights."""
    shrinkage: float = 0.0
    """s in [0, 1): Sigma_hh becomes (1 - s) Sigma_hh + s tr(Sigma_hh) / d, for few states."""
    svd_tol: float = 0.01
    """|W Sigma_hz| up to which there is nothing to erase; it is at most 0.5, the deviation of z."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fit_on == "sides":
            self.data, self.labelled = "any", False  # type: ignore[misc]
        check(0 <= self.shrinkage < 1, self.name, "shrinkage", self.shrinkage, "0 or more, and less than 1")
        check(self.svd_tol > 0, self.name, "svd_tol", self.svd_tol, "more than 0")
        check(self.at is None or bool(self.at), self.name, "at", self.at, "at least one place")

    def defaults(self, depth: int) -> Mapping[str, Default]:
        return {"at": Default(["final"], "ours", "the states in which the logits are linear")}

    def placed(self, depth: int):
        made = super().placed(depth)
        check_blocks(made.blocks, depth)
        return made

    @property
    def blocks(self) -> list[int]:
        return sorted({place for place in self.at or [] if isinstance(place, int)})

    def fit(self, material: Material) -> Steering:
        """An eraser for each place, from the first to the last. Raises ExpungeError without texts of both kinds."""
        model, rows = inner_model(material.model), self._rows(material)
        if len({bad for *_, bad in rows}) < 2:
            raise ExpungeError("leace tells two kinds of text apart: give texts of both")
        names = block_names(model)
        places: list[tuple[str, Layer]] = [(names[block], after(block, len(names))) for block in self.blocks]
        if "final" in (self.at or []):
            places.append((model.base_model_prefix, "final"))
        edits: list[Erase] = []
        about: dict[str, Any] = {"method": self.name, "fit_on": self.fit_on, "pool": self.pool, "erased": {}}
        for name, layer in places:
            with Steering(edits).attached(model):
                states = moments(model, rows, layer, self.pool)
            if states.n <= width(model) and not self.shrinkage:
                log.warning("leace: %d states in %d dimensions; method.shrinkage=0.1 helps", states.n, width(model))
            left, right = eraser(shrunk(states.xx / states.n, self.shrinkage), states.xz / states.n, self.svd_tol)
            mean = states.mean if self.affine else torch.zeros_like(states.mean)
            edits.append(Erase(name, left.float(), right.float(), mean.float()))
            about["erased"][str(layer)] = {"states": states.n, "rank": left.shape[1]}
            if not left.shape[1]:
                log.warning("leace: no linear difference at %s; nothing is erased there", layer)
        return Steering(edits, about)

    def _rows(self, material: Material) -> list[Row]:
        if self.fit_on == "labelled":
            return [(ids, 0, bad) for ids, bad in material.labelled]
        sides = ((material.forget, True), (material.retain, False))
        return [(prompt + text, len(prompt), bad) for side, bad in sides for prompt, text in side]


class Moments:
    """Mean and sums of products about it, of states x `[d]` and labels z, added up over batches in float64 (Chan et al.)."""

    def __init__(self, width: int):
        self.n = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.mean_z = torch.zeros(1, dtype=torch.float64)
        self.xx = torch.zeros(width, width, dtype=torch.float64)
        self.xz = torch.zeros(width, 1, dtype=torch.float64)

    def add(self, x: torch.Tensor, z: torch.Tensor) -> None:
        """x: float64 `[N, d]`; z: float64 `[N, 1]`."""
        total = self.n + len(x)
        mean, mean_z = x.mean(0), z.mean(0)
        centred, difference, difference_z = x - mean, (mean - self.mean.to(x)), (mean_z - self.mean_z.to(x))
        share = self.n * len(x) / total
        self.xx += (centred.T @ centred + share * difference[:, None] * difference).cpu()
        self.xz += (centred.T @ (z - mean_z) + share * difference[:, None] * difference_z).cpu()
        self.mean += (difference * (len(x) / total)).cpu()
        self.mean_z += (difference_z * (len(x) / total)).cpu()
        self.n = total


@torch.no_grad()
def moments(model: nn.Module, rows: Sequence[Row], layer: "Layer", pool: Literal["tokens", "last", "mean"]) -> Moments:
    """Those of the states of `rows` at `layer`, and their labels."""
    device = next(model.parameters()).device
    found = Moments(width(model))

    def work(batch: Sequence[Row]) -> None:
        lengths = torch.tensor([len(ids) for ids, *_ in batch])
        first = torch.tensor([start for _, start, _ in batch])
        positions = torch.arange(int(lengths.max()))
        ids = torch.tensor([[*ids, *[0] * (len(positions) - len(ids))] for ids, *_ in batch], device=device)
        real = positions < lengths[:, None]  # [B, T]
        counted = real & (positions >= (lengths - 1 if pool == "last" else first)[:, None])
        states = hidden_states(model, ids, real.long().to(device), (layer,))[layer]
        states = states.double() if states.device.type == "cuda" else states.cpu().double()  # not all devices have it
        z = torch.tensor([[float(bad)] for *_, bad in batch], dtype=torch.float64)
        counted, z = counted.to(states.device), z.to(states.device)
        if pool == "mean":
            found.add((states * counted[..., None]).sum(1) / counted.sum(1, keepdim=True), z)
        else:
            found.add(states[counted], z.expand(-1, len(positions))[counted][:, None])

    in_batches(sorted(rows, key=lambda row: -len(row[0])), lambda row: BATCH_TOKENS // len(row[0]), work)
    return found


def shrunk(covariance: torch.Tensor, share: float) -> torch.Tensor:
    """(1 - s) Sigma + s tr(Sigma) / d I."""
    eye = torch.eye(len(covariance), dtype=covariance.dtype)
    return (1 - share) * covariance + share * covariance.trace() / len(covariance) * eye


def eraser(xx: torch.Tensor, xz: torch.Tensor, svd_tol: float = 0.01) -> tuple[torch.Tensor, torch.Tensor]:
    """L, R `[d, k]` with L R^T = W^+ Q W, of Sigma_xx `[d, d]` and Sigma_xz `[d, c]`, float64; k = 0: nothing to erase."""
    values, vectors = torch.linalg.eigh(xx)
    held = values > values[-1] * len(xx) * torch.finfo(xx.dtype).eps
    roots = values[held].sqrt()
    vectors = vectors[:, held]
    unwhiten, whiten = (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T  # W^+, W
    columns, sizes, _ = torch.linalg.svd(whiten @ xz, full_matrices=False)
    columns = columns[:, sizes > svd_tol]
    return unwhiten @ columns, whiten @ columns
