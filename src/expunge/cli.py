"""The command line, and the only reader of argv: `expunge run`, `train`, `evaluate`, `doctor` and the rest.

Results go to standard output, all else to standard error. Bad input is one line there and exit status 2; Ctrl-C saves a
checkpoint and exits with 130 (docs/cli.md).
"""

import contextlib
import functools
import inspect
import json
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from expunge.errors import ExpungeError, Interrupted
from expunge.listing import LISTINGS, completer
from expunge.registry import did_you_mean

app = typer.Typer(name="expunge", no_args_is_help=True, pretty_exceptions_enable=False)
out = Console()

UsageError: Any = typer.BadParameter.__base__  # click's, or that of the click that typer carries inside itself


def _be_quiet(asked: bool) -> bool:
    if asked:
        logging.getLogger("expunge").setLevel(logging.WARNING)
    return asked


Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, for example method.weight=0.3", show_default=False)]
ConfigFile = Annotated[list[Path] | None, typer.Option("--config", "-c", help="YAML file; repeat to lay one over another.")]
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
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for all that the run leaves behind.")]
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


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"expunge {version('expunge')}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Remove a behaviour from a language model, and prove that it is gone."""


@app.command()
@loads_a_model
def run(
    overrides: Overrides = None,
    config: ConfigFile = None,
    model: ModelName = None,
    method: MethodName = None,
    pairs: PairsName = None,
    forget: ForgetName = None,
    retain: RetainName = None,
    budget: Budget = "quick",
    output: Out = Path("runs/repo"),
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: Json = False,
    *,
    loading: dict[str, Any],
) -> None:
    """Detoxify a model, measure it against the original, and write the report."""
    from expunge import pipeline

    _hush()
    settings = _settings(overrides, config, model, method, pairs, budget, loading, forget, retain)
    if dry_run:
        _print_plan(settings, output, as_json)
        return
    pipeline.run(settings, output, quiet)
    if pipeline.is_main_process():
        _print_headline(output, as_json)


@app.command()
@loads_a_model
def train(
    overrides: Overrides = None,
    config: ConfigFile = None,
    model: ModelName = None,
    method: MethodName = None,
    pairs: PairsName = None,
    forget: ForgetName = None,
    retain: RetainName = None,
    budget: Budget = "full",
    output: Out = Path("runs/repo"),
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: Json = False,
    *,
    loading: dict[str, Any],
) -> None:
    """Train only: the edited model is left in OUT/model."""
    from expunge import pipeline

    _hush()
    settings = pipeline.resolve(_settings(overrides, config, model, method, pairs, budget, loading, forget, retain))
    if dry_run:
        _print_plan(settings, output, as_json)
        return
    pipeline.build_method(settings.method)
    args = pipeline.build_training(settings.training, output, settings.seed)
    pipeline.check_model(settings)
    pipeline.monitor_data(settings, args, pipeline.outline_of(settings)[1])
    with pipeline.claim(output, settings):
        pipeline.train(settings, output, quiet)
    if pipeline.is_main_process():
        _print_paths({"model": output / "model"}, as_json)


@app.command()
@loads_a_model
def doctor(
    overrides: Overrides = None,
    config: ConfigFile = None,
    model: ModelName = None,
    method: MethodName = None,
    pairs: PairsName = None,
    forget: ForgetName = None,
    retain: RetainName = None,
    budget: Budget = "quick",
    quiet: Quiet = False,
    as_json: Json = False,
    *,
    loading: dict[str, Any],
) -> None:
    """Say what this machine offers, and estimate memory and time of a run without loading the model."""
    from expunge.machine import machine

    settings = _settings(overrides, config, model, method, pairs, budget, loading, forget, retain)
    found: dict[str, Any] = {"machine": machine()}
    if not as_json:
        _print_tree(found, as_json)  # at once: torch takes seconds to import
    from expunge.doctor import device, reports

    _hush()
    how = {name: value for name in ("model", *LOADING, "lora") if (value := getattr(settings, name))}
    rest = {"device": device(), "reports": reports(), "run": {**how, **_figures(settings)}}
    _print_tree({**found, **rest} if as_json else rest, as_json)


