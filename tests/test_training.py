import copy
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from expunge.adapters import add_lora
from expunge.callbacks import StopOnInterrupt, last_checkpoint
from expunge.data import Pair, Text, Unpaired
from expunge.data.rows import SetRows
from expunge.errors import ExpungeError
from expunge.methods import METHODS, Method
from expunge.methods.dpo import DPO
from expunge.methods.repo import REPO
from expunge.models import load_model, weights_digest
from expunge.training import UnlearnConfig, UnlearnTrainer

IDS = torch.tensor([[5, 17, 250, 33, 8, 91]])
REFERRING = [name for name in METHODS.names() if METHODS.get(name).reference and not METHODS.get(name).applied]


def config(folder: Path, **changes) -> UnlearnConfig:
    settings = {
        "output_dir": str(folder / "checkpoints"),
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "max_steps": 3,
        "save_strategy": "no",
    }
    return UnlearnConfig(**settings | changes)


@pytest.fixture
def trained(tmp_path, tiny_model, tokenizer, pairs):
    """`trained(method, model=..., callbacks=..., **config)`: a trainer that has run."""

    def make(method: Method, model=None, callbacks=None, resume=None, **changes) -> UnlearnTrainer:
        model = model or tiny_model()
        trainer = UnlearnTrainer(model, method, config(tmp_path, **changes), pairs, tokenizer, callbacks)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return make


def steps_of(trainer: UnlearnTrainer) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


def test_an_architecture_is_trained_saved_and_reloaded(tmp_path, tiny_model, trained, architecture):
    model = tiny_model(architecture)
    before = weights_digest(model)
    trainer = trained(REPO(), model)
    out = tmp_path / "model"
    trainer.save_model(str(out))
    loaded = AutoModelForCausalLM.from_pretrained(out, attn_implementation=model.config._attn_implementation)
    assert weights_digest(loaded) == weights_digest(model) != before
    assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)
    files = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
    assert {path.suffix for path in out.iterdir()} <= {".json", ".safetensors", ".jinja"}
    assert not [name for name in load_file(out / "model.safetensors") if "heads" in name or "discriminator" in name]
    assert "heads.safetensors" not in files


def test_a_trained_model_carries_no_heads_and_may_be_trained_again(trained):
    trainer = trained(REPO())
    assert sum(p.numel() for p in trainer.heads.parameters()) > 0
    assert not [name for name in trainer.model.state_dict() if "heads" in name]
    again = trained(DPO(), trainer.model)
    assert len(again.heads) == 0


