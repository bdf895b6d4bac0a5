"""The table of a sweep of table1.yaml turned as the paper has it: a line an attack, a column a method.

python recipes/repo/table1.py runs/table1                        # Markdown: attacked [its interval] (unattacked)
python recipes/repo/table1.py runs/table1 challenge perplexity   # of some sets
"""

import csv
import sys
from pathlib import Path

Cells = dict[str, str]


def figure(cells: Cells, column: str) -> list[str]:
    """Value and ends of its interval; nothing where there is none."""
    found = (cells[column + end] for end in ("", " low", " high"))
    return [f"{round(float(each), 2) + 0.0:.2f}".removeprefix("0") for each in found if each]


def shown(cells: Cells, column: str) -> str:
    """An attack's column is named after that of its set, "pairs, orthogonalize"."""
    value, *ends = figure(cells, column) or ["–"]
    before = column.partition(", ")[0]
    own = f" ({figure(cells, before)[0]})" if ends and before != column else ""
    return value + (f" [{', '.join(ends)}]" if ends else "") + own


def table(lines: list[Cells], *sets: str) -> list[str]:
    """lines: those of table.csv; sets: the only ones that are shown, or none for all."""
    columns = [column for column in lines[0] if f"{column} low" in lines[0]]
    columns = [column for column in columns if not sets or column.partition(", ")[0] in sets]
    rows = [f"| | {' | '.join(cells['method'] for cells in lines)} |", f"| :--- |{' ---: |' * len(lines)}"]
    return rows + [f"| {column} | {' | '.join(shown(cells, column) for cells in lines)} |" for column in columns]


def main(folder: str, *sets: str) -> None:
    with (Path(folder) / "table.csv").open(encoding="utf-8", newline="") as file:
        print("\n".join(table(list(csv.DictReader(file)), *sets)))


if __name__ == "__main__":
    main(*sys.argv[1:])
