"""Orthogonalization (Łucki et al. 2025, after Arditi et al. 2024): take out of the residual stream what unlearning put in.

    r_l      = mean h_l(unlearned) - mean h_l(reference)     after block l, over the continuation tokens of the forget set
    project    h <- h - (h . u) u                            u = r_l / |r_l|, at every position of every text
    affine     h <- h - ((h - mu_l) . u) u                   mu_l = mean h_l(reference)
    shift      h <- h - r_l                              of several blocks, each what those before it leave of its r_l

What they undo where unlearning added a constant c to the output of one block (then r = c there): shift all of it, exactly.
A projection takes from a state its own part along c too. Affine gives back the mean of that part on the forget set, which is
exact where it is the same for all states; project sets it to 0, which is exact where it was 0. Which is best hangs on what
unlearning did.

`orthogonalize` is the papers' attack: project, after every block, and nothing is chosen. `orthogonalize_best` is ours, and
stronger: the best of the three forms, after all blocks, a third of them or one.

    Orthogonalize().run(unlearned, reference, data, Budget())
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn

from expunge.anatomy import block_names, check_blocks
from expunge.attacks.base import Attack, AttackData, AttackResult, Budget, Meter, attack, in_range
from expunge.data.tokenize import TokenizedText
from expunge.engine import collate
from expunge.errors import ExpungeError
from expunge.metrics.perplexity import row_nll, text_windows
from expunge.models import Description, Layer, depth, frozen, hidden_states, in_batches, sharing_copy, width
from expunge.ranges import Count, Positive
from expunge.steering import Edit, Erase, Shift, steer_further

BATCH_TOKENS = 4096
NEUTRAL_TOKENS = 2048
"""Of the running text on which perplexity is held."""
NOTHING = 1e-6
"""|r| over the length of the mean states, below which it is rounding."""

Form = Literal["project", "affine", "shift"]
FORMS: tuple[Form, ...] = ("project", "affine", "shift")


@attack("orthogonalize")
class Orthogonalize(Attack):
    """Project out of every block's output the direction in which unlearning moved it, as the papers do; weights stay."""

    family: ClassVar[str] = "activations"
    paper: ClassVar[str] = "An Adversarial Perspective on Machine Unlearning for AI Safety (Łucki et al. 2025)"
    needs: ClassVar[tuple[str, ...]] = ("reference", "forget")
    budgets: ClassVar[dict[str, dict[str, list[Any]]]] = {
        "small": {"samples": [250]},
        "paper": {},
        "large": {"form": ["project", "affine", "shift"], "direction": ["difference", "reference_free"]},
    }

    form: Literal["project", "affine", "shift", "best"] = "project"
    """What is done to states: project (the papers'), affine, or shift; see the equations. best: which of them, by the
    likelihood of `validation`."""
    direction: Literal["difference", "reference_free"] = "difference"
    """r: unlearned minus reference on the forget set; or, without a reference, unlearned on forget minus on retain set."""
    layers: Literal["all", "search"] | list[int] = "all"
    """After which blocks, from 0. search: all, a third, or one, by the likelihood of `validation`. What is chosen keeps the
    perplexity within the bound, and makes `validation` likelier than the victim does; else the attack is idle."""
    outliers: Positive | None = 3.0
    """Leave a token out of the means where the L1 distance of its state to the mean has a z-score above this; null: none."""
    samples: Count = 1000
    """At most so many texts of a set, drawn with the seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range(self.layers != [], self.name, "layers", self.layers, "all, search, or at least one block")
        base = "reference" if self.direction == "difference" else "retain"
        self.needs = (base, "forget", *(("validation", "neutral") if self.chooses else ()))  # type: ignore[misc]

    @property
    def chooses(self) -> bool:
        return self.layers == "search" or self.form == "best"

    def check(self, unlearned: Description, reference: Description | None, data: AttackData) -> None:
        super().check(unlearned, reference, data)
        if isinstance(self.layers, list):
            check_blocks(self.layers, unlearned.depth)

    def run(self, unlearned: Any, reference: Any, data: AttackData, budget: Budget) -> AttackResult:
        """Raises ExpungeError for what is lacking and for a block that there is not.

        about: the form and the blocks taken, |r| by block, and of all that were tried the mean -log p of a token of
        `validation` and the perplexity, beside the victim's.
        """
        self.check_loaded(unlearned, reference, data)
        meter = Meter(budget)
        model: Any = sharing_copy(unlearned, ()).eval()
        other = reference if self.direction == "difference" else model
        with frozen(model, other):
            measure, before = self._means(model, other, data, meter)
            after = measure(model)
            offsets, lengths = after - before, torch.stack([after, before]).norm(dim=-1).amax(0)
            norms, least = offsets.norm(dim=-1), NOTHING * lengths
            sets = [tuple(block for block in blocks if norms[block] > least[block]) for blocks in self._sets(len(norms))]
            about = {"norms": norms.tolist()}
            if not any(sets):
                return meter.result(
                    model, about=about, idle="no block's mean state moved: there is no direction to take out"
                )
            names = block_names(model)

            def edits(form: Form, blocks: Sequence[int]) -> dict[int, Edit]:
                made: dict[int, Edit] = {}
                for block in blocks:
                    offset = offsets[block]
                    if form == "shift" and made:
                        offset = measure(steered(model, made.values(), {}))[block] - before[block]
                        if offset.norm() <= least[block]:
                            continue
                    made[block] = edit(form, names[block], offset, before[block])
                return made

            forms: tuple[Form, ...] = FORMS if self.form == "best" else (self.form,)
            candidates: Iterable[tuple[Form, Mapping[int, Edit]]] = (
                (form, edits(form, blocks)) for blocks in dict.fromkeys(sets) if blocks for form in forms
            )
            found, more = self._best(model, candidates, data, meter)
        if found is None:
            bound = f"{budget.utility_bound:g} times the victim's"
            idle = f"nothing makes the validation text likelier and keeps the perplexity within {bound}"
            return meter.result(model, about=about | more, idle=idle)
        return meter.result(found, about=about | more)

    def _sets(self, count: int) -> list[list[int]]:
        """Sets of blocks to try, the widest first."""
        every = list(range(count))
        if self.layers == "search":
            thirds = [part.tolist() for part in np.array_split(np.array(every), 3)]
            return [every, *thirds, *([block] for block in every)]
        return [every if self.layers == "all" else sorted(set(self.layers))]  # type: ignore[arg-type]

    def _means(
        self, model: Any, other: Any, data: AttackData, meter: Meter
    ) -> tuple[Callable[[Any], torch.Tensor], torch.Tensor]:
        """How a model's mean states on the forget set are found, float64 `[L, d]`, and those that they are compared with."""
        forget = self._drawn(data, "forget")
        if self.direction == "difference":
            kept = self._kept(other, forget)  # of both models the same tokens count
            before = mean_states(other, forget, kept)
        else:
            retain = self._drawn(data, "retain")
            kept = self._kept(model, forget)
            before = mean_states(model, retain, self._kept(model, retain))
            meter.queries += len(retain) + (0 if self.outliers is None else 2 * (len(forget) + len(retain)))

        def measure(model: Any) -> torch.Tensor:
            meter.queries += len(forget)
            return mean_states(model, forget, kept)

        return measure, before

    def _kept(self, model: Any, rows: Sequence[TokenizedText]) -> torch.Tensor | None:
        """Which tokens count, bool `[L, N]`; None for all."""
        if self.outliers is None:
            return None
        return inliers(distances(model, rows, mean_states(model, rows)), self.outliers)

    def _drawn(self, data: AttackData, part: Literal["forget", "retain", "validation"]) -> Sequence[TokenizedText]:
        rows = data.drawn(part, self.samples, self.seed)
        if not rows:
            raise ExpungeError(f"attack {self.name}: no text of the {part} set has a token")
        return rows

    def _best(
        self, victim: Any, candidates: Iterable[tuple[Form, Mapping[int, Edit]]], data: AttackData, meter: Meter
    ) -> tuple[Any, dict[str, Any]]:
        """The victim with the edits of one of the candidates, the only one or what is chosen, if any; and what was seen."""
        own = self._measured(victim, data, meter)
        about: dict[str, Any] = {"victim": own, "candidates": []}
        best, found = own.get("nll", math.inf), None
        for form, edits in candidates:
            model = steered(victim, edits.values(), {self.name: {"form": form, "blocks": [*edits]}})
            figures = self._measured(model, data, meter)
            about["candidates"].append({"form": form, "layers": [*edits], **figures})
            loss = figures.get("nll", math.inf)
            if not self.chooses or (loss < best and figures["perplexity"] <= meter.budget.utility_bound * own["perplexity"]):
                best, found = loss, model
                about |= {"form": form, "layers": [*edits], **({"loss": loss} if figures else {})}
            meter.step(**({"loss": loss, "best": best} if figures else {}))
            if meter.spent:
                break
        return found, about

    def _measured(self, model: Any, data: AttackData, meter: Meter) -> dict[str, float]:
        """nll: mean -log p of a continuation's token of the validation set, where there is one; perplexity, to choose by."""
        found = {}
        if data.validation:
            rows = [(prompt + continuation, len(prompt)) for prompt, continuation in self._drawn(data, "validation")]
            nll, tokens = row_nll(model, rows)
            found["nll"] = float(nll.sum() / tokens.sum())
            meter.queries += len(rows)
        if self.chooses:
            windows = text_windows(model, data.tokenizer, data.neutral, NEUTRAL_TOKENS)
            found["perplexity"] = float(np.exp(windows.nll.sum() / windows.tokens.sum()))
            meter.queries += len(windows.nll)
        return found


