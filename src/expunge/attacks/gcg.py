"""GCG: greedy coordinate gradient, a suffix under which the victim goes on as the model before unlearning did.

    Zou et al. 2023, Algorithm 2; a step, with L the mean loss of the targets over the optimisation prompts:
    1. the `top_k` tokens of least  dL / d one-hot  at each place of the suffix
    2. `width` suffixes, each with `replace` random places set to one of them; those that do not survive as text are dropped
    3. L of every one of them; the best is the next suffix

    GCG(steps=250, width=512).run(unlearned, reference, data, Budget()).plan     # {"suffix": (1212, 87, ...)}

Probe sampling (Zhao et al. 2024): a small draft model ranks all of the B suffixes of a step, the victim a random B/16 of
them; the better the two rankings agree, by Spearman's rho, the fewer of the draft's best go to the victim besides:
max(1, floor((1 - (1 + rho)/2) B/8)).
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from expunge.attacks.base import Attack, AttackData, AttackResult, Budget, Meter, attack, in_range
from expunge.attacks.continuations import Loss, TargetLosses
from expunge.attacks.tokens import (
    allowed_tokens,
    check_prompts,
    first_string,
    reference_targets,
    typed_anywhere,
    without_bos,
)
from expunge.config import at_least
from expunge.errors import ExpungeError
from expunge.generation import check_room
from expunge.ids import continuation_text
from expunge.metrics.stats import rank_correlation
from expunge.models import Description, frozen, load_model, load_outline


@attack("gcg")
class GCG(Attack):
    """Search one suffix for all prompts, token by token, along the gradient (standard GCG)."""

    family: ClassVar[str] = "prompt"
    paper: ClassVar[str] = "Universal and Transferable Adversarial Attacks on Aligned Language Models, Zou et al. 2023"
    needs: ClassVar[tuple[str, ...]] = ("reference", "prompts", "score")
    models: ClassVar[tuple[str, ...]] = ("draft",)
    budgets: ClassVar[dict[str, dict[str, list[Any]]]] = {
        "small": {"steps": [100], "width": [64]},
        "paper": {"steps": [250], "width": [512]},
        "large": {"steps": [500], "width": [512]},
    }

    length: int = 20
    """Tokens of the suffix."""
    steps: int = 250
    width: int = 512
    """Suffixes drawn in a step, before those that do not survive as text are dropped."""
    top_k: int = 256
    """Tokens to draw from at each place."""
    replace: int = 1
    """Places that a drawn suffix changes."""
    buffer: int = 0
    """0: a step goes on from the best that it drew, even a worse one. N: from the best so far, at first that of N starts, of
    which all but one are random; fewer where few random strings survive as text."""
    loss: Loss = "cross_entropy"
    """Of a target: the mean of its tokens' -log p, or the mellowmax of their -logits."""
    optimised: int = 8
    """Prompts to search on: those whose target scores highest."""
    target_tokens: int = 20
    """Tokens of the reference's own continuation, which is the target."""
    ascii: bool = True
    """Only printable ASCII."""
    draft: str | None = None
    """A smaller model with the same tokenizer, for probe sampling."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least = dict.fromkeys(("length", "steps", "width", "top_k", "replace", "optimised", "target_tokens"), 1)
        at_least(f"attack.{self.name}", self, **least, buffer=0)
        in_range(self.replace <= self.length, self.name, "replace", self.replace, f"at most the length, {self.length}")

    @property
    def adds(self) -> int:
        return self.length

    def check(self, unlearned: Description, reference: Description | None, data: AttackData) -> None:
        super().check(unlearned, reference, data)
        check_prompts(data, self.optimised)
        if self.draft and load_outline(self.draft)[1].get_vocab() != data.tokenizer.get_vocab():
            raise ExpungeError(f"attack.gcg.draft={self.draft}: its tokenizer is not the model's; take one of its kin")

    def run(self, unlearned: Any, reference: Any, data: AttackData, budget: Budget) -> AttackResult:
        self.check_loaded(unlearned, reference, data)
        meter, draw, tokenizer = Meter(budget), torch.Generator().manual_seed(self.seed), data.tokenizer
        targets, counts = reference_targets(reference, data, self.optimised, self.target_tokens)
        prompts = [without_bos(tokenizer, target.prompt) for target in targets]
        allowed = allowed_tokens(tokenizer, len(unlearned.get_input_embeddings().weight), self.ascii)
        first = first_string(tokenizer, self.length, allowed, prompts)
        drafts = [load_model(self.draft, device=unlearned.device)[0]] if self.draft else []
        for model in (unlearned, *drafts):
            check_room(model, [target.prompt + first.tolist() for target in targets], self.target_tokens)

        with frozen(unlearned, *drafts):
            victim, *draft = (TargetLosses(model, targets, self.loss) for model in (unlearned, *drafts))

            def measure(strings: torch.Tensor) -> torch.Tensor:
                meter.queries += len(strings) * len(targets)
                return victim.losses(strings, current).cpu().nan_to_num(nan=math.inf)

            current = first
            by_chance = random_strings(allowed, max(self.width, self.buffer), self.length, draw)
            others = typed_anywhere(tokenizer, by_chance, prompts)
            drawn = torch.cat([first[None], others[: max(0, self.buffer - 1)]])
            losses, starts = measure(drawn), len(drawn)
            first_loss = losses[0].item()
            loss, current = least(losses, drawn)
            best_loss, best = loss, current
            while meter.steps < self.steps and not meter.spent:
                meter.queries += len(targets)
                slope = victim.gradient(current)[1].cpu()
                drawn = candidates(current, slope, allowed, self.width, self.top_k, self.replace, draw)
                drawn = typed_anywhere(tokenizer, drawn, prompts)
                if len(drawn):
                    if draft:
                        drawn, losses = probe_sample(drawn, draft[0].losses(drawn, current).cpu(), measure, draw)
                    else:
                        losses = measure(drawn)
                    found = least(losses, drawn)
                    if not self.buffer or found[0] < loss:
                        loss, current = found
                    if found[0] < best_loss:
                        best_loss, best = found
                meter.step(loss=loss, best=best_loss)

        about = {
            "string": continuation_text(tokenizer, prompts[0], best.tolist()),
            "loss": best_loss,
            "first_loss": first_loss,
            "starts": starts,
            "shared_keys": victim.shares,
            "targets": counts,
        }
        return meter.result(unlearned, plan={"suffix": tuple(best.tolist())}, about=about)


def random_strings(allowed: torch.Tensor, count: int, length: int, draw: torch.Generator) -> torch.Tensor:
    """int64 `[count, length]` of allowed tokens, each as likely."""
    tokens = allowed.nonzero().flatten()
    return tokens[torch.randint(len(tokens), (count, length), generator=draw)]


def candidates(
    string: torch.Tensor,
    slope: torch.Tensor,
    allowed: torch.Tensor,
    width: int,
    top_k: int,
    replace: int,
    draw: torch.Generator,
) -> torch.Tensor:
    """int64 `[N, S]`, at most `width` distinct strings, each `string` `[S]` with `replace` random places set anew.

    slope: dL / d one-hot `[S, V]`; a place gets one of its `top_k` allowed tokens of least slope, each as likely.
    """
    slope = slope.masked_fill(~allowed, math.inf)
    top = slope.topk(min(top_k, int(allowed.sum())), largest=False).indices  # [S, k]
    places = torch.rand(width, len(string), generator=draw).argsort(1)[:, :replace]
    ranks = torch.randint(top.shape[1], (width, replace), generator=draw)
    drawn = string.repeat(width, 1).scatter_(1, places, top[places, ranks]).unique(dim=0)
    return drawn[(drawn != string).any(1)]


def least(losses: torch.Tensor, strings: torch.Tensor) -> tuple[float, torch.Tensor]:
    place = losses.argmin()
    return losses[place].item(), strings[place]


def probe_sample(
    strings: torch.Tensor,
    guesses: torch.Tensor,
    measure: Callable[[torch.Tensor], torch.Tensor],
    draw: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of `strings` `[N, S]` that were measured, and their losses: a random sixteenth, and the draft's best.

    guesses: the draft's losses `[N]`.
    """
    probed = torch.randperm(len(strings), generator=draw)[: max(2, len(strings) // 16)]
    losses = measure(strings[probed])
    rho = rank_correlation(guesses[probed].numpy(), losses.numpy(), len(probed))[0]
    best = guesses.argsort(stable=True)[: kept_after_probing(rho, len(strings))]
    best = best[~torch.isin(best, probed)]
    rest = [measure(strings[best])] if len(best) else []
    return strings[torch.cat([probed, best])], torch.cat([losses, *rest])


def kept_after_probing(rho: float, width: int) -> int:
    """How many of the draft's best are measured; a rho that is not defined tells nothing, as 0 does."""
    return max(1, math.floor((1 - (1 + (0.0 if math.isnan(rho) else rho)) / 2) * width / 8))
