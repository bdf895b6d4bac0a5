"""The page: a run's files to one self-contained report.html, with its tables beside it and the model's card.

    write_report(Path("runs/first"))        # -> runs/first/report.html

Nothing is loaded from a network: style and script are inline, and the page's own security policy names them by hash.
Text from models and files is escaped by jinja2, and `visible` shows the characters that escaping lets through.
"""

import base64
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from expunge.config import RedTeamConfig
from expunge.errors import ExpungeError
from expunge.report.attacks import attacks_table
from expunge.report.card import write_card
from expunge.report.charts import HEIGHT, MARK, WIDTH, curves, marks
from expunge.report.files import RunFiles, flat, read_run, read_text
from expunge.report.formats import to_csv, to_latex, to_markdown
from expunge.report.frontier import BOTTOM, LEFT, RIGHT, TOP, Frontier, frontier
from expunge.report.samples import LENGTH, VEIL, choose
from expunge.report.tables import CHALLENGE, FORCED, QUESTIONS, Cell, Table, full, headline
from expunge.report.text import clip, short, visible
from expunge.whole import write_text

MAX_BYTES = 3_000_000
FIGURES, CHECKPOINTS, FACTS = 2_000, 400, 400  # lines of the full table, of the frontier's, of the provenance
CONFIG = 60_000  # characters of the configuration
HERE = Path(__file__).parent


class Sentence(NamedTuple):
    """One measured fact; before and ratio are None where nothing was compared."""

    what: str
    before: Cell | None
    after: Cell
    ratio: Cell | None
    n: Cell


def write_report(folder: Path) -> Path:
    """Write `folder/report.html`, the tables beside it and the card of `folder/model`; returns the page's path.

    Raises ExpungeError for a folder that holds no finished run, or a file that cannot be read or written.
    """
    run = read_run(folder)
    made = frontier(run.checkpoints)
    tables = {"headline": headline({run.name: run.rows}), "full": full(run.rows)}
    page = render(run, tables["headline"], tables["full"], made, folder / "samples.jsonl")
    if (size := len(page.encode())) > MAX_BYTES:
        raise ExpungeError(f"{folder}: the page would have {size / 1e6:.1f} MB, over {MAX_BYTES / 1e6:.0f}")
    if made:
        tables["frontier"] = made.table
    for name, table in tables.items():
        for ending, form in (("csv", to_csv), ("md", to_markdown), ("tex", to_latex)):
            write_text(folder / "tables" / f"{name}.{ending}", form(table))
    write_card(folder / "model", run)
    write_text(folder / "report.html", page)
    return folder / "report.html"


def render(run: RunFiles, table: Table, all_figures: Table, made: Frontier | None, samples: Path) -> str:
    """The page as HTML; `samples` is what messages about `run.samples` name."""
    style, script = read_text(HERE / "page.css"), read_text(HERE / "page.js")
    policy = {
        "default-src": "'none'",
        "style-src": f"'{_sha256(style)}'",
        "script-src": f"'{_sha256(script)}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            run=run,
            style=style,
            script=script,
            policy="; ".join(f"{name} {value}" for name, value in policy.items()),
            sentences=list(_sentences(table)),
            table=table,
            marks=marks(table, CHALLENGE) | marks(table, FORCED),
            curves=curves(run.training),
            shown=choose(run.samples, samples),
            full=all_figures,
            attacked=_attacked(run),
            frontier=made,
            facts=list(flat(run.provenance)),
            config=clip(run.config, CONFIG),
            limits={"figures": FIGURES, "checkpoints": CHECKPOINTS, "facts": FACTS, "length": LENGTH, "veil": VEIL},
            size={"width": WIDTH, "height": HEIGHT, "mark": MARK},
            frame={"left": LEFT, "top": TOP, "right": RIGHT, "bottom": BOTTOM},
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        # a str subclass is Markup: what the template itself made, already through here
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = short
    return environment


def _attacked(run: RunFiles) -> Table | None:
    """What attacks brought back, by kind of toxicity or accuracy; None for a run without."""
    rows = [row for row in run.rows if row.over]
    if not rows:
        return None
    team = run.settings.get("redteam") or {}
    table = attacks_table(rows, team.get("utility_bound", RedTeamConfig.utility_bound))
    return replace(table, lines=tuple(line._replace(detail="") for line in table.lines))


def _sentences(table: Table) -> Iterator[Sentence]:
    """The first figure of each metric of the headline, of questions each."""
    key = {line: line.label if line.group == QUESTIONS else line.name for line in table.lines}
    first = {key[line]: line for line in reversed(table.lines)}
    for line in dict.fromkeys(first[key[line]] for line in table.lines):
        cells = dict(zip(table.headers[1:], line.cells, strict=True))
        what = f"{line.name[:1].upper()}{line.name[1:]} ({line.detail})"
        measured = {name: cell for name, cell in cells.items() if cell.value is not None}
        if "unlearned" in measured:
            before, ratio = measured.get("reference"), measured.get("ratio")
            yield Sentence(what, before, measured["unlearned"], ratio, cells["n"])


def _sha256(text: str) -> str:
    """The name that a content security policy has for an inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
