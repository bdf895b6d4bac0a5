"""The trainer: batches to losses, heads on the model while it trains, checkpoints.

The loss is computed inside the wrapped model's forward; the method's heads hang on the model while it trains, have a
learning rate of their own, go into checkpoints, and stay out of the exported model.
"""

import copy
import math
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME

from expunge.callbacks import EachEpoch, EachStep, StepBar
from expunge.data import Pair, Unpaired
from expunge.data.rows import PairRows, SetRows
from expunge.data.tokenize import tokenize_labelled
from expunge.engine import Step, Whole, check_head, collate, inside_forward, run_step, shares_prefix
from expunge.errors import ExpungeError
from expunge.ids import check_known
from expunge.methods import Material, Method
from expunge.models import (
    Reference,
    context_length,
    depth,
    evaluating,
    known_tokens,
    only_training,
    original,
    weights_digest,
    width,
    without_dropout,
)
from expunge.registry import did_you_mean
from expunge.states import StoredStates
from expunge.training.arguments import UnlearnConfig, refuse
from expunge.training.rows import check_room, tokenized
from expunge.whole import cannot_write

HEADS = "expunge_heads"
FIRST = 64  # rows to forget that a method may look at before training


class UnlearnTrainer(Trainer):
    """Train `model` in place with `method` on preference pairs, or on a forget and a retain set.

    model: any causal LM, or one wrapped by PEFT (then the reference is the same model with its adapter off).
    Of two sets every batch has as many rows of each; an epoch is one pass over the forget set (`expunge.data.rows`).
    probe_data: (text, is it of the kind to be rid of), for methods that fit probes, which use all of it: leave out what is
    to be forgotten, as `load_probe_data(forget=...)` does.
    anchor: the text that `anchor_text` names, which is read if it is not given.
    measure: (model, steps done) to figures by name, called as `eval_strategy` says; random state is left as it was.
    Raises ExpungeError where the loss is no longer a number: the last checkpoint stands.
    """

    loss_is_scaled_for_ga = False  # transformers >= 5.19: our losses are means, accumulation divides them

    def __init__(
        self,
        model: PreTrainedModel | Any,
        method: Method,
        args: UnlearnConfig,
        train_dataset: Sequence[Pair] | Unpaired,
        processing_class: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback] | None = None,
        measure: Callable[[nn.Module, int], Mapping[str, float]] | None = None,
        probe_data: Sequence[tuple[str, bool]] = (),
        anchor: str | None = None,
    ):
        refuse(model, args)
        method = method.placed(depth(model))
        self.paired = not isinstance(train_dataset, Unpaired)
        method.check_data(self.paired)
        if args.anchor_text and "anchor" not in method.sides:
            raise ExpungeError(f"training.anchor_text: {method.name} as it is set reads no neutral text; leave it out")
        if not self.paired and args.dataloader_persistent_workers:
            raise ExpungeError(
                "training.dataloader_persistent_workers: of two sets each epoch reads other rows; leave it false"
            )
        if args.eval_strategy != "no" and measure is None:
            raise ExpungeError(
                "eval_strategy: nothing to measure with; give UnlearnTrainer measure=Monitor(...) (expunge.monitor), or "
                "any function of model and step that returns figures by name"
            )
        self.method, self.measure = method, measure
        self.trained = method.trains(model)
        if args.max_grad_norm is None:
            args = copy.copy(args)  # the caller may use it for another method
            args.max_grad_norm = method.max_grad_norm
        rows, self.truncation = tokenized(train_dataset, args, processing_class, anchor)
        self.rows = rows
        check_room(model, rows, processing_class)
        without_dropout(model)
        set_seed(args.seed)
        self.heads = nn.ModuleDict(dict(method.heads(width(model)))).to(args.device)
        self._observed: dict[str, list[float]] = defaultdict(list)
        self.chunked = args.layout == "auto"
        self.plain: bool | None = None  # decided on the first batch
        self._whole: Whole | None = None
        self._since_log: dict[str, list[float]] = defaultdict(list)
        self._tokens, self._clock = 0, time.monotonic()
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=rows,  # type: ignore[arg-type]
            eval_dataset={},  # transformers asks for one where there is an eval_strategy; `evaluate` measures
            processing_class=processing_class,
            callbacks=callbacks,
        )
        if isinstance(rows, SetRows):
            self.add_callback(EachEpoch(rows.set_epoch))
        if method.observes:
            self.add_callback(EachStep(self._after_step))
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if not args.disable_tqdm:
            self.add_callback(StepBar())
        self.model_accepts_loss_kwargs = False  # transformers 5.17 and 5.18 name the same fact so
        self.reference = None
        if method.reference:
            cached = args.reference == "cached" and method.ref_layers
            self.reference = Reference(model, self._stored(model, rows) if cached else None, self.trained)
        self._prepare(model, probe_data)

    def _prepare(self, model: nn.Module, probe_data: Sequence[tuple[str, bool]]) -> None:
        """What the method draws from model and data before the first step; the same on every process."""
        args: UnlearnConfig = self.args  # type: ignore[assignment]
        tokenizer, most = self.processing_class, args.max_prompt_tokens + args.max_continuation_tokens
        forget = [self.rows[at]["forget"] for at in range(min(FIRST, len(self.rows)))]
        longest = min(most, context_length(model))
        labelled = tokenize_labelled(probe_data, tokenizer, longest) if self.method.labelled else []
        check_known((ids for ids, _ in labelled), known_tokens(model), tokenizer)
        with torch.no_grad(), original(model), torch.random.fork_rng():
            self.method.prepare(dict(self.heads), Material(model, forget, labelled))

    def _stored(self, model: nn.Module, rows: PairRows | SetRows) -> StoredStates:
        """The states that the method reads of the reference; one process of a machine computes them for all."""
        adapter: set[str] = set()
        if hasattr(model, "disable_adapter"):
            marks: tuple[Any, ...] = (model.base_model.prefix, "modules_to_save")  # type: ignore[union-attr]
            adapter = {name for name in model.state_dict() if any(mark in name for mark in marks)}
        weights = weights_digest(model, skip=adapter)
        ids = rows.sequences(self.method.ref_sides)
        with self.args.main_process_first(desc="reference states"), original(model), self.accelerator.autocast():
            return StoredStates.of(model, ids, self.method.ref_layers, weights, quiet=self.args.disable_tqdm is True)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train` with the heads on the model, so that DDP and FSDP2 see their parameters; then without."""
        inner: Any = self.accelerator.unwrap_model(self.model)
        inner.add_module(HEADS, self.heads)
        self._clock = time.monotonic()
        try:
            with only_training(inner, self.trained):
                return super().train(*args, **kwargs)
        finally:
            delattr(inner, HEADS)

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """The micro-batches of the next optimizer step; their rows are counted together, over all processes."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        parts = len(batches) * self.accelerator.num_processes
        self._whole = None if parts <= 1 else Whole.of({side: self._rows(side, batches) for side in batches[0]}, parts)
        return batches, items

    def _rows(self, side: str, batches: Sequence[Mapping[str, Mapping[str, torch.Tensor]]]) -> torch.Tensor:
        rows = torch.cat([torch.stack([batch[side]["prompts"], batch[side]["lengths"]], dim=1) for batch in batches])
        rows = self.accelerator.pad_across_processes(rows.to(self.args.device), dim=0)  # with rows of no tokens
        return self.accelerator.gather(rows)  # type: ignore[return-value]

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """The figures of `measure` on the model as it is, logged with a prefix. Every process measures, for all to agree."""
        assert self.measure is not None
        started, model = time.monotonic(), self.accelerator.unwrap_model(self.model)
        with _undisturbed(model):
            found = self.measure(model, self.state.global_step)
        figures = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        best = self.args.metric_for_best_model
        if best and f"eval_{best.removeprefix('eval_')}" not in figures:
            raise ExpungeError(f"training.metric_for_best_model={best!r} is not measured{did_you_mean(best, found)}")
        self.log(figures)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        self._clock += time.monotonic() - started  # tokens per second are those of training
        return figures

    def compute_loss(self, model, inputs: dict[str, Any], return_outputs=False, num_items_in_batch=None):
        inner = self.accelerator.unwrap_model(model)
        step, losses = inside_forward(model, inner, self._losses, inputs)
        total = torch.stack(list(losses.values())).sum()
        values = {name: value.item() for name, value in losses.items()}
        if not math.isfinite(sum(values.values())):
            shown = ", ".join(f"{name}={value}" for name, value in values.items())
            raise ExpungeError(
                f"the loss is not a number at step {self.state.global_step + 1} ({shown}): the last checkpoint in "
                f"{self.args.output_dir} stands; lower training.learning_rate or the method's weight, with another --out"
            )
        for name, value in {**values, **step.logged}.items():
            self._since_log[name].append(value)
        for name in self.method.observes:
            self._observed[name].append(step.logged[name])
        self._tokens += sum(int(side["lengths"].sum()) for side in inputs.values())
        return total

    def _after_step(self) -> None:
        """Give the method its figures of the optimizer step, as means over micro-batches and processes."""
        names = self.method.observes
        means = torch.tensor([sum(self._observed[name]) / len(self._observed[name]) for name in names])
        means = self.accelerator.reduce(means.to(self.args.device), "mean").tolist()  # type: ignore[union-attr]
        self._observed.clear()
        for name, value in self.method.after_step(dict(self.heads), dict(zip(names, means, strict=True))).items():
            self._since_log[name].append(value)

    def _losses(self, inner: nn.Module, batch: Mapping[str, Any]) -> tuple[Step, Mapping[str, torch.Tensor]]:
        progress = self.state.global_step / max(1, self.state.max_steps)
        read = {name: side for name, side in batch.items() if name in self.method.sides}
        with self.accelerator.autocast():
            if self.plain is None:
                check_head(inner, batch)
                self.plain = not (self.paired and self.chunked and shares_prefix(inner, read, self.method.layers))
            step = run_step(
                inner,
                self.reference,
                read,
                layers=self.method.layers,
                ref_layers=self.method.ref_layers,
                heads=self.heads,
                progress=progress,
                ref_sides=self.method.ref_sides,
                plain=self.plain,
                chunked=self.chunked,
                whole=self._whole,
            )
            return step, self.method.loss(step)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Three groups: matrices with weight decay, vectors without, and the heads at their own learning rate."""
        trained: nn.Module = self.model if model is None else model  # type: ignore[assignment]
        decayed = set(self.get_decay_parameter_names(trained))
        groups: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "heads": []}
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad:
                kind = "heads" if HEADS in name else "matrices" if name in decayed else "vectors"
                groups[kind].append(parameter)
        args: UnlearnConfig = self.args  # type: ignore[assignment]
        heads_rate = args.heads_learning_rate
        if heads_rate is None:
            heads_rate = max(10 * args.learning_rate, 1e-4)
        cls, options = self.get_optimizer_cls_and_kwargs(args, trained)  # type: ignore[arg-type]
        self.optimizer = cls(
            [
                {"params": groups["matrices"], "weight_decay": args.weight_decay},
                {"params": groups["vectors"], "weight_decay": 0.0},
                {"params": groups["heads"], "weight_decay": 0.0, "lr": heads_rate},
            ],
            **options,
        )
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to a line of losses what the method logged since the last one, as means, and tokens per second."""
        if self._since_log and "loss" in logs:
            now = time.monotonic()
            means = [sum(values) / len(values) for values in self._since_log.values()]
            figures = torch.tensor([*means, self._tokens / max(1e-9, now - self._clock)], dtype=torch.float32)
            *means, speed = self.accelerator.reduce(figures.to(self.args.device), "mean").tolist()  # type: ignore[union-attr]
            logs.update(zip(self._since_log, means, strict=True))
            logs["tokens_per_second"] = speed * self.accelerator.num_processes
            self._since_log.clear()
            self._tokens, self._clock = 0, now
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Model, tokenizer, and the heads in a file of their own; no pickled arguments."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)  # type: ignore[arg-type]
        model = self.accelerator.unwrap_model(self.model)
        if state_dict is not None:
            state_dict = {name: tensor for name, tensor in state_dict.items() if HEADS not in name}
        with _without_heads(model):
            model.save_pretrained(folder, state_dict=state_dict)
        if self.heads.state_dict() and folder.name.startswith("checkpoint-"):
            save_file(self.heads.state_dict(), folder / "heads.safetensors")
        self.processing_class.save_pretrained(folder)  # type: ignore[union-attr]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint that is written again is incomplete until it is whole: its state goes first and comes last."""
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
                raise
            shutil.rmtree(folder, ignore_errors=True)
            raise cannot_write(folder, error) from None

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the state, which comes next, says that all processes are done

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        inner = self.accelerator.unwrap_model(model or self.model)
        with _without_heads(inner):
            super()._load_from_checkpoint(resume_from_checkpoint, inner)
        if self.heads.state_dict():
            self.heads.load_state_dict(load_file(Path(resume_from_checkpoint) / "heads.safetensors"))

    def _load_best_model(self) -> None:
        with _without_heads(self.accelerator.unwrap_model(self.model)):
            super()._load_best_model()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # transformers' estimate looks for input_ids, which our batches do not have


@contextmanager
def _undisturbed(model: nn.Module):
    """Evaluation mode inside; then the mode and all random states are what they were."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(), evaluating(model):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def _without_heads(model: nn.Module):
    heads = model._modules.pop(HEADS, None)
    try:
        yield
    finally:
        if heads is not None:
            model._modules[HEADS] = heads
