"""The stages of a run: train, measure the reference, measure the unlearned model, report. Each is skipped when done.

    from expunge import RunConfig, run
    run(RunConfig(model="builtin", method={"name": "repo"}), Path("runs/first"))

A stage leaves `OUT/stages/NAME.json` with a hash of its inputs; the same command goes on where it was cut off.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from transformers import set_seed

from expunge import harness, hub
from expunge.adapters import add_lora, merge
from expunge.assembly import (
    build_method,
    build_training,
    check_model,
    check_unreported,
    evaluation_data,
    evaluation_plan,
    loading,
    lora_of,
    monitor_data,
    outline_of,
    probe_data,
    resolve,
    training_data,
)
from expunge.callbacks import Mark, StopOnInterrupt, forget_others, last_checkpoint
from expunge.claim import claimed
from expunge.config import DataConfig, RunConfig, cache_folder
from expunge.data import Pair, Text, Unpaired, load_corpus
from expunge.errors import ExpungeError, Interrupted
from expunge.fitting import fit_and_apply
from expunge.metrics.evaluation import EvaluationData, EvaluationPlan, check_room, evaluate_model
from expunge.metrics.figures import Evaluation
from expunge.metrics.figures import rows as figure_rows
from expunge.metrics.perplexity import text_windows
from expunge.metrics.s_unlearning import s_rows
from expunge.models import context_of, load_model, weights_digest
from expunge.monitor import Monitor, light_plan
from expunge.provenance import digest, digest_all, environment, peak_memory_bytes
from expunge.report import write_report
from expunge.rows import Row, write_lines, write_rows
from expunge.scorers import Scorer, load_scorer
from expunge.training import UnlearnConfig, UnlearnTrainer
from expunge.whole import whole, write_text

log = logging.getLogger("expunge")

MEASURED = (
    "evaluation",
    "data.prompts",
    "data.heldout",
    "data.neutral",
    "data.corpus",
    "data.questions",
    "redteam",
    "attack",
)
"""Keys that change what is measured, not what is trained: they may change under the same --out."""


def is_main_process() -> bool:
    """Of several that a launcher started, the one that writes and measures; all of them see the same folder."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def run(config: RunConfig, folder: Path, quiet: bool = False) -> list[Row]:
    """The whole job into `folder`; returns the rows of `results.jsonl`. Safe to call again after an interruption.

    Under `accelerate launch` all processes train; the main one measures, the others return no rows.
    """
    config = resolve(config)
    build_method(config.method)  # complain before any work
    args = build_training(config.training, folder, config.seed)
    check_model(config)
    scorers = [load_scorer(name) for name in config.evaluation.scorers]
    outline, tokenizer = outline_of(config)
    data = evaluation_data(config.data, config.evaluation, tokenizer)
    check_room(data, evaluation_plan(config.evaluation), tokenizer, context_of(outline))
    monitor_data(config, args, tokenizer)
    with claim(folder, config):
        publish = _train_or_skip(config, folder, quiet)
        if not is_main_process():
            return []
        rows = measure(folder, config, folder / "model", config.model, data, scorers, quiet, config.revision)
        write_report(folder)
        publish()  # with its card
    return rows


def claim(folder: Path, config: RunConfig, **more: Any) -> contextlib.AbstractContextManager[None]:
    """Hold `folder` for this run inside a `with`: see `claimed`. more: what tells other commands' folders apart."""
    settings = dataclasses.asdict(config) | more
    return claimed(folder, settings, MEASURED) if is_main_process() else contextlib.nullcontext()


def origin_of(folder: Path) -> dict[str, Any]:
    """What the run in `folder` started from: `model`, `method`, and `loading`, how the model was loaded, but for code of its
    own, as the run may be another's. Empty where it holds no run."""
    path = folder / "config.yaml"
    if not path.is_file() or not (folder / "model").is_dir():
        return {}
    try:
        run = yaml.safe_load(path.read_text(encoding="utf-8"))
        how = {name: run.get(name) for name in ("revision", "dtype", "attn_implementation", "quantization")}
        loading = {name: value for name, value in how.items() if value}
        return {"model": run["model"], "method": run.get("method") or {}, "loading": loading}
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, KeyError):
        raise ExpungeError(f"{path}: not the configuration of a run: name its model's folder, and --reference") from None


