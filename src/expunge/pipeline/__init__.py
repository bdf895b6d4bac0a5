"""The stages of a run: train, measure the reference, measure the unlearned model, report. Each is skipped when done.

    from expunge import RunConfig, run
    run(RunConfig(model="builtin", method={"name": "repo"}), Path("runs/first"))

A stage leaves `OUT/stages/NAME.json` with hashes of its inputs; the same command goes on where it was cut off. Hashes are of
content, never of names, and are compared when a record is read again: what is finished is never made anew over it.
"""

from expunge.pipeline.job import run, run_plan
from expunge.pipeline.measuring import measure
from expunge.pipeline.origin import check_run, origin_of, settings_of_run
from expunge.pipeline.stages import (
    MEASURED,
    check_one_process,
    claim,
    dated,
    finish,
    is_main_process,
    keep_date,
    write_provenance,
)
from expunge.pipeline.training import train

__all__ = [
    "MEASURED",
    "check_one_process",
    "check_run",
    "claim",
    "dated",
    "finish",
    "is_main_process",
    "keep_date",
    "measure",
    "origin_of",
    "run",
    "run_plan",
    "settings_of_run",
    "train",
    "write_provenance",
]
