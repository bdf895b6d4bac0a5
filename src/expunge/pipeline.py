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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, set_seed

from expunge.claim import claimed
from expunge.config import DataConfig, EvaluationConfig, RunConfig, cache_folder, convert
from expunge.data import Pair, load_corpus, load_pairs, load_prompts
from expunge.errors import ExpungeError, Interrupted
from expunge.methods import METHODS, Method
from expunge.metrics.evaluation import EvaluationData, EvaluationPlan, check_room, evaluate_model
from expunge.metrics.figures import Evaluation
from expunge.metrics.figures import rows as figure_rows
from expunge.models import add_lora, context_of, load_model, load_outline, weights_digest
from expunge.provenance import digest, digest_all, environment, peak_memory_bytes
from expunge.registry import UnknownName, did_you_mean
from expunge.report import write_report
from expunge.rows import Row, write_lines, write_rows
from expunge.scorers import Scorer, load_scorer
from expunge.training import StopOnInterrupt, UnlearnConfig, UnlearnTrainer, last_checkpoint
from expunge.whole import whole, write_text

log = logging.getLogger("expunge")

MEASURED = ("evaluation", "data.prompts", "data.heldout", "data.neutral", "data.corpus")
"""Keys that change what is measured, not what is trained: they may change under the same --out."""

BUILTIN_DEFAULTS = Path(__file__).parent / "assets" / "defaults.json"
"""Hyper-parameters tuned for the built-in model, by method; other models start from the paper's."""


def resolve(config: RunConfig) -> RunConfig:
    """`config` with the built-in model's tuned values where the user gave none."""
    name = config.method.get("name", "repo")
    tuned: dict[str, Any] = {}
    if config.model == "builtin":
        tuned = json.loads(BUILTIN_DEFAULTS.read_text(encoding="utf-8")).get(name, {})
    method = {"name": name, **tuned.get("method", {}), **{k: v for k, v in config.method.items() if k != "name"}}
    return dataclasses.replace(config, method=method, training={**tuned.get("training", {}), **config.training})


def build_method(settings: dict[str, Any]) -> Method:
    """The method named by `settings["name"]` with its hyper-parameters; ExpungeError for an unknown name or key."""
    settings = dict(settings)
    try:
        cls = METHODS.get(settings.pop("name", "repo"))
    except UnknownName as error:
        raise ExpungeError(str(error)) from None
    return cls(**_checked(cls, settings, "method"))


def build_training(settings: dict[str, Any], folder: Path, seed: int, quiet: bool = False) -> UnlearnConfig:
    """UnlearnConfig with `settings`; checkpoints go to `folder`."""
    values = _checked(UnlearnConfig, settings, "training")
    values.setdefault("seed", seed)
    try:
        return UnlearnConfig(output_dir=str(folder), disable_tqdm=quiet, **values)
    except ValueError as error:
        raise ExpungeError(f"training: {str(error).splitlines()[0]}") from None


def steps_of(args: UnlearnConfig, pairs: int) -> int:
    """Optimizer steps on one device."""
    if args.max_steps > 0:
        return args.max_steps
    a_pass = math.ceil(math.ceil(pairs / args.per_device_train_batch_size) / args.gradient_accumulation_steps)
    return math.ceil(args.num_train_epochs * a_pass)


def _checked(cls: type, settings: dict[str, Any], section: str) -> dict[str, Any]:
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init and field.name != "output_dir"}
    for key in settings:
        if key not in fields:
            raise ExpungeError(f"unknown key {section + '.' + key!r}{did_you_mean(key, fields)}")
    simple = (int, float, bool, str, type(None))
    return {
        key: convert(hint, value, f"{section}.{key}") if all(part in simple for part in get_args(hint) or [hint]) else value
        for key, value in settings.items()
        for hint in [fields[key].type]
    }


