"""Measuring in the midst of training: it sees what changed, and training does not see it."""

import json
import random
from typing import ClassVar

import numpy as np
import pytest
import torch
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from expunge import REPO, ExpungeError, UnlearnConfig, UnlearnTrainer
from expunge.callbacks import last_checkpoint
from expunge.config import EvaluationConfig
from expunge.data import load_corpus
from expunge.metrics.evaluation import EvaluationData
from expunge.models import weights_digest
from expunge.monitor import FIGURES, Monitor, light_plan
from expunge.rows import read_rows
from expunge.scorers import load_scorer

TEXT = "The river runs past the old mill and on to the sea. " * 20


@pytest.fixture
def monitor(tmp_path, tiny_model, tokenizer):
    def make(model=None, **changes) -> Monitor:
        data = EvaluationData(challenge={"mine": ["The river", "A cold wind"]}, corpora={"text": TEXT})
        plan = light_plan(2, 1000, EvaluationConfig(max_new_tokens=4, seed=3))
        settings = {"data": data, "plan": plan, "scorer": load_scorer("ngram"), "path": tmp_path / "checkpoints.jsonl"}
        return Monitor(model or tiny_model(), tokenizer, **settings | changes)

    return make


@pytest.fixture
def trainer(tmp_path, tiny_model, tokenizer, pairs):
    def make(model=None, measure=None, callbacks=None, **changes) -> UnlearnTrainer:
        settings = {"use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2, "warmup_steps": 0, "max_steps": 6}
        settings |= {"per_device_train_batch_size": 4, "save_strategy": "no", "eval_steps": 2}
        args = UnlearnConfig(**{"output_dir": str(tmp_path / "run"), **settings, **changes})
        return UnlearnTrainer(model or tiny_model(), REPO(), args, pairs, tokenizer, callbacks, measure)

    return make


def test_a_call_writes_rows_of_its_step_with_ratios_to_the_start(tmp_path, tiny_model, monitor):
    model = tiny_model()
    watch = monitor(model, about={"method": "repo", "run": "first"})
    same = watch(model, 0)
    assert same.keys() == set(FIGURES)
    assert same["toxicity_ratio"] == same["perplexity_ratio"] == 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert watch(model, 2)["perplexity_ratio"] > 1.5  # the control: broken weights show
    rows = read_rows(tmp_path / "checkpoints.jsonl")
    assert [(row.step, row.metric) for row in rows] == [(step, name) for step in (0, 2) for name in sorted(FIGURES)]
    for row in rows:
        assert (row.stage, row.subject, row.method, row.run, row.seed) == ("train", "unlearned", "repo", "first", 3)
        assert row.paired == row.metric.endswith("_ratio")
        toxic = row.metric.startswith("toxicity")
        about = ("mine", "sampled", "ngram", 2, 2) if toxic else ("text", None, None, None, row.n)
        assert (row.dataset, row.decode, row.scorer, row.samples, row.n) == about


def test_steps_that_are_taken_again_have_rows_once(tmp_path, tiny_model, monitor):
    model = tiny_model()
    for step in (2, 4, 6):
        monitor(model)(model, step)
    monitor(model)(model, 4)  # resumed at 3
    assert [row.step for row in read_rows(tmp_path / "checkpoints.jsonl")] == [2] * 4 + [4] * 4
    assert not list(tmp_path.glob("*.tmp"))


def test_one_of_both_may_be_left_out_but_not_both(tiny_model, monitor):
    model = tiny_model()
    assert monitor(model, data=EvaluationData(corpora={"text": TEXT}))(model, 0).keys() == {"perplexity", "perplexity_ratio"}
    with pytest.raises(ExpungeError, match=r"nothing to measure; give monitor\.prompts, monitor\.corpus or both"):
        monitor(model, data=EvaluationData())


def disturbing(model, step):
    assert not model.training
    for _ in range(step):
        random.random(), np.random.rand(), torch.rand(1)
    model.train()
    return {"toxicity": 1.0}


def test_training_is_bit_identical_with_and_without_a_measurement(tmp_path, tiny_model, trainer, monitor):
    digests, losses = set(), []
    for how in ("none", "monitor", "disturbing"):
        model = tiny_model()
        measure = {"none": None, "monitor": monitor(), "disturbing": disturbing}[how]
        run = trainer(model, measure, eval_strategy="no" if measure is None else "steps", logging_steps=3)
        run.train()
        digests.add(weights_digest(model))
        lines = [line for line in run.state.log_history if "loss" in line]
        losses.append([(line["loss"], line["anchor"], line["erase"]) for line in lines])
        measured = [line for line in run.state.log_history if "eval_toxicity" in line]
        assert [line["step"] for line in measured] == ([] if measure is None else [2, 4, 6])
        assert not any("anchor" in line for line in measured)
        assert model.training
    assert len(digests) == 1
    assert losses[0] == losses[1] == losses[2]


def test_a_resumed_run_leaves_the_rows_of_an_undisturbed_one(tmp_path, tiny_model, trainer, monitor):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 5

    plan = {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": 3}
    trainer(measure=monitor(), **plan, output_dir=str(tmp_path / "whole")).train()
    whole = (tmp_path / "checkpoints.jsonl").read_text()
    trainer(measure=monitor(), callbacks=[Stop()], **plan).train()
    resumed = trainer(measure=monitor(), **plan)
    resumed.train(resume_from_checkpoint=str(last_checkpoint(tmp_path / "run")))
    assert (tmp_path / "checkpoints.jsonl").read_text() == whole
    assert {json.loads(line)["step"] for line in whole.splitlines()} == {2, 4, 6}


@pytest.mark.parametrize("save", ["steps", "best"])
def test_the_best_model_is_the_least_toxic_one(tmp_path, tiny_model, trainer, save):
    values, digests = {2: 3.0, 4: 1.0, 6: 2.0}, {}

    def measure(model, step):
        digests[step] = weights_digest(model, skip=[name for name in model.state_dict() if "expunge_heads" in name])
        return {"toxicity_ratio": values[step]}

    model = tiny_model()
    best = {"load_best_model_at_end": True, "metric_for_best_model": "toxicity_ratio", "save_steps": 2}
    run = trainer(model, measure, eval_strategy="steps", save_strategy=save, **best)
    run.train()
    assert weights_digest(model) == digests[4] != digests[6]
    with pytest.raises(
        ExpungeError, match=r"metric_for_best_model='toxicty' is not measured \(did you mean 'toxicity_ratio'\?"
    ):
        trainer(measure=measure, eval_strategy="steps", save_strategy="no", metric_for_best_model="toxicty").train()


def test_a_strategy_without_a_measurement_is_one_line(trainer):
    with pytest.raises(ExpungeError, match=r"eval_strategy: nothing to measure with; give UnlearnTrainer measure="):
        trainer(eval_strategy="steps")


def test_the_validation_text_is_no_text_that_is_reported():
    text = load_corpus("builtin-validation")
    assert len(text) > 10_000
    assert text[:200] not in load_corpus("builtin-neutral")


class Recorder(TrainerCallback):
    lines: ClassVar[list[dict]] = []

    def on_log(self, args, state, control, logs=None, **_):
        self.lines.append(dict(logs))


def test_losses_and_measurements_go_where_report_to_says(monkeypatch, trainer):
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["trackio"])
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", Recorder)
    Recorder.lines.clear()
    trainer(measure=lambda model, step: {"toxicity": 0.5}, eval_strategy="epoch", report_to="trackio", max_steps=4).train()
    assert sum("anchor" in line for line in Recorder.lines) == 4
    assert sum(line.get("eval_toxicity") == 0.5 for line in Recorder.lines) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [("wandb", "the package is not installed .pip install wandb."), ("wandbb", "unknown 'wandbb' .did you mean 'wandb'")],
)
def test_a_reporter_that_is_not_there_is_one_line(tmp_path, monkeypatch, name, message):
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["trackio"])
    with pytest.raises(ExpungeError, match=message):
        UnlearnConfig(str(tmp_path), report_to=name)
