"""Two processes on gloo train the same model as one with twice the batch, each method's final and middle states alike.

Under DDP, which is what the trainer chooses; and with weights in shards, by `fully_shard` on the blocks and the model.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

from expunge import REPO, UnlearnConfig, UnlearnTrainer
from expunge.data import Pair, Text, Unpaired
from expunge.engine import collate, inside_forward, run_step
from expunge.methods import METHODS as REGISTRY
from expunge.methods import Material, Method
from expunge.models import Reference, blocks
from expunge.rows import read_lines, write_lines

QUIET = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class Middle(Method):
    """Its loss reads one block's states alone: the forward stops there, and the weights above get no gradient."""

    layers = ref_layers = (1,)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        pass

    def loss(self, step):
        gap = step.hidden("forget", 1) - 0.5 * step.hidden("forget", 1, ref=True)
        return {"erase": step.mean(gap.square().mean(-1), "forget")}

    def placed(self, depth):
        return self


TRAINED = [name for name in REGISTRY.names() if not REGISTRY.get(name).applied]
BLOCKS = {"layer": 1, "train_blocks": [0, 1]}  # of three
SETTINGS = {
    "rmu": {"form": "wmdp", "c": 5.0, "alpha": 10.0, **BLOCKS},
    "adaptive_rmu": {"alpha": 10.0, **BLOCKS},
    "cosine_rmu": BLOCKS,
    "circuit_breakers": {"gamma": 2.0},
    "simnpo": {"beta": 0.3},  # at 4.5 what is to be forgotten weighs next to nothing
}
METHODS = {
    **{name: REGISTRY.get(name)(**SETTINGS.get(name, {})) for name in TRAINED},
    "repo-middle": REPO(layer=1, segment=2),
    "middle": Middle(),
    "repo-sets": REPO(),  # on two sets that share no prompt
    "cosine_rmu-l2-sets": REGISTRY.get("cosine_rmu")(distance="l2", **BLOCKS),
}
LABELLED = [("a b" + " c" * (i % 4 + 1), False) for i in range(8)] + [("a b" + " e" * (i % 4 + 1), True) for i in range(8)]
ROWS = [{"retain": ([5, 6], [7 + i, 9]), "forget": ([5, 6], [11, 12 + i])} for i in range(8)]
SETS = Unpaired(
    [Text("a b" * (i % 2), " e" * (1 + i % 3) + f" {i} f") for i in range(16)],
    [Text("", f"c {i}" + " d" * (1 + i % 5)) for i in range(5)],
)
PAIRS = [Pair("a b", " c" * (1 + i % 4) + f" {i}", " e" * (1 + i % 3) + f" {i} f" * (1 + i % 2)) for i in range(16)]


def train(folder, name, model, tokenizer, batch, accumulated=1):
    args = UnlearnConfig(
        output_dir=str(folder / "checkpoints"),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulated,
        max_steps=3,
        warmup_steps=0,
        learning_rate=1e-2,
        adam_epsilon=1e-3,
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = UnlearnTrainer(model, METHODS[name], args, SETS if "sets" in name else PAIRS, tokenizer, probe_data=LABELLED)
    trainer.train()
    return trainer


def work(folder: Path) -> None:
    """What each of the two processes runs: all methods one after the other."""
    for name in METHODS:
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.double)
        trainer = train(folder, name, model, AutoTokenizer.from_pretrained(folder / "model"), batch=2, accumulated=2)
        assert trainer.accelerator.num_processes == 2
        write_lines(folder / f"{name}-{trainer.accelerator.process_index}.jsonl", logged(trainer))
        save_file(trained(trainer), folder / f"{name}-{trainer.accelerator.process_index}.safetensors")
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.double)
        rank = trainer.accelerator.process_index
        save_file(sharded(name, model, ROWS[rank::2]), folder / f"{name}-sharded-{rank}.safetensors")
    torch.distributed.destroy_process_group()


