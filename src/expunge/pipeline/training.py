"""The stage that makes the unlearned model, by training or by fitting, and sends it to the hub where that is asked for."""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import set_seed

from expunge import hub
from expunge.adapters import add_lora, merge
from expunge.assembly import (
    build_method,
    build_training,
    check_model,
    check_trainable,
    check_unreported,
    loading,
    lora_of,
    monitor_data,
    outline_of,
    probe_data,
    training_data,
)
from expunge.callbacks import Mark, StopOnInterrupt, last_checkpoint
from expunge.config import DataConfig, RunConfig
from expunge.data import Pair, Unpaired, load_corpus
from expunge.errors import Interrupted
from expunge.fitting import fit_and_apply
from expunge.metrics.perplexity import text_windows
from expunge.models import identity_of, load_model
from expunge.monitor import Monitor, light_plan
from expunge.pipeline.origin import inputs_of, is_made, set_others_aside
from expunge.pipeline.stages import finish, is_done, is_main_process
from expunge.provenance import data_digest, digest, peak_memory_bytes
from expunge.rows import write_lines
from expunge.scorers import load_scorer
from expunge.training import UnlearnConfig, UnlearnTrainer
from expunge.whole import whole

log = logging.getLogger("expunge")


def train(config: RunConfig, folder: Path, quiet: bool = False) -> None:
    """Train into `folder/model`, from the last complete checkpoint. Skipped when it is done; `folder` is claimed before.

    With `training.push_to_hub` the model goes to the hub then, once.
    """
    train_or_skip(config, folder, quiet)()


def train_or_skip(config: RunConfig, folder: Path, quiet: bool) -> Callable[[], None]:
    """What `train` does, but for the push, which is what it returns."""
    args = build_training(config.training, folder / "checkpoints", config.seed, quiet)
    outline, tokenizer = outline_of(config)
    check_trainable(config, outline)
    data = training_data(config, tokenizer, args)
    probed = probe_data(config, data)
    inputs = inputs_of(config, args, data, probed, tokenizer)
    key, made = digest(inputs), is_made(folder, inputs)
    applied = build_method(config.method).applied
    wanted = args.push_to_hub and is_main_process() and not is_done(folder, "push", key)
    repo = hub.reserve(args, folder.resolve().name) if wanted else None
    args.push_to_hub = False  # or the trainer would push its checkpoints
    if made:
        log.info("train: done before")
    elif applied:
        _apply(config, args, data, probed, folder, inputs)
    else:
        _train(config, args, data, probed, folder, inputs)

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
    inputs: Mapping[str, Any],
) -> None:
    check_model(config)
    lora, merged = lora_of(config)
    method = build_method(config.method)
    scorer = load_scorer(config.monitor.scorer) if args.eval_strategy != "no" else None
    started = time.monotonic()
    model, tokenizer = load_model(config.model, revision=config.revision, **loading(config))
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
        set_others_aside(checkpoints, inputs)
    callbacks = [stop, Mark(checkpoints, inputs)]
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
        **_made(folder, inputs),
        **_data_facts(config.data, data, trainer),
        "steps": trainer.state.global_step,
        "seed": args.seed,
        "peak_memory_bytes": peak_memory_bytes(),
        "seconds": round(time.monotonic() - started, 1),
    }
    finish(folder, "train", digest(inputs), facts)


def _apply(
    config: RunConfig,
    args: UnlearnConfig,
    data: list[Pair] | Unpaired,
    probed: list[tuple[str, bool]],
    folder: Path,
    inputs: Mapping[str, Any],
) -> None:
    """In place of training, for a method that is fitted; one process does it."""
    if not is_main_process():
        return
    check_model(config)
    started = time.monotonic()
    model, tokenizer = load_model(config.model, revision=config.revision, **loading(config))
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
        **_made(folder, inputs),
        **({"probe": {"source": config.data.probe, "n": len(probed), "sha256": data_digest(probed)}} if probed else {}),
        **({"data": {"n": len(data), "sha256": data_digest(data)}} if data else {}),
        "steps": 0,
        "applied": about,
        "seed": args.seed,
        "peak_memory_bytes": peak_memory_bytes(),
        "seconds": round(time.monotonic() - started, 1),
    }
    finish(folder, "train", digest(inputs), facts)


def _data_facts(sources: DataConfig, data: list[Pair] | Unpaired, trainer: UnlearnTrainer) -> dict[str, Any]:
    """What was trained on and what of it did not fit."""
    if not isinstance(data, Unpaired):
        cut: Any = trainer.truncation
        counts = {"n": len(trainer.rows), "sha256": data_digest(data), "truncation": dataclasses.asdict(cut)}
        return {"pairs": {"source": sources.train, **counts}}
    return {
        side: {
            "source": getattr(sources, side),
            "n": len(trainer.rows.sides[side]),  # type: ignore[union-attr]
            "sha256": data_digest(getattr(data, side)),
            "truncation": dataclasses.asdict(trainer.truncation[side]),  # type: ignore[index]
        }
        for side in ("forget", "retain")
    }


def _made(folder: Path, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the model was made from, and what it is: compared when the record is read again."""
    made = identity_of(folder / "model").parts
    return {"reference_sha256": inputs["model"]["weights"], "inputs": dict(inputs), "made": made}
