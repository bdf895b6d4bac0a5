"""Rounding against hand-computed grids, and an unlearning below the rounding step, which is undone."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from expunge.attacks import AttackData, Budget, cases
from expunge.attacks.quantize import Quantize, block_matrices, round_to_nearest
from expunge.errors import ExpungeError
from expunge.generation import Decoding, generate
from expunge.steering import Shift, Steering

IDS = torch.tensor([[5, 17, 250, 33, 8, 91]])


@pytest.fixture(scope="module")
def data(tokenizer) -> AttackData:
    return AttackData(tokenizer)


def channels(layer) -> torch.Tensor:
    """The weight with a row for each output, by the layer's own product: f(e_i) - f(0) is what input i adds."""
    inputs = layer.weight.shape[0] if isinstance(layer, Conv1D) else layer.in_features
    with torch.no_grad():
        return (layer(torch.eye(inputs)) - layer(torch.zeros(1, inputs))).T


def expected(rows: np.ndarray, bits: int) -> np.ndarray:
    """One row at a time, as the equation is written."""
    most, done = 2 ** (bits - 1) - 1, []
    for row in rows:
        step = np.abs(row).max() / most
        done.append(np.clip(np.round(row / step), -most, most) * step)
    return np.stack(done)


def test_a_matrix_by_hand():
    weight = torch.tensor([[7.0, -3.4, 0.6, 0.4], [-1.4, 0.31, 0.29, 0.0], [0.0, 0.0, 0.0, 0.0]])
    rounded = torch.tensor([[7.0, -3.0, 1.0, 0.0], [-1.4, 0.4, 0.2, 0.0], [0.0, 0.0, 0.0, 0.0]])  # steps 1 and 0.2
    torch.testing.assert_close(round_to_nearest(weight, 4), rounded)
    halves = torch.tensor([[7.0, -3.0, 0.6, 0.6 * 5 / 7], [-1.4, 0.4, 0.29, 0.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(round_to_nearest(weight, 4, group=2), halves)
    torch.testing.assert_close(round_to_nearest(weight, 4, group=3)[:, 3:], weight[:, 3:])  # one alone is its own largest
    torch.testing.assert_close(round_to_nearest(weight, 4, group=64), rounded)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rounding_again_changes_nothing(bits, dtype):
    weight = torch.randn(200, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    for group in (0, 32):
        once = round_to_nearest(weight, bits, group)
        assert once.dtype == dtype and not torch.equal(once, weight)
        assert torch.equal(round_to_nearest(once, bits, group), once)
        largest = weight.view(200, -1, group or 96).abs().amax(-1)
        assert torch.equal(once.view(200, -1, group or 96).abs().amax(-1), largest)
        values = max(len(row.unique()) for row in once.view(-1, group or 96))
        assert values <= 2**bits - 1


@pytest.mark.parametrize("bits", [8, 4])
def test_an_unlearning_below_the_rounding_step_is_undone(tiny_model, data, bits):
    """The positive control: what the reference says comes back, bit for bit."""
    reference = Quantize(bits=bits).run(tiny_model(), None, data, Budget()).model
    victim, generator = copy.deepcopy(reference), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in block_matrices(victim):
            weight = layer.weight
            step = weight.abs().amax(0) / (2 ** (bits - 1) - 1)  # Conv1D [in, out]
            moved = weight + 0.45 * step * (2 * torch.rand(weight.shape, generator=generator) - 1)
            weight.copy_(moved.where(weight.abs() < weight.abs().amax(0), weight))
    gap = (victim(IDS).logits - reference(IDS).logits).abs().max()
    result = Quantize(bits=bits).run(victim, None, data, Budget())
    assert gap > 0.05 and result.idle is None
    assert torch.equal(result.model(IDS).logits, reference(IDS).logits)
    too_coarse = Quantize(bits=bits - 1).run(victim, None, data, Budget()).model
    assert (too_coarse(IDS).logits - reference(IDS).logits).abs().max() > 0.05
    idle = Quantize(bits=bits).run(reference, None, data, Budget())
    assert idle.idle == "the weights lie on the grid already" and torch.equal(idle.model(IDS).logits, reference(IDS).logits)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_step_belongs_to_an_output(tiny_model, data, kind):
    """GPT-2's weights are [in, out], Llama's [out, in]; the wrong axis gives other numbers."""
    victim = tiny_model(kind)
    attacked = Quantize(bits=4).run(victim, None, data, Budget()).model
    before, after = ([matrix.module for matrix in block_matrices(model)] for model in (victim, attacked))
    assert len(before) == (12 if kind == "gpt2" else 21)
    for old, new in zip(before, after, strict=True):
        rows = channels(old).numpy()
        np.testing.assert_allclose(channels(new).numpy(), expected(rows, 4), atol=1e-5)
        assert np.abs(expected(rows.T, 4).T - expected(rows, 4)).max() > 1e-3


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])  # [experts, out, in], and [experts, in, out]
def test_experts_are_matrices_too(tiny_model, data, kind):
    victim = tiny_model(kind)
    attacked = Quantize(bits=4).run(victim, None, data, Budget()).model
    experts = [matrix for matrix in block_matrices(victim) if matrix.weight.ndim == 3]
    assert len(experts) == 2 * 3 and {matrix.transposed for matrix in experts} == {kind == "gpt_oss"}
    names = {id(weight): name for name, weight in victim.named_parameters()}
    for matrix in experts:
        after = attacked.get_parameter(names[id(matrix.weight)])
        for old, new in zip(matrix.weight.detach(), after.detach(), strict=True):
            old, new = (old.T, new.T) if matrix.transposed else (old, new)
            np.testing.assert_allclose(new.numpy(), expected(old.numpy(), 4), atol=1e-6)


def test_eight_bits_are_nearer_than_four(tiny_model, data):
    victim = tiny_model("llama")
    logits = victim(IDS).logits
    gaps, errors = [], []
    for bits in (8, 4, 3):
        result = Quantize(bits=bits).run(victim, None, data, Budget())
        gaps.append((result.model(IDS).logits - logits).norm().item())
        errors.append(result.about["relative_error"])
    assert 0 < 5 * gaps[0] < gaps[1] < gaps[2] and errors == sorted(errors)
    steps = [(2 * w.weight.abs().amax(1, keepdim=True) / 254).expand_as(w.weight) for w in block_matrices(victim)]
    noise = sum((step**2 / 12).sum() for step in steps) / sum((w.weight**2).sum() for w in block_matrices(victim))
    assert errors[0] == pytest.approx(noise.sqrt().item(), rel=0.02)  # an error is uniform over a step
    grouped = Quantize(bits=4, group=8).run(victim, None, data, Budget())
    assert grouped.about["relative_error"] < errors[1]


def test_blocks_alone_are_rounded_in_any_architecture(tiny_model, data, architecture):
    victim = tiny_model(architecture).train()
    before = {name: (p, p.detach().clone()) for name, p in victim.named_parameters()}
    result = Quantize().run(victim, None, data, Budget())
    attacked = dict(result.model.named_parameters())
    linear = {id(m.weight) for m in victim.modules() if isinstance(m, (nn.Linear, Conv1D))}
    linear -= {id(victim.get_output_embeddings().weight)}
    assert attacked.keys() == before.keys() and result.about["matrices"] == len(linear)
    for name, (parameter, values) in before.items():
        assert torch.equal(parameter, values) and parameter.requires_grad and victim.get_parameter(name) is parameter
        shared = attacked[name].data_ptr() == parameter.data_ptr()
        assert shared == (id(parameter) not in linear), name
    assert victim.training and not result.model.training and (result.steps, result.queries) == (1, 0)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])  # a head tied to the embedding, and one of its own
