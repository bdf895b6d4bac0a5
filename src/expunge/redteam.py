"""The attack stage: every attack on the unlearned model and on its reference, each attacked model measured like any other.

    rows = red_team(config, Path("runs/attacks"), "runs/first/model", "builtin")

A case is one attack with one setting and one draw on one subject. OUT/attacks/CASE keeps what it gave, so that the same call
goes on after the last whole one; cases on a reference are shared by runs. A rise that the untouched model shows too is no
recovery, so rows of the unlearned model are paired with those of the reference under the same attack.
"""

import dataclasses
import functools
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from expunge import assembly, pipeline
from expunge.attacks import ATTACKS, Attack, AttackData, AttackResult, Budget, cases
from expunge.attacks.base import PARTS, check_names
from expunge.config import RedTeamConfig, RunConfig, cache_folder
from expunge.data import Text, load_corpus, load_pairs, load_prompts, load_unpaired
from expunge.errors import ExpungeError
from expunge.metrics.evaluation import EvaluationData, EvaluationPlan, check_room, evaluate_model
from expunge.metrics.figures import Evaluation
from expunge.metrics.figures import rows as figure_rows
from expunge.models import context_length, load_model, weights_digest
from expunge.provenance import digest, digest_all, peak_memory_bytes
from expunge.report import write_report
from expunge.report.attacks import NONE, summary, write_attacks
from expunge.rows import Row, write_rows
from expunge.scorers import load_scorer
from expunge.whole import whole, write_text

log = logging.getLogger("expunge")


@dataclass(frozen=True)
class Subject:
    """A model that is attacked. shared: its cases lie where all runs find them."""

    name: str
    model: Any
    digest: str
    shared: bool


@dataclass(frozen=True)
class Case:
    """What an attack left: its evaluation, and `facts` about it, in JSON's types."""

    evaluation: Evaluation
    facts: Mapping[str, Any]


def settings_of(config: RunConfig) -> tuple[RedTeamConfig, dict[str, list[Attack]]]:
    """How the red team works, and the cases of each attack.

    Raises ExpungeError for what there is not, and for a set to search or choose with that is reported too.
    """
    team = config.redteam or RedTeamConfig()
    names = [name for one in team.attacks for name in (ATTACKS.names() if one == "all" else [one])]
    own = config.attack or {}
    check_names([*names, *own])
    reported = [name for name in (*config.data.prompts, config.data.heldout, config.data.corpus) if name]
    for key in ("validation", "search", "neutral"):
        name = getattr(team, key)
        if name and any(_same(name, other) for other in reported):
            raise ExpungeError(f"redteam.{key}={name}: it is reported too; what is chosen by it would flatter it")
    return team, {name: cases(name, team.budget, own.get(name)) for name in dict.fromkeys(names)}


