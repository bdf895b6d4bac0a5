"""A red team at work: all cases on all subjects, failures among them, and the tables of what came back."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from expunge import assembly, pipeline
from expunge.attacks import Attack, Budget
from expunge.attacks.base import PARTS
from expunge.config import RedTeamConfig, RunConfig
from expunge.errors import ExpungeError, is_out_of_memory
from expunge.metrics.evaluation import check_room
from expunge.metrics.figures import rows as figure_rows
from expunge.models import context_length, identity_of, inner_model, known_of, load_model
from expunge.provenance import digest, peak_memory_bytes
from expunge.redteam.cases import Bench, Case, Subject, title
from expunge.redteam.data import attackers_data, measured_data, measured_plan, settings_of
from expunge.report import write_report
from expunge.report.attacks import NONE, summary, write_attacks
from expunge.rows import Row, write_rows
from expunge.scorers import load_scorer

log = logging.getLogger("expunge")


def red_team(
    config: RunConfig,
    folder: Path,
    model: str | Path,
    reference: str | Path | None,
    quiet: bool = False,
    reference_revision: str | None = None,
    before: Sequence[Row] = (),
) -> list[Row]:
    """Attack `model`, and `reference` where there is one, into `folder`: attacks.jsonl, and attacks.* as tables.

    config: resolved, or with an empty `method` where that is not known. Returns the rows of results.jsonl: those of
    `before`, then the summary. Raises ExpungeError before any work where an attack lacks what it needs, and in the end where
    attacks failed; what the others gave is written then.
    """
    team, attacks = settings_of(config)
    unlearned, tokenizer = _subject("unlearned", config, model, config.revision)
    subjects = [unlearned]
    if reference is not None:
        subjects.insert(0, _subject("reference", config, reference, reference_revision)[0])
    every = [one for several in attacks.values() for one in several]
    bench = _bench(config, team, folder, subjects, tokenizer, every, quiet)
    common = {"stage": "attack", "run": folder.name, "model": str(config.model), "seed": config.evaluation.seed}
    rows: list[Row] = []
    seconds, failed = 0.0, []
    variants: dict[str, Sequence[Attack | None]] = {NONE: [None], **attacks}
    for name, attack in ((name, one) for name, several in variants.items() for one in several):
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
        "weights_sha256": {subject.name: subject.weights for subject in subjects},
        "data_sha256": {"measured": bench.about["measured"], "had": bench.given(PARTS)[1]},
        "seconds": round(seconds, 2),  # of all cases, also those that were there
        "peak_memory_bytes": peak_memory_bytes(),
    }
    pipeline.finish(folder, "attack", digest({**stage, "attacks": attacks}), stage)
    pipeline.write_provenance(folder, config, bench.scorers)
    if failed:
        raise ExpungeError(f"{len(failed)} attacks failed, first {failed[0]}; the same command tries them again")
    return results


def run_and_attack(config: RunConfig, folder: Path, quiet: bool = False) -> list[Row]:
    """`pipeline.run`, and then the red team where the configuration has one: its summary ends results.jsonl."""
    check_ahead(config)
    rows = pipeline.run(config, folder, quiet)
    if config.redteam is None:
        return rows
    config = assembly.resolve(config)
    with pipeline.claim(folder, config):
        try:
            return red_team(config, folder, folder / "model", config.model, quiet, config.revision, rows)
        finally:
            write_report(folder)


def check_ahead(config: RunConfig) -> None:
    """Raise an ExpungeError where the red team of a run could not begin, before there is a model to attack.

    All that attacks check is checked, on what is known of the model: its configuration, and whether it is quantized.
    Without a red team it is names and settings of attacks alone.
    """
    team, attacks = settings_of(config)
    if config.redteam is None:
        return
    pipeline.check_one_process("attacks run in one process: train without `redteam`, and give the run to `expunge attack`")
    config = assembly.resolve(config)
    outline, tokenizer = assembly.outline_of(config)
    quantized = bool(config.quantization or getattr(outline, "quantization_config", None))
    model = SimpleNamespace(config=outline, is_quantized=quantized)
    subjects = [Subject(name, model, "", shared=False) for name in ("reference", "unlearned")]
    _bench(config, team, Path(), subjects, tokenizer, [one for several in attacks.values() for one in several], quiet=True)


def merged(model: Any) -> Any:
    """With its adapter, if it has one, in its weights, in float32: attacks change the weights that the model computes with.

    Weights that bitsandbytes holds stay: attacks that change weights refuse them.
    """
    if not hasattr(model, "merge_and_unload") or getattr(model, "is_quantized", False):
        return model
    return model.float().merge_and_unload()


def _subject(name: str, config: RunConfig, model: str | Path, revision: str | None) -> tuple[Subject, Any]:
    """A model to attack, and its tokenizer. A reference's cases are shared."""
    found, how = identity_of(model, revision), assembly.loading(config)
    loaded, tokenizer = load_model(model, revision=revision, **how)
    key = digest(found.loaded(how))
    return Subject(name, merged(loaded), key, name == "reference", found.weights), tokenizer


def _bench(
    config: RunConfig,
    team: RedTeamConfig,
    folder: Path,
    subjects: Sequence[Subject],
    tokenizer: Any,
    attacks: Sequence[Attack],
    quiet: bool,
) -> Bench:
    """Raises ExpungeError where an attack lacks what it needs, or adds more to a prompt than the context has room for."""
    unlearned, original = subjects[-1], subjects[0] if len(subjects) > 1 else None
    scorers = [load_scorer(name) for name in config.evaluation.scorers]
    measured, plan = measured_data(config, tokenizer), measured_plan(config)
    added = max((attack.adds for attack in attacks), default=0)
    longer = dataclasses.replace(plan, suffix=(0,) * added)
    known = known_of(inner_model(unlearned.model).config)
    room = added + check_room(measured, longer, tokenizer, context_length(unlearned.model), known)
    had = dataclasses.replace(attackers_data(config, team, tokenizer, scorers[0], measured), room=room, known=known)
    for attack in attacks:
        attack.check(unlearned.model, original.model if original else None, had)
    budget = Budget(team.steps, team.queries, team.seconds, team.utility_bound)
    return Bench(folder, original, had, budget, measured, plan, scorers, quiet)


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
