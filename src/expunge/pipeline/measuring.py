"""The stages that measure the reference and the unlearned model."""

import logging
import shutil
import time
from collections.abc import Callable
from functools import partial

from expunge import harness
from expunge.config import cache_folder
from expunge.metrics.evaluation import evaluate_model
from expunge.metrics.figures import Evaluation
from expunge.metrics.figures import rows as figure_rows
from expunge.metrics.s_unlearning import s_rows
from expunge.pipeline.origin import record_of
from expunge.pipeline.stages import finish, is_done, write_provenance
from expunge.plan import Plan, Subject, evaluation_inputs
from expunge.provenance import digest, peak_memory_bytes
from expunge.rows import Row, write_lines, write_rows

log = logging.getLogger("expunge")


def measure(plan: Plan, keep: bool = False) -> list[Row]:
    """Measure the unlearned model and its reference into the plan's folder: results.jsonl, samples.jsonl, provenance.json.

    keep: a model that had to be loaded stays in memory for the stage that comes next.
    """
    config, folder, reference = plan.config, plan.folder, plan.reference
    found = {subject.name: _evaluate(plan, subject, keep) for subject in plan.subjects}
    common = {"stage": "evaluate", "run": folder.name, "seed": config.evaluation.seed}
    rows: list[Row] = []
    makers: list[Callable[..., list[Row]]] = [figure_rows]
    if sets := config.evaluation.s_unlearning:
        makers.append(partial(s_rows, utility=sets.utility, forget=sets.forget))
    for make in makers:
        if reference:
            rows += make(found["reference"], subject="reference", model=str(reference.source), **common)
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
        ({"subject": subject, **sample} for subject, evaluation in found.items() for sample in evaluation.samples),
    )
    write_rows(folder / "results.jsonl", rows)
    write_provenance(folder, config, plan.scorers)
    return rows


def _evaluate(plan: Plan, subject: Subject, keep: bool) -> Evaluation:
    """One subject's evaluation, kept under what it follows from: model, loading, text, plan and scorers."""
    asked, folder, found = plan.config.evaluation, plan.folder, subject.identity
    inputs = evaluation_inputs(plan, subject)
    key, stage = digest(inputs), f"evaluate-{subject.name}"
    # one folder for each key: measured again of something else, it takes nothing's place
    cache = cache_folder("evaluations") / key if subject.name == "reference" else folder / "stages" / f"{stage}-{key[:16]}"
    done, started = is_done(folder, stage, key) and cache.exists(), time.monotonic()
    if not cache.exists():
        model, tokenizer = subject.loaded
        parts = folder / "stages" / f"{stage}-{key[:16]}.parts"  # of this run: another may measure the same
        shown = not plan.quiet
        measured = evaluate_model(
            model, tokenizer, plan.evaluation_data, plan.evaluation_plan, plan.scorers, progress=shown, parts=parts
        )
        if asked.harness:
            measured.figures += harness.run_harness(model, tokenizer, *plan.harness_tasks, progress=shown)
        if not cache.exists():  # another run may have been faster, and be reading it
            measured.save(cache)
        shutil.rmtree(parts, ignore_errors=True)
        del model
        if not keep:
            subject.release()
    evaluation = Evaluation.load(cache)
    if not done:
        if changed := found.changed(record_of(folder, stage).get("model", found.parts)):
            names = " and ".join(changed)
            log.warning("evaluate: %s %s: %s changed since it was last measured here", subject.name, subject.source, names)
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
        finish(folder, stage, key, facts)
    return evaluation