def test_a_lora_export_is_loaded_with_its_base(tmp_path, tiny_model, tokenizer, trained):
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base)
    tokenizer.save_pretrained(base)
    torch.manual_seed(0)
    model = add_lora(load_model(base)[0], r=4)
    frozen = {name: p.clone() for name, p in model.named_parameters() if "lora_" not in name}
    trainer = trained(REPO(), model, learning_rate=1e-2)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if "lora_" not in name)
    out = tmp_path / "model"
    trainer.save_model(str(out))
    files = {path.name for path in out.iterdir()}
    assert "adapter_model.safetensors" in files
    assert not {name for name in files if Path(name).suffix not in (".json", ".safetensors", ".jinja", ".md")}
    loaded, _ = load_model(out)
    torch.testing.assert_close(loaded(IDS).logits, model.eval()(IDS).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(loaded(IDS).logits, load_model(base)[0](IDS).logits, atol=1e-2)


def test_the_reference_stays_what_it_was_bit_by_bit(tiny_model, trained):
    model = tiny_model()
    before = weights_digest(model)
    trainer = trained(REPO(), model)
    assert weights_digest(trainer.reference.copy) == before != weights_digest(model)


@pytest.mark.parametrize(
    ("method", "names"),
    [
        (REPO(), {"anchor", "erase", "discriminator_accuracy", "discriminator_bce"}),
        (DPO(), {"preference", "reward_margin", "reward_accuracy", "clamped"}),
    ],
    ids=["repo", "dpo"],
)
def test_every_step_logs_what_the_method_names(trained, method, names):
    lines = steps_of(trained(method))
    assert len(lines) == 3
    for line in lines:
        assert names | {"loss", "grad_norm", "learning_rate", "tokens_per_second"} <= line.keys()
        assert line["tokens_per_second"] > 0
    assert lines[0].get("anchor", 0) == pytest.approx(0, abs=1e-7)
    assert lines[0].get("preference", 0.693147) == pytest.approx(0.693147, rel=1e-5)


def test_dpo_learns_one_batch_by_heart(trained):
    lines = steps_of(trained(DPO(), max_steps=15, per_device_train_batch_size=8, learning_rate=3e-3))
    assert lines[-1]["reward_accuracy"] == 1
    assert lines[-1]["loss"] < 0.3 < lines[0]["loss"]


def test_erasing_holds_the_discriminator_back(trained):
    """A head that learns alone tells the sides of a small set apart; against a model that hides them it does not."""
    last = {}
    for weight in (0.0, 3.0):
        lines = steps_of(trained(REPO(weight=weight), max_steps=60, per_device_train_batch_size=8, heads_learning_rate=1e-2))
        last[weight] = sum(line["discriminator_bce"] for line in lines[-10:]) / 10
    assert last[0.0] < 0.3
    assert last[3.0] > 0.5


def groups(trainer: UnlearnTrainer) -> list[tuple[float, float, int]]:
    return [
        (group["initial_lr"], group["weight_decay"], sum(p.numel() for p in group["params"]))
        for group in trainer.optimizer.param_groups
    ]


def test_matrices_vectors_and_heads_have_a_group_each(trained, tiny_model):
    model = tiny_model()
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    found = groups(trained(REPO(width=7), model, weight_decay=0.1))
    assert found == [(1e-3, 0.1, matrices), (1e-3, 0.0, vectors), (1e-2, 0.0, 32 * 7 + 7 + 7 + 1)]


@pytest.mark.parametrize(
    ("model_rate", "heads_rate", "expected"),
    [(1e-3, None, 1e-2), (1e-6, None, 1e-4), (1e-3, 5e-4, 5e-4), (1e-3, 0.0, 0.0)],
)
def test_the_learning_rate_of_the_heads(trained, model_rate, heads_rate, expected):
    trainer = trained(REPO(), learning_rate=model_rate, heads_learning_rate=heads_rate, max_steps=1)
    assert groups(trainer)[2][0] == pytest.approx(expected)


def test_the_gradient_norm_is_the_methods_unless_one_is_given(tmp_path, tiny_model, tokenizer, pairs):
    shared = config(tmp_path)
    for method, norm in ((DPO(), 10.0), (REPO(), 1.0)):
        assert UnlearnTrainer(tiny_model(), method, shared, pairs, tokenizer).args.max_grad_norm == norm
    given = config(tmp_path, max_grad_norm=0.5)
    assert UnlearnTrainer(tiny_model(), DPO(), given, pairs, tokenizer).args.max_grad_norm == 0.5


@pytest.mark.parametrize("method", [REPO(), REPO(layer=1), DPO()], ids=["repo", "repo-layer-1", "dpo"])
def test_checkpointed_activations_change_nothing(trained, method):
    plain, checkpointed = (trained(method, gradient_checkpointing=flag) for flag in (False, True))
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(checkpointed.model.state_dict()[name], tensor, rtol=1e-5, atol=1e-7)


@dataclass(kw_only=True)
class WrittenByMeans(Method):
    """A plug-in's loss: a mean over tokens, one over rows and one over tokens already chosen."""

    name = "written_by_means"  # not registered: other tests read the registry

    def loss(self, step):
        logps, lengths = step.logps("forget")
        states, mask = step.hidden("retain"), step.mask("retain", "all")
        return {
            "tokens": step.mean(states.square().mean(-1), "retain", "all"),
            "rows": step.mean(logps / lengths, "forget", "last"),
            "chosen": step.mean(states[mask].abs().mean(-1), "retain", "all"),
        }


def test_accumulated_batches_are_one_large_one(tiny_model, tokenizer, tmp_path):
    """8 x 1 = 4 x 2 = 1 x 8, token means included: rows differ in length, and the last step has 3, which fill no batch."""
    pairs = [Pair("a b", " c" * (1 + i % 4) + f" {i}", " e" * (1 + i % 3) + f" {i} f" * (1 + i % 2)) for i in range(11)]
    for method in (
        REPO(),
        REPO(segment=2, erase_on="all"),
        REPO(segment=0, anchor_on="continuation"),
        DPO(),
        WrittenByMeans(),
    ):
        weights = []
        for size, accumulated in ((8, 1), (4, 2), (1, 8)):
            model = tiny_model(dtype=torch.double)
            changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
            args = config(tmp_path, max_steps=2, adam_epsilon=1e-3, **changes)
            trainer = UnlearnTrainer(model, method, args, pairs, tokenizer)
            trainer.train()
            weights.append((trainer, model.state_dict()))
        (whole, one), *splits = weights
        for split, other in splits:
            assert [line["loss"] for line in steps_of(split)] == pytest.approx([line["loss"] for line in steps_of(whole)])
            for name, tensor in one.items():
                torch.testing.assert_close(other[name], tensor, rtol=1e-6, atol=1e-8)


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            control.should_training_stop = True


def unpaired(pairs: list[Pair]) -> Unpaired:
    """The pairs as two sets in the same order."""
    return Unpaired(*([Text(pair.prompt, getattr(pair, side)) for pair in pairs] for side in ("rejected", "chosen")))


TEXTS = Unpaired(
    [Text("a b" * (i % 2), " e" * (1 + i % 3) + f" {i} f") for i in range(11)],
    [Text("", f"c {i}" + " d" * (1 + i % 5)) for i in range(5)],
)


class Gradients(TrainerCallback):
    """Of the first step, before they are clipped."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if state.global_step == 0:
            self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", [REPO(), REPO(layer=1, segment=2), REPO(anchor_on="continuation", erase_on="all")])
def test_pairs_given_as_two_sets_are_the_pairs_in_the_plain_layout(tiny_model, tokenizer, tmp_path, pairs, method):
    """One batch of all rows, so that what stands beside what does not matter: losses, gradients, weights."""
    found = []
    for data in (pairs, unpaired(pairs)):
        model, gradients = tiny_model(dtype=torch.double), Gradients()
        args = config(tmp_path, layout="plain", per_device_train_batch_size=8, max_grad_norm=1e9, adam_epsilon=1e-3)
        trainer = UnlearnTrainer(model, method, args, data, tokenizer, [gradients])
        trainer.train()
        found.append(([line["loss"] for line in steps_of(trainer)], gradients.found, model.state_dict()))
    (losses, gradients, weights), (other_losses, other_gradients, other_weights) = found
    assert other_losses == pytest.approx(losses, rel=1e-6)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())
    for name, gradient in gradients.items():  # D works in float32
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-4, atol=1e-6)
    for name, tensor in weights.items():
        torch.testing.assert_close(other_weights[name], tensor, rtol=1e-4, atol=1e-6)


def test_two_sets_are_trained_on_in_the_plain_layout_and_counted_apart(tiny_model, tokenizer, tmp_path, caplog):
    with caplog.at_level("INFO", "expunge"):
        trainer = UnlearnTrainer(tiny_model(), REPO(), config(tmp_path, max_continuation_tokens=5), TEXTS, tokenizer)
    cut = trainer.truncation["forget"].continuations_cut
    assert cut > 0 and f"train: to forget, 11 texts: {cut} continuations cut" in caplog.messages
    assert len([line for line in caplog.messages if line.startswith("train: to retain, 5 texts: ")]) == 1
    trainer.train()
    assert trainer.plain is True
    assert steps_of(trainer)[-1]["anchor"] > 0


def test_accumulated_batches_of_two_sets_are_one_large_one(tiny_model, tokenizer, tmp_path):
    """As of pairs; the sides differ in prompts and lengths, and the last step has 3 rows of each."""
    weights = []
    for size, accumulated in ((8, 1), (4, 2), (1, 8)):
        model = tiny_model(dtype=torch.double)
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        trainer = UnlearnTrainer(
            model, REPO(), config(tmp_path, max_steps=3, adam_epsilon=1e-3, **changes), TEXTS, tokenizer
        )
        trainer.train()
        weights.append(([line["loss"] for line in steps_of(trainer)], model.state_dict()))
    (losses, one), *splits = weights
    for other_losses, other in splits:
        assert other_losses == pytest.approx(losses)
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("cut", [3, 5, 6], ids=["at an epoch's end", "within the next", "at its end"])
def test_a_resumed_run_on_two_sets_is_bit_identical(tmp_path, tiny_model, tokenizer, cut):
    """3 steps an epoch; what stands beside a row changes with the epoch, which is drawn on in whichever it is resumed."""

    def ran(folder, callbacks=(), resume=None):
        args = config(tmp_path, output_dir=str(tmp_path / folder), max_steps=8, save_strategy="steps", save_steps=1)
        trainer = UnlearnTrainer(tiny_model(), REPO(), args, TEXTS, tokenizer, list(callbacks))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = ran("whole")
    drawn = [SetRows(whole.rows.sides, whole.args.seed) for _ in range(3)]
    for epoch, rows in enumerate(drawn):
        rows.set_epoch(epoch)
    assert whole.rows.beside == drawn[2].beside not in (drawn[0].beside, drawn[1].beside)
    ran("cut", [StopAt(cut)])
    resumed = ran("cut", resume=str(tmp_path / "cut" / f"checkpoint-{cut}"))
    assert resumed.state.global_step == 8 and resumed.rows.beside == drawn[2].beside
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    assert [line["loss"] for line in steps_of(resumed)] == [line["loss"] for line in steps_of(whole)]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_cached_states_of_two_sets_train_as_the_live_reference(tmp_path, tiny_model, tokenizer, monkeypatch, lora):
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "cache"))
    losses = []
    for reference in ("live", "cached"):
        torch.manual_seed(0)
        model = add_lora(tiny_model(), r=2) if lora else tiny_model()
        trainer = UnlearnTrainer(model, REPO(), config(tmp_path, max_steps=7, reference=reference), TEXTS, tokenizer)
        trainer.train()
        losses.append([line["loss"] for line in steps_of(trainer)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_what_two_sets_cannot_be_is_one_line(tiny_model, tokenizer, tmp_path):
    with pytest.raises(ExpungeError, match=r"dpo compares the two sides of a pair: give pairs"):
        UnlearnTrainer(tiny_model(), DPO(), config(tmp_path), TEXTS, tokenizer)
    long = Unpaired([Text("", " a b c d" * 40)], [Text("", "e")])
    with pytest.raises(ExpungeError, match=r"the longest text has 81 tokens, the model's context 64: lower"):
        UnlearnTrainer(tiny_model(), REPO(), config(tmp_path, max_continuation_tokens=80), long, tokenizer)


KEEN = REPO(ensemble=2, extra_steps=2, restart=2)


@pytest.mark.parametrize(("method", "lora"), [(REPO(), False), (REPO(), True), (KEEN, False)], ids=["full", "lora", "keen"])
def test_a_resumed_run_is_bit_identical(tmp_path, tiny_model, trained, method, lora):
    def fresh():
        if not lora:
            return tiny_model()
        torch.manual_seed(7)
        return add_lora(tiny_model(), r=4)

    plan = {"max_steps": 7, "save_strategy": "steps", "save_steps": 3}  # 2 steps an epoch: resumes within one
    whole = trained(method, fresh(), output_dir=str(tmp_path / "whole"), **plan)
    trained(method, fresh(), [StopAt(4)], output_dir=str(tmp_path / "cut"), **plan)
    checkpoint = last_checkpoint(tmp_path / "cut")
    assert checkpoint.name in ("checkpoint-3", "checkpoint-4")
    resumed = trained(method, fresh(), output_dir=str(tmp_path / "cut"), resume=str(checkpoint), **plan)
    assert resumed.state.global_step == 7
    for one, other in ((whole.model, resumed.model), (whole.heads, resumed.heads)):
        for name, tensor in one.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor), name
    assert [line["loss"] for line in steps_of(resumed)] == [line["loss"] for line in steps_of(whole)]


def test_the_last_complete_checkpoint_is_found_and_half_written_ones_are_named(tmp_path, caplog):
    assert last_checkpoint(tmp_path / "none") is None
    state = json.dumps({"global_step": 10})
    written = {"checkpoint-9": state, "checkpoint-10": state, "checkpoint-20": state[:-1], "checkpoint-old": state}
    for name, text in written.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-30").mkdir()
    with caplog.at_level("INFO", "expunge"):
        assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    lines = [f"{tmp_path / name}: half-written, skipped" for name in ("checkpoint-30", "checkpoint-20")]
    assert caplog.messages == lines


def test_a_checkpoint_that_is_written_again_is_incomplete_until_it_is_whole(tmp_path, trained, monkeypatch):
    trainer = trained(REPO(), save_strategy="steps", save_steps=3)
    folder = tmp_path / "checkpoints" / "checkpoint-3"
    assert last_checkpoint(tmp_path / "checkpoints") == folder
    monkeypatch.setattr(trainer, "_save_scaler", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer._save_checkpoint(trainer.model, None)
    assert last_checkpoint(tmp_path / "checkpoints") is None


def test_a_checkpoint_holds_the_heads_apart_and_no_pickled_arguments(tmp_path, trained):
    trainer = trained(REPO(), save_strategy="steps", save_steps=2)
    folder = tmp_path / "checkpoints" / "checkpoint-2"
    assert not (folder / "training_args.bin").exists()
    assert load_file(folder / "heads.safetensors").keys() == trainer.heads.state_dict().keys()
    assert not [name for name in load_file(folder / "model.safetensors") if "discriminator" in name]
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 2


class BreakAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step == self.step:
            with torch.no_grad():
                model.transformer.ln_f.weight[0] = float("nan")


def test_a_loss_that_is_not_a_number_stops_the_run_and_the_checkpoint_stands(tmp_path, trained):
    with pytest.raises(ExpungeError, match=r"not a number at step 4 .*anchor=nan") as caught:
        trained(REPO(), callbacks=[BreakAt(3)], max_steps=6, save_strategy="steps", save_steps=2)
    assert "\n" not in str(caught.value)
    weights = load_file(last_checkpoint(tmp_path / "checkpoints") / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


class InterruptAt(TrainerCallback):
    def __init__(self, step: int, times: int = 1):
        self.step, self.times = step, times

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step - 1:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_saves_a_checkpoint_and_stops(tmp_path, trained):
    before = signal.getsignal(signal.SIGINT)
    with StopOnInterrupt() as stop:
        trainer = trained(REPO(), callbacks=[InterruptAt(2), stop], max_steps=6)
    assert stop.asked
    assert trainer.state.global_step == 2
    assert last_checkpoint(tmp_path / "checkpoints").name == "checkpoint-2"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_stops_at_once(tmp_path, trained):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopOnInterrupt() as stop:
        trained(REPO(), callbacks=[InterruptAt(2, times=2), stop], max_steps=6)
    assert signal.getsignal(signal.SIGINT) is before


def test_neutral_text_is_anchored_beside_the_pairs(tmp_path, trained, tiny_model, bos_tokenizer, pairs):
    text = tmp_path / "neutral.txt"
    text.write_text("The river runs past the old mill and on to the sea. " * 20, encoding="utf-8")
    lines = steps_of(trained(REPO(), anchor_text=str(text), anchor_tokens=16))
    assert lines[-1]["anchor_text"] > 0
    args = config(tmp_path, anchor_text=str(text), anchor_tokens=16)
    rows = UnlearnTrainer(tiny_model(), REPO(), args, pairs, bos_tokenizer).train_dataset
    for prompt, window in (rows[i]["anchor"] for i in range(len(rows))):
        assert prompt == []
        assert len(window) == 16
        assert window[0] == bos_tokenizer.bos_token_id


def test_neutral_text_that_is_too_short_is_an_error(tmp_path, trained):
    text = tmp_path / "neutral.txt"
    text.write_text("Short.", encoding="utf-8")
    with pytest.raises(ExpungeError, match="shorter than one window"):
        trained(REPO(), anchor_text=str(text))
    text.write_text("The river runs past the old mill and on to the sea. " * 20, encoding="utf-8")
    with pytest.raises(ExpungeError, match=r"^training.anchor_tokens=65: more than the model's context of 64; lower it$"):
        trained(REPO(), anchor_text=str(text), anchor_tokens=65)


def test_the_caller_s_model_is_trained_and_cut_pairs_are_counted(trained, tiny_model):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    trainer = trained(REPO(), model, max_continuation_tokens=5)
    assert trainer.model is model
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert trainer.truncation.rejected_cut > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_in_half_precision_are_warned_of_as_small_updates_are_lost(trained, tiny_model, caplog, dtype):
    model = tiny_model(dtype=dtype)
    before = copy.deepcopy(model.state_dict())
    trained(REPO(), model, learning_rate=1e-6, warmup_steps=0)
    moved = torch.cat([(tensor != before[name]).flatten() for name, tensor in model.state_dict().items()])
    assert (moved.float().mean().item() < 0.1) is (dtype == torch.bfloat16)
    assert ("small updates round to nothing" in caplog.text) is (dtype == torch.bfloat16)


@pytest.mark.parametrize("method", [REPO(), DPO()], ids=["repo", "dpo"])
def test_bfloat16_autocast_trains_nearly_the_same(trained, method):
    one, other = (trained(method, bf16=flag, use_cpu=True, learning_rate=1e-3, warmup_steps=0) for flag in (False, True))
    before, after = ([line["loss"] for line in steps_of(trainer)] for trainer in (one, other))
    assert after == pytest.approx(before, rel=0.05) and after != before


@pytest.mark.parametrize("name", REFERRING)
def test_under_lora_no_method_makes_a_second_copy(tmp_path, tiny_model, tokenizer, pairs, name):
    method = METHODS.get(name)(**({"retain": "kl"} if name == "grad_diff" else {}))
    assert method.reference
    probed = [(side, bad) for pair in pairs for side, bad in ((pair.chosen, False), (pair.rejected, True))]
    model = add_lora(tiny_model(), r=2)
    trainer = UnlearnTrainer(model, method, config(tmp_path), pairs, tokenizer, probe_data=probed)
    assert trainer.reference is not None and trainer.reference.copy is None and trainer.reference.head is None
    with trainer.reference.of(model) as reference:
        assert reference is model


def test_a_half_precision_base_under_lora_is_not(trained, tiny_model):
    assert steps_of(trained(REPO(), add_lora(tiny_model(dtype=torch.bfloat16), r=2)))[-1]["anchor"] > 0


def test_several_gpus_in_one_process_are_refused(tmp_path, tiny_model, tokenizer, pairs):
    args = config(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ExpungeError, match="2 GPUs are visible to one process: start it with `accelerate launch`"):
        UnlearnTrainer(tiny_model(), REPO(), args, pairs, tokenizer)


def test_a_layer_that_the_model_does_not_have_is_one_line(trained):
    with pytest.raises(ExpungeError, match="layer 3: the model has 3 blocks"):
        trained(REPO(layer=3))


@pytest.mark.parametrize("method", [REPO(weight=1.0), DPO()], ids=["repo", "dpo"])
def test_both_layouts_train_the_same_model(tmp_path, tiny_model, tokenizer, pairs, method):
    sgd = {"optim": "sgd", "learning_rate": 0.3, "max_steps": 10}  # Adam makes steps of noise where there is no gradient
    logits = []
    for layout in ("plain", "auto"):
        trainer = UnlearnTrainer(tiny_model(), method, config(tmp_path, layout=layout, **sgd), pairs, tokenizer)
        trainer.train()
        assert trainer.plain is (layout == "plain")
        logits.append(trainer.model(IDS).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)


def test_an_unknown_layout_is_one_line(trained):
    with pytest.raises(ExpungeError, match=r"training\.layout='packed': auto or plain"):
        trained(REPO(), layout="packed")


def test_pairs_beyond_the_context_are_one_line(tiny_model, tokenizer, tmp_path):
    long = [Pair("a b c d e f g h " * 20, " i j k l " * 20, " m n o p " * 20)]
    with pytest.raises(ExpungeError, match="the longest pair has 128 tokens, the model's context 64: lower"):
        UnlearnTrainer(tiny_model(), REPO(), config(tmp_path), long, tokenizer)


def test_neutral_text_that_a_method_does_not_read_is_refused(tiny_model, tokenizer, tmp_path, pairs):
    text = tmp_path / "neutral.txt"
    text.write_text("The river runs past the old mill. " * 40)
    with pytest.raises(ExpungeError, match=r"^training.anchor_text: dpo as it is set reads no neutral text; leave it out$"):
        UnlearnTrainer(tiny_model(), DPO(), config(tmp_path, anchor_text=str(text)), pairs, tokenizer)
