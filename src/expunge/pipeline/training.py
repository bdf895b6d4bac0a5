"""The stage that makes the unlearned model, by training or by fitting, and sends it to the hub where that is asked for."""

import copy
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
from expunge.callbacks import Mark, StopOnInterrupt, last_checkpoint
from expunge.data import Unpaired
from expunge.errors import Interrupted
from expunge.fitting import fit_and_apply
from expunge.metrics.perplexity import text_windows
from expunge.models import identity_of
from expunge.monitor import Monitor
from expunge.pipeline.origin import is_made, set_others_aside
from expunge.pipeline.stages import finish, is_done, is_main_process
from expunge.plan import Plan, training_inputs
from expunge.provenance import data_digest, digest, peak_memory_bytes
from expunge.rows import write_lines
from expunge.training import UnlearnTrainer
from expunge.whole import whole

log = logging.getLogger("expunge")


def train(plan: Plan) -> None:
    """Train into `OUT/model`, from the last complete checkpoint. Skipped when it is done; the folder is claimed before.

    With `training.push_to_hub` the model goes to the hub then, once.
    """
    train_or_skip(plan)()


def train_or_skip(plan: Plan) -> Callable[[], None]:
    """What `train` does, but for the push, which is what it returns."""
    args, folder, inputs = plan.args, plan.folder, training_inputs(plan)
    key, made = digest(inputs), is_made(folder, inputs)
    wanted = args.push_to_hub and is_main_process() and not is_done(folder, "push", key)
    repo = hub.reserve(args, folder.resolve().name) if wanted else None
    if made:
        log.info("train: done before")
    elif plan.trains:
        _train(plan, inputs)
    else:
        _apply(plan, inputs)
    plan.start.release()

    def publish() -> None:
        if repo:
            url = hub.push(folder / "model", repo, args)
            log.info("train: pushed, %s", url)
            finish(folder, "push", key, {"repository": repo, "commit": url})

    return publish


def _train(plan: Plan, inputs: Mapping[str, Any]) -> None:
    plan.check_settings()
    config, folder, method, args = plan.config, plan.folder, plan.method, copy.copy(plan.args)
    args.push_to_hub = False  # or the trainer would push its checkpoints
    lora, merged = plan.lora
    started = time.monotonic()
    model, tokenizer = plan.start.load()
    monitor = None
    if watched := plan.monitor_data:
        path = folder / "checkpoints.jsonl" if is_main_process() else None
        about = {"run": folder.name, "model": config.model, "method": method.name}
        monitor = Monitor(model, tokenizer, watched, plan.monitor_plan, plan.monitor_scorer, path, about)
    set_seed(args.seed)
    if config.lora is not None:
        model = add_lora(model, config.revision, **lora)
    stop = StopOnInterrupt()
    checkpoints = Path(args.output_dir)  # type: ignore[arg-type]
    with args.main_process_first(desc="checkpoints"):
        set_others_aside(checkpoints, inputs)
    callbacks = [stop, Mark(checkpoints, inputs)]
    trainer = UnlearnTrainer(
        model,
        method,
        args,
        plan.training_data,
        tokenizer,
        callbacks=callbacks,
        measure=monitor,
        probe_data=plan.probe_data,
        anchor=plan.anchor,
    )
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
        **_data_facts(plan, trainer),
        "steps": trainer.state.global_step,
        "seed": args.seed,
        "peak_memory_bytes": peak_memory_bytes(),
        "seconds": round(time.monotonic() - started, 1),
    }
    finish(folder, "train", digest(inputs), facts)


def _apply(plan: Plan, inputs: Mapping[str, Any]) -> None:
    """In place of training, for a method that is fitted; one process does it."""
    if not is_main_process():
        return
    plan.check_settings()
    config, folder, args, data, probed = plan.config, plan.folder, plan.args, plan.training_data, plan.probe_data
    started, text = time.monotonic(), plan.matched_text
    model, tokenizer = plan.start.load()
    set_seed(args.seed)

    def perplexity() -> float:
        found = text_windows(model, tokenizer, str(text), config.monitor.tokens)
        return math.exp(found.nll.sum() / found.tokens.sum())

    about = fit_and_apply(
        model,
        tokenizer,
        plan.method,
        data,
        probed,
        perplexity if text else None,
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


def _data_facts(plan: Plan, trainer: UnlearnTrainer) -> dict[str, Any]:
    """What was trained on and what of it did not fit."""
    sources, data = plan.config.data, plan.training_data
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
