"""The discriminators of REPO: how they are built, how they take steps of their own, and how they start anew.

    D(h) = w_n ReLU( ... ReLU(w_1 h + b_1) ... ) + b_n,     sigmoid(D(h)) = P(forget)

One joint step with the model is the paper's (section 2.2). A model that moves fast outruns such a discriminator. Three
options of REPO hold against that, all ours: several discriminators, further steps on each batch, a new start now and then.

    heads = build(768, width=256, depth=1, members=2, normed=False)
"""

import itertools
from collections.abc import Callable, Mapping

import torch
from torch import nn

BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam, for a discriminator's own steps


def build(size: int, width: int, depth: int, members: int, normed: bool) -> dict[str, nn.Module]:
    """`members` discriminators of states `[..., size]`, by name: `depth` hidden layers of `width` units, one logit.

    normed: a norm without parameters comes first, for states that have not passed the model's final norm.
    """
    sizes = [size] + [width] * depth

    def one() -> nn.Sequential:
        stack: list[nn.Module] = [nn.LayerNorm(size, elementwise_affine=False)] if normed else []
        for wide, narrow in itertools.pairwise(sizes):
            stack += [nn.Linear(wide, narrow), nn.ReLU()]
        return nn.Sequential(*stack, nn.Linear(sizes[-1], 1))

    return {"discriminator" if number == 0 else f"discriminator_{number}": one() for number in range(members)}


def members(heads: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The discriminators among a method's heads, by name."""
    return {name: head for name, head in heads.items() if name.startswith("discriminator")}


class Upkeep(nn.Module):
    """What it takes to train discriminators apart from the model: moments of Adam, and a count of optimizer steps.

    All of it is in buffers: a checkpoint has it, and a resumed run goes on with it.
    """

    steps: torch.Tensor

    def __init__(self, discriminators: Mapping[str, nn.Module], seed: int):
        super().__init__()
        self.seed = seed
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        for name, discriminator in discriminators.items():
            size = sum(parameter.numel() for parameter in discriminator.parameters())
            self.register_buffer(f"{name}_moments", torch.zeros(2, size))
            self.register_buffer(f"{name}_count", torch.zeros((), dtype=torch.long))

    @torch.enable_grad()
    def practise(self, name: str, discriminator: nn.Module, loss: Callable[[], torch.Tensor], rate: float) -> None:
        """One step of Adam down `loss`, which is computed from `discriminator`; gradients are averaged over processes."""
        parameters = list(discriminator.parameters())
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), parameters)])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(gradient)
            gradient /= torch.distributed.get_world_size()
        moments, count = getattr(self, f"{name}_moments"), getattr(self, f"{name}_count")
        count += 1
        for moment, beta, power in zip(moments, BETAS, (1, 2), strict=True):
            moment.mul_(beta).add_((1 - beta) * gradient**power)
        first, second = (moment / (1 - beta ** int(count)) for moment, beta in zip(moments, BETAS, strict=True))
        move = rate * first / (second.sqrt() + EPSILON)
        with torch.no_grad():
            for parameter, change in zip(parameters, move.split([p.numel() for p in parameters]), strict=True):
                parameter -= change.view_as(parameter)

    def advance(self, discriminators: Mapping[str, nn.Module], every: int) -> None:
        """Count an optimizer step; after every `every` steps start the next discriminator in turn anew.

        Its weights are drawn from the seed and the count, the same on every process and after a resume. The moments of its
        own steps are forgotten; those of the model's optimizer stay.
        """
        self.steps += 1
        turn, rest = divmod(int(self.steps), every)
        if rest:
            return
        name, discriminator = list(discriminators.items())[(turn - 1) % len(discriminators)]
        with torch.random.fork_rng():
            torch.manual_seed(self.seed * 1_000_003 + turn)
            for module in discriminator.modules():
                if isinstance(module, nn.Linear):
                    module.reset_parameters()
        getattr(self, f"{name}_moments").zero_()
        getattr(self, f"{name}_count").zero_()
