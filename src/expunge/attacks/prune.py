"""Set-difference pruning: zero the weights that matter on what was forgotten, and not on neutral text.

    S(W) = mean over texts x of  | W * dL(x)/dW |         L(x) = mean NLL of the tokens of x after its prompt

    pruned, of each matrix:   the top q of S on the forget set, less the top p of S on neutral text,   q <= p

Zeroing a weight changes L by about W * dL/dW, so the first set is where the victim's behaviour on the forget set is made:
unlearning of the kind that a few weights do goes with them, and the second set keeps the rest of the model.

    result = Prune(shares=[0.05, 0.1], samples=512).run(unlearned, None, data, Budget())

Wei et al., ICML 2024, "Assessing the Brittleness of Safety Alignment via Pruning and Low-Rank Modifications", section 3 with
SNIP's scores; against unlearning Lucki et al. 2025, whose grid of q and p is the budget `paper`.
"""

import logging
from collections.abc import Sequence
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import nn

from expunge.attacks.base import Attack, AttackData, AttackResult, Budget, Meter, attack, in_range
from expunge.attacks.quantize import block_matrices
from expunge.attacks.relearn import draw
from expunge.data.tokenize import TokenizedText
from expunge.losses import sequence_logps
from expunge.models import context_length, head_logits, hidden_states, sharing_copy
from expunge.ranges import Count

log = logging.getLogger("expunge")

GRID = [0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2]
PAIRS = [[q, p] for q in GRID for p in GRID if q <= p]


@attack("prune")
class Prune(Attack):
    """Zero the weights that matter to the forget set and not to neutral text."""

    paper: ClassVar[str] = "Wei et al. 2024; Lucki et al. 2025"
    needs: ClassVar[tuple[str, ...]] = ("forget", "neutral")
    budgets: ClassVar[dict[str, dict[str, list[Any]]]] = {
        "small": {"shares": [[0.01, 0.01], [0.05, 0.05], [0.05, 0.1], [0.1, 0.2]], "samples": [64]},
        "paper": {"shares": PAIRS, "samples": [512]},
        "large": {"shares": PAIRS, "samples": [512], "seed": [0, 1, 2]},
    }

    shares: list[float] = field(default_factory=lambda: [0.05, 0.1])
    """[q, p]: the shares of each matrix that count as mattering to the forget set and to neutral text; q <= p."""
    samples: Count = 512
    """Texts of each, or as many as both have."""

    def __post_init__(self) -> None:
        super().__post_init__()
        good = len(self.shares) == 2 and 0 <= self.shares[0] <= self.shares[1] <= 1
        in_range(good, self.name, "shares", self.shares, "[q, p] with 0 <= q <= p <= 1")

    def run(self, unlearned: Any, reference: Any, data: AttackData, budget: Budget) -> AttackResult:
        self.check_loaded(unlearned, reference, data)
        meter = Meter(budget)
        q, p = self.shares
        context = context_length(unlearned)
        drawn = [draw(self, data, part, self.samples, context, or_all=True) for part in ("forget", "neutral")]
        texts = list(zip(*drawn, strict=False))  # as many of each
        if len(texts) < self.samples:
            log.warning("attack prune: %d texts of each set, of samples=%d: there are no more", len(texts), self.samples)
        model = sharing_copy(unlearned, []).eval()
        if not q:
            return meter.result(model, idle="q=0: no weight is chosen")
        matrices = block_matrices(model)
        for matrix in matrices:
            matrix.put(matrix.weight.detach().clone())
        weights = [matrix.weight.requires_grad_() for matrix in matrices]
        on_forget, on_neutral = ([torch.zeros_like(w, dtype=torch.float32) for w in weights] for _ in range(2))
        for forgotten, other in texts:
            loss = add_scores(on_forget, model, weights, forgotten)
            add_scores(on_neutral, model, weights, other)
            meter.queries += 2
            meter.step(loss=loss)
            if meter.spent:
                break
        pruned = 0
        for weight, matters, kept in zip(weights, on_forget, on_neutral, strict=True):
            chosen = set_difference(matters, kept, q, p)
            weight.detach()[chosen] = 0
            pruned += int(chosen.sum())
        total = sum(weight.numel() for weight in weights)
        idle = None if pruned else "no weight that matters to the forget set does not matter to neutral text"
        return meter.result(model, about={"pruned": pruned, "share": pruned / total, "texts": 2 * meter.steps}, idle=idle)


def add_scores(
    totals: Sequence[torch.Tensor], model: nn.Module, weights: Sequence[torch.Tensor], row: TokenizedText
) -> float:
    """Add |W * dL/dW| of one row to the `totals`, one of the shape of each weight; returns L.

    A sum over rows ranks as their mean does. A weight that the row does not reach adds nothing.
    """
    loss = continuation_nll(model, row)
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    for total, weight, gradient in zip(totals, weights, gradients, strict=True):
        if gradient is not None:
            total += (weight.detach().float() * gradient.float()).abs()
    return loss.item()


def continuation_nll(model: nn.Module, row: TokenizedText) -> torch.Tensor:
    """Mean negative log-probability of the tokens of a row's continuation, a scalar."""
    prompt, continuation = row
    ids = torch.tensor([prompt + continuation], device=next(model.parameters()).device)
    states = hidden_states(model, ids, torch.ones_like(ids), ["final"])["final"]
    before = len(prompt) - 1  # the first token that predicts one of the continuation
    logits = head_logits(model, states[:, before:])
    targets = ids[:, before:].to(logits.device)
    scored = torch.ones_like(targets, dtype=torch.bool)
    scored[:, 0] = False
    logps, tokens = sequence_logps(logits, targets, scored)
    return -(logps / tokens).sum()


def set_difference(matters: torch.Tensor, kept: torch.Tensor, q: float, p: float) -> torch.Tensor:
    """bool, of the shape of both scores: among the top q of `matters`, and not among the top p of `kept`, by matrix."""
    return _top(matters, q) & ~_top(kept, p)


def _top(scores: torch.Tensor, share: float) -> torch.Tensor:
    flat = scores.flatten(-2)  # of experts, each has a top of its own
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen.scatter_(-1, flat.topk(round(share * flat.shape[-1])).indices, True)
    return chosen.view(scores.shape)
