"""The whole job: everything that can be wrong is said first, then stage by stage."""

from pathlib import Path

from expunge.assembly import (
    build_method,
    build_training,
    check_model,
    evaluation_data,
    evaluation_plan,
    monitor_data,
    outline_of,
    resolve,
)
from expunge.config import RunConfig
from expunge.metrics.evaluation import check_room
from expunge.models import context_of, known_of
from expunge.pipeline.measuring import measure
from expunge.pipeline.stages import claim, dated, is_main_process
from expunge.pipeline.training import train_or_skip
from expunge.report import write_report
from expunge.rows import Row
from expunge.scorers import load_scorer


def run(config: RunConfig, folder: Path, quiet: bool = False) -> list[Row]:
    """The whole job into `folder`; returns the rows of `results.jsonl`. Safe to call again after an interruption.

    Under `accelerate launch` all processes train; the main one measures, the others return no rows.
    """
    with dated(folder):
        return _run(config, folder, quiet)


def _run(config: RunConfig, folder: Path, quiet: bool) -> list[Row]:
    config = resolve(config)
    build_method(config.method)  # complain before any work
    args = build_training(config.training, folder, config.seed)
    check_model(config)
    scorers = [load_scorer(name) for name in config.evaluation.scorers]
    outline, tokenizer = outline_of(config)
    data = evaluation_data(config.data, config.evaluation, tokenizer)
    check_room(data, evaluation_plan(config.evaluation), tokenizer, context_of(outline), known_of(outline))
    monitor_data(config, args, tokenizer)
    with claim(folder, config):
        publish = train_or_skip(config, folder, quiet)
        if not is_main_process():
            return []
        rows = measure(folder, config, folder / "model", config.model, data, scorers, quiet, config.revision)
        write_report(folder)
        publish()  # with its card
    return rows
