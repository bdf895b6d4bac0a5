"""The table of a sweep of table1.yaml turned as the paper has it: a line an attack, a column a method.

python recipes/repo/table1.py runs/table1        # Markdown: attacked [its interval] (unattacked)
"""

import csv
import sys
from pathlib import Path

Cells = dict[str, str]


def figure(cells: Cells, column: str) -> str:
    value, low, high = (f"{float(cells[column + end]):.2f}".replace("0.", ".") for end in ("", " low", " high"))
    return f"{value} [{low}, {high}]"


def table(lines: dict[str, Cells]) -> list[str]:
    """lines: those of table.csv by method. An attack's column is named after that of its set, "pairs, orthogonalize"."""
    columns = [column for column in next(iter(lines.values())) if not column.endswith((" low", " high"))]
    rows = [f"| | {' | '.join(lines)} |", f"| :--- |{' ---: |' * len(lines)}"]
    for column in columns:
        before = column.partition(", ")[0]
        if any(not cells[column] for cells in lines.values()):
            continue
        shown = [
            figure(cells, column) + (f" ({figure(cells, before).partition(' ')[0]})" if before != column else "")
            for cells in lines.values()
        ]
        rows.append(f"| {column} | {' | '.join(shown)} |")
    return rows


def main(folder: str) -> None:
    with (Path(folder) / "table.csv").open(encoding="utf-8", newline="") as file:
        lines = {line.pop("method"): line for line in csv.DictReader(file) if line.pop("group") and line.pop("runs")}
    print("\n".join(table(lines)))


if __name__ == "__main__":
    main(*sys.argv[1:])
