"""The page: a run's files to one self-contained report.html, and the headline as table.csv and table.md.

    write_report(Path("runs/first"))        # -> runs/first/report.html

Nothing is loaded from a network: style and script are inline, and the page's own security policy names them by hash.
Text from models and files is escaped by jinja2, and `visible` shows the characters that escaping lets through.
"""

import base64
import hashlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from expunge.errors import ExpungeError
from expunge.report.charts import HEIGHT, MARK, WIDTH, curves, marks
from expunge.report.files import RunFiles, read_run, read_text
from expunge.report.samples import LENGTH, VEIL, choose
from expunge.report.tables import CHALLENGE, FORCED, Cell, Table, full, headline, to_csv, to_markdown
from expunge.report.text import clip, short, visible
from expunge.whole import write_text

MAX_BYTES = 3_000_000
FIGURES, FACTS, CONFIG = (
    2_000,
    400,
    60_000,
)  # lines of the full table and of the provenance, characters of the configuration
HERE = Path(__file__).parent


class Sentence(NamedTuple):
    """One measured fact; before and ratio are None where nothing was compared."""

    what: str
    before: Cell | None
    after: Cell
    ratio: Cell | None
    n: Cell


def write_report(folder: Path) -> Path:
    """Write `folder/report.html`, `table.csv` and `table.md` from the run's files; returns the page's path.

    Raises ExpungeError for a folder that holds no finished run, or a file that cannot be read or written.
    """
    run = read_run(folder)
    table = headline({run.name: run.rows})
    page = render(run, table, folder / "samples.jsonl")
    if (size := len(page.encode())) > MAX_BYTES:
        raise ExpungeError(f"{folder}: the page would have {size / 1e6:.1f} MB, over {MAX_BYTES / 1e6:.0f}")
    for name, text in (("table.csv", to_csv(table)), ("table.md", to_markdown(table)), ("report.html", page)):
        write_text(folder / name, text)
    return folder / "report.html"


def render(run: RunFiles, table: Table, samples: Path) -> str:
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
            full=full(run.rows),
            facts=list(_flat(run.provenance)),
            config=clip(run.config, CONFIG),
            limits={"figures": FIGURES, "facts": FACTS, "length": LENGTH, "veil": VEIL},
            size={"width": WIDTH, "height": HEIGHT, "mark": MARK},
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


def _sentences(table: Table) -> Iterator[Sentence]:
    """The first figure of each metric of the headline."""
    first = {line.figure.metric: line for line in reversed(table.lines)}
    for line in dict.fromkeys(first[line.figure.metric] for line in table.lines):
        cells = dict(zip(table.headers[1:], line.cells, strict=True))
        what = f"{line.figure.name[:1].upper()}{line.figure.name[1:]} ({line.figure.detail})"
        measured = {name: cell for name, cell in cells.items() if cell.value is not None}
        if "unlearned" in measured:
            before, ratio = measured.get("reference"), measured.get("ratio")
            yield Sentence(what, before, measured["unlearned"], ratio, cells["n"])


def _flat(facts: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Nested facts as (dotted path, text); memory in GiB, times in seconds."""
    for key, value in facts.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict):
            yield from _flat(value, name)
        elif name.endswith("_bytes") and isinstance(value, (int, float)):
            yield name.removesuffix("_bytes"), f"{value / 2**30:.2f} GiB"
        elif name.endswith("seconds") and isinstance(value, (int, float)):
            yield name, f"{value:,.1f} s"
        else:
            yield name, "none" if value is None else clip(str(value), 1000)


def _sha256(text: str) -> str:
    """The name that a content security policy has for an inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
