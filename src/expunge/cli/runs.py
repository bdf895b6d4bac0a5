"""Commands that make or measure a run: `run`, `train`, `doctor`, `evaluate`, `report`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.cli.options import (
    LOADING,
    PROMPTS,
    Budget,
    ConfigFile,
    DryRun,
    ForgetName,
    Json,
    MethodName,
    ModelName,
    Out,
    Overrides,
    PairsName,
    Quiet,
    RetainName,
    expanded,
    loads_a_model,
    read_settings,
)
from expunge.cli.printing import hush, json_line, print_paths, print_table, print_tree


@loads_a_model
def run(
    overrides: Overrides = None,
    config: ConfigFile = None,
    model: ModelName = None,
    method: MethodName = None,
    pairs: PairsName = None,
    forget: ForgetName = None,
    retain: RetainName = None,
    budget: Budget = "quick",
    output: Out = Path("runs/repo"),
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: Json = False,
    *,
    loading: dict[str, Any],
) -> None:
    """Detoxify a model, measure it against the original, and write the report."""
    from expunge import pipeline
    from expunge.redteam import check_ahead, run_and_attack

    hush()
    settings = read_settings(overrides, config, model, method, pairs, budget, loading, forget, retain)
    if dry_run:
        check_ahead(settings)
        _print_plan(settings, output, as_json)
        return
    run_and_attack(settings, output, quiet)
    if pipeline.is_main_process():
        _print_headline(output, as_json)


@loads_a_model
def train(
    overrides: Overrides = None,
    config: ConfigFile = None,
    model: ModelName = None,
    method: MethodName = None,
    pairs: PairsName = None,
    forget: ForgetName = None,
    retain: RetainName = None,
    budget: Budget = "full",
    output: Out = Path("runs/repo"),
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: Json = False,
    *,
    loading: dict[str, Any],
) -> None:
    """Train only: the edited model is left in OUT/model."""
    from expunge import assembly, pipeline

    hush()
    settings = read_settings(overrides, config, model, method, pairs, budget, loading, forget, retain)
    if dry_run:
        _print_plan(settings, output, as_json)
        return
    settings = assembly.resolve(settings)
    assembly.build_method(settings.method)
    args = assembly.build_training(settings.training, output, settings.seed)
    assembly.check_model(settings)
    assembly.monitor_data(settings, args, assembly.outline_of(settings)[1])
    with pipeline.claim(output, settings):
        pipeline.train(settings, output, quiet)
    if pipeline.is_main_process():
        print_paths({"model": output / "model"}, as_json)


@loads_a_model
def doctor(
    overrides: Overrides = None,
    config: ConfigFile = None,
    model: ModelName = None,
    method: MethodName = None,
    pairs: PairsName = None,
    forget: ForgetName = None,
    retain: RetainName = None,
    budget: Budget = "quick",
    quiet: Quiet = False,
    as_json: Json = False,
    *,
    loading: dict[str, Any],
) -> None:
    """Say what this machine offers, and estimate memory and time of a run without loading the model."""
    from expunge.machine import machine

    settings = read_settings(overrides, config, model, method, pairs, budget, loading, forget, retain)
    found: dict[str, Any] = {"machine": machine()}
    if not as_json:
        print_tree(found, as_json)  # at once: torch takes seconds to import
    from expunge.doctor import device, reports

    hush()
    how = {name: value for name in ("model", *LOADING, "lora") if (value := getattr(settings, name))}
    rest = {"device": device(), "reports": reports(), "run": {**how, **_figures(settings)}}
    print_tree({**found, **rest} if as_json else rest, as_json)


@loads_a_model
def evaluate(
    model: Annotated[str, typer.Argument(callback=expanded, help="builtin, a hub name, a model folder, or a run folder.")],
    overrides: Overrides = None,
    reference: Annotated[str | None, typer.Option(callback=expanded, help="The model to compare with.")] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(help="Prompts: a named set or a file; repeat for several.", autocompletion=PROMPTS),
    ] = None,
    config: ConfigFile = None,
    budget: Budget = "quick",
    output: Out = Path("runs/evaluation"),
    quiet: Quiet = False,
    as_json: Json = False,
    *,
    loading: dict[str, Any],
) -> None:
    """Measure any model, against a reference where one is given."""
    import json

    from expunge import assembly, pipeline
    from expunge.report import write_report
    from expunge.scorers import load_scorer

    hush()
    if not pipeline.is_main_process():
        return
    origin = pipeline.origin_of(Path(model), reference)
    name = str(Path(model) / "model") if origin else model
    told = [*(overrides or []), *([f"data.prompts={json.dumps(prompts)}"] if prompts else [])]
    settings = read_settings(told, config, name, None, None, budget, origin.get("loading", {}) | loading)
    settings.method = origin.get("method", {})
    revision = settings.revision if origin and not reference else None  # another reference has its own
    reference = reference or origin.get("model")
    with pipeline.dated(output, like=Path(model)):
        data = assembly.evaluation_data(settings.data, settings.evaluation, assembly.outline_of(settings)[1])
        scorers = [load_scorer(name) for name in settings.evaluation.scorers]
        with pipeline.claim(output, settings, evaluate={"reference": reference}):
            pipeline.measure(output, settings, settings.model, reference, data, scorers, quiet, revision)
            write_report(output)
    _print_headline(output, as_json)


def report(
    folder: Annotated[Path, typer.Argument(callback=expanded, help="A run's folder.")], as_json: Json = False
) -> None:
    """Write OUT/report.html again from a run's files."""
    from expunge.report import write_report

    print_paths({"report": write_report(folder)}, as_json)


