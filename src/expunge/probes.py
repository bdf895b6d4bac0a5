"""Linear probes on residual states: pool the states of texts, fit a logistic regression, apply it anywhere.

states = pooled_states(model, rows, "final", "mean")          # [N, d], rows: token ids
probe = fit_probe(states, labels)                             # P(label 1) = sigmoid(w . x + b)
probe.logit(states), probe.auc
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from expunge.errors import ExpungeError
from expunge.ids import check_known
from expunge.models import Layer, check_model, hidden_states, in_batches, known_tokens

BATCH_TOKENS = 8192
CHANCE = 0.6  # an area under the curve below which a probe is as good as none

log = logging.getLogger("expunge")


@dataclass(frozen=True)
class Probe:
    """w: float32 `[d]` in the raw space of the states; b; the area under the ROC curve in cross-validation."""

    weight: torch.Tensor
    bias: float
    auc: float

    def logit(self, states: torch.Tensor) -> torch.Tensor:
        """`[...]` of states `[..., d]`: w . x + b, in float32."""
        return states.float() @ self.weight.to(states.device) + self.bias


def pooled_states(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    layer: Layer = "final",
    pool: Literal["mean", "last"] = "mean",
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """float32 `[N, d]`: of each row of token ids the mean of its states at `layer`, or its last token's.

    Raises ExpungeError for an empty row.
    """
    return pooled_states_at(model, rows, [layer], pool, progress)[layer]


def pooled_states_at(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    layers: Sequence[Layer],
    pool: Literal["mean", "last"] = "mean",
    progress: Callable[[int, int], None] | None = None,
) -> dict[Layer, torch.Tensor]:
    """`pooled_states` of several layers, in one forward of each row."""
    check_known(rows, known_tokens(model))
    if not all(rows):
        raise ExpungeError("a text without tokens has no states; leave it out")
    check_model(model)
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    found: dict[Layer, list[torch.Tensor]] = {layer: [] for layer in layers}

    def work(batch: Sequence[int]) -> None:
        lengths = torch.tensor([len(rows[i]) for i in batch], device=device)
        ids = torch.zeros(len(batch), len(rows[batch[0]]), dtype=torch.long, device=device)
        for place, i in enumerate(batch):
            ids[place, : len(rows[i])] = torch.tensor(rows[i])
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]  # [B, T]
        with torch.inference_mode():
            states = hidden_states(model, ids, mask.long(), layers)
            for layer in found:
                found[layer].append(_pooled(states[layer].float(), mask, pool).cpu())

    in_batches(order, lambda i: BATCH_TOKENS // len(rows[i]), work, progress)
    back = torch.tensor(order).argsort()
    return {layer: torch.cat(parts)[back] for layer, parts in found.items()}


def _pooled(states: torch.Tensor, mask: torch.Tensor, pool: Literal["mean", "last"]) -> torch.Tensor:
    """`[B, d]` of states `[B, T, d]`, by the real tokens, bool `[B, T]`."""
    mask = mask.to(states.device)
    if pool == "last":
        return states[torch.arange(len(states)), mask.sum(1) - 1]
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def fit_probe(
    states: torch.Tensor, labels: Sequence[int], c: float = 1.0, folds: int = 5, seed: int = 0, name: str = "the probe"
) -> Probe:
    """L2 logistic regression on standardised features, mapped back to the raw space.

    states: `[N, d]`; labels: 0 or 1, N of them; c: scikit-learn's inverse strength of the penalty.
    Raises ExpungeError where a label has fewer rows than there are folds, or states are not finite; a probe near chance
    warns with its name and its AUC.
    """
    if not torch.isfinite(states).all():
        raise ExpungeError("the states are not all finite numbers; load the model in float32")
    x, y = states.double().numpy(), np.asarray(labels)
    least = min(int((y == label).sum()) for label in (0, 1))
    if least < folds:
        raise ExpungeError(f"a probe needs at least {folds} texts of each label; the rarer one has {least}")
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))
    splits = StratifiedKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            outside = cross_val_predict(pipeline, x, y, cv=splits, method="decision_function")
            scaler, regression = (step for _, step in pipeline.fit(x, y).steps)
        except ConvergenceWarning:
            raise ExpungeError("the probe's logistic regression did not converge") from None
    auc = float(roc_auc_score(y, outside))
    if auc < CHANCE:
        log.warning("%s hardly tells the labels apart: AUC %.2f in cross-validation, 0.5 is chance", name, auc)
    weight = regression.coef_[0] / scaler.scale_
    bias = float(regression.intercept_[0] - weight @ scaler.mean_)
    return Probe(torch.from_numpy(weight).float(), bias, auc)