def train(config: RunConfig, folder: Path, quiet: bool = False) -> None:
    """Train into `folder/model`, from the last complete checkpoint. Skipped when it is done; `folder` is claimed before.

    With `training.push_to_hub` the model goes to the hub then, once.
    """
    _train_or_skip(config, folder, quiet)()


def _train_or_skip(config: RunConfig, folder: Path, quiet: bool) -> Callable[[], None]:
    """What `train` does, but for the push, which is what it returns."""
    args = build_training(config.training, folder / "checkpoints", config.seed, quiet)
    data = training_data(config, outline_of(config)[1], args)
    key = digest([config.model, config.revision, loading(config), config.method, config.training, config.lora, config.seed])
    key = digest([key, _hash(data)])
    probed = probe_data(config, data)
    if probed:
        key = digest([key, probed])
    applied = build_method(config.method).applied
    if applied:
        key = digest([key, config.monitor.corpus, config.monitor.tokens])
    elif args.eval_strategy != "no":  # what is measured decides which checkpoint is best
        key = digest([key, config.monitor, light_plan(config.monitor.samples, config.monitor.tokens, config.evaluation)])
    wanted = args.push_to_hub and is_main_process() and not _done(folder, "push", key)
    repo = hub.reserve(args, folder.resolve().name) if wanted else None
    args.push_to_hub = False  # or the trainer would push its checkpoints
    if _done(folder, "train", key):
        log.info("train: done before")
    elif applied:
        _apply(config, args, data, probed, folder, key)
    else:
        _train(config, args, data, probed, folder, key)

    def publish() -> None:
        if repo:
            url = hub.push(folder / "model", repo, args)
            log.info("train: pushed, %s", url)
            finish(folder, "push", key, {"repository": repo, "commit": url})

    return publish


def _train(
    config: RunConfig,
    args: UnlearnConfig,
    data: list[Pair] | Unpaired,
    probed: list[tuple[str, bool]],
    folder: Path,
    key: str,
) -> None:
    check_model(config)
    lora, merged = lora_of(config)
    method = build_method(config.method)
    scorer = load_scorer(config.monitor.scorer) if args.eval_strategy != "no" else None
    started = time.monotonic()
    model, tokenizer = load_model(config.model, revision=config.revision, **loading(config))
    model_digest = weights_digest(model)
    monitor = None
    if scorer and (watched := monitor_data(config, args, tokenizer)):
        plan = light_plan(config.monitor.samples, config.monitor.tokens, config.evaluation)
        path = folder / "checkpoints.jsonl" if is_main_process() else None
        about = {"run": folder.name, "model": config.model, "method": method.name}
        monitor = Monitor(model, tokenizer, watched, plan, scorer, path, about)
    set_seed(args.seed)
    if config.lora is not None:
        model = add_lora(model, config.revision, **lora)
    stop = StopOnInterrupt()
    checkpoints = Path(args.output_dir)  # type: ignore[arg-type]
    with args.main_process_first(desc="checkpoints"):
        forget_others(checkpoints, key)
    callbacks = [stop, Mark(checkpoints, key)]
    trainer = UnlearnTrainer(model, method, args, data, tokenizer, callbacks=callbacks, measure=monitor, probe_data=probed)
    checkpoint = last_checkpoint(checkpoints)
    if checkpoint:
        log.info("train: going on from %s", checkpoint)
    with stop:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.asked and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; the same command goes on from there"
        )
    if merged:
        trainer.model = merge(trainer.model)
    if not is_main_process():
        trainer.save_model(str(folder / "model"))  # gives its part
        return
    with whole(folder / "model") as temporary:
        trainer.save_model(str(temporary))
    write_lines(folder / "training.jsonl", [line for line in trainer.state.log_history if "loss" in line])
    facts = {
        "reference_sha256": model_digest,
        **_data_facts(config.data, data, trainer),
        "steps": trainer.state.global_step,
        "seed": args.seed,
        "peak_memory_bytes": peak_memory_bytes(),
        "seconds": round(time.monotonic() - started, 1),
    }
    finish(folder, "train", key, facts)


