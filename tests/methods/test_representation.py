"""What holds of every method that works on states, whatever its loss: layouts, splits, what is trained, resumed runs."""

import copy
import dataclasses
import json
import re

import pytest
import torch
from safetensors.torch import load_file

from expunge.adapters import add_lora
from expunge.anatomy import parameters_in
from expunge.data import Text, Unpaired
from expunge.engine import Whole, collate, run_step
from expunge.methods import Method
from expunge.methods.adaptive_rmu import AdaptiveRMU
from expunge.methods.circuit_breakers import CircuitBreakers
from expunge.methods.cosine_rmu import CosineRMU
from expunge.methods.probe_directions import ProbeDirections
from expunge.methods.rmu import RMU
from expunge.methods.sure import SURE
from expunge.training import UnlearnConfig, UnlearnTrainer

METHODS = [
    RMU(c=3.0),
    RMU(form="wmdp", layer=2, vector="gaussian"),
    AdaptiveRMU(alpha=20),
    CosineRMU(),
    CosineRMU(distance="l2", alpha="fixed"),
    ProbeDirections(),
    CircuitBreakers(),
]
ONE_EACH = [RMU(), AdaptiveRMU(), CosineRMU(), ProbeDirections(), CircuitBreakers()]
LEARNED = [CosineRMU(), CosineRMU(distance="l2", reward="product"), ProbeDirections(reward="improvement")]


def named(method: Method) -> str:
    return method.name


def heads_of(method: Method, dtype=torch.double) -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    heads = dict(method.heads(32))
    if "probes" in heads:
        heads["probes"].directions.normal_()
    if "control" in heads and method.name != "rmu":
        heads["control"].scale.fill_(7.0)
    return {name: head.to(dtype) for name, head in heads.items()}


