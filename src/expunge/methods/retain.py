"""What holds a model up while output-space methods push the forget side down: likelihood or KL on the retain side.

NLL(y) = - sum_t log p(y_t | x, y_<t) / number of tokens,     over the continuations of the whole batch

losses = {"forget": ..., **retain_losses(step, "nll")}
"""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from expunge.engine import Step

Retain = Literal["nll", "kl"]


def retain_losses(step: "Step", kind: Retain) -> "dict[str, torch.Tensor]":
    """{"retain": scalar}: NLL of y+, or KL(reference || model) at its tokens, and then at neutral text if there is any."""
    if kind == "nll":
        return {"retain": step.token_nll("retain")}
    losses = {"retain": step.token_kl("retain", "continuation")}
    if "anchor" in step.sides:
        losses["anchor_text"] = step.token_kl("anchor", "all")
    return losses
