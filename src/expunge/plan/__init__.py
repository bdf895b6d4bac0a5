"""A configuration, and the `Plan` made of it once: what every stage of a run takes instead of working it out anew.

    plan = Plan.of(RunConfig(model="builtin", method={"name": "repo"}), Path("runs/first"))
    plan.method, plan.args, plan.tokenizer, plan.training_data, plan.scorers

Nothing here trains, measures or writes. What does not go together raises ExpungeError, one line.
"""

from expunge.plan.explained import explained
from expunge.plan.keys import changes, evaluation_inputs, training_inputs
from expunge.plan.plan import Plan
from expunge.plan.settings import ANCHOR, build_method, build_training, loading, one_kind, resolve, texts_of
from expunge.plan.subject import Subject

__all__ = [
    "ANCHOR",
    "Plan",
    "Subject",
    "build_method",
    "build_training",
    "changes",
    "evaluation_inputs",
    "explained",
    "loading",
    "one_kind",
    "resolve",
    "texts_of",
    "training_inputs",
]