@app.command()
@loads_a_model
def evaluate(
    model: Annotated[str, typer.Argument(help="builtin, a hub name, a model folder, or a run folder.")],
    overrides: Overrides = None,
    reference: Annotated[str | None, typer.Option(help="The model to compare with.")] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(help="Prompts: a named set or a file; repeat for several.", autocompletion=PROMPTS),
    ] = None,
    config: ConfigFile = None,
    budget: Budget = "quick",
    output: Out = Path("runs/evaluation"),
    quiet: Quiet = False,
    as_json: Json = False,
    *,
    loading: dict[str, Any],
) -> None:
    """Measure any model, against a reference where one is given."""
    from expunge import pipeline
    from expunge.report import write_report
    from expunge.scorers import load_scorer

    _hush()
    if not pipeline.is_main_process():
        return
    origin = pipeline.origin_of(Path(model))
    name = str(Path(model) / "model") if origin else model
    settings = _settings(overrides, config, name, None, None, budget, origin.get("loading", {}) | loading)
    settings.method = origin.get("method", {})
    revision = settings.revision if origin and not reference else None  # another reference has its own
    reference = reference or origin.get("model")
    if prompts:
        settings.data.prompts = prompts
    data = pipeline.evaluation_data(settings.data, settings.evaluation, pipeline.outline_of(settings)[1])
    scorers = [load_scorer(name) for name in settings.evaluation.scorers]
    with pipeline.claim(output, settings, evaluate={"reference": reference}):
        pipeline.measure(output, settings, settings.model, reference, data, scorers, quiet, revision)
        write_report(output)
    _print_headline(output, as_json)


@app.command()
@loads_a_model
def generate(
    prompts: Annotated[
        str, typer.Argument(help="A file of prompts, a named set, or - for lines of standard input.", autocompletion=PROMPTS)
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="builtin, a hub name or a folder.")] = "builtin",
    samples: Annotated[int, typer.Option(help="Sampled continuations a prompt; 0 is one greedy continuation.", min=0)] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 20,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.9,
    temperature: Annotated[float, typer.Option(min=0.01)] = 1.0,
    seed: int = 0,
    quiet: Quiet = False,
    *,
    loading: dict[str, Any],
) -> None:
    """Continue prompts: one JSON line each, {prompt, sample, continuation}."""
    from expunge.data import load_prompts
    from expunge.generation import Decoding, generate
    from expunge.models import load_model

    _hush()
    loaded, tokenizer = load_model(model, **{"dtype": "float32", **loading})
    if prompts == "-":
        texts = _read_stdin().splitlines()
    else:
        texts = [prompt.text for prompt in load_prompts(prompts, tokenizer=tokenizer)]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    decoding = Decoding(max_new_tokens=max_new_tokens, samples=samples, top_p=top_p, temperature=temperature, seed=seed)
    for text, continuations in zip(texts, generate(loaded, tokenizer, ids, decoding), strict=True):  # type: ignore[arg-type]
        for sample, continuation in enumerate(continuations):
            _json_line({"prompt": text, "sample": sample, "continuation": tokenizer.decode(continuation)})


