"""GCG: greedy coordinate gradient, a suffix under which the victim goes on as the model before unlearning did.

    Zou et al. 2023, Algorithm 2; a step, with L the mean loss of the targets over the optimisation prompts:
    1. the `top_k` tokens of least  dL / d one-hot  at each place of the suffix
    2. `width` suffixes, each with `replace` random places set to one of them; those that do not survive as text are dropped
    3. L of every one of them; the best is the next suffix

    GCG(steps=250, width=512).run(unlearned, reference, data, Budget()).plan     # {"suffix": (1212, 87, ...)}

With `draft`, a small model decides which of them are measured (expunge.attacks.search.probe_sampling).
"""

import math
from typing import Any, ClassVar

import torch

from expunge.attacks.base import Attack, AttackData, AttackResult, Budget, Meter, attack, in_range
from expunge.attacks.search.probe_sampling import probe_sample
from expunge.attacks.search.proposals import candidates, random_strings
from expunge.attacks.search.strings import allowed_tokens, first_string, typed_anywhere, without_bos
from expunge.attacks.search.suffix_loss import Loss, TargetLosses
from expunge.attacks.search.targets import check_prompts, reference_targets
from expunge.errors import ExpungeError
from expunge.generation import check_room
from expunge.ids import continuation_text
from expunge.models import Description, frozen, load_model, load_outline
from expunge.ranges import Count, NonNegativeInt


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

    length: Count = 20
    """Tokens of the suffix."""
    steps: Count = 250
    width: Count = 512
    """Suffixes drawn in a step, before those that do not survive as text are dropped."""
    top_k: Count = 256
    """Tokens to draw from at each place."""
    replace: Count = 1
    """Places that a drawn suffix changes."""
    buffer: NonNegativeInt = 0
    """0: a step goes on from the best that it drew, even a worse one. N: from the best so far, at first that of N starts, of
    which all but one are random; fewer where few random strings survive as text."""
    loss: Loss = "cross_entropy"
    """Of a target: the mean of its tokens' -log p, or the mellowmax of their -logits."""
    optimised: Count = 8
    """Prompts to search on: those whose target scores highest."""
    target_tokens: Count = 20
    """Tokens of the reference's own continuation, which is the target."""
    ascii: bool = True
    """Only printable ASCII."""
    draft: str | None = None
    """A smaller model with the same tokenizer, for probe sampling."""

    def __post_init__(self) -> None:
        super().__post_init__()
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


def least(losses: torch.Tensor, strings: torch.Tensor) -> tuple[float, torch.Tensor]:
    place = losses.argmin()
    return losses[place].item(), strings[place]
