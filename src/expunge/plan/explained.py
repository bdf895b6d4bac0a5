"""Where the settings of a run come from: what `--dry-run` prints beside them.

fields, defaults = explained(plan)
"""

import dataclasses
from typing import Any

from expunge.plan.plan import Plan
from expunge.plan.settings import ANCHOR, tuned_values


def explained(plan: Plan) -> tuple[dict[str, Any], dict[str, str]]:
    """Every field of the method as it is in this model; and of what was left open what it is, whether that is the paper's,
    scaled to the depth, or ours, and why. Raises ExpungeError for blocks that are not there."""
    depth, asked = plan.start.description.depth, plan.asked
    fields = dataclasses.asdict(plan.method.placed(depth))  # type: ignore[call-overload]
    defaults: dict[str, str] = {}
    if plan.config.training.get("anchor_text") == ANCHOR:
        defaults["training.anchor_text"] = f"{ANCHOR} (ours: neutral text under the KL)"
    given = {"method": asked.method, "training": asked.training}
    for section, values in tuned_values(asked).items():
        left = {name: value for name, value in values.items() if name not in given[section]}
        defaults |= {f"{section}.{name}": f"{value} (ours: tuned for the built-in model)" for name, value in left.items()}
    for name, default in plan.method.left_open(depth).items():
        defaults[f"method.{name}"] = f"{default.value} ({default.source}: {default.why})"
    return {"name": plan.config.method["name"], **fields}, defaults
