"""A red team at work: all cases on all subjects, failures among them, and the tables of what came back."""

import dataclasses
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from expunge import pipeline
from expunge.attacks import Attack, AttackData, Budget
from expunge.attacks.base import PARTS
from expunge.config import RedTeamConfig
from expunge.errors import ExpungeError, is_out_of_memory
from expunge.metrics.evaluation import check_room
from expunge.metrics.figures import rows as figure_rows
from expunge.models import Description
from expunge.plan import Plan
from expunge.provenance import digest, peak_memory_bytes
from expunge.redteam.cases import Bench, Case, title
from expunge.redteam.data import attacked_plan, attackers_data, settings_of
from expunge.report import write_report
from expunge.report.attacks import NONE, summary, write_attacks
from expunge.rows import Row, write_rows

log = logging.getLogger("expunge")


def red_team(plan: Plan, before: Sequence[Row] = (), had: AttackData | None = None) -> list[Row]:
    """Attack the unlearned model, and its reference where there is one: attacks.jsonl, and attacks.* as tables.

    had: what an attacker has, worked out here if it is not given. Models are loaded where a case is missing, and released in
    the end. Returns the rows of results.jsonl: those of `before`, then the summary. Raises ExpungeError before any work
    where an attack lacks what it needs, and in the end where attacks failed; what the others gave is written then.
    """
    try:
        return _attacked(plan, before, had)
    finally:
        for subject in plan.subjects:
            subject.release()


def _attacked(plan: Plan, before: Sequence[Row], had: AttackData | None) -> list[Row]:
    config, folder, subjects = plan.config, plan.folder, plan.subjects
    team, attacks = settings_of(config)
    variants: dict[str, Sequence[Attack | None]] = {NONE: [None], **attacks}
    every = [(name, one) for name, several in variants.items() for one in several]
    budget = _budget(team)
    had = dataclasses.replace(had or attackers_data(plan, team), tokenizer=plan.unlearned.tokenizer)
    had = _with_room(plan, had, attacks, plan.unlearned.description)
    measured, how = plan.attacked_data, attacked_plan(plan)
    bench = Bench(folder, plan.reference, had, budget, measured, how, plan.scorers, plan.quiet)
    if not all(bench.has(name, one, subject) for (name, one), subject in itertools.product(every, subjects)):
        for subject in subjects:
            subject.loaded = merged(subject.model), subject.tokenizer
        _check(attacks, plan.unlearned.description, plan.reference.description if plan.reference else None, had)
    common = {"stage": "attack", "run": folder.name, "model": str(config.model), "seed": config.evaluation.seed}
    rows: list[Row] = []
    seconds, failed = 0.0, []
    for name, attack in every:
        found: dict[str, Case] = {}
        for subject in subjects:
            try:
                found[subject.name] = bench.case(name, attack, subject)
            except Exception as error:
                if not (isinstance(error, ExpungeError) or is_out_of_memory(error)):
                    raise
                reason = (str(error) or "out of memory").splitlines()[0]
                failed.append(f"{title(name, attack)} on {subject.name}: {reason}")
                log.warning("attack: failed: %s", failed[-1])
        seconds += sum(case.facts["with_evaluation"] for case in found.values())
        about = {**common, "attack": name, "draw": attack.seed if attack else None}
        rows += _rows(found, about, config.method.get("name"))
        write_rows(folder / "attacks.jsonl", rows)
    summarised = summary(rows, team.utility_bound)
    write_attacks(folder, summarised, team.utility_bound)
    results = [*before, *summarised]
    write_rows(folder / "results.jsonl", results)
    stage = {
        "weights_sha256": {subject.name: subject.identity.weights for subject in subjects},
        "data_sha256": {"measured": bench.about["measured"], "had": bench.given(PARTS)[1]},
        "seconds": round(seconds, 2),  # of all cases, also those that were there
        "peak_memory_bytes": peak_memory_bytes(),
    }
    pipeline.finish(folder, "attack", digest({**stage, "attacks": attacks}), stage)
    pipeline.write_provenance(folder, config, bench.scorers)
    if failed:
        raise ExpungeError(f"{len(failed)} attacks failed, first {failed[0]}; the same command tries them again")
    return results


def run_and_attack(plan: Plan) -> list[Row]:
    """`pipeline.run`, and then the red team where the configuration has one: its summary ends results.jsonl.

    The models that were measured stay in memory for it: it needs both of them at once.
    """
    with pipeline.dated(plan.folder):
        had = check_ahead(plan)
        rows = pipeline.run_plan(plan, keep=had is not None)
        if had is None:
            return rows
        with pipeline.claim(plan.folder, plan.config):
            try:
                return red_team(plan, rows, had)
            finally:
                write_report(plan.folder)


def check_ahead(plan: Plan) -> AttackData | None:
    """What an attacker will have; None without a red team.

    Raises an ExpungeError where the red team of a run could not begin, before there is a model to attack: all that attacks
    check is checked on the description of the model that the run starts from. Without a red team it is names and settings of
    attacks alone.
    """
    team, attacks = settings_of(plan.config)
    if plan.config.redteam is None:
        return None
    pipeline.check_one_process("attacks run in one process: train without `redteam`, and give the run to `expunge attack`")
    _budget(team)
    start, had = plan.start.description, attackers_data(plan, team)
    _check(attacks, start, start, _with_room(plan, had, attacks, start))
    return had


def _budget(team: RedTeamConfig) -> Budget:
    return Budget(team.steps, team.queries, team.seconds, team.utility_bound)


def _with_room(plan: Plan, had: AttackData, attacks: Mapping[str, Sequence[Attack]], victim: Description) -> AttackData:
    """`had` with how many tokens the victim's context leaves. Raises ExpungeError where an attack adds more to a prompt."""
    added = max((attack.adds for attack in itertools.chain(*attacks.values())), default=0)
    longer = dataclasses.replace(attacked_plan(plan), suffix=(0,) * added)
    room = added + check_room(plan.attacked_data, longer, had.tokenizer, victim.context, victim.known)
    return dataclasses.replace(had, room=room, known=victim.known)


def _check(
    attacks: Mapping[str, Sequence[Attack]], victim: Description, reference: Description | None, had: AttackData
) -> None:
    """Raise ExpungeError where an attack lacks what it needs."""
    for attack in itertools.chain(*attacks.values()):
        attack.check(victim, reference, had)


def merged(model: Any) -> Any:
    """With its adapter, if it has one, in its weights, in float32: attacks change the weights that the model computes with.

    Weights that bitsandbytes holds stay: attacks that change weights refuse them.
    """
    if not hasattr(model, "merge_and_unload") or getattr(model, "is_quantized", False):
        return model
    return model.float().merge_and_unload()


def _rows(found: Mapping[str, Case], common: Mapping[str, Any], method: str | None) -> list[Row]:
    """The figures of each subject under one attack; of the unlearned one also beside the reference's under the same."""
    rows: list[Row] = []
    for subject, case in found.items():
        facts = {key: case.facts[key] for key in ("idle", "steps", "queries", "seconds")}
        facts["loss"] = case.facts["about"].get("loss")
        about = {**common, "subject": subject, "attack_config": {**case.facts["setting"], "spent": facts}}
        if subject == "unlearned":
            reference = found["reference"].evaluation if "reference" in found else None
            rows += figure_rows(case.evaluation, reference=reference, method=method, **about)
        else:
            rows += figure_rows(case.evaluation, **about)
    return rows
