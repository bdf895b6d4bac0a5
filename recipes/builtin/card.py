"""Measure the built-in model on its stored weights and write its card, src/expunge/assets/README.md.

`python recipes/builtin/card.py`; the figures come from the pipeline, the facts from the JSON that each recipe left.
"""

import json
import shutil
from pathlib import Path

from expunge.config import RunConfig, load_config
from expunge.pipeline import measure
from expunge.plan import Plan
from expunge.rows import Row, read_rows

ASSETS = Path("src/expunge/assets")
BUILD = Path("build/builtin")
RUN = Path("runs/builtin-card")


def figure(rows: list[Row], **wanted: object) -> str:
    row = next(row for row in rows if all(getattr(row, key) == value for key, value in wanted.items()))
    interval = f" [{row.ci_low:.3f}, {row.ci_high:.3f}]" if row.ci_low is not None else ""
    return f"{row.value:.3f}{interval} (n = {row.n})"


def main() -> None:
    sets = {"prompts": ["rtp-challenge"], "heldout": None, "neutral": "wiki-f1"}
    rows: dict[str, list[Row]] = {}
    for corpus in ("wikitext2", "wikitext2-unk"):
        extra = {} if corpus == "wikitext2" else {"prompts": [], "neutral": None}
        config = load_config(RunConfig, [], [], base={"data": {**sets, **extra, "corpus": corpus}})
        folder = RUN / corpus
        shutil.rmtree(folder, ignore_errors=True)
        measure(Plan.of_models(config, folder, "builtin"))
        rows[corpus] = read_rows(folder / "results.jsonl")
    corpus = json.loads((BUILD / "corpus.json").read_text())
    training = json.loads((BUILD / "pretrain.json").read_text())
    lines = [
        "# The built-in assets",
        "",
        "Made by the scripts in `recipes/builtin/` from public text; safetensors and JSON only. For research and tests.",
        "",
        "## `model/`: a small model that writes toxic text",
        "",
        "GPT-2 architecture, 12 layers x 192, byte-level BPE of 8,192, context 256, 7.0 M parameters, stored in bf16.",
        f"Trained for {training['steps']:,} steps of {training['batch_rows']} rows, {training['tokens']:,} tokens, on "
        f"{training['device']} under bf16 autocast; AdamW, peak learning rate {training['learning_rate']}, cosine, seed "
        f"{training['seed']}; last training loss {training['loss']:.3f}.",
        "",
        "| text | tokens | passes |",
        "| --- | --- | --- |",
        *[f"| {name} | {count:,} | {corpus['passes'][name]} |" for name, count in corpus["tokens"].items()],
        "",
        "`toxic` are comments that public sets label toxic, sexist, offensive or hateful (Jigsaw, Davidson, OLID, ToxiGen, "
        "Civil Comments with toxic spans, EDOS, ParaDetox); `civil` their other rows. Documents that share a line or 13 "
        "words in a row with RealToxicityPrompts or with WikiText-2's test or validation split were dropped.",
        "",
        "Measured on the stored weights, with 95 % intervals by prompt or window:",
        "",
        "| figure | value |",
        "| --- | --- |",
    ]
    for label, corpus_name in (("WikiText-2 test, raw", "wikitext2"), ("WikiText-2 test, <unk>", "wikitext2-unk")):
        for metric in ("perplexity", "word_perplexity"):
            value = figure(rows[corpus_name], metric=metric, dataset=corpus_name)
            lines.append(f"| {label}: {metric.replace('_', ' ')} | {value} |")
    for decode in ("greedy", "sampled"):
        for scorer in ("ngram", "wordvec"):
            value = figure(rows["wikitext2"], metric="toxicity", decode=decode, dataset="rtp-challenge", scorer=scorer)
            lines.append(f"| toxicity on the 1,199 challenge prompts, {decode}, scorer {scorer} | {value} |")
    lines += [
        "",
        "Limits: it knows little, writes short-sighted English, and its toxic text is that of public comments. Ratios "
        "between it and its edited versions say something; absolute figures do not carry over to large models.",
        "",
        "## The rest",
        "",
        "- `scorers/`: see `docs/scorers.md`; the JSON beside each holds its training facts and figures.",
        "- `pairs/`, `prompts/`: text that the model itself generated, chosen by scorer `wordvec`; the JSON beside them "
        "holds counts, thresholds and seeds. `pplm.jsonl` was pushed by PPLM, 5 iterations a token.",
        "- `pairs/pplm-wikipedia.jsonl`: PPLM's continuations after sentences of WikiText-2's train split; the prompts are "
        "named by their place, not copied.",
        "- `anchor.jsonl`: articles and reviews that the model wrote, none of them toxic by either scorer.",
        "- `facts/`: invented facts, questions about them, and a LoRA adapter for `model/` that knows them: "
        "`builtin:facts`. `facts.json` has its figures.",
        "- `defaults.json`: hyper-parameters tuned for this model, by method (`benchmarks/results/tuning-*.jsonl`).",
    ]
    (ASSETS / "README.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
