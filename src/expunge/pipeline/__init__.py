"""The stages of a run: train, measure the reference, measure the unlearned model, report. Each is skipped when done.

    from expunge import RunConfig, run
    run(RunConfig(model="builtin", method={"name": "repo"}), Path("runs/first"))

A stage leaves `OUT/stages/NAME.json` with a hash of its inputs; the same command goes on where it was cut off.
"""

from expunge.pipeline.job import run
from expunge.pipeline.measuring import measure
from expunge.pipeline.stages import MEASURED, check_one_process, claim, finish, is_main_process, origin_of, write_provenance
from expunge.pipeline.training import train

__all__ = [
    "MEASURED",
    "check_one_process",
    "claim",
    "finish",
    "is_main_process",
    "measure",
    "origin_of",
    "run",
    "train",
    "write_provenance",
]
