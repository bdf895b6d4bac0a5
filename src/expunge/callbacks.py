"""Beside the training loop: the progress bar, Ctrl-C, and which checkpoint is the last whole one.

stop = StopOnInterrupt()
trainer = UnlearnTrainer(model, method, args, pairs, tokenizer, callbacks=[stop])
with stop:
    trainer.train(resume_from_checkpoint=last_checkpoint(Path(args.output_dir)))
"""

import json
import logging
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

MARK = "inputs.json"

log = logging.getLogger("expunge")


class StepBar(ProgressCallback):
    """A progress bar that shows the latest losses instead of printing a line a step."""

    def on_log(self, args, state, control, logs=None, **_):
        if self.training_bar is not None and logs:
            shown = {name: f"{value:.3f}" for name, value in logs.items() if name in ("loss", "anchor", "erase")}
            self.training_bar.set_postfix(shown)


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C asks for a checkpoint at the end of the step, then stops; a second Ctrl-C stops at once.

    Use as a callback and as a context manager around `train()`.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "StopOnInterrupt":
        self._previous = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_step_end(self, args, state, control, **_):
        if args.world_size > 1:  # the signal may have come to one process before this step and to another after it
            asked = torch.tensor(int(self.asked), device=args.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            self.asked = bool(asked)
        if self.asked:
            control.should_save = True
            control.should_training_stop = True
        return control


class EachEpoch(TrainerCallback):
    """Tells the rows of two sets which pass over the forget set begins, also where a run is resumed."""

    def __init__(self, tell: Callable[[int], None]):
        self.tell = tell

    def on_epoch_begin(self, args, state, control, **_):
        self.tell(int(state.epoch or 0))


class EachStep(TrainerCallback):
    """Calls a function after each optimizer step, before a checkpoint of it is written."""

    def __init__(self, call: Callable[[], None]):
        self.call = call

    def on_step_end(self, args, state, control, **_):
        self.call()


class Mark(TrainerCallback):
    """Leaves, beside checkpoints, hashes of what they come from: model, data, method and settings."""

    def __init__(self, folder: Path, inputs: Mapping[str, Any]):
        self.path, self.inputs = folder / MARK, inputs

    def on_save(self, args, state, control, **_):
        if state.is_world_process_zero:
            self.path.write_text(json.dumps(self.inputs), encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> dict[str, Any]:
        """What the checkpoints in `folder` come from; empty where that is not known."""
        try:
            return dict(json.loads((folder / MARK).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`; one that a crash left half-written is skipped, and said to be."""
    found = {path.name.removeprefix("checkpoint-"): path for path in folder.glob("checkpoint-*")}
    for step in sorted((int(step) for step in found if step.isdigit()), reverse=True):
        if _complete(path := folder / f"checkpoint-{step}"):
            return path
        log.info("%s: half-written, skipped", path)
    return None


def _complete(checkpoint: Path) -> bool:
    """The state is written last, and half of a JSON object is none."""
    try:
        return "global_step" in json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
