"""TVI, toxic vector intervention (Lee et al. 2024): subtract one direction from the residual stream, change no weight.

    h <- h - alpha v          after the last block, at every position

v by `direction`:
    probe   w / |w|: a logistic regression on each labelled text's mean state there
    value   of all MLPs' value vectors the one nearest to w in angle, as long as it is
    svd     U[:, 0] of [v_1 ... v_N] = U S V^T, unit vectors of the N nearest, turned so that cos(U[:, 0], w) > 0

Nothing reads the last block's other positions, so that all of them or the last one alone is the same there. Where the
block's MLP ends in a bias, it is folded into that: the model is an ordinary one.

    TVI(direction="probe", match_perplexity=1.02)          # alpha such that perplexity rises by 2 %
"""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from expunge.anatomy import block_names, check_blocks, nearest_values
from expunge.errors import ExpungeError
from expunge.methods.base import Material, Method, check, method
from expunge.methods.placement import Default, after
from expunge.models import inner_model
from expunge.probes import fit_probe, pooled_states
from expunge.steering import Shift, Steering

ALPHAS = {"probe": 50.0, "value": 20.0, "svd": 100.0}
NEAR = 1e-3
"""Of the perplexity asked for, relative."""
DOUBLINGS, HALVINGS = 30, 30

log = logging.getLogger("expunge")


@method("tvi")
class TVI(Method):
    """Subtract a toxic direction from the activations, at inference; weights stay as they are."""

    family: ClassVar[str] = "representation"
    paper: ClassVar[str] = "A Mechanistic Understanding of Alignment Algorithms (Lee et al. 2024)"
    data: ClassVar[Literal["pairs", "any", "none"]] = "none"
    reference: ClassVar[bool] = False
    labelled: ClassVar[bool] = True
    applied: ClassVar[bool] = True

    direction: Literal["probe", "value", "svd"] = "probe"
    """What is subtracted: the probe's direction, the nearest value vector, or the main direction of the nearest ones."""
    alpha: float | None = None
    """Strength: how often v is subtracted. null: 50 (probe), 20 (value), 100 (svd), unless match_perplexity is given."""
    match_perplexity: float | None = None
    """Find alpha so that perplexity becomes so many times the model's own, on monitor.corpus."""
    top: int = 128
    """N of svd: value vectors that are taken together."""
    block: int | None = None
    """The block, from 0, after which v is subtracted, and where the probe is fitted; null: the last."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.alpha is None or self.alpha >= 0, self.name, "alpha", self.alpha, "0 or more")
        check(self.top >= 1, self.name, "top", self.top, "1 or more")
        ratio = self.match_perplexity
        check(ratio is None or ratio > 1, self.name, "match_perplexity", ratio, "more than 1, such as 1.02")
        if ratio is not None and self.alpha is not None:
            raise ExpungeError("method.alpha beside method.match_perplexity, which finds it: give one of them")

    def defaults(self, depth: int) -> Mapping[str, Default]:
        found = {"block": Default(depth - 1, "paper", "the last block")}
        if self.match_perplexity is None:
            found["alpha"] = Default(ALPHAS[self.direction], "paper", "GPT-2 medium's; another model wants another")
        return found

    def placed(self, depth: int):
        made = super().placed(depth)
        check_blocks([made.block], depth)  # type: ignore[list-item]
        return made

    def fit(self, material: Material) -> Steering:
        """One shift. Raises ExpungeError without labelled texts, and where no alpha gives the perplexity asked for."""
        if not material.labelled:
            raise ExpungeError("tvi fits a probe on labelled texts: give data.probe")
        assert self.block is not None, "placed() fills it in"
        model = inner_model(material.model)
        rows, labels = [ids for ids, _ in material.labelled], [int(bad) for _, bad in material.labelled]
        states = pooled_states(model, rows, after(self.block, self.model_depth), "mean")
        probe = fit_probe(states, labels, name=f"the probe after block {self.block}")
        about: dict[str, Any] = {
            "method": self.name,
            "direction": self.direction,
            "block": self.block,
            "probe_auc": probe.auc,
        }
        vector, more = self._vector(model, F.normalize(probe.weight, dim=0))
        at = block_names(model)[self.block]

        def steering(alpha: float) -> Steering:
            return Steering(
                [Shift(at, alpha * vector)], about | more | {"alpha": alpha, "length": float(alpha * vector.norm())}
            )

        if self.match_perplexity is None:
            assert self.alpha is not None, "placed() fills it in"
            return steering(self.alpha)
        if material.perplexity is None:
            raise ExpungeError("method.match_perplexity: perplexity of what? give monitor.corpus")
        measure, own = material.perplexity, material.perplexity()

        def ratio(alpha: float) -> float:
            with steering(alpha).attached(model):
                return measure() / own

        alpha, found = strength(ratio, self.match_perplexity, ALPHAS[self.direction])
        more |= {"perplexity": own, "perplexity_ratio": found}
        log.info("tvi: alpha %.4g makes perplexity %.4f times %.4g", alpha, found, own)
        return steering(alpha)

    def _vector(self, model: nn.Module, towards: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """v `[d]`, float32 on the CPU, and where it comes from."""
        if self.direction == "probe":
            return towards, {}
        values = nearest_values(model, towards, self.top if self.direction == "svd" else 1)
        first = values[0]
        if self.direction == "value":
            return first.vector, {"value": {"block": first.block, "neuron": first.neuron, "cosine": first.cosine}}
        vector = main_direction(torch.stack([value.vector for value in values]), towards)
        return vector, {"values": len(values), "cosine": float(vector @ towards)}


def main_direction(vectors: torch.Tensor, towards: torch.Tensor) -> torch.Tensor:
    """`[d]`, a unit vector: the first left singular vector of the `[d, N]` matrix of `vectors` `[N, d]` as unit vectors."""
    stacked = F.normalize(vectors.double(), dim=-1).T  # [d, N]
    first = torch.linalg.svd(stacked, full_matrices=False)[0][:, 0].float()
    return first if first @ towards > 0 else -first


def strength(ratio: Callable[[float], float], wanted: float, start: float) -> tuple[float, float]:
    """alpha where `ratio`, 1 at 0 and rising, is `wanted`, and what it is there: doubled until it is above, then halved.

    Raises ExpungeError where it never gets there, or jumps over it.
    """
    low, high = 0.0, start
    for _ in range(DOUBLINGS):
        if not (found := ratio(high)) < wanted:
            break
        low, high = high, 2 * high
    else:
        raise ExpungeError(
            f"method.match_perplexity={wanted}: perplexity does not rise so far ({found:.3g} at alpha={high / 2:.3g})"
        )
    for _ in range(HALVINGS):
        if math.isfinite(found) and abs(found / wanted - 1) < NEAR:
            return high, found
        middle = (low + high) / 2
        if not (at_middle := ratio(middle)) < wanted:
            high, found = middle, at_middle
        elif abs(at_middle / wanted - 1) < NEAR:
            return middle, at_middle
        else:
            low = middle
    raise ExpungeError(f"method.match_perplexity={wanted}: perplexity jumps over it, to {found:.3g} at alpha={high:.3g}")
