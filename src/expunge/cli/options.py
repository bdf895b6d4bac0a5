"""Options that several commands share, and the configuration that they make."""

import functools
import inspect
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.errors import ExpungeError
from expunge.listing import completer
from expunge.paths import expand
from expunge.registry import did_you_mean


def expanded(value: Any) -> Any:
    """What an option or an argument says, where that may be a path: with `~` and `$NAME` put in, of a list each."""
    if isinstance(value, (list, tuple)):
        return [expanded(each) for each in value]
    return value if value is None else type(value)(expand(value))


def _be_quiet(asked: bool) -> bool:
    if asked:
        logging.getLogger("expunge").setLevel(logging.WARNING)
    return asked


Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, for example method.weight=0.3", show_default=False)]
ConfigFile = Annotated[
    list[Path] | None, typer.Option("--config", "-c", callback=expanded, help="YAML file; repeat to lay one over another.")
]
ModelName = Annotated[str | None, typer.Option("--model", "-m", help="builtin, a hub name or a folder.")]
MethodName = Annotated[str | None, typer.Option(help="A method's name.", autocompletion=completer("methods"))]
PairsName = Annotated[
    str | None,
    typer.Option(help="Preference pairs: a named set, a file or a hub set.", autocompletion=completer("data", kind="pairs")),
]
ForgetName = Annotated[
    str | None,
    typer.Option(help="Texts to forget, with --retain instead of pairs: a set or a file.", autocompletion=completer("data")),
]
RetainName = Annotated[
    str | None, typer.Option(help="Texts to keep: a named set, a file or a hub set.", autocompletion=completer("data"))
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", callback=_be_quiet, help="No bars and no notes; warnings stay.")]
Json = Annotated[bool, typer.Option("--json", help="The result as one JSON object on standard output.")]
Budget = Annotated[str, typer.Option(help="quick (minutes) or full.", autocompletion=completer("budgets"))]
PROMPTS = completer("data", kind="prompts")
Out = Annotated[Path, typer.Option("--out", "-o", callback=expanded, help="Folder for all that the run leaves behind.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved plan and stop.")]

LOADING = {
    "revision": Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the hub.")],
    "dtype": Annotated[
        str | None, typer.Option(help="float32 (default), bfloat16, float16, or auto: as the model was saved.")
    ],
    "device_map": Annotated[str | None, typer.Option(help="auto, a device, ...: as in transformers. Default: one device.")],
    "attn_implementation": Annotated[str | None, typer.Option(help="eager, sdpa, flash_attention_2, ...")],
    "quantization": Annotated[str | None, typer.Option(help="4bit or 8bit, by bitsandbytes; training needs an adapter.")],
    "trust_remote_code": Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")],
}
"""How a model is loaded, as options and as keys of the configuration."""


def loads_a_model(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of LOADING; it gets those that were given as the mapping `loading`."""

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        given = {name: values.pop(name) for name in LOADING}
        command(**values, loading={name: value for name, value in given.items() if value})

    own = inspect.signature(command, eval_str=True)
    kept = [parameter for name, parameter in own.parameters.items() if name != "loading"]
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=False if "trust" in name else None)
        for name, kind in LOADING.items()
    ]
    wrapped.__signature__ = own.replace(parameters=[*kept, *more])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in [*kept, *more]}
    return wrapped


def read_settings(
    overrides: list[str] | None,
    files: list[Path] | None,
    model: str | None,
    method: str | None,
    pairs: str | None,
    budget: str,
    loading: dict[str, Any],
    forget: str | None = None,
    retain: str | None = None,
) -> Any:
    """RunConfig: the budget, then YAML files, then options, then dotted overrides, each over the ones before."""
    from expunge.config import BUDGETS, RunConfig, load_config

    if budget not in BUDGETS:
        raise ExpungeError(f"unknown budget {budget!r}{did_you_mean(budget, BUDGETS)}")
    data = {"data.train": pairs, "data.forget": forget, "data.retain": retain}
    options = {"model": model, "method.name": method, **data, **loading}
    named = [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    return load_config(RunConfig, files or [], named + (overrides or []), base=BUDGETS[budget])