def red_team(
    config: RunConfig,
    folder: Path,
    model: str | Path,
    reference: str | Path | None,
    quiet: bool = False,
    reference_revision: str | None = None,
    before: Sequence[Row] = (),
) -> list[Row]:
    """Attack `model`, and `reference` where there is one, into `folder`: attacks.jsonl, and attacks.* as tables.

    config: resolved, or with an empty `method` where that is not known. Returns the rows of results.jsonl: those of
    `before`, then the summary. Raises ExpungeError before any work where an attack lacks what it needs, and in the end where
    attacks failed; what the others gave is written then.
    """
    team, attacks = settings_of(config)
    scorers = [load_scorer(name) for name in config.evaluation.scorers]
    unlearned, tokenizer = load_model(model, revision=config.revision, **assembly.loading(config))
    unlearned = merged(unlearned)
    subjects = [Subject("unlearned", unlearned, weights_digest(unlearned), shared=False)]
    original = None
    if reference is not None:
        original = merged(load_model(reference, revision=reference_revision, **assembly.loading(config))[0])
        subjects.insert(0, Subject("reference", original, weights_digest(original), shared=True))
    measured, plan = measured_data(config, tokenizer), measured_plan(config)
    every = [attack for several in attacks.values() for attack in several]
    added = max((attack.adds for attack in every), default=0)
    longer = dataclasses.replace(plan, suffix=(0,) * added)
    room = added + check_room(measured, longer, tokenizer, context_length(unlearned))
    had = dataclasses.replace(attackers_data(config, team, tokenizer, scorers[0], measured), room=room)
    for attack in every:
        attack.check(unlearned, original, had)
    budget = Budget(team.steps, team.queries, team.seconds, team.utility_bound)
    about = {
        "expunge": version("expunge"),
        "measured": digest_all([measured]),
        "plan": plan,
        "scorers": [(scorer.name, scorer.digest) for scorer in scorers],  # in order: the first is the judge
        "attention": config.attn_implementation,
    }
    means = {"reference": subjects[0].digest if original is not None else None, "budget": budget}

    @functools.cache
    def given(needs: frozenset[str]) -> tuple[AttackData, str]:
        """What an attack needs and no more, so that what it does not see makes no case another; and a hash of it."""
        part = had.only(needs)
        unseen = ("tokenizer", "score", "plan", "room")  # of these `about` knows the plan and the scorer
        seen = [field.name for field in dataclasses.fields(part) if field.name not in unseen]
        return part, digest_all(getattr(part, name) for name in seen)

    common = {"stage": "attack", "run": folder.name, "model": str(config.model), "method": config.method.get("name")}
    rows: list[Row] = []
    seconds = 0.0
    failed: list[str] = []
    untouched: dict[str, Evaluation] = {}
    for name, variants in {NONE: [None], **attacks}.items():
        for attack in variants:
            found: dict[str, Case] = {}
            part, seen = given(frozenset(attack.needs if attack else ()))
            how = {**about, **({"attack": attack, "had": seen, **means} if attack else {})}
            for subject in subjects:
                place = _place(folder, subject, name, digest({**how, "subject": subject.digest}))
                if not _is_whole(place):
                    started = time.monotonic()
                    log.info("attack: %s on %s", _title(name, attack), subject.name)
                    try:
                        result = attack.run(subject.model, original, part, budget) if attack else AttackResult(subject.model)
                        own = dataclasses.replace(plan, **result.plan)
                        if result.idle and own == plan and subject.name in untouched:
                            evaluation = untouched[subject.name]
                        else:
                            evaluation = evaluate_model(result.model, tokenizer, measured, own, scorers, progress=not quiet)
                    except (ExpungeError, torch.OutOfMemoryError) as error:
                        failed.append(f"{_title(name, attack)} on {subject.name}: {str(error).splitlines()[0]}")
                        log.warning("attack: failed: %s", failed[-1])
                        continue
                    if not _is_whole(place):  # another run may have been faster, and be reading it
                        took = round(time.monotonic() - started, 1)
                        _keep(place, evaluation, _facts(name, attack, subject.name, result) | {"with_evaluation": took})
                    del result  # before the next model is attacked
                found[subject.name] = Case(Evaluation.load(place), _record(place))
                seconds += found[subject.name].facts["with_evaluation"]
                if attack is None:
                    untouched[subject.name] = found[subject.name].evaluation
            rows += _rows(found, {**common, "attack": name, "draw": attack.seed if attack else None}, config.evaluation.seed)
        write_rows(folder / "attacks.jsonl", rows)
    summarised = summary(rows, team.utility_bound)
    write_attacks(folder, summarised, team.utility_bound)
    results = [*before, *summarised]
    write_rows(folder / "results.jsonl", results)
    stage = {
        "weights_sha256": {subject.name: subject.digest for subject in subjects},
        "data_sha256": {"measured": about["measured"], "had": given(frozenset(PARTS))[1]},
        "seconds": round(seconds, 1),  # of all cases, also those that were there
        "peak_memory_bytes": peak_memory_bytes(),
    }
    pipeline.finish(folder, "attack", digest({**about, **means, "attacks": attacks}), stage)
    pipeline.write_provenance(folder, config, scorers)
    if failed:
        raise ExpungeError(f"{len(failed)} attacks failed, first {failed[0]}; the same command tries them again")
    return results


def run_and_attack(config: RunConfig, folder: Path, quiet: bool = False) -> list[Row]:
    """`pipeline.run`, and then the red team where the configuration has one: its summary ends results.jsonl."""
    rows = pipeline.run(config, folder, quiet)
    if config.redteam is None or not pipeline.is_main_process():
        return rows
    config = assembly.resolve(config)
    with pipeline.claim(folder, config):
        try:
            return red_team(config, folder, folder / "model", config.model, quiet, config.revision, rows)
        finally:
            write_report(folder)


def merged(model: Any) -> Any:
    """With its adapter, if it has one, in its weights, in float32: attacks change the weights that the model computes with.

    Weights that bitsandbytes holds stay: attacks that change weights refuse them.
    """
    if not hasattr(model, "merge_and_unload") or getattr(model, "is_quantized", False):
        return model
    return model.float().merge_and_unload()