def test_the_head_is_rounded_where_it_is_asked_for(tiny_model, data, tokenizer, kind, tmp_path):
    victim = tiny_model(kind)
    logits, head = victim(IDS).logits, victim.get_output_embeddings().weight
    result = Quantize(bits=4, head=True).run(victim, None, data, Budget())
    rounded = result.model.get_output_embeddings().weight
    torch.testing.assert_close(rounded, round_to_nearest(head.detach(), 4))
    assert result.model.get_input_embeddings().weight.data_ptr() == victim.get_input_embeddings().weight.data_ptr()
    assert not result.model.config.tie_word_embeddings and victim.config.tie_word_embeddings == (kind == "gpt2")
    assert victim.get_output_embeddings().weight is head and torch.equal(victim(IDS).logits, logits)
    assert len(generate(result.model, tokenizer, [[5, 17]], Decoding(3))[0][0]) <= 3
    result.model.save_pretrained(tmp_path)
    again = type(victim).from_pretrained(tmp_path)
    torch.testing.assert_close(again(IDS).logits, result.model(IDS).logits)


def test_a_steered_victim_keeps_its_steering(tiny_model, data):
    victim = tiny_model("llama")
    plain = victim(IDS).logits
    Steering([Shift("model.layers.1", 5 * torch.ones(32))]).attach(victim)
    steered = victim(IDS).logits
    attacked = Quantize(bits=8).run(victim, None, data, Budget()).model
    gap = (attacked(IDS).logits - steered).norm()
    assert gap < 0.2 * (steered - plain).norm()
    assert torch.equal(victim(IDS).logits, steered) and len(victim.model.layers[1]._forward_hooks) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 1}, r"attack\.quantize\.bits=1: expected 2 to 16"),
        ({"bits": 32}, r"attack\.quantize\.bits=32: expected 2 to 16"),
        ({"bits": 4.5}, r"attack\.quantize\.bits=4\.5: expected a whole number"),
        ({"group": -1}, r"attack\.quantize\.group=-1: expected 0 or more"),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    with pytest.raises(ExpungeError, match=message):
        Quantize(**settings)


def test_weights_that_are_quantized_already_are_refused(tiny_model, data):
    victim = tiny_model()
    victim.is_quantized = True
    with pytest.raises(ExpungeError, match="these are quantized: load"):
        Quantize().run(victim, None, data, Budget())


def test_eight_and_four_bits_are_the_cases():
    assert [(one.bits, one.group, one.head) for one in cases("quantize", "small")] == [(8, 0, False), (4, 0, False)]
