"""Results on standard output: trees, paths and JSON lines; bars on standard error; quiet libraries."""

import contextlib
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from expunge.errors import ExpungeError

if TYPE_CHECKING:  # what prints no table does not wait for it
    from expunge.report.tables import Table

out = Console()


def hush() -> None:
    """Leave out transformers' bars for loading and saving shards, its notes and deprecations, the hub's retries."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging as library

    warnings.filterwarnings("ignore", category=FutureWarning)  # from one library to another
    warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft finds out by itself
    library.disable_progress_bar()
    library.set_verbosity_error()
    hub.set_verbosity_error()


@contextlib.contextmanager
def bar(what: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error; inside, (done, in all) moves it on."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def print_table(made: "Table", title: str) -> None:
    """A table of the report."""
    shown = RichTable(title=title)
    for i, header in enumerate(made.headers):
        shown.add_column(escape(header), justify="left" if i == 0 else "right")
    for row in made.rows:
        shown.add_row(*map(escape, row))
    out.print(shown)


def print_rows(rows: Sequence[Sequence[str]]) -> None:
    """Plain columns."""
    shown = RichTable(show_header=False, box=None, pad_edge=False)
    for row in rows:
        shown.add_row(*map(escape, row))
    out.print(shown)


def print_paths(paths: dict[str, Path], as_json: bool) -> None:
    if as_json:
        json_line({name: str(path) for name, path in paths.items()})
        return
    for name, path in paths.items():
        out.print(f"{name}: {path}", soft_wrap=True, markup=False, highlight=False)


def print_tree(tree: dict[str, Any], as_json: bool) -> None:
    import yaml

    if as_json:
        json_line(tree)
    else:
        print(yaml.safe_dump(tree, sort_keys=False, width=120), end="", flush=True)


def json_line(record: dict[str, Any]) -> None:
    """JSON's own escapes stand for characters that standard output cannot print, so that nothing is lost."""
    line = json.dumps(record, ensure_ascii=False) + "\n"
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        line = json.dumps(record) + "\n"
    sys.stdout.write(line)


def check_plain(record: dict[str, Any], where: str) -> None:
    """ExpungeError for a value of a row that JSON does not have, such as a date of a Parquet file."""
    for key, value in record.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise ExpungeError(
                f"{where}: field {key!r} is {type(value).__name__} {value!r}, which JSON does not have; leave the column out"
            ) from None


def print_what_can_be_printed() -> None:
    """Escape from now on, on both streams, the characters that their encodings do not have."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what stands in for one takes all
            stream.reconfigure(errors="backslashreplace")
