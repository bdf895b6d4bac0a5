"""The attack stage: every attack on the unlearned model and on its reference, each attacked model measured like any other.

    from expunge.redteam import red_team
    rows = red_team(Plan.of_models(config, Path("runs/attacks"), "runs/first/model", "builtin"))

A case is one attack with one setting and one draw on one subject. OUT/attacks/CASE keeps what it gave, so that the same call
goes on after the last whole one; cases on a reference are shared by runs. A rise that the untouched model shows too is no
recovery, so rows of the unlearned model are paired with those of the reference under the same attack.
"""

from expunge.redteam.data import attacked_plan, attackers_data, settings_of
from expunge.redteam.run import check_ahead, merged, red_team, run_and_attack

__all__ = [
    "attacked_plan",
    "attackers_data",
    "check_ahead",
    "merged",
    "red_team",
    "run_and_attack",
    "settings_of",
]
