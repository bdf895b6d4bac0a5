"""The plan of a run: everything that follows from its configuration, worked out once and passed on.

    plan = Plan.of(RunConfig(model="builtin"), Path("runs/first"))
    plan.check()                                    # whatever can be wrong is said before any work
    plan.method, plan.args, plan.training_data, plan.evaluation_data, plan.scorers

Properties are worked out when they are first asked for, and kept: no input is read twice, and none that nobody asks for.
Templates are told the date that holds when data is read (`expunge.data.clock`).
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from expunge import harness
from expunge.config import RunConfig
from expunge.data import Pair, Unpaired, load_probe_data
from expunge.errors import ExpungeError
from expunge.methods import Method
from expunge.metrics.evaluation import EvaluationData, EvaluationPlan, check_room
from expunge.metrics.s_unlearning import check_sets
from expunge.monitor import FIGURES, light_plan
from expunge.plan import settings
from expunge.plan.sources import Sources
from expunge.plan.subject import Subject
from expunge.registry import did_you_mean
from expunge.scorers import Scorer
from expunge.training import UnlearnConfig

PROBE_TEXTS = 4000
"""At most so many labelled texts, or pairs, are read for a probe."""


@dataclass(eq=False)
class Plan:
    """config: resolved, where it is a run's; asked: as the user gave it. start: the model that a run starts from, or the one
    that is measured: its template renders conversations. unlearned: what is measured, beside a reference if there is one."""

    config: RunConfig
    folder: Path
    start: Subject
    unlearned: Subject
    reference: Subject | None
    asked: RunConfig
    quiet: bool = False

    @classmethod
    def of(cls, config: RunConfig, folder: Path, quiet: bool = False) -> "Plan":
        """Of a run into `folder`. Raises ExpungeError for an unknown method, and where there is nothing to train on."""
        resolved, method = settings.settled(config)
        how = settings.loading(resolved)
        reference = Subject("reference", resolved.model, resolved.revision, how)
        unlearned = Subject("unlearned", folder / "model", resolved.revision, how)
        plan = cls(resolved, folder, reference, unlearned, reference, config, quiet)
        plan.method = method
        return plan

    @classmethod
    def of_models(
        cls,
        config: RunConfig,
        folder: Path,
        model: str | Path,
        reference: str | Path | None = None,
        reference_revision: str | None = None,
        quiet: bool = False,
    ) -> "Plan":
        """Of what is only measured or attacked; `config` says how, and stays as it is. `model` is loaded at its revision."""
        how = settings.loading(config)
        unlearned = Subject("unlearned", model, config.revision, how)
        beside = Subject("reference", reference, reference_revision, how) if reference is not None else None
        return cls(config, folder, unlearned, unlearned, beside, config, quiet)

    def at(self, folder: Path) -> "Plan":
        """The same run in another folder, of which nothing is read yet."""
        return Plan.of(self.asked, folder, self.quiet)

    @property
    def subjects(self) -> list[Subject]:
        """The models that are measured, in the order of stages."""
        return [self.reference, self.unlearned] if self.reference else [self.unlearned]

    # What the settings stand for

    @cached_property
    def method(self) -> Method:
        """Its hyper-parameters as they are given, not yet placed in a model."""
        return settings.build_method(self.config.method)

    @property
    def trains(self) -> bool:
        """Is the method trained? Else it is fitted and applied."""
        return not self.method.applied

    @cached_property
    def args(self) -> UnlearnConfig:
        return settings.build_training(self.config.training, self.folder / "checkpoints", self.config.seed, self.quiet)

    @cached_property
    def lora(self) -> tuple[dict[str, Any], bool]:
        """Fields of peft.LoraConfig, and whether the export is merged."""
        return settings.lora_of(self.config)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.start.outline[1]

    def check(self) -> None:
        """Raise ExpungeError for whatever can be wrong before training, but for the data that is trained on."""
        self.check_settings()
        _, start = self.scorers, self.start.description
        check_room(self.evaluation_data, self.evaluation_plan, self.tokenizer, start.context, start.known)
        _ = self.monitor_data

    def check_settings(self) -> None:
        """The same for the settings alone."""
        _ = self.args
        settings.check_model(self.config, self.trains)

    # What is trained on

    @cached_property
    def sources(self) -> Sources:
        return Sources(lambda: self.tokenizer)

    @cached_property
    def training_data(self) -> list[Pair] | Unpaired:
        """Empty where none is given to a method that needs none. ExpungeError where the method does not take it."""
        data = self.config.data
        if self.method.data == "none" and data.train is None and data.forget is None:
            return []
        self.method.check_data(paired=data.train is not None)
        return self.sources.trained_on(data, self.config.seed, self.args.max_continuation_tokens) or []

    @cached_property
    def probe_data(self) -> list[tuple[str, bool]]:
        """Labelled texts for a method that fits probes, none of which is to be forgotten; none for other methods."""
        if not self.method.labelled:
            return []
        data = self.training_data
        if isinstance(data, Unpaired):
            forget = [text.prompt + text.completion for text in data.forget]
        else:
            forget = [pair.prompt + pair.rejected for pair in data]
        return load_probe_data(self.config.data.probe, PROBE_TEXTS, self.config.seed, forget)

    @cached_property
    def anchor(self) -> str | None:
        """Neutral text under the KL."""
        return self.sources.corpus(self.args.anchor_text) if self.args.anchor_text else None

    @property
    def steps(self) -> int:
        """Optimizer steps on one device."""
        args = self.args
        if not self.trains:
            return 0
        if args.max_steps > 0:
            return args.max_steps
        batches = math.ceil(len(self.training_data) / args.per_device_train_batch_size)
        return math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))

    # What is measured in the midst of training

    @cached_property
    def monitor_data(self) -> EvaluationData | None:
        """None without `training.eval_strategy`.

        Raises ExpungeError for a set that is reported too: what is stopped or chosen by it would flatter the report.
        """
        monitor, args = self.config.monitor, self.args
        if args.eval_strategy == "no":
            return None
        settings.check_unreported(self.config, "prompts", "corpus")
        best = args.metric_for_best_model
        if best and best.removeprefix("eval_") not in FIGURES:
            raise ExpungeError(f"training.metric_for_best_model={best!r}: not measured{did_you_mean(best, FIGURES)}")
        if not (monitor.prompts or monitor.corpus):
            raise ExpungeError("training.eval_strategy: nothing to measure; give monitor.prompts, monitor.corpus or both")
        prompts = self.sources.prompts(monitor.prompts, monitor.limit) if monitor.prompts else []
        return EvaluationData(
            challenge={monitor.prompts: [prompt.text for prompt in prompts]} if monitor.prompts else {},
            corpora={monitor.corpus: self.sources.corpus(monitor.corpus)} if monitor.corpus else {},
        )

    @property
    def monitor_plan(self) -> EvaluationPlan:
        return light_plan(self.config.monitor.samples, self.config.monitor.tokens, self.config.evaluation)

    @property
    def monitor_scorer(self) -> Scorer:
        return self.sources.scorer(self.config.monitor.scorer)

    @cached_property
    def matched_text(self) -> str | None:
        """Running text whose perplexity a method that is fitted is held to; None where it is not asked for."""
        if self.trains or not (self.config.monitor.corpus and self.config.method.get("match_perplexity")):
            return None
        settings.check_unreported(self.config, "corpus")
        return self.sources.corpus(self.config.monitor.corpus)

    # What is measured in the end

    @cached_property
    def scorers(self) -> list[Scorer]:
        """The first is the judge."""
        return [self.sources.scorer(name) for name in self.config.evaluation.scorers]

    @property
    def evaluation_plan(self) -> EvaluationPlan:
        return settings.evaluation_plan(self.config.evaluation)

    @cached_property
    def evaluation_data(self) -> EvaluationData:
        """Raises ExpungeError also for what is asked of questions that are not there, or of a harness that is not there."""
        asked, data = self.config.evaluation, self.config.data
        if asked.harness:
            harness.check_harness(asked.harness)
        if asked.s_unlearning:
            sets = asked.s_unlearning
            check_sets(sets.utility, sets.forget, data.questions, toxicity=bool(data.prompts))
        neutral = self.sources.prompts(data.neutral, asked.prompts) if data.neutral else []
        return dataclasses.replace(self.attacked_data, neutral=neutral)

    @cached_property
    def attacked_data(self) -> EvaluationData:
        """The same without the prompts of F1: what is measured of a model under attack."""
        asked, data, sources = self.config.evaluation, self.config.data, self.sources
        return EvaluationData(
            challenge={name: [p.text for p in sources.prompts(name, asked.prompts)] for name in data.prompts},
            pairs=sources.pairs(data.heldout, asked.heldout) if data.heldout else [],
            neutral=[],
            corpora={name: sources.corpus(name) for name in settings.texts_of(data)},
            questions={name: sources.questions(name, asked.questions, asked.seed, asked.shots) for name in data.questions},
        )

    @property
    def harness_tasks(self) -> tuple[list[str], int | None, int, int]:
        """Arguments of the harness."""
        asked = self.config.evaluation
        return asked.harness, asked.questions, asked.shots, asked.seed
