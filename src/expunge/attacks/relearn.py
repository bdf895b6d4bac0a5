"""Relearning: fine-tune the unlearned model on a few texts, and see how much of the rest comes back.

    minimise   - mean log p(token | tokens before it)     over all tokens of prompt + continuation

relearn_forget trains on texts that were to be forgotten (10 in the papers), relearn_retain on texts that were to be
retained, relearn_benign on neutral running text, which has to do with neither. AdamW; the rate rises over the first 5 % of
the steps, then falls linearly to 0. Ten texts are six steps: `AttackResult.steps` belongs beside every figure.

    result = RelearnForget(samples=10, learning_rate=5e-5, seed=1).run(unlearned, None, data, Budget())

REPO paper, section 3.2 and appendix B (its learning rates are lost); Hu et al. 2024, "Jogging the Memory of Unlearned LLMs";
Lucki et al. 2025, "An Adversarial Perspective on Machine Unlearning for AI Safety" (LoRA, r 128, alpha 16, 2e-4).
"""

import math
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from expunge.adapters import add_lora
from expunge.attacks.base import Attack, AttackData, AttackResult, Budget, Meter, attack
from expunge.data.tokenize import TokenizedText
from expunge.engine import collate
from expunge.errors import ExpungeError
from expunge.metrics.perplexity import row_nll
from expunge.models import Description, context_length, frozen, sharing_copy, without_dropout
from expunge.ranges import Count, NonNegative, NonNegativeInt, Positive

RATES = [5e-5, 2e-4, 1e-3]
"""Ours, for a small model."""
PAPERS_RATES = [1e-5, 5e-5, 1e-4]
"""Ours, for the papers' models: the REPO paper gives none; Hu et al. take 1e-5 for all weights."""
MORE_RATES = [1e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3]
DRAWS = [0, 1, 2]
"""The papers' figures are means over three of them."""


@dataclass(kw_only=True)
class Relearn(Attack):
    """Fields and training of a relearning attack, on texts of `part`."""

    part: ClassVar[Literal["forget", "retain", "neutral"]]

    samples: Count = 10
    """Texts, drawn at random with `seed`."""
    epochs: NonNegativeInt = 3
    learning_rate: Positive = 5e-5
    """At its peak."""
    batch: Count = 8
    """Texts a step; all of them where there are fewer."""
    weight_decay: NonNegative = 0.01
    lora: NonNegativeInt = 0
    """Rank of an adapter on every linear layer, which then is all that is trained; 0 trains all weights."""
    alpha: Count = 16
    """What the adapter adds is multiplied by alpha / rank."""

    def check(self, unlearned: Description, reference: Description | None, data: AttackData) -> None:
        super().check(unlearned, reference, data)
        draw(self, data, self.part, self.samples, unlearned.context)

    def run(self, unlearned: Any, reference: Any, data: AttackData, budget: Budget) -> AttackResult:
        self.check_loaded(unlearned, reference, data)
        meter = Meter(budget)
        rows = draw(self, data, self.part, self.samples, context_length(unlearned))
        about = {"samples": len(rows), "tokens": sum(len(prompt) + len(continuation) for prompt, continuation in rows)}
        if not self.epochs:
            return meter.result(sharing_copy(unlearned, []), about=about, idle="epochs=0: nothing is trained")
        with frozen(unlearned), _seeded(self.seed):  # PEFT freezes the weights beneath an adapter, which are the victim's
            model = self.trainable(unlearned)
            self.train(model, rows, meter)
        model.eval()
        nll, tokens = row_nll(model, [(prompt + continuation, 1) for prompt, continuation in rows])
        meter.queries += len(rows)
        return meter.result(model, about={**about, "loss": float(nll.sum() / tokens.sum())})

    def trainable(self, unlearned: Any) -> Any:
        """A copy of the victim, or an adapter on its own weights; in at least float32, where small steps are not lost."""
        model: Any = without_dropout(sharing_copy(unlearned, [] if self.lora else None))
        model.loss_type = "ForCausalLM"  # of GPT-2 transformers does not find it in the name, and says so
        if self.lora:
            return add_lora(model, r=self.lora, lora_alpha=self.alpha)
        return (model.float() if model.dtype.itemsize < 4 else model).requires_grad_(True)

    def train(self, model: nn.Module, rows: Sequence[TokenizedText], meter: Meter) -> None:
        """Fine-tune in place, until the epochs or the budget end. Raises ExpungeError where the loss is no number."""
        batch = min(len(rows), self.batch)
        steps = self.epochs * math.ceil(len(rows) / batch)
        place = next(model.parameters()).device
        with tempfile.TemporaryDirectory() as folder:
            args = _OneDevice(
                output_dir=folder,
                use_cpu=place.type == "cpu",
                seed=self.seed,
                num_train_epochs=self.epochs,
                per_device_train_batch_size=batch,
                learning_rate=self.learning_rate,
                weight_decay=self.weight_decay,
                warmup_steps=steps // 20,  # transformers rounds up: the one step of a short training would have rate 0
                lr_scheduler_type="linear",
                optim="adamw_torch",
                logging_steps=1,
                logging_nan_inf_filter=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
            )
            if (place.type, place.index or 0) != (args.device.type, args.device.index or 0):
                raise ExpungeError(
                    f"attack {self.name}: the model is on {place}, but training runs on {args.device}: move it there, or "
                    "let this process see that device only (CUDA_VISIBLE_DEVICES)"
                )
            metered = _Metered(self.name, meter, len(rows), batch)
            trainer = Trainer(model, args, causal_batch, train_dataset=rows, callbacks=[metered])  # type: ignore[arg-type]
            trainer.remove_callback(PrinterCallback)
            trainer.train()


