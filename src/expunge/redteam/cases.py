"""Cases: one attack with one setting and one draw on one subject, run and measured once, and found again."""

import dataclasses
import functools
import json
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expunge.attacks import Attack, AttackData, AttackResult, Budget
from expunge.config import cache_folder
from expunge.metrics.evaluation import EvaluationData, EvaluationPlan, evaluate_model
from expunge.metrics.figures import Evaluation
from expunge.models import identity_of, tokenizer_digest
from expunge.plan import Subject
from expunge.provenance import data_digest, digest, software
from expunge.report.attacks import NONE
from expunge.scorers import Scorer
from expunge.whole import whole, write_text

log = logging.getLogger("expunge")


@dataclass(frozen=True)
class Case:
    """What an attack left: its evaluation, and `facts` about it, in JSON's types."""

    evaluation: Evaluation
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Bench:
    """What every case has in common: the model before unlearning, what an attacker has, and how a model is measured.

    A case of the reference lies where all runs find it.
    """

    folder: Path
    original: Subject | None
    had: AttackData
    budget: Budget
    measured: EvaluationData
    plan: EvaluationPlan
    scorers: Sequence[Scorer]
    quiet: bool
    _given: dict[frozenset[str], tuple[AttackData, str]] = field(default_factory=dict)

    def has(self, name: str, attack: Attack | None, subject: Subject) -> bool:
        """Is the case there, whole?"""
        return _is_whole(self._place(name, attack, subject))

    def case(self, name: str, attack: Attack | None, subject: Subject) -> Case:
        """The case, made where it is not there yet. Raises what the attack or its evaluation raises."""
        place = self._place(name, attack, subject)
        if not _is_whole(place):
            log.info("attack: %s on %s", title(name, attack), subject.name)
            started = time.monotonic()
            result, evaluation = self._made(attack, subject)
            if not _is_whole(place):  # another run may have been faster, and be reading it
                facts = _facts(name, attack, subject.name, result)
                _keep(place, evaluation, {**facts, "with_evaluation": round(time.monotonic() - started, 2)})
        return Case(Evaluation.load(place), json.loads((place / "case.json").read_text(encoding="utf-8")))

    def _made(self, attack: Attack | None, subject: Subject) -> tuple[AttackResult, Evaluation]:
        if attack is None:
            result = AttackResult(subject.model)
        else:
            original = self.original.model if self.original else None
            result = attack.run(subject.model, original, self.given(attack.needs)[0], self.budget)
        plan = dataclasses.replace(self.plan, **result.plan)
        if attack and result.idle and plan == self.plan:
            return result, self.case(NONE, None, subject).evaluation
        evaluation = evaluate_model(
            result.model, self.had.tokenizer, self.measured, plan, self.scorers, progress=not self.quiet
        )
        return result, evaluation

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """How any model is measured, and by what; text is cut by the victim's tokenizer, also for the reference."""
        return {
            "software": software(),
            "tokenizer": tokenizer_digest(self.had.tokenizer),
            "measured": data_digest(self.measured),
            "plan": self.plan,
            "scorers": [(scorer.name, scorer.digest) for scorer in self.scorers],  # in order: the first is the judge
        }

    def given(self, needs: Collection[str]) -> tuple[AttackData, str]:
        """What an attack needs and no more, so that what it does not see makes no case another; and a hash of it."""
        if (key := frozenset(needs)) not in self._given:
            part = self.had.only(key)
            unseen = ("tokenizer", "score", "plan", "room")  # `about` knows these; room follows from it and the subject
            seen = [field.name for field in dataclasses.fields(part) if field.name not in unseen]
            self._given[key] = part, digest({name: data_digest(getattr(part, name)) for name in seen})
        return self._given[key]

    def _place(self, name: str, attack: Attack | None, subject: Subject) -> Path:
        how = {**self.about, "subject": subject.key}
        if attack:
            means = {"reference": self.original.key if self.original else None, "budget": self.budget}
            how |= {"attack": _content(attack), "had": self.given(attack.needs)[1], **means}
        base = cache_folder("attacks") if subject.name == "reference" else self.folder / "attacks"
        return base / f"{subject.name}-{name}-{digest(how)[:16]}"


def title(name: str, attack: Attack | None) -> str:
    if attack is None:
        return name
    told = [f"{key}={value}" for key, value in _setting(attack).items()]
    return f"{name} ({', '.join([*told, f'draw {attack.seed}'])})"


def _content(attack: Attack) -> dict[str, Any]:
    """Its name and fields, a model by what it is."""
    named = {field: identity_of(name).key for field in attack.models if (name := getattr(attack, field))}
    return {"name": attack.name, **_setting(attack), "seed": attack.seed, **named}


def _setting(attack: Attack) -> dict[str, Any]:
    """Its fields, the seed aside."""
    return {key: value for key, value in dataclasses.asdict(attack).items() if key != "seed"}  # type: ignore[call-overload]


def _facts(name: str, attack: Attack | None, subject: str, result: AttackResult) -> dict[str, Any]:
    spent = ("idle", "about", "steps", "queries", "seconds", "peak_memory_bytes")
    found = {key: getattr(result, key) for key in spent}
    setting = _setting(attack) if attack else {}
    return {"attack": name, "subject": subject, "setting": setting, **found, "trace": list(result.trace)}


def _keep(place: Path, evaluation: Evaluation, facts: Mapping[str, Any]) -> None:
    """The whole case or nothing."""
    with whole(place) as temporary:
        evaluation.save(temporary)
        write_text(temporary / "case.json", json.dumps(facts, default=float))


def _is_whole(place: Path) -> bool:
    """Of a sweep's cell that is done no more than `case.json` is left (`Store.lighten`)."""
    return (place / "figures.jsonl").is_file()