def losses_of(method, moved, batch, heads, plain=True, whole=None):
    model, reference = moved
    sides = method.ref_sides
    step = run_step(model, reference, batch, method.layers, method.ref_layers, heads, 0.4, sides, plain=plain, whole=whole)
    return method.loss(step)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_padding_the_order_of_rows_and_the_layout_do_not_matter(moved, pair_rows, method):
    method = method.placed(3)
    heads = heads_of(method)
    wanted = losses_of(method, moved, collate(pair_rows), heads)
    assert all(value > 1e-4 for value in wanted.values())
    padded = collate(pair_rows)
    for side in padded.values():
        side["ids"] = torch.cat([side["ids"], torch.full((len(pair_rows), 5), 77)], 1)
    for found in (
        losses_of(method, moved, padded, heads),
        losses_of(method, moved, collate(pair_rows[::-1]), heads),
        losses_of(method, moved, collate(pair_rows), heads, plain=False),
    ):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("kind", ["pair_rows", "set_rows"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_mean_over_micro_batches_is_that_of_one_batch(moved, request, kind, method):
    rows = request.getfixturevalue(kind)
    method = method.placed(3)
    heads = heads_of(method)
    wanted = losses_of(method, moved, collate(rows), heads)
    batches = [collate([row]) for row in rows]
    counts = {
        side: torch.cat([torch.stack([b[side]["prompts"], b[side]["lengths"]], 1) for b in batches])
        for side in ("retain", "forget")
    }
    parts = [losses_of(method, moved, batch, heads, whole=Whole.of(counts, len(batches))) for batch in batches]
    for name, value in wanted.items():
        torch.testing.assert_close(torch.stack([part[name] for part in parts]).mean(), value)


# --- with the trainer


SETS = Unpaired([Text("", f"f {i}" + " a b" * (1 + i % 3)) for i in range(7)], [Text("", f"r {i}" + " d") for i in range(5)])


@pytest.fixture
def trainer_of(tmp_path, tiny_model, tokenizer, pairs):
    """`trainer_of(method, model, data, **config)`: a trainer that has not run."""
    probed = [(pair.prompt + side, bad) for pair in pairs for side, bad in ((pair.chosen, False), (pair.rejected, True))]

    def make(method, model=None, data=None, folder="checkpoints", **changes) -> UnlearnTrainer:
        settings = {
            "output_dir": str(tmp_path / folder),
            "use_cpu": True,
            "disable_tqdm": True,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "warmup_steps": 1,
            "max_steps": 3,
            "save_strategy": "no",
        }
        args = UnlearnConfig(**settings | changes)
        return UnlearnTrainer(model or tiny_model(), method, args, data or pairs, tokenizer, probe_data=probed)

    return make


def lines_of(trainer: UnlearnTrainer) -> list[dict[str, float]]:
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("method", ONE_EACH, ids=named)
def test_only_what_is_named_is_trained_and_the_reference_is_not(trainer_of, tiny_model, method, lora):
    torch.manual_seed(0)
    model = add_lora(tiny_model(), r=2) if lora else tiny_model()
    placed = method.placed(3)
    chosen = set(placed.trains(model))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert chosen and chosen < trainable
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = trainer_of(method, model)
    if not lora:
        reference = {name: p.clone() for name, p in trainer.reference.copy.named_parameters()}
        assert all(torch.equal(p, before[name]) for name, p in reference.items())
    trainer.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed <= chosen
    assert {name for name in chosen if "bias" not in name} <= changed  # a key's bias has no gradient
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable  # as it was given
    if not lora:
        assert all(torch.equal(p, reference[name]) for name, p in trainer.reference.copy.named_parameters())


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("method", "deepest"), [(m, 2 if m.name in ("probe_directions", "circuit_breakers") else 1) for m in ONE_EACH], ids=str
)
def test_all_weights_are_trained_that_the_loss_reaches(trainer_of, tiny_model, architecture, method, deepest):
    """As in the REPO paper: embeddings and every block up to the deepest state; decay does not touch what lies above."""
    model = tiny_model(architecture)
    method = dataclasses.replace(method, parameters="all")
    assert method.placed(3).trains(model) is None
    before = copy.deepcopy(dict(model.named_parameters()))
    trainer_of(method, model).train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    reached = {name for block in range(deepest + 1) for name in parameters_in(model, [block], "all_block")}
    reached |= {name for name in before if re.search("wte|wpe|embed_tokens", name)}
    assert changed <= reached < set(before)
    assert {name for name in reached if "bias" not in name} <= changed


def test_other_weights_can_be_named(trainer_of, tiny_model):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    trainer_of(RMU(layer=2, train_blocks=[1], parameters="attn.c_proj.weight"), model).train()
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == ["transformer.h.1.attn.c_proj.weight"]


@pytest.mark.parametrize("method", [*ONE_EACH, SURE()], ids=named)
def test_a_resumed_run_is_bit_identical(tmp_path, trainer_of, tiny_model, method):
    """6 steps against 3 and 3 more; the second trainer begins with another seed's heads, which the checkpoint replaces."""
    data = SETS if method.name in ("adaptive_rmu", "probe_directions") else None
    plan = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "save_total_limit": None}
    whole = trainer_of(method, data=data, folder="whole", **plan)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = trainer_of(method, data=data, folder="resumed", **plan)
    saved = load_file(checkpoint / "heads.safetensors") if len(whole.heads) else {}
    for name, tensor in resumed.heads.state_dict().items():
        assert tensor.shape == saved[name].shape
        tensor.fill_(0.5)  # what was drawn or fitted again is not what counts
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 6
    for one, other in ((whole.model, resumed.model), (whole.heads, resumed.heads)):
        for name, tensor in one.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)
    assert lines_of(resumed) == lines_of(whole)