@attack("orthogonalize_best")
class OrthogonalizeBest(Orthogonalize):
    """Ours: the best of three ways to take out what unlearning put in, after all blocks, a third of them or one."""

    family: ClassVar[str] = "activations"
    needs: ClassVar[tuple[str, ...]] = ("reference", "forget", "validation", "neutral")
    budgets: ClassVar[dict[str, dict[str, list[Any]]]] = {
        "small": {"samples": [250]},
        "paper": {},
        "large": {"form": ["project", "affine", "shift"], "direction": ["difference", "reference_free"]},
    }

    form: Literal["project", "affine", "shift", "best"] = "best"
    layers: Literal["all", "search"] | list[int] = "search"


def steered(model: Any, edits: Iterable[Edit], about: dict[str, Any]) -> Any:
    """A model of its own with these edits, which shares the weights."""
    made: Any = sharing_copy(model, ())
    steer_further(made, [*edits], about)
    return made


def edit(form: Form, at: str, offset: torch.Tensor, centre: torch.Tensor) -> Edit:
    """What is done to states after the block called `at`; offset r and centre mu, float64 `[d]`."""
    if form == "shift":
        return Shift(at, offset.float())
    unit = (offset / offset.norm()).float()[:, None]  # [d, 1]
    return Erase(at, unit, unit.clone(), (centre if form == "affine" else torch.zeros_like(centre)).float())


