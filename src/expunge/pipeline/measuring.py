"""The stages that measure the reference and the unlearned model."""

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from expunge import harness
from expunge.assembly import evaluation_plan, loading
from expunge.config import EvaluationConfig, RunConfig, cache_folder
from expunge.metrics.evaluation import EvaluationData, EvaluationPlan, evaluate_model
from expunge.metrics.figures import Evaluation
from expunge.metrics.figures import rows as figure_rows
from expunge.metrics.s_unlearning import s_rows
from expunge.models import Identity, identity_of, load_model
from expunge.pipeline.origin import record_of
from expunge.pipeline.stages import finish, is_done, write_provenance
from expunge.provenance import data_digest, digest, peak_memory_bytes, software
from expunge.rows import Row, write_lines, write_rows
from expunge.scorers import Scorer

log = logging.getLogger("expunge")


def measure(
    folder: Path,
    config: RunConfig,
    model: str | Path,
    reference: str | Path | None,
    data: EvaluationData,
    scorers: Sequence[Scorer],
    quiet: bool = False,
    reference_revision: str | None = None,
) -> list[Row]:
    """Measure `model` and its `reference` into `folder`: results.jsonl, samples.jsonl, provenance.json.

    Both are loaded as `config` says, `model` at its revision.
    """
    plan = evaluation_plan(config.evaluation)
    subjects = {"reference": reference, "unlearned": model} if reference else {"unlearned": model}
    found: dict[str, Evaluation] = {}
    for subject, name in subjects.items():
        revision = reference_revision if subject == "reference" else config.revision
        found[subject] = _evaluate(folder, subject, name, plan, data, scorers, config, quiet, revision)
    common = {"stage": "evaluate", "run": folder.name, "seed": config.evaluation.seed}
    rows: list[Row] = []
    makers: list[Callable[..., list[Row]]] = [figure_rows]
    if sets := config.evaluation.s_unlearning:
        makers.append(partial(s_rows, utility=sets.utility, forget=sets.forget))
    for make in makers:
        if reference:
            rows += make(found["reference"], subject="reference", model=str(reference), **common)
        rows += make(
            found["unlearned"],
            reference=found.get("reference"),
            subject="unlearned",
            model=str(config.model),
            method=config.method.get("name") if reference else None,
            **common,
        )
    write_lines(
        folder / "samples.jsonl",
        ({"subject": subject, **sample} for subject in subjects for sample in found[subject].samples),
    )
    write_rows(folder / "results.jsonl", rows)
    write_provenance(folder, config, scorers)
    return rows


def _evaluate(
    folder: Path,
    subject: str,
    name: str | Path,
    plan: EvaluationPlan,
    data: EvaluationData,
    scorers: Sequence[Scorer],
    config: RunConfig,
    quiet: bool,
    revision: str | None,
) -> Evaluation:
    """One subject's evaluation, kept under what it follows from: model, loading, text, plan and scorers."""
    asked, found = config.evaluation, identity_of(name, revision)
    inputs = evaluation_inputs(config, found, data, plan, scorers)
    key, stage = digest(inputs), f"evaluate-{subject}"
    # one folder for each key: measured again of something else, it takes nothing's place
    cache = cache_folder("evaluations") / key if subject == "reference" else folder / "stages" / f"{stage}-{key[:16]}"
    done, started = is_done(folder, stage, key) and cache.exists(), time.monotonic()
    if not cache.exists():
        model, tokenizer = load_model(name, revision=revision, **loading(config))
        parts = folder / "stages" / f"{stage}-{key[:16]}.parts"  # of this run: another may measure the same
        measured = evaluate_model(model, tokenizer, data, plan, scorers, progress=not quiet, parts=parts)
        if asked.harness:
            measured.figures += harness.run_harness(model, tokenizer, *_tasks(asked), progress=not quiet)
        if not cache.exists():  # another run may have been faster, and be reading it
            measured.save(cache)
        shutil.rmtree(parts, ignore_errors=True)
    evaluation = Evaluation.load(cache)
    if not done:
        if changed := found.changed(record_of(folder, stage).get("model", found.parts)):
            log.warning("evaluate: %s %s: %s changed since it was last measured here", subject, name, " and ".join(changed))
        facts = {
            "weights_sha256": found.weights,
            "model": found.parts,
            "data_sha256": inputs["data"],
            "scorers": inputs["scorers"],
            **({"lm_eval": harness.harness_version()} if asked.harness else {}),
            **evaluation.counts(),
            "seconds": round(time.monotonic() - started, 1),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        finish(folder, f"evaluate-{subject}", key, facts)
    return evaluation


def evaluation_inputs(
    config: RunConfig, found: Identity, data: EvaluationData, plan: EvaluationPlan, scorers: Sequence[Scorer]
) -> dict[str, Any]:
    """All that an evaluation follows from, as hashes of content."""
    return {
        **found.loaded(loading(config)),
        "software": software(),
        "data": data_digest(data),
        "plan": plan,
        "scorers": {scorer.name: scorer.digest for scorer in scorers},
        "harness": harness.fingerprint(*_tasks(config.evaluation)) if config.evaluation.harness else None,
    }


def _tasks(asked: EvaluationConfig) -> tuple[list[str], int | None, int, int]:
    """Arguments of the harness."""
    return asked.harness, asked.questions, asked.shots, asked.seed
