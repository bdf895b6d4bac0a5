"""Run what is missing of a sweep: trials, the choice among them, then seed by seed the cells; and write what there is.

    outcome = run_sweep(Path("recipe.yaml"), Path("runs/sweep")); print(outcome.notes)

A cell is done when its record says so. It is known by a hash of all that decides it, so that a changed one runs again.
Several processes may run one sweep: each takes cells that no other holds.
"""

import contextlib
import gc
import logging
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from expunge.errors import ExpungeError, Interrupted
from expunge.pipeline import check_one_process, dated, keep_date
from expunge.plan import Plan
from expunge.redteam import run_and_attack
from expunge.report.compare import Entry, headline_columns, rows_behind
from expunge.report.tables import Table
from expunge.rows import Row, write_lines
from expunge.sweep.choice import Choice, choose, figures_of
from expunge.sweep.plan import Cell, Group, groups_of, narrowed
from expunge.sweep.recipe import SEED, read_recipe
from expunge.sweep.store import Store
from expunge.sweep.tables import choice_note, table_of, trials_table, write_tables

log = logging.getLogger("expunge")

Runner = Callable[[Plan], Any]


def run_alone(plan: Plan) -> None:
    """A run that leaves nothing in memory, whatever becomes of it."""
    try:
        run_and_attack(plan)
    finally:
        gc.collect()


class Place(NamedTuple):
    """A cell of the plan, in order; cell: None where trials that have not ended decide it."""

    title: str
    cell: Cell | None
    blocked: str | None = None  # why it cannot run


@dataclass(frozen=True)
class Outcome:
    """What there is of a sweep: records of the cells that ended, titles of those left, tables, and what to know of them."""

    records: list[dict[str, Any]]
    left: list[str]
    table: Table | None  # None before a cell is done
    trials: Table | None
    notes: list[str]

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [record for record in self.records if record["status"] == "failed"]


def run_sweep(
    file: Path,
    folder: Path,
    budget: str | None = None,
    only: Sequence[str] = (),
    minutes: float | None = None,
    runner: Runner = run_alone,
) -> Outcome:
    """Run what of the recipe `file` is not done in `folder`, and write its records and tables.

    only: AXIS=LABEL,LABEL. minutes: after so many no cell is begun. A cell that fails leaves a record with its error; the
    next call tries it again. Raises ExpungeError for bad input, Interrupted and KeyboardInterrupt for Ctrl-C.
    """
    check_one_process("a sweep runs its cells in one process: start `expunge sweep` itself, once or several times")
    sweep = Sweep(file, folder, budget)
    groups, seeds = narrowed(sweep.groups, sweep.recipe, only)
    end = time.monotonic() + 60 * minutes if minutes is not None else None
    tried: set[str] = set()
    with sweep.store.opened({"budget": sweep.budget, **sweep.written.as_written()}), dated(folder):
        keep_date(folder)
        begun = True
        while begun:  # once more, as others may have finished the trials that a cell waited for
            begun = False
            for place in sweep.places(groups, seeds):
                cell = place.cell
                if cell is None or cell.name in tried or sweep.store.is_done(cell):
                    continue
                if end is not None and time.monotonic() >= end:
                    return sweep.write()
                with sweep.store.taken(cell) as mine:
                    if mine and not sweep.store.is_done(cell):
                        begun = True
                        tried.add(cell.name)
                        sweep.run(place, runner)
                        sweep.tell()
    return sweep.write()