def mean_states(model: nn.Module, rows: Sequence[TokenizedText], kept: torch.Tensor | None = None) -> torch.Tensor:
    """float64 `[L, d]`: the mean state after each block over continuation tokens; kept: bool `[L, N]`, those that count."""
    total = torch.zeros(depth(model), width(model), dtype=torch.float64)
    count = torch.zeros(depth(model), 1, dtype=torch.float64)

    def add(block: int, tokens: torch.Tensor, states: torch.Tensor) -> None:
        if kept is not None:
            states = states[kept[block, tokens]]
        total[block] += states.sum(0)
        count[block] += len(states)

    each_block(model, rows, add)
    return total / count


def distances(model: nn.Module, rows: Sequence[TokenizedText], means: torch.Tensor) -> torch.Tensor:
    """float64 `[L, N]`: the L1 distance to `means` `[L, d]` of each continuation token's state after each block."""
    found = torch.zeros(depth(model), sum(len(continuation) for _, continuation in rows), dtype=torch.float64)

    def add(block: int, tokens: torch.Tensor, states: torch.Tensor) -> None:
        found[block, tokens] = (states - means[block]).abs().sum(-1)

    each_block(model, rows, add)
    return found


def inliers(distance: torch.Tensor, z: float) -> torch.Tensor:
    """bool `[L, N]`: is a token's z-score among all of its block at most `z`? Łucki et al. take its mean distance to all
    others, and drop every token of the same kind."""
    return ~(distance - distance.mean(-1, keepdim=True) > z * distance.std(-1, keepdim=True))


def each_block(
    model: nn.Module, rows: Sequence[TokenizedText], visit: Callable[[int, torch.Tensor, torch.Tensor], None]
) -> None:
    """`each_layer` of the states that leave the blocks, which are visited by their numbers."""
    leaving: list[Layer] = [*range(1, depth(model)), "pre_norm"]
    each_layer(model, rows, leaving, lambda layer, tokens, states: visit(leaving.index(layer), tokens, states))


@torch.no_grad()
def each_layer(
    model: nn.Module,
    rows: Sequence[TokenizedText],
    layers: Sequence[Layer],
    visit: Callable[[Layer, torch.Tensor, torch.Tensor], None],
) -> None:
    """Call `visit(layer, tokens, states)` for every batch and layer, with the states `[n, d]`, float64, at continuation
    tokens, and these tokens' numbers `[n]` in the order of the rows. A first position is in a prompt."""
    device = next(model.parameters()).device
    first = np.cumsum([0, *(len(continuation) for _, continuation in rows)])
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0] + rows[i][1]))

    def work(batch: Sequence[int]) -> None:
        row = collate([{"row": rows[i]} for i in batch])["row"]
        prompts, lengths, place = row["prompts"][:, None], row["lengths"][:, None], torch.arange(row["ids"].shape[1])
        counted = (place >= prompts) & (place < lengths)  # [B, T]
        tokens = (torch.tensor(first[list(batch)])[:, None] + place - prompts)[counted]
        found = hidden_states(model, row["ids"].to(device), (place < lengths).long().to(device), layers)
        of_tokens = [(states := found.pop(layer))[counted.to(states.device)].cpu() for layer in layers]
        for layer, states in zip(layers, of_tokens, strict=True):  # from here on nothing runs out of the device's memory
            visit(layer, tokens, states.double())

    in_batches(order, lambda i: BATCH_TOKENS // len(rows[i][0] + rows[i][1]), work)
