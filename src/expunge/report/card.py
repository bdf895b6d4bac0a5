"""The card of a run's model: `model/README.md`, whose front matter a model hub reads.

    write_card(Path("runs/first/model"), read_run(Path("runs/first")))

Form: https://huggingface.co/docs/hub/model-cards. What is local stays out: of a path only the last part is named.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from expunge.report.files import RunFiles, flat
from expunge.report.formats import markdown, to_markdown
from expunge.report.tables import headline, headline_rows
from expunge.rows import Row
from expunge.whole import write_text

log = logging.getLogger("expunge")

MARK = "Written by expunge, and again with each report; without this line it is left alone."
PREFIX = re.compile(r"((?:(?:hf|jsonl|json|csv|tsv|parquet|txt|tokens|raw):)?)(.*)", re.DOTALL)
ENDINGS = {".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt"}
KEPT = ("environment.expunge", "environment.source", "environment.packages.", "scorers.", "seeds.")
SETTINGS = (
    "revision", "dtype", "quantization", "method", "training", "lora", "data.train", "data.forget", "data.retain",
    "data.limit", "seed",
)  # fmt: skip


def write_card(folder: Path, run: RunFiles) -> None:
    """Write `folder/README.md`; nothing where there is no such folder, or another's README.md in it."""
    path = folder / "README.md"
    if not folder.is_dir():
        return
    if path.exists() and not _is_replaceable(path.read_text(encoding="utf-8", errors="replace")):
        log.info("%s is not expunge's: left alone", path)
        return
    marks = {"adapter_config.json": "peft", "steering.json": "expunge"}
    library = next((library for file, library in marks.items() if (folder / file).is_file()), "transformers")
    write_text(path, render_card(run, library))


def render_card(run: RunFiles, library: str) -> str:
    """The card as Markdown with YAML front matter; `library` loads the folder: transformers, peft, or expunge if steered."""
    method = run.settings.get("method")
    name = str(method.get("name")) if isinstance(method, dict) else "unknown"
    model = str(run.settings.get("model"))
    rows = _public_rows(run.rows)
    front: dict[str, Any] = {"base_model": model, "library_name": library, "pipeline_tag": "text-generation"}
    ours = model.split(":")[0] == "builtin"
    local = ours or _is_path(model)
    if local:
        del front["base_model"]
    front["tags"] = ["unlearning", "expunge", name]
    if results := _results(rows):
        front["model-index"] = [{"name": run.name, "results": results}]
    return (
        _environment()
        .get_template("card.md.j2")
        .render(
            front=Markup(yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=1000)),
            mark=Markup(MARK),
            run=run,
            name=name,
            model="expunge's built-in model" if model == "builtin" else public(model),
            builtin=ours,
            applied=(run.provenance.get("stages") or {}).get("train", {}).get("steps") == 0,
            unpaired=bool((run.settings.get("data") or {}).get("forget")),
            library=library,
            local_base=local,
            remote_code=run.settings.get("trust_remote_code") is True,
            table=Markup(to_markdown(headline({run.name: rows}))),
            scorers=list(dict.fromkeys(figure.scorer for figure, _ in headline_rows(rows) if figure.scorer)),
            attacked=any(row.stage == "attack" for row in rows),
            settings=[
                (key, public(value)) for key, value in flat(run.settings) if _is_named(key, SETTINGS) and value != "none"
            ],
            facts=list(_facts(run.provenance)),
        )
    )


def public(name: str) -> str:
    """`name` without the folders of this machine; a hub's `owner/name` stays."""
    prefix, body = PREFIX.fullmatch(name).groups()  # type: ignore[union-attr]
    return prefix + (re.split(r"[/\\]", body.rstrip("/\\"))[-1] if _is_path(body) else body)


def _is_path(name: str) -> bool:
    if name.startswith(("/", ".", "~")) or "\\" in name or Path(name).suffix in ENDINGS:
        return True
    try:
        return Path(name).exists()
    except OSError:  # longer than any file's name
        return False


def _public_rows(rows: Iterable[Row]) -> list[Row]:
    """The rows with data sets and scorers named for the public, apart where they were apart before."""
    rows = list(rows)
    named: dict[str, str] = {}
    for name in dict.fromkeys(name for row in rows for name in (row.dataset, row.scorer) if name):
        short = public(name)
        same = sum(public(other) == short for other in named)
        named[name] = f"{short} ({same + 1})" if same else short
    return [
        dataclasses.replace(row, dataset=named.get(row.dataset or ""), scorer=named.get(row.scorer or "")) for row in rows
    ]


def _results(rows: list[Row]) -> list[dict[str, Any]]:
    """The headline's figures of the unlearned model and their ratios, as a `model-index` holds them."""
    found: dict[str, list[dict[str, Any]]] = {}
    for figure, roles in headline_rows(rows):
        for role in ("unlearned", "ratio"):
            row = roles.get(role)
            if row is None or not math.isfinite(row.value):
                continue
            detail = figure._replace(dataset=None).detail
            name = f"{figure.name}{' ratio to the reference' if role == 'ratio' else ''}{f' ({detail})' if detail else ''}"
            metric = {"type": row.metric, "name": name, "value": float(row.value), "args": dict(_arguments(row))}
            found.setdefault(row.dataset or "unnamed", []).append(metric)
    task = {"type": "text-generation", "name": "Text generation"}
    # a hub takes no other characters for a data set's type
    return [
        {"task": dict(task), "dataset": {"name": name, "type": re.sub(r"[^\w./-]+", "-", name)}, "metrics": metrics}
        for name, metrics in found.items()
    ]


def _arguments(row: Row) -> Iterator[tuple[str, Any]]:
    for name in ("decode", "side", "k", "mode", "scorer", "samples", "seed", "n", "ci_low", "ci_high", "chance"):
        value = getattr(row, name)
        if value is not None and not (isinstance(value, float) and not math.isfinite(value)):
            yield name, value


def _facts(provenance: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Versions, seeds and hashes, without what tells of the machine."""
    for key, value in flat(provenance):
        section, _, name = key.partition(".")
        if key.startswith(KEPT) or key.endswith("sha256"):
            yield f"{section}.{public(name)}" if section == "scorers" else key, value


def _is_named(path: str, names: Iterable[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in names)


def _is_replaceable(text: str) -> bool:
    """Ours, or the hub's empty form, which PEFT leaves beside every adapter."""
    if MARK in text:
        return True
    from huggingface_hub import ModelCard, ModelCardData

    form = ModelCard.from_template(ModelCardData()).text
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    return body.partition("### Framework versions")[0].strip() == form.partition("### Framework versions")[0].strip()


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        # a str subclass is Markup: made by us
        finalize=lambda value: markdown(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