def _apply(
    config: RunConfig,
    args: UnlearnConfig,
    data: list[Pair] | Unpaired,
    probed: list[tuple[str, bool]],
    folder: Path,
    key: str,
) -> None:
    """In place of training, for a method that is fitted; one process does it."""
    if not is_main_process():
        return
    check_model(config)
    started = time.monotonic()
    model, tokenizer = load_model(config.model, revision=config.revision, **loading(config))
    model_digest = weights_digest(model)
    set_seed(args.seed)
    corpus = None
    if config.monitor.corpus and config.method.get("match_perplexity"):
        check_unreported(config, "corpus")
        corpus = load_corpus(config.monitor.corpus)

    def perplexity() -> float:
        found = text_windows(model, tokenizer, str(corpus), config.monitor.tokens)
        return math.exp(found.nll.sum() / found.tokens.sum())

    about = fit_and_apply(
        model,
        tokenizer,
        build_method(config.method),
        data,
        probed,
        perplexity if corpus else None,
        args.max_prompt_tokens,
        args.max_continuation_tokens,
    )
    with whole(folder / "model") as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    facts = {
        "reference_sha256": model_digest,
        **({"probe": {"source": config.data.probe, "n": len(probed), "sha256": digest_all(probed)}} if probed else {}),
        **({"data": {"n": len(data), "sha256": _hash(data)}} if data else {}),
        "steps": 0,
        "applied": about,
        "seed": args.seed,
        "peak_memory_bytes": peak_memory_bytes(),
        "seconds": round(time.monotonic() - started, 1),
    }
    finish(folder, "train", key, facts)


def measure(
    folder: Path,
    config: RunConfig,
    model: str | Path,
    reference: str | Path | None,
    data: EvaluationData,
    scorers: Sequence[Scorer],
    quiet: bool = False,
    reference_revision: str | None = None,
) -> list[Row]:
    """Measure `model` and its `reference` into `folder`: results.jsonl, samples.jsonl, provenance.json.

    Both are loaded as `config` says, `model` at its revision.
    """
    plan = evaluation_plan(config.evaluation)
    subjects = {"reference": reference, "unlearned": model} if reference else {"unlearned": model}
    found: dict[str, Evaluation] = {}
    for subject, name in subjects.items():
        revision = reference_revision if subject == "reference" else config.revision
        found[subject] = _evaluate(folder, subject, name, plan, data, scorers, config, quiet, revision)
    common = {"stage": "evaluate", "run": folder.name, "seed": config.evaluation.seed}
    rows: list[Row] = []
    makers: list[Callable[..., list[Row]]] = [figure_rows]
    if sets := config.evaluation.s_unlearning:
        makers.append(partial(s_rows, utility=sets.utility, forget=sets.forget))
    for make in makers:
        if reference:
            rows += make(found["reference"], subject="reference", model=str(reference), **common)
        rows += make(
            found["unlearned"],
            reference=found.get("reference"),
            subject="unlearned",
            model=str(config.model),
            method=config.method.get("name") if reference else None,
            **common,
        )
    write_lines(
        folder / "samples.jsonl",
        ({"subject": subject, **sample} for subject in subjects for sample in found[subject].samples),
    )
    write_rows(folder / "results.jsonl", rows)
    write_provenance(folder, config, scorers)
    return rows


