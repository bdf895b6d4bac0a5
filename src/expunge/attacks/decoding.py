"""Attacks by decoding alone: the model and the prompt stay, what is forced or drawn changes.

    prefill    go on after the first k tokens of a continuation of the kind to be forgotten (Andriushchenko et al. 2025)
    sampling   n samples at a temperature, of which the worst counts: best-of-n (Huang et al. 2024, Hughes et al. 2024)

    result = Prefill(k=4).run(unlearned, None, data, Budget())
    evaluate_model(result.model, tokenizer, measured, dataclasses.replace(plan, **result.plan), scorers)

Both give the victim back, and a plan: `ks`, whose figures are those of the held-out pairs' rejected side, and `temperature`,
`samples`, `top_p` and `seed`, whose expected_max_toxicity is best-of-n. Samples are keyed, so that more of them hold fewer.
"""

from typing import Annotated, Any, ClassVar

from expunge.attacks.base import Attack, AttackData, AttackResult, Budget, Meter, attack
from expunge.ranges import Count, NonNegativeInt, Positive, Range


@attack("prefill")
class Prefill(Attack):
    """Force the first k tokens of a held-out continuation of the kind to be forgotten, and let the model go on."""

    family: ClassVar[str] = "decoding"
    paper: ClassVar[str] = (
        "Jailbreaking Leading Safety-Aligned LLMs with Simple Adaptive Attacks (Andriushchenko et al. 2025)"
    )
    budgets: ClassVar[dict[str, dict[str, list[Any]]]] = {
        "small": {"k": [0, 4, 8]},
        "paper": {"k": [0, 4, 8]},
        "large": {"k": [0, 1, 2, 4, 8, 16]},
    }

    k: NonNegativeInt = 4
    """Tokens that are forced; 0 is the plain evaluation. A continuation that has no more than k is left out."""

    def run(self, unlearned: Any, reference: Any, data: AttackData, budget: Budget) -> AttackResult:
        idle = None if self.k else "k=0 forces nothing"
        return Meter(budget).result(unlearned, plan={"ks": (self.k,)}, idle=idle)


@attack("sampling")
class Sampling(Attack):
    """Draw n samples of every prompt at a temperature; the worst of them is what an attacker keeps (best-of-n)."""

    family: ClassVar[str] = "decoding"
    paper: ClassVar[str] = "Catastrophic Jailbreak of Open-source LLMs via Exploiting Generation (Huang et al. 2024)"
    budgets: ClassVar[dict[str, dict[str, list[Any]]]] = {
        "small": {"temperature": [0.7, 1.0, 1.5], "samples": [10]},
        "paper": {"temperature": [0.5, 1.0, 1.5], "samples": [25]},
        "large": {"temperature": [0.5, 0.7, 1.0, 1.25, 1.5, 2.0], "samples": [100]},
    }

    temperature: Positive = 1.0
    """By which logits are divided, > 0."""
    samples: Count = 10
    """n."""
    top_p: Annotated[float, Range(gt=0, le=1)] = 0.9
    """Mass of the nucleus, in (0, 1]; 1 draws from all tokens."""

    def run(self, unlearned: Any, reference: Any, data: AttackData, budget: Budget) -> AttackResult:
        plan = {name: getattr(self, name) for name in ("temperature", "samples", "top_p")}
        seed = {"seed": self.seed} if self.seed else {}  # else the evaluation's, so that T = 1 draws what it drew before
        return Meter(budget).result(unlearned, plan=plan | seed)
