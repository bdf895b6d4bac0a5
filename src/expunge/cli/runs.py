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
    from expunge.plan import Plan
    from expunge.redteam import check_ahead, run_and_attack

    hush()
    plan = Plan.of(read_settings(overrides, config, model, method, pairs, budget, loading, forget, retain), output, quiet)
    if dry_run:
        with pipeline.dated(output):
            check_ahead(plan)
            _print_plan(plan, as_json)
        return
    run_and_attack(plan)
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
    from expunge import pipeline
    from expunge.plan import Plan

    hush()
    plan = Plan.of(read_settings(overrides, config, model, method, pairs, budget, loading, forget, retain), output, quiet)
    with pipeline.dated(output):
        if dry_run:
            _print_plan(plan, as_json)
            return
        plan.check_settings()
        _ = plan.tokenizer, plan.monitor_data
        with pipeline.claim(output, plan.config):
            pipeline.train(plan)
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
    from expunge.plan import Plan

    hush()
    how = {name: value for name in ("model", *LOADING, "lora") if (value := getattr(settings, name))}
    rest = {"device": device(), "reports": reports(), "run": {**how, **_figures(Plan.of(settings, Path("runs/repo")))}}
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

    from expunge import pipeline
    from expunge.plan import Plan
    from expunge.report import write_report

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
    plan = Plan.of_models(settings, output, settings.model, reference, revision, quiet)
    with pipeline.dated(output, like=Path(model)):
        _ = plan.tokenizer, plan.evaluation_data, plan.scorers
        with pipeline.claim(output, settings, evaluate={"reference": reference}):
            pipeline.measure(plan)
            write_report(output)
    _print_headline(output, as_json)


def report(
    folder: Annotated[Path, typer.Argument(callback=expanded, help="A run's folder.")], as_json: Json = False
) -> None:
    """Write OUT/report.html again from a run's files."""
    from expunge.report import write_report

    print_paths({"report": write_report(folder)}, as_json)


def _print_plan(plan: Any, as_json: bool) -> None:
    import dataclasses

    from expunge.plan import explained

    method, defaults = explained(plan)
    shown: dict[str, Any] = dataclasses.asdict(plan.config) | {"method": method}
    if defaults:
        shown["defaults"] = defaults
    named = (
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
    values = {key: getattr(plan.args, key) for key in named}
    shown["training"] = {key: getattr(value, "value", value) for key, value in values.items()} | plan.config.training
    data = plan.training_data
    paired = isinstance(data, list)
    shown |= {"pairs": len(data)} if paired else {"texts": {"forget": len(data.forget), "retain": len(data.retain)}}
    shown["steps"] = plan.steps
    shown["out"] = str(plan.folder)
    shown["estimate"] = _figures(plan)
    print_tree(shown, as_json)


def _figures(plan: Any) -> dict[str, Any]:
    from expunge.doctor import advice, forecast
    from expunge.estimate import CannotEstimate

    try:
        made = forecast(plan)
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
        "verdict": advice(made, plan.config),
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
