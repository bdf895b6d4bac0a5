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
from typing import Any, get_args

import yaml
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, set_seed

from expunge import harness, hub
from expunge.adapters import add_lora, lora_config, merge
from expunge.callbacks import Mark, StopOnInterrupt, forget_others, last_checkpoint
from expunge.claim import claimed
from expunge.config import DataConfig, EvaluationConfig, RunConfig, cache_folder, convert
from expunge.data import Pair, Text, Unpaired, load_corpus, load_pairs, load_probe_data, load_prompts, load_unpaired
from expunge.data.multiple_choice import load_questions
from expunge.errors import ExpungeError, Interrupted
from expunge.fitting import fit_and_apply
from expunge.methods import METHODS, Method
from expunge.metrics.evaluation import EvaluationData, EvaluationPlan, check_room, evaluate_model
from expunge.metrics.figures import Evaluation
from expunge.metrics.figures import rows as figure_rows
from expunge.metrics.perplexity import text_windows
from expunge.metrics.s_unlearning import check_sets, s_rows
from expunge.models import context_of, is_adapter, load_model, load_outline, loading_options, weights_digest
from expunge.monitor import FIGURES, Monitor, light_plan
from expunge.provenance import digest, digest_all, environment, peak_memory_bytes
from expunge.registry import UnknownName, did_you_mean
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

PROBE_TEXTS = 4000
"""At most so many labelled texts, or pairs, are read for a probe."""

BUILTIN_DEFAULTS = Path(__file__).parent / "assets" / "defaults.json"
"""Hyper-parameters tuned for the built-in model, by method; other models start from the paper's."""


def resolve(config: RunConfig) -> RunConfig:
    """`config` with the built-in model's tuned values where the user gave none, and no pairs where two sets are given."""
    name, tuned = config.method.get("name", "repo"), _tuned(config)
    method = {"name": name, **tuned.get("method", {}), **{k: v for k, v in config.method.items() if k != "name"}}
    training = {**tuned.get("training", {}), **config.training}
    return dataclasses.replace(config, method=method, training=training, data=_one_kind(config.data, method))