def _print_plan(settings: Any, folder: Path, as_json: bool) -> None:
    import dataclasses

    from expunge import assembly

    outline, tokenizer = assembly.outline_of(settings)
    method, defaults = assembly.explained(settings, outline)
    settings = assembly.resolve(settings)
    plan = dataclasses.asdict(settings) | {"method": method}
    if defaults:
        plan["defaults"] = defaults
    args = assembly.build_training(settings.training, folder / "checkpoints", settings.seed)
    shown = (
        "learning_rate",
        "heads_learning_rate",
        "weight_decay",
        "warmup_steps",
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "lr_scheduler_type",
        "bf16",
        "save_steps",
    )
    values = {key: getattr(args, key) for key in shown}
    plan["training"] = {key: getattr(value, "value", value) for key, value in values.items()} | settings.training
    data = assembly.training_data(settings, tokenizer, args)
    paired = isinstance(data, list)
    plan |= {"pairs": len(data)} if paired else {"texts": {"forget": len(data.forget), "retain": len(data.retain)}}
    plan["steps"] = 0 if assembly.build_method(settings.method).applied else assembly.steps_of(args, len(data))
    plan["out"] = str(folder)
    plan["estimate"] = _figures(settings, data)
    print_tree(plan, as_json)


def _figures(settings: Any, data: Any = None) -> dict[str, Any]:
    from expunge.doctor import advice, forecast
    from expunge.estimate import CannotEstimate

    try:
        made = forecast(settings, data)
    except CannotEstimate as error:
        return {"unavailable": str(error)}
    memory = {name: round(size / 1e9, 2) for name, size in {"process": made.process, **made.memory}.items()}
    return {
        "truncation": made.truncation,
        "parameters": made.parameters,
        "trained": made.trained,
        **({"trains": made.trains} if made.trains else {}),
        "memory_gb": memory,
        "peak_gb": round(made.peak / 1e9, 2),
        "step_tflop": float(f"{made.operations / 1e12:.3g}"),
        "minutes": None if made.seconds is None else float(f"{made.seconds / 60:.2g}"),
        "verdict": advice(made, settings),
    }


def _print_headline(folder: Path, as_json: bool) -> None:
    from expunge.report.tables import headline, to_records
    from expunge.rows import read_rows

    rows = read_rows(folder / "results.jsonl")
    if as_json:
        json_line({"report": str(folder / "report.html"), "figures": to_records(rows)})
        return
    print_table(headline({folder.name: rows}), "reference against unlearned")
    print_paths({"report": folder / "report.html"}, as_json)
