"""Commands on texts: `generate`, `score`."""

import math
import sys
from typing import Annotated, Any

import typer

from expunge.cli.options import PROMPTS, Json, Quiet, loads_a_model
from expunge.cli.printing import check_plain, hush, json_line
from expunge.errors import ExpungeError
from expunge.listing import completer


@loads_a_model
def generate(
    prompts: Annotated[
        str, typer.Argument(help="A file of prompts, a named set, or - for standard input.", autocompletion=PROMPTS)
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
    from expunge.ids import continuation_text, prompt_ids
    from expunge.models import load_model

    hush()
    loaded, tokenizer = load_model(model, **{"dtype": "float32", **loading})
    texts = [prompt.text for prompt in load_prompts(prompts, tokenizer=tokenizer)]
    ids = prompt_ids(tokenizer, texts)
    decoding = Decoding(max_new_tokens=max_new_tokens, samples=samples, top_p=top_p, temperature=temperature, seed=seed)
    for text, prompt, continuations in zip(texts, ids, generate(loaded, tokenizer, ids, decoding), strict=True):
        for sample, continuation in enumerate(continuations):
            added = continuation_text(tokenizer, prompt, continuation)
            json_line({"prompt": text, "sample": sample, "continuation": added})


def score(
    file: Annotated[str, typer.Argument(help="A file of rows with `text`, or - for JSON lines on standard input.")],
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
    """Toxicity of texts: the rows as JSON lines with `score`, in order; of several scorers `scores`, and their agreement."""
    from expunge.data.named import file_at
    from expunge.data.records import read_records
    from expunge.scorers import load_scorer

    names = scorer or ["ngram"]
    if any(name.startswith("hf:") for name in names):
        hush()
    records = []
    for where, record in read_records(file_at(file, default="jsonl")):
        if not isinstance(record.get("text"), str):
            raise ExpungeError(f"{where}: no field 'text' with text in it (found: {', '.join(map(str, record)) or 'none'})")
        check_plain(record, where)
        records.append(record)
    texts = [record["text"] for record in records]
    scorers = [load_scorer(name) for name in names]
    found = {each.name: each.score(texts) for each in scorers}
    for number, record in enumerate(records):
        scores = {name: round(float(values[number]), 6) for name, values in found.items()}
        record |= {"score": next(iter(scores.values()))} if len(scorers) == 1 else {"scores": scores}
    if as_json:
        json_line({"records": records, "agreement": _agreement(found)})
        return
    for record in records:
        json_line(record)
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
