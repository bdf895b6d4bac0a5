"""Multi-layer probe directions (Objectives Vary, section 4.3): states made orthogonal to what gives toxic text away.

    L_F = mean over rows and blocks i of ( h_i[last] . w_i )^2            equation 6
    L_R = mean over blocks of MM( 1 - cos(h_i, h0_i) )                    equation 5, at the same blocks
    L = L_F + alpha L_R

w_i is the weight of a logistic regression on the reference's last-token states at the output of block i, fitted on labelled
texts (`data.probe`) that are not among the texts to forget. Nine blocks, three in each third of the depth.

    ProbeDirections(blocks=[1, 3, 5], directions="unit")
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from expunge.errors import ExpungeError
from expunge.losses import cosine_steer_loss, probe_direction_loss
from expunge.methods.base import Material, method
from expunge.methods.learned import LearnedAlpha
from expunge.methods.placement import Default, dispersed
from expunge.methods.steered import AtBlocks, weights_to_train
from expunge.probes import fit_probe, pooled_states_at

if TYPE_CHECKING:
    from expunge.engine import Step
    from expunge.models import Layer


@method("probe_directions")
class ProbeDirections(LearnedAlpha, AtBlocks):
    """Make last-token states of forget text orthogonal to a probe's direction, at several layers at once."""

    paper: ClassVar[str] = "Model Unlearning Objectives Vary for Distinct Language Functions, section 4.3"
    labelled: ClassVar[bool] = True
    ref_sides: ClassVar[tuple[str, ...] | None] = ("retain",)

    parameters: str = "mlp_out"
    """Which weights of those blocks: mlp_out, all_block, or a part of their names; or `all` weights of the model."""
    directions: Literal["unit", "raw"] = "unit"
    """w as a unit vector, or as long as the regression makes it, which changes what alpha means."""
    pool: Literal["last", "mean"] = "last"
    """The states that probes are fitted on: the last token's, or their mean."""

    def defaults(self, depth: int) -> Mapping[str, Default]:
        return {"blocks": dispersed(depth)}

    @property
    def layers(self) -> "tuple[Layer, ...]":
        return self.targets

    def trains(self, model: nn.Module) -> list[str] | None:
        return weights_to_train(model, self.blocks or [], self.parameters)

    def heads(self, width: int) -> dict[str, nn.Module]:
        probes = nn.Module()
        probes.register_buffer("directions", torch.zeros(len(self.blocks or []), width))
        probes.register_buffer("auc", torch.zeros(len(self.blocks or [])))
        return {"probes": probes, **self.policy(bounded=False)}

    def prepare(self, heads: Mapping[str, nn.Module], material: Material) -> None:
        """Fit a probe for each block on the labelled texts."""
        if not material.labelled:
            raise ExpungeError("probe_directions fits probes on labelled texts: give data.probe")
        rows, labels = [ids for ids, _ in material.labelled], [int(bad) for _, bad in material.labelled]
        states = pooled_states_at(material.model, rows, self.layers, self.pool)
        for place, (block, layer) in enumerate(zip(self.blocks or [], self.layers, strict=True)):
            probe = fit_probe(states[layer], labels, name=f"the probe after block {block}")
            weight = F.normalize(probe.weight, dim=0) if self.directions == "unit" else probe.weight
            heads["probes"].directions[place] = weight  # type: ignore[index, operator]
            heads["probes"].auc[place] = probe.auc  # type: ignore[index, operator]

    def loss(self, step: "Step") -> dict[str, torch.Tensor]:
        last = step.mask("forget", "last")
        states = torch.stack([step.hidden("forget", layer)[last] for layer in self.layers], dim=1)  # [B, I, d]
        directions = step.heads["probes"].directions.to(states.device)  # type: ignore[union-attr, operator]
        forget = step.mean(probe_direction_loss(states, directions), "forget", "last")  # type: ignore[arg-type]
        kept = [
            cosine_steer_loss(step.hidden("retain", layer), step.hidden("retain", layer, ref=True)) for layer in self.layers
        ]
        retain = step.mean(torch.stack(kept).mean(0), "retain")
        with torch.no_grad():
            cosines = F.cosine_similarity(states.float(), directions.float(), dim=-1).abs().mean(0)  # type: ignore[union-attr, operator]
            for place, block in enumerate(self.blocks or []):
                step.log(f"forget_block_{block}", probe_direction_loss(states[:, place], directions[place]).mean())  # type: ignore[index, arg-type]
                step.log(f"cosine_block_{block}", cosines[place])
            step.log("forget_norm", states.float().norm(dim=-1).mean())
        return self.joined(step, forget, retain)
