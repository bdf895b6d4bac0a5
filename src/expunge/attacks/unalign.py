"""Un-aligning by scaling keys (Lee et al. 2024, section 5.3): turn up the neurons that write what was to be forgotten.

    the `vectors` value vectors v of all MLPs nearest in angle to w, a probe's direction: forget against retain texts
    k <- factor k            the key of each of these neurons; in a gated MLP that of its up projection; no bias

Lee et al. found that DPO leaves the toxic value vectors where they are and makes their neurons fire less often: a longer key
makes them fire again. The model is ordinary: of a few matrices some rows are longer.

    Unalign(vectors=7).run(unlearned, reference, data, Budget())
"""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F

from expunge.anatomy import mlp_inputs, nearest_values
from expunge.attacks.base import Attack, AttackData, AttackResult, Budget, Meter, attack
from expunge.errors import ExpungeError
from expunge.ids import leading_tokens
from expunge.models import frozen, sharing_copy
from expunge.probes import fit_probe, pooled_states
from expunge.ranges import Count, Positive

PLAIN, GATED = 10.0, 3.0
"""Factors of the paper: section 5.3 (GPT-2), appendix E (Llama 2)."""


@attack("unalign")
class Unalign(Attack):
    """Scale up the keys of the MLP neurons whose value vectors are nearest to a probe of what was to be forgotten."""

    family: ClassVar[str] = "weights"
    paper: ClassVar[str] = "A Mechanistic Understanding of Alignment Algorithms (Lee et al. 2024)"
    needs: ClassVar[tuple[str, ...]] = ("forget", "retain")
    budgets: ClassVar[dict[str, dict[str, list[Any]]]] = {
        "small": {},
        "paper": {},
        "large": {"factor": [3.0, 10.0, 30.0], "vectors": [7, 32, 128]},
    }

    vectors: Count = 7
    """Value vectors whose keys are scaled."""
    factor: Positive | None = None
    """By which a key becomes longer, > 0; null: 10, or 3 where the MLP is gated."""
    samples: Count = 1000
    """At most so many texts of a set, drawn with the seed."""

    def run(self, unlearned: Any, reference: Any, data: AttackData, budget: Budget) -> AttackResult:
        """The probe is the reference's where there is one, else the victim's; value vectors are the victim's.

        Raises ExpungeError for fewer than five texts of a set, too many vectors, an MLP that is not found, and weights that
        are quantized. about: the probe, and each neuron with its cosine.
        """
        self.check_loaded(unlearned, reference, data)
        meter = Meter(budget)
        model: Any = sharing_copy(unlearned, ()).eval()
        probed = model if reference is None else reference
        rows = [self._texts(data, part) for part in ("retain", "forget")]
        with frozen(model, probed):
            states = pooled_states(probed, [row for side in rows for row in side], "pre_norm", "mean")
            meter.queries += len(states) if probed is model else 0
            probe = fit_probe(states, [label for label, side in enumerate(rows) for _ in side], seed=self.seed)
            found = nearest_values(model, F.normalize(probe.weight, dim=0), self.vectors)
        if len(found) < self.vectors:
            raise ExpungeError(f"attack.unalign.vectors={self.vectors}: there are only {len(found)} to choose from")
        keys = {value.block: mlp_inputs(model, value.block) for value in found}
        factor = self.factor or (GATED if "gate" in keys[found[0].block] else PLAIN)
        about = {
            "factor": factor,
            "probe_of": "unlearned" if reference is None else "reference",
            "probe_auc": probe.auc,
            "values": [{"block": v.block, "neuron": v.neuron, "cosine": v.cosine} for v in found],
        }
        if factor == 1:
            return meter.result(model, about=about, idle="factor=1 leaves every key as it is")
        changed = {id(inputs["up"].layer.weight) for inputs in keys.values()}
        model = sharing_copy(model, [name for name, weight in model.named_parameters() if id(weight) in changed])
        with torch.no_grad():
            for value in found:
                mlp_inputs(model, value.block)["up"].vectors[value.neuron] *= factor
        return meter.result(model, about=about)

    def _texts(self, data: AttackData, part: Literal["forget", "retain"]) -> list[list[int]]:
        """Continuations alone, as texts of their own: prompts are often the same on both sides."""
        start = leading_tokens(data.tokenizer)
        return [start + continuation for _, continuation in data.drawn(part, self.samples, self.seed)]
