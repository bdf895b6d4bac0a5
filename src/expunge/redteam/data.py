"""What a red team works with: its attacks, what an attacker has, and what is measured, which the attacker does not see."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expunge import assembly
from expunge.attacks import ATTACKS, Attack, AttackData, cases
from expunge.attacks.base import check_names
from expunge.config import RedTeamConfig, RunConfig
from expunge.data import Text, load_corpus, load_pairs, load_prompts, load_unpaired
from expunge.errors import ExpungeError
from expunge.metrics.evaluation import EvaluationData, EvaluationPlan

WORDS = 8
"""A line of running text with so many is no heading."""

log = logging.getLogger("expunge")


def settings_of(config: RunConfig) -> tuple[RedTeamConfig, dict[str, list[Attack]]]:
    """How the red team works, and the cases of each attack. Raises ExpungeError for what there is not."""
    team = config.redteam or RedTeamConfig()
    names = [name for one in team.attacks for name in (ATTACKS.names() if one == "all" else [one])]
    own = config.attack or {}
    check_names([*names, *own])
    return team, {name: cases(name, team.budget, own.get(name)) for name in dict.fromkeys(names)}


def check_unreported(config: RunConfig, team: RedTeamConfig) -> None:
    """Raise ExpungeError for a set to search or to choose with that is reported too."""
    reported = [name for name in (*config.data.prompts, config.data.heldout, *assembly.texts_of(config.data)) if name]
    for key in ("validation", "search", "neutral"):
        name = getattr(team, key)
        if name and any(_same(name, other) for other in reported):
            raise ExpungeError(f"redteam.{key}={name}: it is reported too; what is chosen by it would flatter it")


def attackers_data(
    config: RunConfig, team: RedTeamConfig, tokenizer: Any, scorer: Any, measured: EvaluationData
) -> AttackData:
    """What an attacker has, but for what is measured. Raises ExpungeError where nothing else is left of a part."""
    check_unreported(config, team)
    args = assembly.build_training(config.training, Path("unused"), config.seed)
    forget, retain = _trained_on(config, tokenizer, args.max_continuation_tokens)
    pairs = load_pairs(team.validation, tokenizer=tokenizer) if team.validation else []
    search = load_prompts(team.search, tokenizer=tokenizer) if team.search else []
    sources, seen = config.data, _texts_of(measured)
    return AttackData(
        tokenizer,
        _unmeasured(forget, seen, f"the forget set, {sources.train or sources.forget},"),
        _unmeasured(retain, seen, f"the retain set, {sources.train or sources.retain},"),
        _unmeasured([Text(pair.prompt, pair.rejected) for pair in pairs], seen, f"redteam.validation={team.validation}"),
        [text.prompt for text in _unmeasured([Text(p.text, "") for p in search], seen, f"redteam.search={team.search}")],
        _unmeasured_text(load_corpus(team.neutral), measured, team.neutral) if team.neutral else "",
        scorer.score,
        args.max_prompt_tokens,
        args.max_continuation_tokens,
        measured_plan(config),
    )


def _trained_on(config: RunConfig, tokenizer: Any, passage: int) -> tuple[list[Text], list[Text]]:
    """The forget and the retain set; of a model of which nothing is known, both empty."""
    data = assembly.one_kind(config.data)
    if data.train is not None:
        pairs = load_pairs(data.train, limit=data.limit, seed=config.seed, tokenizer=tokenizer)
        return [Text(pair.prompt, pair.rejected) for pair in pairs], [Text(pair.prompt, pair.chosen) for pair in pairs]
    if data.forget is None or data.retain is None:
        return [], []
    sets = load_unpaired(data.forget, data.retain, data.limit, config.seed, tokenizer, passage)
    return list(sets.forget), list(sets.retain)


def _texts_of(measured: EvaluationData) -> set[str]:
    """Prompts that are measured, and held-out pairs' texts."""
    asked = {prompt for prompts in measured.challenge.values() for prompt in prompts}
    asked |= {pair.prompt + text for pair in measured.pairs for text in ("", pair.chosen, pair.rejected)}
    return {text.strip() for text in asked} - {""}


def _unmeasured(texts: Sequence[Text], seen: set[str], source: str) -> list[Text]:
    """Those whose prompt, or whole text, is not among `seen`: what is found with others would flatter the attack."""
    left = [text for text in texts if not seen & {text.prompt.strip(), (text.prompt + text.completion).strip()}]
    if texts and not left:
        raise ExpungeError(f"{source}: it is reported too, all of it; what is found with it would flatter the attack")
    if len(left) < len(texts):
        log.warning("attack: %s: %d of %d texts are reported too, and left out", source, len(texts) - len(left), len(texts))
    return left


def _unmeasured_text(text: str, measured: EvaluationData, name: str) -> str:
    """Running text without the lines that perplexity is reported on; short ones, such as headings, stay."""
    reported = {line.strip() for corpus in measured.corpora.values() for line in corpus.splitlines() if _is_long(line)}
    lines = text.splitlines(keepends=True)
    left = [line for line in lines if line.strip() not in reported]
    if len(left) == len(lines):
        return text
    if not any(map(_is_long, left)):
        raise ExpungeError(
            f"redteam.neutral={name}: it is reported too, all of it; what is kept by it would flatter the attack"
        )
    log.warning(
        "attack: redteam.neutral=%s: %d of %d lines are reported too, and left out", name, len(lines) - len(left), len(lines)
    )
    return "".join(left)


def _is_long(line: str) -> bool:
    return len(line.split()) >= WORDS


def _same(name: str, other: str) -> bool:
    """Do both name one set, or one file?"""
    return name == other or (Path(name).is_file() and Path(other).is_file() and Path(name).samefile(other))


def measured_data(config: RunConfig, tokenizer: Any) -> EvaluationData:
    """What a run is measured on, but for the prompts of F1."""
    data = dataclasses.replace(config.data, neutral=None)
    asked = dataclasses.replace(config.evaluation, harness=[], s_unlearning=None)
    return assembly.evaluation_data(data, asked, tokenizer)


def measured_plan(config: RunConfig) -> EvaluationPlan:
    """How: nothing is forced but by an attack."""
    return dataclasses.replace(assembly.evaluation_plan(config.evaluation), ks=(0,), perplexity_modes=("exact",))
