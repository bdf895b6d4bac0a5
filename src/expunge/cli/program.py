"""The program `expunge`: its commands put together, bad input as one line, exit statuses."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.cli.attacks import attack
from expunge.cli.options import Json, expanded
from expunge.cli.pairs import build_pairs, validate_pairs
from expunge.cli.printing import json_line, print_rows, print_what_can_be_printed
from expunge.cli.runs import doctor, evaluate, report, run, train
from expunge.cli.sweeps import compare, sweep
from expunge.cli.texts import generate, score
from expunge.errors import ExpungeError, Interrupted, is_out_of_memory
from expunge.listing import LISTINGS, shown
from expunge.registry import did_you_mean, load_plugin

UsageError: Any = typer.BadParameter.__base__  # click's, or that of the click that typer carries inside itself


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"expunge {version('expunge')}")
        raise typer.Exit


def _load_plugins(files: list[Path] | None) -> None:
    for file in files or []:
        load_plugin(expanded(file))


def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    plugin: Annotated[
        list[Path] | None,
        typer.Option(
            callback=_load_plugins,
            metavar="FILE",
            help="A Python file of yours with methods, attacks or scorers; before or after the command; repeat for several.",
        ),
    ] = None,
) -> None:
    """Remove a behaviour from a language model, and prove that it is gone."""


def list_(
    what: Annotated[
        str,
        typer.Argument(
            help="methods, attacks, scorers, data or budgets.",
            autocompletion=lambda incomplete: [name for name in LISTINGS if name.startswith(incomplete)],
        ),
    ],
    as_json: Json = False,
) -> None:
    """What there is to name on the command line."""
    if what not in LISTINGS:
        raise ExpungeError(f"nothing called {what!r} to list{did_you_mean(what, LISTINGS)}")
    entries = LISTINGS[what]()
    if as_json:
        json_line({what: entries})
        return
    print_rows([shown(entry) for entry in entries])


COMMANDS: tuple[Callable[..., None], ...] = (run, train, doctor, evaluate, attack, generate, score, sweep, compare, report)

app = typer.Typer(name="expunge", no_args_is_help=True, pretty_exceptions_enable=False)
app.callback()(common)
for command in COMMANDS:
    app.command()(command)
pairs = typer.Typer(no_args_is_help=True, help="Make preference pairs, or look a set over.")
pairs.command("build")(build_pairs)
pairs.command("validate")(validate_pairs)
app.add_typer(pairs, name="pairs")
app.command("list")(list_)


def main() -> None:
    """Run the command line; one line and a non-zero status for anything that the user can mend."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("expunge").setLevel(logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    print_what_can_be_printed()
    try:
        _check_arguments(sys.argv[1:])
        arguments = _plugins_first(sys.argv[1:])
        if status := app(arguments, prog_name="expunge", standalone_mode=False) or 0:  # it takes Ctrl-C for itself
            _complain("stopped")
        sys.stdout.flush()
        sys.exit(status)
    except ExpungeError as error:
        _complain(str(error))
        sys.exit(130 if isinstance(error, Interrupted) else 2)
    except UsageError as error:
        if len(sys.argv) > 1:  # else the help has been printed
            command = error.ctx.command_path if error.ctx else "expunge"
            _complain(f"{error.format_message().rstrip('.')}; see `{command} --help`")
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        _complain("stopped")
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).split("\n")[0]
        _complain(f"out of memory ({reason}): `expunge doctor` says what a run takes, and what would make it smaller")
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it closes the pipe
        sys.exit(1)


def _plugins_first(arguments: list[str]) -> list[str]:
    """`arguments` with each `--plugin FILE` before the command, whose other options may name what the file holds."""
    plugins, rest = [], []
    given = iter(arguments)
    for argument in given:
        if argument == "--":
            rest += [argument, *given]
        elif argument == "--plugin":
            plugins += [argument, *islice(given, 1)]
        else:
            (plugins if argument.startswith("--plugin=") else rest).append(argument)
    return [*plugins, *rest]


def _check_arguments(arguments: Sequence[str]) -> None:
    """ExpungeError for a name that is not text: at the end, when it is written beside the figures, it would be too late."""
    for argument in arguments:
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:  # bytes that are not of the encoding of names stand there as surrogates
            raise ExpungeError(
                f"{argument!r}: not text in {sys.getfilesystemencoding()}, the encoding of names; give the file another "
                "name, or set PYTHONUTF8=1 where names are in UTF-8"
            ) from None


def _complain(reason: str) -> None:
    """One line, whatever a library put into it."""
    print("expunge:", " ".join(reason.split()), file=sys.stderr)