class Sweep:
    """A recipe under one budget, and what there is of it in a folder."""

    def __init__(self, file: Path, folder: Path, budget: str | None = None):
        self.written = read_recipe(file)
        try:
            self.budget, self.recipe = self.written.under(budget)
            self.groups = groups_of(self.recipe)
        except ExpungeError as error:
            raise ExpungeError(f"{file}: {error}") from None
        self.store = Store(folder, file.stem)

    def plan(self, only: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Every cell in order: title, status (done, failed, to do, waiting for its trials) and the name of its folder."""
        found = []
        for place in self.places(*narrowed(self.groups, self.recipe, only)):
            record = self.store.record(place.cell) if place.cell else None
            status = record["status"] if record else "to do" if place.cell else "waiting for its trials"
            found.append({"title": place.title, "status": status, "cell": place.cell.name if place.cell else None})
        return found

    def places(self, groups: Sequence[Group], seeds: Iterable[str]) -> Iterator[Place]:
        """The trials of all groups, then seed by seed the cells: a sweep that is cut off has compared all on the first."""
        for group in groups:
            yield from (Place(trial.title, trial) for trial in group.trials)
        for label in seeds:
            for group in groups:
                yield self._place(group, label)

    def _place(self, group: Group, label: str) -> Place:
        title = ", ".join(filter(None, (group.name, f"{SEED} {label}".strip() if label else "")))
        if not group.settings:
            return Place(title, group.final(label, {}))
        choice = self.choice(group)
        if choice is None:
            return Place(title, None)
        if choice.taken is None:
            return Place(title, group.final(label, {}), f"none of its {len(group.settings)} trials finished")
        return Place(title, group.final(label, group.settings[choice.taken]))

    def choice(self, group: Group) -> Choice | None:
        """None where nothing is tuned, and before every trial has ended."""
        records = [self.store.record(trial) for trial in group.trials]
        if self.recipe.tune is None or not records or not all(records):
            return None
        done = [self.store.is_done(trial) for trial in group.trials]
        rows = [self.store.rows(trial) if ok else None for trial, ok in zip(group.trials, done, strict=True)]
        return choose(self.recipe.tune, rows)

    def run(self, place: Place, runner: Runner) -> None:
        """One cell, whatever becomes of it; Ctrl-C goes through."""
        cell, started = place.cell, time.monotonic()
        assert cell
        try:
            if place.blocked:
                raise ExpungeError(place.blocked)
            log.info("sweep: %s", place.title)
            runner(cell.plan.at(self.store.run_folder(cell)))
        except Interrupted:
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            more = {} if isinstance(error, ExpungeError) else {"traceback": traceback.format_exc()}
            self.store.write(cell, "failed", time.monotonic() - started, error=reason, **more)
            log.warning("sweep: %s: failed: %s", place.title, reason)
        else:
            self.store.lighten(cell, self.recipe.keep_models)
            self.store.write(cell, "done", time.monotonic() - started, error=None, rows=self._rows_of_figures(cell))
            if cell.trial and self.recipe.tune:
                figures_of(self.recipe.tune, self.store.rows(cell))  # before all others have run in vain

    def _rows_of_figures(self, cell: Cell) -> list[dict[str, Any]]:
        """What the tables will ask of a cell that is done, without fields that do not apply."""
        rows = self.store.rows(cell)
        if cell.trial and self.recipe.tune:
            wanted = [self.recipe.tune.by.figure, *(bound.figure for bound in self.recipe.tune.keep)]
        else:
            wanted = list((self.recipe.wanted or headline_columns([Entry("", [rows])])).values())
        with contextlib.suppress(ExpungeError):  # a figure in doubt: all are kept, and the table complains
            rows = rows_behind(rows, wanted)
        return [{key: value for key, value in vars(row).items() if value is not None} for row in rows]

    def tell(self) -> None:
        """Write what there is in the midst of a sweep: a column in doubt is an error at its end, and stops no cell."""
        try:
            log.info("sweep: %d left", len(self.write().left))
        except ExpungeError as error:
            log.warning("sweep: no table: %s", error)

    def write(self) -> Outcome:
        """Records and tables of what there is, into the folder."""
        outcome, folder = self.outcome(), self.store.folder
        write_lines(folder / "sweep.jsonl", outcome.records)
        if outcome.table:
            write_tables(folder, "table", outcome.table, outcome.notes)
        if outcome.trials:
            write_tables(folder, "trials", outcome.trials)
        return outcome

    def outcome(self) -> Outcome:
        """All of the recipe, whichever part of it is run."""
        records, left, notes = [], [], []
        tuning, choices = self.recipe.tune, [self.choice(group) for group in self.groups]
        entries = []
        for group, choice in zip(self.groups, choices, strict=True):
            runs: list[list[Row]] = []
            if tuning and choice:
                notes.append(choice_note(tuning, group, choice))
            for number, trial in enumerate(group.trials):
                found = figures_of(tuning, self.store.rows(trial)) if tuning and self.store.is_done(trial) else None
                more = {"figures": found, "taken": choice is not None and choice.taken == number}
                self._add(records, left, Place(trial.title, trial), **more)
            for label in group.seeds:
                place = self._place(group, label)
                if self._add(records, left, place) and place.cell and self.store.is_done(place.cell):
                    runs.append(self.store.rows(place.cell))
            entries.append(Entry(group.name, runs))
        failed = [f"{record['title']}: failed: {record['error']}" for record in records if record["status"] == "failed"]
        table, below = table_of(self.recipe, entries) if any(entry.runs for entry in entries) else (None, [])
        trials = trials_table(tuning, self.groups, choices) if tuning and any(choices) else None
        return Outcome(records, left, table, trials, [*below, *notes, *failed])

    def _add(self, records: list[dict[str, Any]], left: list[str], place: Place, **more: Any) -> bool:
        record = self.store.record(place.cell) if place.cell else None
        if record is None:
            left.append(place.title)
            return False
        records.append({"title": place.title, **record, **more})
        return True
