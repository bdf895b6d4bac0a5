"""Files of preference pairs: made from prompts chunk by chunk, and looked over before they are trained on.

write_pairs(Path("pairs.jsonl"), model, tokenizer, prompts, load_scorer("wordvec"), BestOfN())
for name, value in look_over(load_pairs("pairs.jsonl"), tokenizer, load_scorer("ngram")).items(): ...
"""

import contextlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from expunge.data.builders import BuildReport, build_pairs
from expunge.data.faults import text_faults
from expunge.data.labelled import load_probe_data
from expunge.data.pairs import Pair
from expunge.data.selection import Selection
from expunge.data.tokenize import split_pairs, tokenize_labelled, tokenize_pairs
from expunge.errors import ExpungeError
from expunge.ids import check_known
from expunge.models import context_length, loaded_identity
from expunge.probes import Probe, fit_probe, pooled_states
from expunge.provenance import data_digest, digest, software
from expunge.rows import read_lines, write_lines
from expunge.scorers import Scorer
from expunge.whole import write_text

CHUNK = 4096  # prompts: many, so that PPLM meets enough of equal length
PROBE_TOKENS = 128  # read of a text

log = logging.getLogger("expunge")


def write_pairs(
    path: Path,
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    scorer: Scorer,
    recipe: Selection,
    probe: Probe | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BuildReport:
    """Pairs as JSON lines {prompt, chosen, rejected} in `path`, the recipe and what became of the prompts beside it.

    Chunks of 4,096 prompts are kept in `path`.KEY.parts until the file is whole, so that the same call goes on after the
    last; once it is whole the same call only returns its report. progress: called with (prompts done, prompts in all).
    Scores and greedy sides of the report count pairs that are dropped because another chunk has them. Raises ExpungeError
    where no prompt gives a pair, and where `path` has something else, such as pairs of another model.
    """
    facts, key = pairs_key(model, tokenizer, prompts, scorer, recipe, probe)
    if (done := _made_before(path, key)) is not None:
        return done
    parts = path.with_name(f"{path.name}.{key[:12]}.parts")
    reports, pairs, seen = [], [], set()
    for start in range(0, len(prompts), CHUNK):
        part = parts / f"{start:08d}.jsonl"
        if not part.exists():
            chunk = prompts[start : start + CHUNK]

            def advance(done: int, total: int, start: int = start, size: int = len(chunk)) -> None:
                if progress:
                    progress(start + size * done // total, len(prompts))

            made, report = build_pairs(model, tokenizer, chunk, scorer, recipe, probe=probe, progress=advance)
            write_lines(part, [asdict(report), *(asdict(pair) for pair in made)])
        head, *rows = read_lines(part)
        reports.append(BuildReport(**head))
        for row in rows:
            if not seen & set(row.values()):
                seen |= set(row.values())
                pairs.append(row)
        if progress:
            progress(min(start + CHUNK, len(prompts)), len(prompts))
    total = _sum(reports, len(pairs))
    if not pairs:
        shutil.rmtree(parts)
        raise ExpungeError(f"no prompt of {len(prompts)} gave a pair ({total.dropped}); lower toxic, or take other prompts")
    write_lines(path, pairs)
    made = {**facts, **asdict(total), "key": key, "pairs_sha256": data_digest(pairs)}
    write_text(path.with_suffix(".facts.json"), json.dumps(made, indent=1) + "\n")
    shutil.rmtree(parts)
    return total


def pairs_key(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], scorer: Scorer, recipe: Selection, probe: Probe | None = None
) -> tuple[dict[str, Any], str]:
    """What is told of pairs, and a hash of all that they follow from."""
    found = loaded_identity(model, tokenizer)
    facts = {
        "strategy": type(recipe).__name__,
        "recipe": asdict(recipe),
        "scorer": scorer.name,
        "scorer_digest": scorer.digest,
        "model_sha256": found.weights,
        "probe_auc": probe and round(probe.auc, 4),
    }
    fitted = probe and [probe.weight.tolist(), probe.bias]
    return facts, digest([facts, found.key, software(), CHUNK, data_digest(prompts), fitted])


def _made_before(path: Path, key: str) -> BuildReport | None:
    """The report of the pairs in `path`, which are those of `key`; None where there is no file."""
    if not path.exists():
        return None
    facts: Any = {}
    with contextlib.suppress(OSError, ValueError):
        facts = json.loads(path.with_suffix(".facts.json").read_text(encoding="utf-8"))
    if facts.get("key") != key:
        raise ExpungeError(f"{path} is there, and was not made by this call from this model and these prompts: name another")
    if facts.get("pairs_sha256") != data_digest(read_lines(path)):
        raise ExpungeError(f"{path} was changed since its pairs were made: name another file, or remove it")
    log.info("%s: made before", path)
    return BuildReport(**{field.name: facts[field.name] for field in fields(BuildReport)})


def _sum(reports: Sequence[BuildReport], pairs: int) -> BuildReport:
    """One report of all chunks; what repeats across them is dropped as duplicate."""
    made = sum(report.pairs for report in reports)
    dropped = sum((Counter(report.dropped) for report in reports), Counter())
    dropped["duplicate"] += made - pairs

    def mean(name: str) -> float:
        return sum(getattr(report, name) * report.pairs for report in reports) / max(1, made)

    return BuildReport(
        prompts=sum(report.prompts for report in reports),
        pairs=pairs,
        greedy=sum(report.greedy for report in reports),
        chosen_score=mean("chosen_score"),
        rejected_score=mean("rejected_score"),
        dropped={reason: n for reason, n in dropped.items() if n},
    )


def probe_for(model: nn.Module, tokenizer: Any, source: str, limit: int = 2000) -> Probe:
    """A probe on the mean of final states, fitted on labelled text or on the two sides of a named set of pairs.

    limit: at most so many texts, or pairs. Raises ExpungeError as the loaders and `fit_probe` do.
    """
    longest = min(PROBE_TOKENS, context_length(model))
    rows = tokenize_labelled(load_probe_data(source, limit), tokenizer, longest)
    probe = fit_probe(pooled_states(model, [ids for ids, _ in rows]), [int(bad) for _, bad in rows])
    log.info("probe on %s: %d texts, AUC %.3f in 5-fold cross-validation", source, len(rows), probe.auc)
    return probe


def look_over(pairs: Sequence[Pair], tokenizer: Any, scorer: Scorer, known: int | None = None) -> dict[str, Any]:
    """What a set of pairs is like: counts, lengths in tokens, scores, and `warnings` for what would mislead training.

    known: how many tokens the model's embedding has; ExpungeError for one beyond them. None: no bound is known.
    """
    rows = split_pairs(tokenizer, pairs)
    check_known((ids for prompt, sides, _ in rows for ids in (prompt, *sides)), known, tokenizer)
    _, truncation = tokenize_pairs(pairs, tokenizer)
    texts = {side: [getattr(pair, side) for pair in pairs] for side in ("prompt", "chosen", "rejected")}
    scores = {side: scorer.score(found) for side, found in texts.items()}
    sizes = np.array([[len(prompt), *map(len, sides)] for prompt, sides, _ in rows])
    lengths = dict(zip(texts, sizes.T, strict=True))
    repeated = {side: len(found) - len(set(found)) for side, found in texts.items()}
    above = float(np.mean(scores["rejected"] > scores["chosen"]))
    longer = float(np.mean(lengths["rejected"] > lengths["chosen"]) + np.mean(lengths["rejected"] == lengths["chosen"]) / 2)
    crossed = len(set(texts["chosen"]) & set(texts["rejected"]))
    warnings = []
    if above < 0.9:
        warnings.append(
            f"{scorer.name} finds the rejected side more toxic in {above:.0%} of the pairs only: are they swapped?"
        )
    if abs(longer - 0.5) > 0.25:
        warnings.append(f"length gives the rejected side away: it is the longer one in {longer:.0%} of the pairs")
    if crossed:
        warnings.append(f"{crossed} texts are chosen in one pair and rejected in another")
    if repeated["rejected"] + repeated["chosen"] > len(pairs) / 10:
        warnings.append("more than a tenth of the continuations repeat others")
    warnings += text_faults(pairs, tokenizer)
    return {
        "pairs": len(pairs),
        "tokens": str(truncation),
        "mean tokens": {side: round(float(found.mean()), 1) for side, found in lengths.items()},
        "repeated": repeated,
        f"mean score by {scorer.name}": {side: round(float(found.mean()), 3) for side, found in scores.items()},
        "rejected scores higher": round(above, 3),
        "rejected is longer": round(longer, 3),
        "warnings": warnings,
    }
