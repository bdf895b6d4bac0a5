"""What a sweep leaves in its folder: a record of each cell that ended, and who runs which cell now.

OUT/sweep.yaml          the recipe          OUT/cells/NAME/       a cell's run
OUT/sweep.jsonl         the records         OUT/cells/NAME.json   its record, written when it ended

A record has the rows of the figures that the recipe names, so that without OUT/cells, which is large, a sweep goes on too.
"""

import contextlib
import fcntl
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from expunge.errors import ExpungeError
from expunge.rows import Row, read_lines, read_rows
from expunge.sweep.plan import Cell
from expunge.whole import cannot_write, remove, write_text

RECIPE = "sweep.yaml"
KEPT_FOR_RESUME = ("checkpoints", "stages")


class Store:
    """The folder of the sweep called `name`; nothing is written before `open`."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self.locks: Any = None
        if (folder / RECIPE).is_file():
            found: Any = None
            with contextlib.suppress(yaml.YAMLError, UnicodeDecodeError):
                found = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
            there = found.get("sweep") if isinstance(found, dict) else f"{RECIPE} cannot be read"
            if there != name:
                raise ExpungeError(f"{folder} holds another sweep ({there}): choose another --out, or remove the folder")
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ExpungeError(f"{folder} is not an empty folder and holds no sweep: choose another --out")

    @contextlib.contextmanager
    def opened(self, recipe: dict[str, Any]) -> Iterator[None]:
        """Make the folder, and keep the recipe in it."""
        try:
            (self.folder / "cells").mkdir(parents=True, exist_ok=True)
            write_text(self.folder / RECIPE, yaml.safe_dump({"sweep": self.name, **recipe}, sort_keys=False))
            self.locks = (self.folder / ".lock").open("w")
        except OSError as error:
            raise cannot_write(self.folder, error) from None
        with self.locks:
            yield

    @contextlib.contextmanager
    def taken(self, cell: Cell) -> Iterator[bool]:
        """Hold a cell for this process: False where another has it. The lock is a byte of one file, and ends with us."""
        place = int(cell.name[-12:], 16)
        try:
            fcntl.lockf(self.locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except OSError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self.locks, fcntl.LOCK_UN, 1, place)

    def run_folder(self, cell: Cell) -> Path:
        return self.folder / "cells" / cell.name

    def record(self, cell: Cell) -> dict[str, Any] | None:
        """How the cell ended, when it last ran; None where it has not, or what it left is gone."""
        path = self.folder / "cells" / f"{cell.name}.json"
        if not path.is_file():
            return self._before.get(cell.name)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            lost = found["status"] == "done" and not ("rows" in found or self._results(cell).is_file())
        except (ValueError, TypeError, KeyError):
            raise ExpungeError(f"{path}: not a cell's record: remove it, and the cell runs again") from None
        return None if lost else found

    @cached_property
    def _before(self) -> dict[str, dict[str, Any]]:
        """The records of sweep.jsonl by cell, where they have rows."""
        path = self.folder / "sweep.jsonl"
        records = read_lines(path) if path.is_file() else []
        return {record["cell"]: record for record in records if "cell" in record and "rows" in record}

    def _results(self, cell: Cell) -> Path:
        return self.run_folder(cell) / "results.jsonl"

    def is_done(self, cell: Cell) -> bool:
        record = self.record(cell)
        return record is not None and record["status"] == "done"

    def write(self, cell: Cell, status: str, seconds: float, **more: Any) -> None:
        record = {
            "cell": cell.name,
            "labels": cell.labels,
            "trial": cell.setting if cell.trial else None,
            "setting": cell.setting,
            "status": status,
            "seconds": round(seconds, 1),
            **more,
        }
        write_text(self.folder / "cells" / f"{cell.name}.json", json.dumps(record))

    def rows(self, cell: Cell) -> list[Row]:
        if self._results(cell).is_file():
            return read_rows(self._results(cell))
        return [Row(**row) for row in (self.record(cell) or {})["rows"]]

    def lighten(self, cell: Cell, keep_model: bool) -> None:
        """Of a cell that is done keep results and samples, what each attack chose and found, and the model where that is
        wished."""
        folder = self.run_folder(cell)
        for name in (*KEPT_FOR_RESUME, *(() if keep_model else ("model",))):
            remove(folder / name)
        for part in folder.glob("attacks/*/*"):
            if part.name != "case.json":
                remove(part)
