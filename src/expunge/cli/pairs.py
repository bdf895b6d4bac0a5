"""`expunge pairs build` and `expunge pairs validate`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.cli.options import PROMPTS, Json, Overrides, Quiet, expanded, loads_a_model
from expunge.cli.printing import bar, hush, print_tree
from expunge.errors import ExpungeError
from expunge.listing import completer
from expunge.registry import did_you_mean


@loads_a_model
def build_pairs(
    overrides: Overrides = None,
    prompts: Annotated[
        str,
        typer.Option(
            help="What is continued: a named set, a file, a hub set, or - (standard input).", autocompletion=PROMPTS
        ),
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
    output: Annotated[Path, typer.Option("--out", "-o", callback=expanded, help="The file of pairs, JSON lines.")] = Path(
        "pairs.jsonl"
    ),
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
    hush()
    judge = load_scorer(scorer)
    loaded, tokenizer = load_model(model, **{"dtype": "float32", **loading})
    texts = [prompt.text for prompt in load_prompts(prompts, limit, tokenizer)]
    probe = probe_for(loaded, tokenizer, probe_data) if strategy == "pplm" else None
    with bar("prompts", quiet) as advance:
        report = write_pairs(output, loaded, tokenizer, texts, judge, recipe, probe, advance)
    print_tree({"file": str(output), **dataclasses.asdict(report)}, as_json)


def validate_pairs(
    source: Annotated[str, typer.Argument(help="Preference pairs: a named set, a file, a hub set, or - (standard input).")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Whose tokenizer counts tokens, and renders chats.")
    ] = "builtin",
    scorer: Annotated[str, typer.Option(help="A scorer's name.", autocompletion=completer("scorers"))] = "ngram",
    as_json: Json = False,
) -> None:
    """Look a set of pairs over: form, lengths, repeats, scores, and warnings of what would mislead training."""
    from expunge.data import load_pairs
    from expunge.data.pair_files import look_over
    from expunge.models import known_of, load_outline
    from expunge.scorers import load_scorer

    hush()
    outline, tokenizer = load_outline(model)
    pairs = load_pairs(source, tokenizer=tokenizer)
    print_tree(look_over(pairs, tokenizer, load_scorer(scorer), known_of(outline)), as_json)
