"""Commands on many runs: `sweep` runs a grid of them, `compare` sets what there is beside each other."""

from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.options import Json, Quiet, expanded
from expunge.cli.printing import hush, json_line, print_paths, print_rows, print_table
from expunge.errors import ExpungeError
from expunge.registry import did_you_mean


def sweep(
    recipe: Annotated[Path, typer.Argument(callback=expanded, help="The YAML of the grid (docs/sweeps.md).")],
    output: Annotated[
        Path | None, typer.Option("--out", "-o", callback=expanded, help="Its folder. Default: runs/NAME of the recipe.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="One of the recipe's. Default: its first.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="AXIS=LABEL,LABEL: run these alone; repeat for more axes.")] = None,
    minutes: Annotated[float | None, typer.Option(help="After so many begin no other cell.", min=0)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cells and what of them is done, and stop.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run a grid of runs, each once; what was done before is skipped, what failed or changed runs again."""
    from expunge.sweep import Sweep, run_sweep

    hush()
    folder = output or Path("runs") / recipe.stem
    if dry_run:
        planned = Sweep(recipe, folder, budget)
        cells = planned.plan(only or ())
        if as_json:
            json_line({"out": str(folder), "budget": planned.budget, "cells": cells})
        else:
            print_rows([(cell["status"], cell["title"]) for cell in cells])
        return
    found = run_sweep(recipe, folder, budget, only or (), minutes)
    if as_json:
        from expunge.report.compare import to_records

        lines = to_records(found.table) if found.table else []
        json_line({"out": str(folder), "lines": lines, "notes": found.notes, "cells": found.records, "left": found.left})
    else:
        if found.table:
            print_table(found.table, recipe.stem)
            print_rows([(note,) for note in found.notes])
            print_paths({"table": folder / "table.md"}, as_json)
        if found.left:
            print_rows([(f"left: {len(found.left)} cells; the same command goes on with them",)])
    if found.failed:
        first = found.failed[0]
        raise ExpungeError(
            f"{len(found.failed)} of {len(found.records)} cells failed, first {first['title']}: {first['error']}; the same "
            "command tries them again"
        )


def compare(
    runs: Annotated[list[Path], typer.Argument(callback=expanded, help="Folders of runs, evaluations or sweeps.")],
    ratio: Annotated[bool, typer.Option("--ratio", help="Ratios to each run's reference instead of values.")] = False,
    form: Annotated[str | None, typer.Option("--format", help="md, csv or tex instead of a table to look at.")] = None,
    as_json: Json = False,
) -> None:
    """Runs beside each other: the headline's figures of each, of a sweep as means over its seeds."""
    from expunge.report.compare import compare as set_beside
    from expunge.report.compare import headline_columns, read_folders, remarks, to_records
    from expunge.report.formats import FORMATS

    if form is not None and form not in FORMATS:
        raise ExpungeError(f"--format {form}: no such form{did_you_mean(form, FORMATS)}")
    entries = read_folders(runs)
    columns = headline_columns(entries, ratio)
    table, notes = set_beside(entries, columns), remarks(entries, columns)
    if as_json:
        json_line({"lines": to_records(table), "notes": notes})
    elif form:
        print(FORMATS[form](table), end="")
    else:
        print_table(table, "ratios to the reference" if ratio else "runs")
        print_rows([(note,) for note in notes])