def _tuned(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The built-in model's tuned values for the method, by section; of other models none."""
    if config.model != "builtin":
        return {}
    return json.loads(BUILTIN_DEFAULTS.read_text(encoding="utf-8")).get(config.method.get("name", "repo"), {})


def _one_kind(data: DataConfig, method: dict[str, Any]) -> DataConfig:
    if data.forget is None and data.retain is None:
        if data.train is None and build_method(method).data != "none":
            raise ExpungeError("nothing to train on: give data.train (--pairs), or data.forget and data.retain")
        return data
    if data.forget is None or data.retain is None:
        given, missing = ("forget", "retain") if data.retain is None else ("retain", "forget")
        raise ExpungeError(f"data.{given} without data.{missing}: give both (a set with labels may be both)")
    if data.train not in (None, DataConfig.train):
        raise ExpungeError(f"data.train={data.train!r} beside data.forget and data.retain: give pairs, or the two sets")
    return dataclasses.replace(data, train=None)


def build_method(settings: dict[str, Any]) -> Method:
    """The method named by `settings["name"]` with its hyper-parameters; ExpungeError for an unknown name or key."""
    settings = dict(settings)
    try:
        cls = METHODS.get(settings.pop("name", "repo"))
    except UnknownName as error:
        raise ExpungeError(str(error)) from None
    return cls(**_checked(cls, settings, "method"))


def explained(config: RunConfig, outline: PreTrainedConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """Every field of the method as it is in a model of this depth; and of what was left open what it is, whether that is
    the paper's, scaled to the depth, or ours, and why. Raises ExpungeError for blocks that are not there."""
    resolved, depth = resolve(config), outline.get_text_config().num_hidden_layers
    method = build_method(resolved.method)
    fields = {"name": resolved.method["name"], **dataclasses.asdict(method.placed(depth))}  # type: ignore[call-overload]
    given = {"method": config.method, "training": config.training}
    return fields, {
        f"{section}.{name}": f"{value} (ours: tuned for the built-in model)"
        for section, values in _tuned(config).items()
        for name, value in values.items()
        if name not in given[section]
    } | {
        f"method.{name}": f"{default.value} ({default.source}: {default.why})"
        for name, default in method.left_open(depth).items()
    }


def build_training(settings: dict[str, Any], folder: Path, seed: int, quiet: bool = False) -> UnlearnConfig:
    """UnlearnConfig with `settings`; checkpoints go to `folder`."""
    values = _checked(UnlearnConfig, settings, "training")
    values.setdefault("seed", seed)
    values.setdefault("disable_tqdm", quiet)
    try:
        args = UnlearnConfig(output_dir=str(folder), **values)
    except ValueError as error:
        raise ExpungeError(f"training: {' '.join(str(error).split())}") from None
    hub.check_settings(args)
    return args


def check_model(config: RunConfig) -> None:
    """Raise ExpungeError, before any weight is read, for settings of the model that do not go together."""
    merged = _lora_of(config)[1]
    if config.lora is not None and build_method(config.method).applied:
        raise ExpungeError(f"lora: {config.method['name']} trains nothing, an adapter least of all; leave it out")
    loading_options(config.dtype or "float32", config.attn_implementation, config.quantization, config.trust_remote_code)
    if config.quantization and config.lora is None:
        raise ExpungeError(
            f"quantization={config.quantization}: quantized weights cannot be trained; add an adapter: lora.r=16"
        )
    if config.quantization and merged:
        raise ExpungeError(
            "lora.merge=true: an adapter cannot be merged into the quantized weights that it was trained on; leave it out. "
            "load_model(OUT/model, dtype='float32') merges it into the weights that they were made from"
        )
    if not is_adapter(config.model, config.revision):
        return
    if config.quantization or config.dtype not in (None, "float32"):
        raise ExpungeError(
            f"{config.model}: an adapter is merged into its base before training goes on, which lower precision would round "
            "off: leave out dtype and quantization"
        )
    if config.lora is not None and not merged:
        raise ExpungeError(
            f"{config.model}: an adapter on top of an adapter is no model by itself: add lora.merge=true, or leave out lora "
            "to train all weights"
        )


def _lora_of(config: RunConfig) -> tuple[dict[str, Any], bool]:
    """Fields of peft.LoraConfig, which are checked, and whether the export is merged."""
    settings = dict(config.lora or {})
    merged = convert(bool, settings.pop("merge", False), "lora.merge")
    lora_config(settings)
    return settings, merged


def loading(config: RunConfig) -> dict[str, Any]:
    """How `load_model` is to load the weights, the revision aside."""
    names = ("device_map", "attn_implementation", "quantization", "trust_remote_code")
    return {"dtype": config.dtype or "float32", **{name: getattr(config, name) for name in names}}


def monitor_data(config: RunConfig, args: UnlearnConfig, tokenizer: Any) -> EvaluationData | None:
    """What is measured in the midst of training; None without `training.eval_strategy`.

    Raises ExpungeError for a set that is reported too: what is stopped or chosen by it would flatter the report.
    """
    if args.eval_strategy == "no":
        return None
    monitor = config.monitor
    _check_unreported(config, "prompts", "corpus")
    best = args.metric_for_best_model
    if best and best.removeprefix("eval_") not in FIGURES:
        raise ExpungeError(f"training.metric_for_best_model={best!r}: not measured{did_you_mean(best, FIGURES)}")
    if not (monitor.prompts or monitor.corpus):
        raise ExpungeError("training.eval_strategy: nothing to measure; give monitor.prompts, monitor.corpus or both")
    prompts = load_prompts(monitor.prompts, monitor.limit, tokenizer) if monitor.prompts else []
    return EvaluationData(
        challenge={monitor.prompts: [prompt.text for prompt in prompts]} if monitor.prompts else {},
        corpora={monitor.corpus: load_corpus(monitor.corpus)} if monitor.corpus else {},
    )


def _check_unreported(config: RunConfig, *keys: str) -> None:
    data = config.data
    reported = {"prompts": [*data.prompts, data.neutral], "corpus": [data.corpus, data.neutral, data.heldout]}
    for key in keys:
        if (name := getattr(config.monitor, key)) is not None and name in reported[key]:
            raise ExpungeError(f"monitor.{key}={name}: it is reported too; measure other text in the midst of training")


def steps_of(args: UnlearnConfig, rows: int) -> int:
    """Optimizer steps on one device, over so many pairs or texts to forget."""
    if args.max_steps > 0:
        return args.max_steps
    a_pass = math.ceil(math.ceil(rows / args.per_device_train_batch_size) / args.gradient_accumulation_steps)
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


def training_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase, args: UnlearnConfig) -> list[Pair] | Unpaired:
    """What is trained on; empty where none is given to a method that needs none. ExpungeError where it does not take it."""
    data = config.data
    method = build_method(config.method)
    if method.data == "none" and data.train is None and data.forget is None:
        return []
    method.check_data(paired=data.train is not None)
    if data.train is not None:
        return load_pairs(data.train, limit=data.limit, seed=config.seed, tokenizer=tokenizer)
    passage = args.max_continuation_tokens
    return load_unpaired(data.forget, data.retain, data.limit, config.seed, tokenizer, passage)  # type: ignore[arg-type]


def probe_data(config: RunConfig, data: list[Pair] | Unpaired) -> list[tuple[str, bool]]:
    """Labelled texts for a method that fits probes, none of which is to be forgotten; none for other methods."""
    if not build_method(config.method).labelled:
        return []
    if isinstance(data, Unpaired):
        forget = [text.prompt + text.completion for text in data.forget]
    else:
        forget = [pair.prompt + pair.rejected for pair in data]
    return load_probe_data(config.data.probe, PROBE_TEXTS, config.seed, forget)


def evaluation_data(data: DataConfig, plan: EvaluationConfig, tokenizer: Any = None) -> EvaluationData:
    """The text that a model is measured on; conversations are rendered by the tokenizer's chat template.

    Raises ExpungeError also for what `plan` asks of questions that `data` does not have, or of a harness that is not there.
    """
    if plan.harness:
        harness.check_harness(plan.harness)
    if plan.s_unlearning:
        check_sets(plan.s_unlearning.utility, plan.s_unlearning.forget, data.questions, toxicity=bool(data.prompts))
    return EvaluationData(
        challenge={name: [p.text for p in load_prompts(name, plan.prompts, tokenizer)] for name in data.prompts},
        pairs=load_pairs(data.heldout, limit=plan.heldout, tokenizer=tokenizer) if data.heldout else [],
        neutral=load_prompts(data.neutral, plan.prompts, tokenizer) if data.neutral else [],
        corpora={data.corpus: load_corpus(data.corpus)} if data.corpus else {},
        questions={name: load_questions(name, plan.questions, plan.seed, plan.shots) for name in data.questions},
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
            _finish(folder, "push", key, {"repository": repo, "commit": url})

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
    lora, merged = _lora_of(config)
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
    _finish(folder, "train", key, facts)


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
        _check_unreported(config, "corpus")
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
    _finish(folder, "train", key, facts)


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
        _finish(folder, f"evaluate-{subject}", key, facts)
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


def _finish(folder: Path, stage: str, key: str, facts: dict[str, Any]) -> None:
    write_text(folder / "stages" / f"{stage}.json", json.dumps({"key": key, **facts}, indent=2))
