"""TRL's DPOTrainer as an oracle: the same model, pairs, order and optimizer must give the same training."""

import copy

import datasets
import pytest
import torch
import trl
from transformers import TrainerCallback

from expunge.adapters import add_lora
from expunge.data import tokenize_pairs
from expunge.methods.dpo import DPO
from expunge.training import UnlearnConfig, UnlearnTrainer

STEPS = 20
BETA = 0.3
SHARED = {
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "train_sampling_strategy": "sequential",
    "per_device_train_batch_size": 3,  # 8 pairs: the last batch of an epoch is shorter
    "max_steps": STEPS,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 4,
    "weight_decay": 0.1,
    "adam_beta1": 0.85,
    "adam_beta2": 0.98,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 1.0,
    "gradient_checkpointing": False,
}


class Record(TrainerCallback):
    """The first step's gradients, and the loss and gradient norm of every step."""

    def __init__(self):
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if not self.gradients:
            self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.norms.append(float(logs["grad_norm"]))


def recording(cls: type) -> type:
    class Recording(cls):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            self.record.losses.append(loss.item())
            return loss

        def train(self):
            self.record = Record()
            self.add_callback(self.record)
            super().train()
            return self.record

    return Recording


def trl_trainer(model, reference, pairs, tokenizer, folder):
    class Pretokenized(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset  # ours has no eos after a completion, so both get the same ids

    tokenized, _ = tokenize_pairs(pairs, tokenizer)
    rows = [{"prompt_ids": row.prompt, "chosen_ids": row.chosen, "rejected_ids": row.rejected} for row in tokenized]
    return recording(Pretokenized)(
        model=model,
        ref_model=reference,
        args=trl.DPOConfig(output_dir=str(folder), beta=BETA, disable_dropout=True, max_length=None, **SHARED),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=copy.deepcopy(tokenizer),
    )


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_dpo_is_that_of_trl(tmp_path, tiny_model, tokenizer, pairs, lora):
    ours = tiny_model(dtype=torch.double)
    if lora:
        torch.manual_seed(0)
        ours = add_lora(ours, r=4).double()
    theirs, reference = copy.deepcopy(ours), None if lora else copy.deepcopy(ours)

    config = UnlearnConfig(output_dir=str(tmp_path / "ours"), **SHARED)
    trainer = recording(UnlearnTrainer)(ours, DPO(beta=BETA, clamp=None), config, pairs, tokenizer)
    record = trainer.train()
    oracle = trl_trainer(theirs, reference, pairs, tokenizer, tmp_path / "theirs").train()

    assert len(record.losses) == len(oracle.losses) == STEPS
    assert record.losses == pytest.approx(oracle.losses, rel=1e-5)
    assert record.norms == pytest.approx(oracle.norms, rel=1e-5)
    assert abs(record.losses[-1] - record.losses[0]) > 0.1  # there was something to compare
    assert record.gradients.keys() == oracle.gradients.keys()
    trained = dict(theirs.named_parameters())
    for name, gradient in record.gradients.items():
        assert distance(gradient, oracle.gradients[name]) < 1e-5
    for name, parameter in ours.named_parameters():
        assert distance(parameter.detach(), trained[name].detach()) < 1e-5


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative to the size of the tensor; TRL projects to the vocabulary in float32."""
    return ((one - other).norm() / other.norm().clamp(min=1e-12)).item()