def attackers_data(
    config: RunConfig, team: RedTeamConfig, tokenizer: Any, scorer: Any, measured: EvaluationData
) -> AttackData:
    """What an attacker has, but for what is measured. Raises ExpungeError where nothing else is left of a part."""
    args = assembly.build_training(config.training, Path("unused"), config.seed)
    forget, retain = _trained_on(config, tokenizer, args.max_continuation_tokens)
    pairs = load_pairs(team.validation, tokenizer=tokenizer) if team.validation else []
    search = load_prompts(team.search, tokenizer=tokenizer) if team.search else []
    own = config.data.train or config.data.forget
    return AttackData(
        tokenizer,
        _unmeasured(forget, measured, f"the forget set, {own},"),
        _unmeasured(retain, measured, f"the retain set, {own if config.data.train else config.data.retain},"),
        _unmeasured([Text(pair.prompt, pair.rejected) for pair in pairs], measured, f"redteam.validation={team.validation}"),
        [text.prompt for text in _unmeasured([Text(p.text, "") for p in search], measured, f"redteam.search={team.search}")],
        load_corpus(team.neutral) if team.neutral else "",
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


def _unmeasured(texts: Sequence[Text], measured: EvaluationData, source: str) -> list[Text]:
    """Those whose prompt, or whole text, is not measured: what is found with others would flatter the attack."""
    asked = {prompt for prompts in measured.challenge.values() for prompt in prompts}
    asked |= {pair.prompt + text for pair in measured.pairs for text in ("", pair.chosen, pair.rejected)}
    seen = {text.strip() for text in asked} - {""}
    left = [text for text in texts if not seen & {text.prompt.strip(), (text.prompt + text.completion).strip()}]
    if texts and not left:
        raise ExpungeError(f"{source}: it is reported too, all of it; what is found with it would flatter the attack")
    if len(left) < len(texts):
        log.warning("attack: %s: %d of %d texts are reported too, and left out", source, len(texts) - len(left), len(texts))
    return left


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


def _title(name: str, attack: Attack | None) -> str:
    if attack is None:
        return name
    told = [f"{key}={value}" for key, value in _setting(attack).items()]
    return f"{name} ({', '.join([*told, f'draw {attack.seed}'])})"


def _setting(attack: Attack) -> dict[str, Any]:
    """Its fields, the seed aside."""
    return {key: value for key, value in dataclasses.asdict(attack).items() if key != "seed"}  # type: ignore[call-overload]


def _place(folder: Path, subject: Subject, name: str, key: str) -> Path:
    base = cache_folder("attacks") if subject.shared else folder / "attacks"
    return base / f"{subject.name}-{name}-{key[:16]}"


def _facts(name: str, attack: Attack | None, subject: str, result: AttackResult) -> dict[str, Any]:
    spent = ("idle", "about", "steps", "queries", "seconds", "peak_memory_bytes")
    found = {key: getattr(result, key) for key in spent}
    setting = _setting(attack) if attack else {}
    return {"attack": name, "subject": subject, "setting": setting, **found, "trace": list(result.trace)}


def _keep(place: Path, evaluation: Evaluation, facts: Mapping[str, Any]) -> None:
    """The whole case or nothing."""
    with whole(place) as temporary:
        evaluation.save(temporary)
        write_text(temporary / "case.json", json.dumps(facts, default=float))


def _is_whole(place: Path) -> bool:
    """Of a sweep's cell that is done no more than `case.json` is left (`Store.lighten`)."""
    return (place / "figures.jsonl").is_file()


def _record(place: Path) -> dict[str, Any]:
    return dict(json.loads((place / "case.json").read_text(encoding="utf-8")))


def _rows(found: Mapping[str, Case], common: Mapping[str, Any], seed: int) -> list[Row]:
    """The figures of each subject under one attack; of the unlearned one also beside the reference's under the same."""
    rows: list[Row] = []
    for subject, case in found.items():
        facts = {key: case.facts[key] for key in ("idle", "steps", "queries", "seconds")}
        facts["loss"] = case.facts["about"].get("loss")
        about = {**common, "subject": subject, "seed": seed, "attack_config": {**case.facts["setting"], "spent": facts}}
        about["method"] = common["method"] if subject == "unlearned" else None
        reference = found["reference"].evaluation if subject == "unlearned" and "reference" in found else None
        rows += figure_rows(case.evaluation, reference=reference, **about)
    return rows
