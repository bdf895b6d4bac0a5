"""What a stage follows from: hashes by name. Its key is the digest of them all; by their names a record says what changed.

    inputs = training_inputs(plan)
    digest(inputs)                                  # the key
    changes({**inputs, "data": "..."}, inputs)      # "the data that is trained on"

Hashes are of content, never of names.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from expunge import harness
from expunge.plan.plan import Plan
from expunge.plan.subject import Subject
from expunge.provenance import data_digest, digest, software

WHAT = {
    "model": "the model",
    "settings": "settings, which another version fills in otherwise",
    "data": "the data that is trained on",
    "probe": "the data of probes",
    "anchor": "training.anchor_text",
    "monitor": "what is measured in the midst of training",
    "monitor_scorer": "monitor.scorer",
}


def training_inputs(plan: Plan) -> dict[str, Any]:
    """Of the unlearned model; of the model that it starts from the hashes of its parts."""
    config, start, method = plan.config, plan.start, plan.method
    how = {**start.identity.loaded(start.loading), "model": None}
    fields = dataclasses.asdict(method)  # type: ignore[call-overload]
    settings = [how, config.method.get("name"), fields, config.training, config.lora, config.seed]
    inputs: dict[str, Any] = {"model": start.identity.parts, "data": data_digest(plan.training_data)}
    if plan.probe_data:
        inputs["probe"] = data_digest(plan.probe_data)
    if plan.anchor is not None:
        inputs["anchor"] = data_digest(plan.anchor)
    if plan.matched_text is not None:
        settings.append(config.monitor.tokens)
        inputs["monitor"] = data_digest(plan.matched_text)
    if plan.trains and plan.monitor_data:  # what is measured decides which checkpoint is best
        settings.append(plan.monitor_plan)
        inputs |= {"monitor": data_digest(plan.monitor_data), "monitor_scorer": plan.monitor_scorer.digest}
    return {**inputs, "settings": digest(settings)}


def evaluation_inputs(plan: Plan, subject: Subject) -> dict[str, Any]:
    """Of one model's evaluation."""
    return {
        **subject.identity.loaded(subject.loading),
        "software": software(),
        "data": data_digest(plan.evaluation_data),
        "plan": plan.evaluation_plan,
        "scorers": {scorer.name: scorer.digest for scorer in plan.scorers},
        "harness": harness.fingerprint(*plan.harness_tasks) if plan.config.evaluation.harness else None,
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In words, what of `now` is not what it was; "" where all is."""
    looked_at = {**before, **now} if "settings" in now else now  # of a run that is only read the model alone
    names = [name for name in looked_at if now.get(name) != before.get(name)]
    told = [WHAT.get(name, name) for name in names]
    if "model" in names:
        was, is_ = before.get("model") or {}, now.get("model") or {}
        parts = [part for part in {**was, **is_} if was.get(part) != is_.get(part)]
        told[names.index("model")] = f"the model's {' and '.join(parts)}"
    return ", ".join(told)