@app.command()
def score(
    file: Annotated[str, typer.Argument(help="JSON lines with `text`, or - for standard input.")],
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            help="A scorer's name (expunge list scorers); repeat for several.",
            show_default="ngram",
            autocompletion=completer("scorers"),
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Toxicity of texts: the same JSON lines with `score`, in order; of several scorers `scores`, and how far they agree."""
    from expunge.rows import parse_lines, read_lines
    from expunge.scorers import load_scorer

    names = scorer or ["ngram"]
    if any(name.startswith("hf:") for name in names):
        _hush()
    records = parse_lines(_read_stdin(), "standard input") if file == "-" else read_lines(Path(file))
    for number, record in enumerate(records, 1):
        if not isinstance(record.get("text"), str):
            raise ExpungeError(f"{file}: record {number} has no field 'text' that is a string")
    texts = [record["text"] for record in records]
    scorers = [load_scorer(name) for name in names]
    found = {each.name: each.score(texts) for each in scorers}
    for number, record in enumerate(records):
        scores = {name: round(float(values[number]), 6) for name, values in found.items()}
        record |= {"score": next(iter(scores.values()))} if len(scorers) == 1 else {"scores": scores}
    if as_json:
        _json_line({"records": records, "agreement": _agreement(found)})
        return
    for record in records:
        _json_line(record)
    if not quiet:
        for each in _agreement(found):  # records by number: their text may be nothing to read by chance
            apart = ", ".join(map(str, each["apart"])) or "none"
            told = "nan" if each["spearman"] is None else f"{each['spearman']:.3f}"
            both = f"{each['first']} and {each['second']}: Spearman {told} (n = {each['n']})"
            print(f"{both}; furthest apart on records {apart}", file=sys.stderr)


def _agreement(scores: dict[str, Any]) -> list[dict[str, Any]]:
    """Of every two scorers; apart: the numbers, from 1, of the records on which they differ most."""
    if len(scores) < 2:
        return []
    from expunge.scorers.agreement import agreement

    return [
        {
            "first": found.first,
            "second": found.second,
            "n": len(scores[found.first]),
            "spearman": found.spearman if math.isfinite(found.spearman) else None,
            "apart": [number + 1 for number in found.apart],
        }
        for found in agreement(scores)
    ]


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run's folder.")], as_json: Json = False) -> None:
    """Write OUT/report.html again from a run's files."""
    from expunge.report import write_report

    _print_paths({"report": write_report(folder)}, as_json)


pairs_app = typer.Typer(no_args_is_help=True, help="Make preference pairs, or look a set over.")
app.add_typer(pairs_app, name="pairs")


@pairs_app.command("build")
@loads_a_model
def build_pairs(
    overrides: Overrides = None,
    prompts: Annotated[
        str, typer.Option(help="What is continued: a named set, a file or a hub set.", autocompletion=PROMPTS)
    ] = "builtin-tuning",
    model: Annotated[
        str, typer.Option("--model", "-m", help="Whose continuations: builtin, a hub name or a folder.")
    ] = "builtin",
    strategy: Annotated[str, typer.Option(help="best-of-n: its own samples; pplm: pushed by a probe.")] = "best-of-n",
    preset: Annotated[str | None, typer.Option(help="Published settings of pplm: lee2024 (default) or pplm.")] = None,
    scorer: Annotated[
        str, typer.Option(help="Tells the sides apart; let it not be the judge.", autocompletion=completer("scorers"))
    ] = "wordvec",
    probe_data: Annotated[
        str, typer.Option(help="What pplm's probe is fitted on: labelled text, or a named set of pairs.")
    ] = "builtin",
    limit: Annotated[int | None, typer.Option(help="At most so many prompts, evenly spread over the set.", min=1)] = None,
    output: Annotated[Path, typer.Option("--out", "-o", help="The file of pairs, JSON lines.")] = Path("pairs.jsonl"),
    quiet: Quiet = False,
    as_json: Json = False,
    *,
    loading: dict[str, Any],
) -> None:
    """Pairs from a model's own continuations: key=value sets fields of the strategy, such as samples=16 or toxic=0.6."""
    import dataclasses

    from expunge.config import load_config
    from expunge.data import load_prompts
    from expunge.data.builders import STRATEGIES
    from expunge.data.pair_files import probe_for, write_pairs
    from expunge.data.pplm import PRESETS
    from expunge.models import load_model
    from expunge.scorers import load_scorer

    for what, name, known in (("strategy", strategy, STRATEGIES), ("preset", preset, PRESETS)):
        if name is not None and name not in known:
            raise ExpungeError(f"unknown {what} {name!r}{did_you_mean(name, known)}")
    if preset and strategy != "pplm":
        raise ExpungeError(f"--preset {preset}: settings of --strategy pplm; {strategy} has none")
    recipe = load_config(STRATEGIES[strategy], [], overrides or [], base=PRESETS[preset] if preset else None)
    _hush()
    judge = load_scorer(scorer)
    loaded, tokenizer = load_model(model, **{"dtype": "float32", **loading})
    texts = [prompt.text for prompt in load_prompts(prompts, limit, tokenizer)]
    probe = probe_for(loaded, tokenizer, probe_data) if strategy == "pplm" else None
    with _bar("prompts", quiet) as advance:
        report = write_pairs(output, loaded, tokenizer, texts, judge, recipe, probe, advance)
    _print_tree({"file": str(output), **dataclasses.asdict(report)}, as_json)


@pairs_app.command("validate")
def validate_pairs(
    source: Annotated[str, typer.Argument(help="Preference pairs: a named set, a file or a hub set.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Whose tokenizer counts tokens, and renders chats.")
    ] = "builtin",
    scorer: Annotated[str, typer.Option(help="A scorer's name.", autocompletion=completer("scorers"))] = "ngram",
    as_json: Json = False,
) -> None:
    """Look a set of pairs over: form, lengths, repeats, scores, and warnings of what would mislead training."""
    from expunge.data import load_pairs
    from expunge.data.pair_files import look_over
    from expunge.models import load_outline
    from expunge.scorers import load_scorer

    _hush()
    _, tokenizer = load_outline(model)
    _print_tree(look_over(load_pairs(source, tokenizer=tokenizer), tokenizer, load_scorer(scorer)), as_json)


@app.command("list")
def list_(
    what: Annotated[
        str,
        typer.Argument(
            help="methods, scorers, data or budgets.",
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
        _json_line({what: entries})
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for entry in entries:
        table.add_row(*(escape(value if isinstance(value, str) else json.dumps(value)) for value in entry.values()))
    out.print(table)


def _settings(
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


def _hush() -> None:
    """Leave out transformers' bars for loading and saving shards, its notes and deprecations, the hub's retries."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging as library

    warnings.filterwarnings("ignore", category=FutureWarning)  # from one library to another
    warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft finds out by itself
    library.disable_progress_bar()
    library.set_verbosity_error()
    hub.set_verbosity_error()


def _print_plan(settings: Any, folder: Path, as_json: bool) -> None:
    import dataclasses

    from expunge import pipeline

    settings = pipeline.resolve(settings)
    plan = dataclasses.asdict(settings)
    method = pipeline.build_method(settings.method)
    plan["method"] = {"name": settings.method["name"], **dataclasses.asdict(method)}  # type: ignore[call-overload]
    args = pipeline.build_training(settings.training, folder / "checkpoints", settings.seed)
    shown = (
        "learning_rate",
        "heads_learning_rate",
        "weight_decay",
        "warmup_steps",
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "lr_scheduler_type",
        "bf16",
        "save_steps",
    )
    values = {key: getattr(args, key) for key in shown}
    plan["training"] = {key: getattr(value, "value", value) for key, value in values.items()} | settings.training
    data = pipeline.training_data(settings, pipeline.outline_of(settings)[1], args)
    paired = isinstance(data, list)
    plan |= {"pairs": len(data)} if paired else {"texts": {"forget": len(data.forget), "retain": len(data.retain)}}
    plan["steps"] = pipeline.steps_of(args, len(data))
    plan["out"] = str(folder)
    plan["estimate"] = _figures(settings, data)
    _print_tree(plan, as_json)


def _figures(settings: Any, data: Any = None) -> dict[str, Any]:
    from expunge.doctor import advice, forecast
    from expunge.estimate import CannotEstimate

    try:
        made = forecast(settings, data)
    except CannotEstimate as error:
        return {"unavailable": str(error)}
    memory = {name: round(size / 1e9, 2) for name, size in {"process": made.process, **made.memory}.items()}
    return {
        "truncation": made.truncation,
        "parameters": made.parameters,
        "trained": made.trained,
        "memory_gb": memory,
        "peak_gb": round(made.peak / 1e9, 2),
        "step_tflop": float(f"{made.operations / 1e12:.3g}"),
        "minutes": None if made.seconds is None else float(f"{made.seconds / 60:.2g}"),
        "verdict": advice(made, settings),
    }


def _print_headline(folder: Path, as_json: bool) -> None:
    from expunge.report.tables import headline, to_records
    from expunge.rows import read_rows

    rows = read_rows(folder / "results.jsonl")
    if as_json:
        _json_line({"report": str(folder / "report.html"), "figures": to_records(rows)})
        return
    made = headline({folder.name: rows})
    table = Table(title="reference against unlearned")
    for i, header in enumerate(made.headers):
        table.add_column(header, justify="left" if i == 0 else "right")
    for row in made.rows:
        table.add_row(*row)
    out.print(table)
    _print_paths({"report": folder / "report.html"}, as_json)


@contextlib.contextmanager
def _bar(what: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error; inside, (done, in all) moves it on."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _print_paths(paths: dict[str, Path], as_json: bool) -> None:
    if as_json:
        _json_line({name: str(path) for name, path in paths.items()})
        return
    for name, path in paths.items():
        out.print(f"{name}: {path}", soft_wrap=True, markup=False, highlight=False)


def _print_tree(tree: dict[str, Any], as_json: bool) -> None:
    import yaml

    if as_json:
        _json_line(tree)
    else:
        print(yaml.safe_dump(tree, sort_keys=False, width=120), end="", flush=True)


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ExpungeError(f"standard input: not UTF-8 text (byte {error.start}); convert it to UTF-8") from None


def _json_line(record: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")


def main() -> None:
    """Run the command line; one line and a non-zero status for anything that the user can mend."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("expunge").setLevel(logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        if status := app(prog_name="expunge", standalone_mode=False) or 0:  # it takes Ctrl-C for itself
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
        if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        reason = str(error).split("\n")[0]
        _complain(f"out of memory ({reason}): `expunge doctor` says what a run takes, and what would make it smaller")
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it closes the pipe
        sys.exit(1)


def _complain(reason: str) -> None:
    """One line, whatever a library put into it."""
    print("expunge:", " ".join(reason.split()), file=sys.stderr)