def outline_of(config: RunConfig) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Configuration and tokenizer of the model that is trained."""
    return load_outline(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)


def training_pairs(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> list[Pair]:
    """What is trained on."""
    return load_pairs(config.data.train, limit=config.data.limit, seed=config.seed, tokenizer=tokenizer)


def evaluation_data(data: DataConfig, plan: EvaluationConfig, tokenizer: Any = None) -> EvaluationData:
    """The text that a model is measured on; conversations are rendered by the tokenizer's chat template."""
    return EvaluationData(
        challenge={name: [p.text for p in load_prompts(name, plan.prompts, tokenizer)] for name in data.prompts},
        pairs=load_pairs(data.heldout, limit=plan.heldout, tokenizer=tokenizer) if data.heldout else [],
        neutral=load_prompts(data.neutral, plan.prompts, tokenizer) if data.neutral else [],
        corpora={data.corpus: load_corpus(data.corpus)} if data.corpus else {},
    )


def evaluation_plan(config: EvaluationConfig) -> EvaluationPlan:
    return EvaluationPlan(
        samples=config.samples,
        max_new_tokens=config.max_new_tokens,
        prompt_tokens=config.prompt_tokens,
        truncate=config.truncate,  # type: ignore[arg-type]
        ks=tuple(config.forced),
        perplexity_tokens=config.perplexity_tokens,
        seed=config.seed,
    )


