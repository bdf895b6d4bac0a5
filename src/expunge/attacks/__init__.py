"""Attacks: whatever might bring back what a model was made to forget. One file each.

from expunge.attacks import ATTACKS, AttackData, Budget
attack = ATTACKS.get("orthogonalize")(form="shift")
result = attack.run(unlearned, reference, AttackData(tokenizer, forget=texts), Budget())
"""

from expunge.attacks.base import ATTACKS, Attack, AttackData, AttackResult, Budget, Meter, attack, cases

__all__ = ["ATTACKS", "Attack", "AttackData", "AttackResult", "Budget", "Meter", "attack", "cases"]