@attack("relearn_forget")
class RelearnForget(Relearn):
    """Fine-tune on a few of the texts that were to be forgotten."""

    paper: ClassVar[str] = "Hu et al. 2024; Lucki et al. 2025; REPO, section 3.2"
    needs: ClassVar[tuple[str, ...]] = ("forget",)
    part: ClassVar[Literal["forget", "retain", "neutral"]] = "forget"
    budgets: ClassVar[dict[str, dict[str, list[Any]]]] = {
        "small": {"samples": [10], "learning_rate": RATES, "seed": DRAWS},
        "paper": {"samples": [10], "learning_rate": PAPERS_RATES, "seed": DRAWS},
        "large": {"samples": [10, 20, 30, 40, 50], "learning_rate": MORE_RATES, "lora": [0, 16], "seed": DRAWS},
    }


@attack("relearn_retain")
class RelearnRetain(Relearn):
    """Fine-tune on texts that were to be retained."""

    paper: ClassVar[str] = "REPO, section 3.2 (1,000 texts) and appendix B (100)"
    needs: ClassVar[tuple[str, ...]] = ("retain",)
    part: ClassVar[Literal["forget", "retain", "neutral"]] = "retain"
    budgets: ClassVar[dict[str, dict[str, list[Any]]]] = {
        "small": {"samples": [100], "learning_rate": RATES, "seed": DRAWS},
        "paper": {"samples": [100, 1000], "learning_rate": PAPERS_RATES, "seed": DRAWS},
        "large": {
            "samples": [100, 200, 300, 400, 500, 1000],
            "learning_rate": MORE_RATES,
            "lora": [0, 16],
            "seed": DRAWS,
        },
    }

    samples: Count = 100


@attack("relearn_benign")
class RelearnBenign(Relearn):
    """Fine-tune on passages of neutral text."""

    paper: ClassVar[str] = "Lucki et al. 2025 (WikiText)"
    needs: ClassVar[tuple[str, ...]] = ("neutral",)
    part: ClassVar[Literal["forget", "retain", "neutral"]] = "neutral"
    budgets: ClassVar[dict[str, dict[str, list[Any]]]] = {
        "small": {"samples": [50], "learning_rate": RATES, "seed": DRAWS},
        "paper": {"samples": [10, 50], "learning_rate": PAPERS_RATES, "seed": DRAWS},
        "large": {"samples": [10, 20, 50], "learning_rate": MORE_RATES, "seed": DRAWS},
    }

    samples: Count = 50
    """The built-in neutral text has 84 passages of 64 tokens; give `redteam.neutral` more to take more."""
    learning_rate: Positive = 2e-4
    lora: NonNegativeInt = 128


def draw(
    by: Attack,
    data: AttackData,
    part: Literal["forget", "retain", "neutral"],
    samples: int,
    context: int,
    or_all: bool = False,
) -> list[TokenizedText]:
    """`samples` texts of a part, at random with the attack's seed, as (prompt ids with bos, continuation ids).

    or_all: where there are fewer, all of them.
    Raises ExpungeError where there are fewer otherwise, or none, and for a row of more than `context` tokens.
    """
    rows = data.rows(part)
    samples = min(samples, max(1, len(rows))) if or_all else samples
    if len(rows) < samples:
        there = (
            f"the neutral text has {len(rows)} passages" if part == "neutral" else f"the {part} set has {len(rows)} texts"
        )
        raise ExpungeError(f"attack.{by.name}.samples={samples}: {there}; lower it, or give more")
    drawn = random.Random(by.seed).sample(rows, samples)
    longest = max(len(prompt) + len(continuation) for prompt, continuation in drawn)
    if longest > context:
        raise ExpungeError(
            f"attack {by.name}: the longest text has {longest} tokens, the model's context {context}: lower "
            "max_prompt_tokens or max_continuation_tokens"
        )
    return drawn


def causal_batch(rows: Sequence[TokenizedText]) -> dict[str, torch.Tensor]:
    """What a causal model's own loss takes, `[B, T]` each: every real token but a row's first, which nothing predicts."""
    side = collate([{"text": row} for row in rows])["text"]
    position = torch.arange(side["ids"].shape[1])
    real = position < side["lengths"][:, None]
    labels = side["ids"].where(real & (position > 0), -100)
    return {"input_ids": side["ids"], "attention_mask": real.long(), "labels": labels}


class _OneDevice(TrainingArguments):
    """However many devices there are: on several, transformers would copy the model to each."""

    @property
    def n_gpu(self) -> int:
        return min(1, super().n_gpu)


class _Metered(TrainerCallback):
    """Tells the meter of each optimizer step, and ends the training where nothing is left of the budget."""

    def __init__(self, name: str, meter: Meter, rows: int, batch: int):
        self.name, self.meter, self.rows, self.batch = name, meter, rows, batch

    def on_log(self, args, state, control, logs=None, **_):
        if not logs or "loss" not in logs:  # the summary at the end
            return
        epochs, steps = divmod(state.global_step, math.ceil(self.rows / self.batch))
        self.meter.queries = epochs * self.rows + steps * self.batch
        self.meter.step(loss=logs["loss"])
        if not math.isfinite(logs["loss"]):
            raise ExpungeError(
                f"attack {self.name}: the loss is not a number at step {state.global_step}; lower "
                f"attack.{self.name}.learning_rate"
            )
        if self.meter.spent:
            control.should_training_stop = True


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """All random generators begin with `seed` inside the block; after it they are where they were."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        set_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
