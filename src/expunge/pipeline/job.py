"""The whole job: everything that can be wrong is said first, then stage by stage."""

from pathlib import Path

from expunge.config import RunConfig
from expunge.pipeline.measuring import measure
from expunge.pipeline.stages import claim, dated, is_main_process
from expunge.pipeline.training import train_or_skip
from expunge.plan import Plan
from expunge.report import write_report
from expunge.rows import Row


def run(config: RunConfig, folder: Path, quiet: bool = False) -> list[Row]:
    """The whole job into `folder`; returns the rows of `results.jsonl`. Safe to call again after an interruption.

    Under `accelerate launch` all processes train; the main one measures, the others return no rows.
    """
    return run_plan(Plan.of(config, folder, quiet))


def run_plan(plan: Plan, keep: bool = False) -> list[Row]:
    """`run` of a configuration whose plan is made. keep: the models that were measured stay in memory (`measure`)."""
    with dated(plan.folder):
        plan.check()
        with claim(plan.folder, plan.config):
            publish = train_or_skip(plan)
            if not is_main_process():
                return []
            rows = measure(plan, keep)
            write_report(plan.folder)
            publish()  # with its card
    return rows
