"""Soft prompt: an attack in embedding space, a few vectors before every prompt (Schwinn et al. 2024, Soft Prompt Threats).

    P  <-  P - step_size * sign( d/dP  mean_i CE(target_i | start, P, prompt_i) ),      P [length, d]

target_i is what the reference says, greedily, after prompt i. The vectors found become tokens: the model given back has
`length` more rows in its input embedding, and its prefix is their ids. The head knows nothing of them.

    SoftPrompt(steps=100).run(unlearned, reference, data, Budget())
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from expunge.attacks.base import Attack, AttackData, AttackResult, Budget, Meter, attack
from expunge.attacks.search.strings import allowed_tokens
from expunge.attacks.search.targets import Target, check_prompts, reference_targets
from expunge.engine import collate
from expunge.generation import check_room
from expunge.ids import leading_tokens
from expunge.models import Description, frozen, head_logits, hidden_states, in_batches, sharing_copy
from expunge.ranges import Count, Positive


@attack("soft_prompt")
class SoftPrompt(Attack):
    """Vectors before every prompt, found by gradient, that make the model say what the reference said."""

    family: ClassVar[str] = "prompt"
    paper: ClassVar[str] = "Soft Prompt Threats, Schwinn et al. 2024"
    needs: ClassVar[tuple[str, ...]] = ("reference", "prompts", "score")
    budgets: ClassVar[dict[str, dict[str, list[Any]]]] = {
        "small": {"steps": [100]},
        "paper": {"step_size": [0.001, 0.01], "seed": [0, 1, 2]},
        "large": {"step_size": [0.001, 0.01], "steps": [1000], "seed": [0, 1, 2]},
    }

    length: Count = 20
    """Vectors."""
    step_size: Positive = 0.01
    """By which every number of every vector moves at a step, > 0; against unlearned knowledge the paper takes 0.001."""
    steps: Count = 100
    optimised: Count = 8
    """Prompts to search on: those after which the reference's own words score highest."""
    target_tokens: Count = 20
    """Of the reference's continuation, at most."""

    @property
    def adds(self) -> int:
        return self.length

    def check(self, unlearned: Description, reference: Description | None, data: AttackData) -> None:
        super().check(unlearned, reference, data)
        check_prompts(data, self.optimised)

    def run(self, unlearned: Any, reference: Any, data: AttackData, budget: Budget) -> AttackResult:
        self.check_loaded(unlearned, reference, data)
        meter = Meter(budget)
        targets, counts = reference_targets(reference, data, self.optimised, self.target_tokens)
        start = len(leading_tokens(data.tokenizer))
        check_room(unlearned, [[*target.prompt, *target.ids] for target in targets], self.length)
        model = sharing_copy(unlearned, ())
        with frozen(model):
            vectors, loss = self._search(model, data, targets, start, meter)
        prefix = add_tokens(model, vectors)
        return meter.result(model, plan={"prefix": prefix}, about={"loss": loss, "targets": counts})

    def _search(
        self, model: Any, data: AttackData, targets: Sequence[Target], start: int, meter: Meter
    ) -> tuple[torch.Tensor, float]:
        """The vectors `[length, d]` of the least loss, as rows of the input embedding, and that loss."""
        weight = model.get_input_embeddings().weight
        allowed = allowed_tokens(data.tokenizer, len(weight)).nonzero().flatten()
        generator = torch.Generator().manual_seed(self.seed)
        first = allowed[torch.randint(len(allowed), (self.length,), generator=generator)]
        wide = torch.promote_types(weight.dtype, torch.float32)  # in half precision small steps would be lost
        vectors = found = weight[first.to(weight.device)].detach().to(wide)
        best = float("inf")
        while True:
            loss, slope = self._slope(model, vectors, targets, start)
            if loss < best:
                best, found = loss, vectors
            meter.queries += len(targets)
            meter.step(loss=loss, best=best)
            if meter.steps >= self.steps or meter.spent:
                return found, best
            vectors = vectors - self.step_size * slope.sign()

    def _slope(self, model: Any, vectors: torch.Tensor, targets: Sequence[Target], start: int) -> tuple[float, torch.Tensor]:
        """The loss, and its gradient `[length, d]`."""
        total, slope = 0.0, torch.zeros_like(vectors)

        def add(batch: Sequence[Target]) -> None:
            nonlocal total
            leaf = vectors.clone().requires_grad_(True)
            with torch.enable_grad():
                loss = soft_losses(model, leaf, batch, start).sum() / len(targets)
                (found,) = torch.autograd.grad(loss, leaf)
            total += loss.item()
            slope.add_(found)

        in_batches(targets, lambda _: len(targets), add)
        return total, slope


def soft_losses(model: Any, vectors: torch.Tensor, targets: Sequence[Target], start: int) -> torch.Tensor:
    """`[N]`: mean cross-entropy of each target's ids after bos, `vectors` and the rest of its prompt.

    vectors: `[n, d]`, rows of the input embedding, before it scales them; start: tokens of bos.
    """
    blank = [0] * len(vectors)
    rows = [{"row": (t.prompt[:start] + blank + t.prompt[start:], t.ids)} for t in targets]
    batch = {name: tensor.to(model.device) for name, tensor in collate(rows)["row"].items()}
    ids, place = batch["ids"], torch.arange(batch["ids"].shape[1], device=model.device)
    mask = place < batch["lengths"][:, None]
    scored = mask & (place >= batch["prompts"][:, None])  # [N, T], at the tokens
    with _in_place(model.get_input_embeddings(), vectors, start):
        states = hidden_states(model, ids, mask.long(), ["final"])["final"].to(ids.device)  # a device map may end elsewhere
    logits = head_logits(model, states[:, :-1][scored[:, 1:]])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits, ids[scored].to(logits.device), reduction="none")
    each = torch.zeros(scored.shape, dtype=losses.dtype, device=losses.device).masked_scatter(
        scored.to(losses.device), losses
    )
    return each.sum(1) / scored.sum(1).to(losses.device)


@contextmanager
def _in_place(embedding: nn.Module, vectors: torch.Tensor, start: int) -> Iterator[None]:
    """`embedding` gives `vectors`, scaled as its own rows are, at the places from `start` on."""
    weight: Any = embedding.weight
    rows: Any = copy.deepcopy(embedding, {id(weight): nn.Parameter(vectors.detach().to(weight.dtype))})
    rows.padding_idx = None
    index = torch.arange(len(vectors), device=weight.device)
    given = torch.func.functional_call(rows, {"weight": vectors.to(weight.dtype)}, (index,))  # [n, d]

    def put(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        each = given.expand(len(output), -1, -1)
        return torch.cat([output[:, :start], each, output[:, start + len(given) :]], dim=1)

    handle = embedding.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


def add_tokens(model: Any, vectors: torch.Tensor) -> tuple[int, ...]:
    """Rows `[n, d]` after those of the input embedding, in place, and their ids; the output embedding keeps its own."""
    embedding = model.get_input_embeddings()
    weight = embedding.weight
    rows = torch.cat([weight.detach(), vectors.to(weight)])
    embedding.weight = nn.Parameter(rows, requires_grad=weight.requires_grad)
    embedding.num_embeddings = len(rows)
    model.config.get_text_config().tie_word_embeddings = False
    return tuple(range(len(weight), len(rows)))