def is_main_process() -> bool:
    """Of several that a launcher started, the one that writes and measures; all of them see the same folder."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def run(config: RunConfig, folder: Path, quiet: bool = False) -> list[Row]:
    """The whole job into `folder`; returns the rows of `results.jsonl`. Safe to call again after an interruption.

    Under `accelerate launch` all processes train; the main one measures, the others return no rows.
    """
    config = resolve(config)
    build_method(config.method)  # complain before any work
    build_training(config.training, folder, config.seed)
    scorers = [load_scorer(name) for name in config.evaluation.scorers]
    outline, tokenizer = outline_of(config)
    data = evaluation_data(config.data, config.evaluation, tokenizer)
    check_room(data, evaluation_plan(config.evaluation), tokenizer, context_of(outline))
    with claim(folder, config):
        train(config, folder, quiet)
        if not is_main_process():
            return []
        rows = measure(folder, config, folder / "model", config.model, data, scorers, quiet)
        write_report(folder)
    return rows


def claim(folder: Path, config: RunConfig) -> contextlib.AbstractContextManager[None]:
    """Hold `folder` for this run inside a `with`: see `claimed`."""
    return claimed(folder, dataclasses.asdict(config), MEASURED) if is_main_process() else contextlib.nullcontext()


def reference_of(folder: Path) -> str | None:
    """The model that the run in `folder` started from; None where it holds no run."""
    path = folder / "config.yaml"
    if not path.is_file() or not (folder / "model").is_dir():
        return None
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        raise ExpungeError(f"{path}: not the configuration of a run: name its model's folder, and --reference") from None


def train(config: RunConfig, folder: Path, quiet: bool = False) -> None:
    """Train into `folder/model`, going on from the last complete checkpoint. Skipped when it is done."""
    pairs = training_pairs(config, outline_of(config)[1])
    key = digest([config.model, config.revision, config.method, config.training, config.lora, config.seed, _hash(pairs)])
    if _done(folder, "train", key):
        log.info("train: done before")
        return
    method = build_method(config.method)
    args = build_training(config.training, folder / "checkpoints", config.seed, quiet)
    started = time.monotonic()
    model, tokenizer = load_model(
        config.model, revision=config.revision, dtype="float32", trust_remote_code=config.trust_remote_code
    )
    model_digest = weights_digest(model)
    set_seed(args.seed)
    if config.lora:
        model = add_lora(model, config.lora.rank, config.lora.alpha, config.lora.targets)
    stop = StopOnInterrupt()
    trainer = UnlearnTrainer(model, method, args, pairs, tokenizer, callbacks=[stop])
    checkpoint = last_checkpoint(Path(args.output_dir))  # type: ignore[arg-type]
    if checkpoint:
        log.info("train: going on from %s", checkpoint)
    with stop:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.asked and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; the same command goes on from there"
        )
    if not is_main_process():
        trainer.save_model(str(folder / "model"))  # gives its part
        return
    with whole(folder / "model") as temporary:
        trainer.save_model(str(temporary))
    write_lines(folder / "training.jsonl", [line for line in trainer.state.log_history if "loss" in line])
    facts = {
        "reference_sha256": model_digest,
        "pairs": {
            "source": config.data.train,
            "n": trainer.pairs,
            "sha256": _hash(pairs),  # type: ignore[arg-type]
            "truncation": dataclasses.asdict(trainer.truncation),
        },
        "steps": trainer.state.global_step,
        "seed": args.seed,
        "peak_memory_bytes": peak_memory_bytes(),
        "seconds": round(time.monotonic() - started, 1),
    }
    _finish(folder, "train", key, facts)


def measure(
    folder: Path,
    config: RunConfig,
    model: str | Path,
    reference: str | Path | None,
    data: EvaluationData,
    scorers: Sequence[Scorer],
    quiet: bool = False,
) -> list[Row]:
    """Measure `model` and its `reference` into `folder`: results.jsonl, samples.jsonl, provenance.json."""
    plan = evaluation_plan(config.evaluation)
    subjects = {"reference": reference, "unlearned": model} if reference else {"unlearned": model}
    found: dict[str, Evaluation] = {}
    for subject, name in subjects.items():
        found[subject] = _evaluate(folder, subject, name, plan, data, scorers, config, quiet)
    common = {"stage": "evaluate", "run": folder.name, "seed": config.evaluation.seed}
    rows: list[Row] = []
    if reference:
        rows += figure_rows(found["reference"], subject="reference", model=str(reference), **common)
    rows += figure_rows(
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
    _write_provenance(folder, config, scorers)
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
) -> Evaluation:
    """One subject's evaluation, from the cache where the same weights met the same text before."""
    model, tokenizer = load_model(name, dtype="float32", trust_remote_code=config.trust_remote_code)
    inputs = {
        "weights": weights_digest(model),
        "data": digest_all([data]),
        "plan": plan,
        "scorers": {scorer.name: scorer.digest for scorer in scorers},
    }
    key = digest(inputs)
    cache = cache_folder("evaluations") / key if subject == "reference" else folder / "stages" / f"evaluate-{subject}"
    if not _done(folder, f"evaluate-{subject}", key) or not cache.exists():
        started = time.monotonic()
        if not cache.exists() or subject != "reference":
            parts = folder / "stages" / f"evaluate-{subject}-{key[:16]}.parts"  # of this run: another may measure the same
            evaluate_model(model, tokenizer, data, plan, scorers, progress=not quiet, parts=parts).save(cache)
            shutil.rmtree(parts, ignore_errors=True)
        facts = {
            "weights_sha256": inputs["weights"],
            "data_sha256": inputs["data"],
            "scorers": inputs["scorers"],
            "seconds": round(time.monotonic() - started, 1),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        _finish(folder, f"evaluate-{subject}", key, facts)
    return Evaluation.load(cache)


def _write_provenance(folder: Path, config: RunConfig, scorers: Sequence[Scorer]) -> None:
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


def _hash(pairs: Sequence[Pair]) -> str:
    return digest_all([pair.prompt, pair.chosen, pair.rejected] for pair in pairs)


def _done(folder: Path, stage: str, key: str) -> bool:
    path = folder / "stages" / f"{stage}.json"
    return path.exists() and _record(path).get("key") == key


def _record(path: Path) -> dict[str, Any]:
    """What a stage left of itself."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ExpungeError(f"{path}: not the JSON object that the stage left: remove it, and the stage runs again") from None


def _finish(folder: Path, stage: str, key: str, facts: dict[str, Any]) -> None:
    write_text(folder / "stages" / f"{stage}.json", json.dumps({"key": key, **facts}, indent=2))
