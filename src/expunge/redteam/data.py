"""What a red team works with: its attacks, what an attacker has, and what is measured, which the attacker does not see."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from expunge.attacks import ATTACKS, Attack, AttackData, cases
from expunge.attacks.base import check_names
from expunge.config import RedTeamConfig, RunConfig
from expunge.data import Text, Unpaired
from expunge.errors import ExpungeError
from expunge.metrics.evaluation import EvaluationData, EvaluationPlan
from expunge.plan import Plan, one_kind, texts_of

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
    reported = [name for name in (*config.data.prompts, config.data.heldout, *texts_of(config.data)) if name]
    for key in ("validation", "search", "neutral"):
        name = getattr(team, key)
        if name and any(_same(name, other) for other in reported):
            raise ExpungeError(f"redteam.{key}={name}: it is reported too; what is chosen by it would flatter it")


def attackers_data(plan: Plan, team: RedTeamConfig) -> AttackData:
    """What an attacker has, but for what is measured. Raises ExpungeError where nothing else is left of a part."""
    check_unreported(plan.config, team)
    sources, measured = plan.sources, plan.attacked_data
    forget, retain = _trained_on(plan)
    pairs = sources.pairs(team.validation) if team.validation else []
    search = sources.prompts(team.search) if team.search else []
    named, seen = plan.config.data, _texts_of(measured)
    return AttackData(
        plan.tokenizer,
        _unmeasured(forget, seen, f"the forget set, {named.train or named.forget},"),
        _unmeasured(retain, seen, f"the retain set, {named.train or named.retain},"),
        _unmeasured([Text(pair.prompt, pair.rejected) for pair in pairs], seen, f"redteam.validation={team.validation}"),
        [text.prompt for text in _unmeasured([Text(p.text, "") for p in search], seen, f"redteam.search={team.search}")],
        _unmeasured_text(sources.corpus(team.neutral), measured, team.neutral) if team.neutral else "",
        plan.scorers[0].score,
        plan.args.max_prompt_tokens,
        plan.args.max_continuation_tokens,
        attacked_plan(plan),
    )


def _trained_on(plan: Plan) -> tuple[list[Text], list[Text]]:
    """The forget and the retain set; of a model of which nothing is known, both empty."""
    found = plan.sources.trained_on(one_kind(plan.config.data), plan.config.seed, plan.args.max_continuation_tokens) or []
    if isinstance(found, Unpaired):
        return list(found.forget), list(found.retain)
    return [Text(pair.prompt, pair.rejected) for pair in found], [Text(pair.prompt, pair.chosen) for pair in found]


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


def attacked_plan(plan: Plan) -> EvaluationPlan:
    """How an attacked model is measured: nothing is forced but by an attack."""
    return dataclasses.replace(plan.evaluation_plan, ks=(0,), perplexity_modes=("exact",))
