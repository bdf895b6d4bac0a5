"""Attacks: whatever might bring back what a model was made to forget. One file each.

from expunge.attacks import Budget, AttackData, cases
[attack] = cases("orthogonalize", "small")
result = attack.run(unlearned, reference, AttackData(tokenizer, forget=texts), Budget())
"""

from expunge.attacks.base import ATTACKS, Attack, AttackData, AttackResult, Budget, Meter, attack, cases

__all__ = ["ATTACKS", "Attack", "AttackData", "AttackResult", "Budget", "Meter", "attack", "cases"]
