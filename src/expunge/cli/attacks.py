"""The command `attack`: what brings back the behaviour that a model was made to forget."""

from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.cli.options import (
    ConfigFile,
    ForgetName,
    Json,
    Out,
    Overrides,
    PairsName,
    Quiet,
    RetainName,
    expanded,
    loads_a_model,
)
from expunge.cli.printing import hush, json_line, print_paths, print_table
from expunge.errors import ExpungeError
from expunge.listing import completer
from expunge.registry import did_you_mean


@loads_a_model
def attack(
    model: Annotated[
        str, typer.Argument(callback=expanded, help="A run folder, or a model: builtin, a hub name, a folder.")
    ],
    overrides: Overrides = None,
    attacks: Annotated[
        str | None, typer.Option(help="Names with commas between, or all.", autocompletion=completer("attacks"))
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="small, paper or large: what each attack tries; if no configuration says, small.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(callback=expanded, help="The model before unlearning; a run knows its own.")
    ] = None,
    pairs: PairsName = None,
    forget: ForgetName = None,
    retain: RetainName = None,
    config: ConfigFile = None,
    output: Out = Path("runs/attacks"),
    quiet: Quiet = False,
    as_json: Json = False,
    *,
    loading: dict[str, Any],
) -> None:
    """Attack an unlearned model and its reference, and say what comes back."""
    import json

    from expunge import pipeline
    from expunge.config import ATTACK_BUDGETS, RunConfig, load_config, merge
    from expunge.plan import Plan, resolve
    from expunge.redteam import red_team
    from expunge.report.attacks import attacks_table, by_group, headline_lines, to_records

    hush()
    pipeline.check_one_process("attacks run in one process: start `expunge attack` itself, without a launcher")
    if budget is not None and budget not in ATTACK_BUDGETS:
        raise ExpungeError(f"unknown budget {budget!r}{did_you_mean(budget, ATTACK_BUDGETS)}")
    origin = pipeline.origin_of(Path(model), reference)
    base: dict[str, Any] = {"method": {}, "data": {"train": None}}  # of another model nobody knows what it was to forget
    if origin:  # what the run was trained on
        base = pipeline.settings_of_run(Path(model))
    if budget is None:
        said = load_config(RunConfig, config or [], overrides or [], base=base).redteam
        budget = said.budget if said else "small"
    base = merge(base, ATTACK_BUDGETS[budget])
    data = {"data.train": pairs, "data.forget": forget, "data.retain": retain}
    named = {"model": origin.get("model") or model, **data, "redteam.budget": budget, **loading}
    if attacks:
        named["redteam.attacks"] = attacks.split(",")
    told = [f"{key}={json.dumps(value)}" for key, value in named.items() if value is not None]
    settings = load_config(RunConfig, config or [], [*told, *(overrides or [])], base=base)
    settings = resolve(settings) if origin else settings
    victim = Path(model) / "model" if origin else model
    revision = settings.revision if origin and not reference else None
    known = reference or origin.get("model")
    if origin:
        settings.revision = None  # a run's own is the reference's
    attacked = {"victim": str(victim), "reference": known}
    plan = Plan.of_models(settings, output, victim, known, revision, quiet)
    with pipeline.dated(output, like=Path(model)), pipeline.claim(output, settings, attacked=attacked):
        rows = red_team(plan)
    table = headline_lines(attacks_table(rows, settings.redteam.utility_bound))  # type: ignore[union-attr]
    if as_json:
        json_line({"out": str(output), "lines": to_records(table)})
        return
    for title, narrow in by_group(table):
        print_table(narrow, f"{title}, under attack")
    print_paths({"table": output / "attacks.md"}, as_json)