def _evaluate(
    folder: Path,
    subject: str,
    name: str | Path,
    plan: EvaluationPlan,
    data: EvaluationData,
    scorers: Sequence[Scorer],
    config: RunConfig,
    quiet: bool,
    revision: str | None,
) -> Evaluation:
    """One subject's evaluation, from the cache where the same weights met the same text before."""
    model, tokenizer = load_model(name, revision=revision, **loading(config))
    inputs = {
        "weights": weights_digest(model),
        "attention": config.attn_implementation,
        "data": digest_all([data]),
        "plan": plan,
        "scorers": {scorer.name: scorer.digest for scorer in scorers},
    }
    asked = config.evaluation
    tasks = (asked.harness, asked.questions, asked.shots, asked.seed)
    if asked.harness:
        inputs["harness"] = harness.fingerprint(*tasks)
    key = digest(inputs)
    cache = cache_folder("evaluations") / key if subject == "reference" else folder / "stages" / f"evaluate-{subject}"
    done, started = _done(folder, f"evaluate-{subject}", key) and cache.exists(), time.monotonic()
    if not done and (not cache.exists() or subject != "reference"):
        parts = folder / "stages" / f"evaluate-{subject}-{key[:16]}.parts"  # of this run: another may measure the same
        found = evaluate_model(model, tokenizer, data, plan, scorers, progress=not quiet, parts=parts)
        if asked.harness:
            found.figures += harness.run_harness(model, tokenizer, *tasks, progress=not quiet)
        if subject != "reference" or not cache.exists():  # another run may have been faster, and be reading it
            found.save(cache)
        shutil.rmtree(parts, ignore_errors=True)
    evaluation = Evaluation.load(cache)
    if not done:
        facts = {
            "weights_sha256": inputs["weights"],
            "data_sha256": inputs["data"],
            "scorers": inputs["scorers"],
            **({"lm_eval": harness.harness_version()} if asked.harness else {}),
            **evaluation.counts(),
            "seconds": round(time.monotonic() - started, 1),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        finish(folder, f"evaluate-{subject}", key, facts)
    return evaluation


def write_provenance(folder: Path, config: RunConfig, scorers: Sequence[Scorer]) -> None:
    """provenance.json: versions, hashes, seeds, and what each stage took."""
    stages = {path.stem: _record(path) for path in sorted((folder / "stages").glob("*.json"))}
    facts = {
        "environment": environment(),
        "scorers": {scorer.name: scorer.digest for scorer in scorers},
        "seeds": {"training": config.seed, "evaluation": config.evaluation.seed},
        "stages": stages,
        "seconds": round(sum(stage.get("seconds", 0) for stage in stages.values()), 1),
        "peak_memory_bytes": max((stage.get("peak_memory_bytes", 0) for stage in stages.values()), default=0),
    }
    write_text(folder / "provenance.json", json.dumps(facts, indent=2))


def _data_facts(sources: DataConfig, data: list[Pair] | Unpaired, trainer: UnlearnTrainer) -> dict[str, Any]:
    """What was trained on and what of it did not fit."""
    if not isinstance(data, Unpaired):
        cut: Any = trainer.truncation
        counts = {"n": len(trainer.rows), "sha256": _hash(data), "truncation": dataclasses.asdict(cut)}
        return {"pairs": {"source": sources.train, **counts}}
    return {
        side: {
            "source": getattr(sources, side),
            "n": len(trainer.rows.sides[side]),  # type: ignore[union-attr]
            "sha256": _hash(getattr(data, side)),
            "truncation": dataclasses.asdict(trainer.truncation[side]),  # type: ignore[index]
        }
        for side in ("forget", "retain")
    }


def _hash(data: Sequence[Pair] | Sequence[Text] | Unpaired) -> str:
    if isinstance(data, Unpaired):
        return digest([_hash(data.forget), _hash(data.retain)])
    return digest_all(list(vars(row).values()) for row in data)


def _done(folder: Path, stage: str, key: str) -> bool:
    path = folder / "stages" / f"{stage}.json"
    return path.exists() and _record(path).get("key") == key


def _record(path: Path) -> dict[str, Any]:
    """What a stage left of itself."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ExpungeError(f"{path}: not the JSON object that the stage left: remove it, and the stage runs again") from None


def finish(folder: Path, stage: str, key: str, facts: dict[str, Any]) -> None:
    """A stage is done: what it leaves of itself in stages/, for provenance.json."""
    write_text(folder / "stages" / f"{stage}.json", json.dumps({"key": key, **facts}, indent=2))