def sharded(name: str, model, rows, shard: bool = True) -> dict[str, torch.Tensor]:
    """The whole weights after three steps on this process' `rows`, every weight in shards while it trains."""
    method = METHODS[name].placed(3)
    heads, reference = heads_of(method), Reference(model)
    labelled = [([5, 6, 7 + i % 3], False) for i in range(8)] + [([5, 6, 11 + i % 3], True) for i in range(8)]
    method.prepare(dict(heads), Material(model, [row["forget"] for row in ROWS], labelled))
    chosen = method.trains(model)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(chosen is None or key in chosen)
    model.add_module("heads", heads)
    if shard:
        for block in blocks(model):
            fully_shard(block)
        fully_shard(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-3)

    def losses(inner, batch):
        step = run_step(inner, reference, batch, method.layers, method.ref_layers, heads, 0.5, method.ref_sides)
        return step, method.loss(step)

    for _ in range(3):
        _, found = inside_forward(model, model, losses, collate(rows))
        torch.stack(list(found.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = {key: tensor.full_tensor() if shard else tensor for key, tensor in model.named_parameters()}
    return {key: tensor.detach().clone() for key, tensor in whole.items()}


def heads_of(method) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(dict(method.heads(32))).double()


def logged(trainer: UnlearnTrainer) -> list[dict[str, float]]:
    """The losses of each step, which are those of all its rows."""
    figures = (*trainer.method.observes, "alpha", "alpha_mean", "reward")
    names = {"loss", "anchor", "erase", "preference", "forget", "retain", "reroute", *figures}
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return [{name: line[name] for name in names if name in line} for line in lines]


def trained(trainer: UnlearnTrainer) -> dict[str, torch.Tensor]:
    tensors = dict(trainer.model.named_parameters()) | trainer.heads.state_dict()  # tied ones once
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def twice(tmp_path_factory, tiny_model, tokenizer) -> Path:
    """The folder where two processes left their weights, all methods in one go: starting them takes longest."""
    folder = tmp_path_factory.mktemp("distributed")
    tiny_model(dtype=torch.double).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", __file__, folder]
    found = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, env=os.environ | QUIET)
    assert found.returncode == 0, found.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_the_model_of_one(tmp_path, twice, tiny_model, tokenizer, name):
    alone = train(tmp_path, name, tiny_model(dtype=torch.double), tokenizer, batch=8)
    expected = trained(alone)
    start = dict(tiny_model(dtype=torch.double).named_parameters())
    assert any((expected[key] - tensor).abs().max() > 1e-3 for key, tensor in start.items())  # it moved
    for rank in (0, 1):
        for line, whole in zip(read_lines(twice / f"{name}-{rank}.jsonl"), logged(alone), strict=True):
            assert line == pytest.approx(whole, rel=1e-4, abs=1e-6)
        found = load_file(twice / f"{name}-{rank}.safetensors")
        for key, tensor in expected.items():
            # steps of 1e-2; D works in float32, a policy's state has NaN where nothing is known yet
            torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", METHODS)
def test_weights_in_shards_train_to_those_of_one_process(twice, tiny_model, name):
    expected = sharded(name, tiny_model(dtype=torch.double), ROWS, shard=False)
    found = load_file(twice / f"{name}-sharded-0.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5)


def test_accelerate_launches_the_command_line_on_two_processes(tmp_path, tiny_model, tokenizer):
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_lines(tmp_path / "pairs.jsonl", map(vars, PAIRS))
    launch = {"--num_processes": 2, "--num_machines": 1, "--mixed_precision": "no", "--dynamo_backend": "no"}
    launcher = ["accelerate.commands.launch", "--multi_gpu", *(word for option in launch.items() for word in option)]
    settings = ["--model", tmp_path / "model", "--pairs", tmp_path / "pairs.jsonl", "--out", tmp_path / "run"]
    settings += ["training.max_steps=2", "training.per_device_train_batch_size=2", "training.use_cpu=true"]
    command = map(str, [sys.executable, "-m", *launcher, "-m", "expunge", "train", *settings])
    found = subprocess.run([*command], capture_output=True, text=True, timeout=300, env=os.environ | QUIET)
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.count("model: ") == 1
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-2" / "rng_state_1.pth").exists()
    assert len(read_lines(tmp_path / "run" / "training.jsonl")) == 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")


if __name__ == "__main__":
    work(Path(sys.argv[1]))