@pytest.mark.parametrize("method", LEARNED, ids=str)
def test_alpha_goes_the_same_way_whatever_the_batches_are_split_into(trainer_of, tiny_model, method):
    traces = []
    for size, accumulated in ((4, 1), (2, 2), (1, 4)):
        plan = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated, "max_steps": 5}
        trainer = trainer_of(method, tiny_model(dtype=torch.double), SETS, adam_epsilon=1e-3, **plan)
        trainer.train()
        traces.append([(line["alpha"], line.get("reward", 0.0), line["alpha_mean"]) for line in lines_of(trainer)])
    assert len({mean for *_, mean in traces[0]}) > 2, "it is learned"
    for trace in traces[1:]:
        for found, wanted in zip(trace, traces[0], strict=True):
            assert found == pytest.approx(wanted, rel=1e-5)


def test_an_alpha_that_runs_away_in_training_is_said(trainer_of, caplog):
    trainer = trainer_of(CosineRMU(reward="literal", alpha_learning_rate=10.0), max_steps=5)
    with caplog.at_level("WARNING", "expunge"):
        trainer.train()
    ends = [line["alpha_mean"] for line in lines_of(trainer)]
    assert ends[-1] == pytest.approx(1e-3)
    assert "alpha has run to its bound of 0.001 at step" in caplog.text


def test_without_decay_the_optimizer_is_adam(trainer_of, monkeypatch):
    """As Objectives Vary trains (appendix B); with decay it is not."""
    ends = {}
    for name, decay in (("adamw", 0.0), ("adam", 0.0), ("decayed", 0.1)):
        trainer = trainer_of(CosineRMU(), weight_decay=decay)
        if name == "adam":
            _, options = trainer.get_optimizer_cls_and_kwargs(trainer.args)
            wanted = {key: options[key] for key in ("lr", "betas", "eps")}
            monkeypatch.setattr(
                trainer, "get_optimizer_cls_and_kwargs", lambda *_, wanted=wanted: (torch.optim.Adam, wanted)
            )
        trainer.train()
        ends[name] = trainer.model.transformer.h[1].mlp.c_proj.weight.detach()
    torch.testing.assert_close(ends["adamw"], ends["adam"], rtol=1e-6, atol=1e-7)
    assert (ends["adamw"] - ends["decayed"]).abs().max() > 1e-4


@pytest.mark.parametrize("data", [None, SETS], ids=["pairs", "sets"])
@pytest.mark.parametrize("method", [RMU(), ProbeDirections()], ids=named)
def test_cached_states_train_as_the_live_reference(tmp_path, monkeypatch, trainer_of, method, data):
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "cache"))
    losses = []
    for reference in ("live", "cached"):
        trainer = trainer_of(method, data=data, reference=reference)
        trainer.train()
        losses.append([line["loss"] for line in lines_of(trainer)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_an_architecture_is_trained_by_rmu(tiny_model, trainer_of, architecture):
    """Where there is another name for the same matrix: the loss falls, and nothing else has moved."""
    model = tiny_model(architecture)
    before = copy.deepcopy(model.state_dict())
    trainer = trainer_of(RMU(form="wmdp", c=50.0, alpha=1.0), model, max_steps=6, learning_rate=2e-2)
    trainer.train()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(parameters_in(model, [0, 1], "mlp_out"))
    lines = lines_of(trainer)
    assert lines[0]["retain"] < 1e-9 and lines[-1]["forget"] < lines[0]["forget"]


def test_a_checkpoint_holds_the_direction_and_the_export_does_not(tmp_path, trainer_of):
    trainer = trainer_of(CosineRMU(), save_strategy="steps", save_steps=3)
    trainer.train()
    heads = load_file(tmp_path / "checkpoints/checkpoint-3/heads.safetensors")
    assert heads.keys() == {"control.direction", "control.scale", "policy.state"}
    assert torch.equal(heads["control.direction"], trainer.heads["control"].direction)
    trainer.save_model(str(tmp_path / "model"))
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert "heads.safetensors" not in files and "config.json" in files
    assert json.loads((tmp_path / "model/config.json").read_text())["model_type"] == "gpt2"
    assert not [name for name in load_file(tmp_path / "model/model.safetensors") if "control" in name or "policy" in name]
