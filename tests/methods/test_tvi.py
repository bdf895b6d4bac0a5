"""TVI: directions against plain forms from the definition, orientation, value vectors as they enter the stream, strength."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from expunge.anatomy import PER_BLOCK, added_values, nearest_values
from expunge.errors import ExpungeError
from expunge.fitting import fit_and_apply
from expunge.methods import Material
from expunge.methods.tvi import TVI, main_direction, strength
from expunge.models import blocks, depth, hidden_states
from expunge.probes import fit_probe, pooled_states
from expunge.steering import detach
from expunge.training import UnlearnConfig, UnlearnTrainer

BAD, GOOD = range(20, 60), range(100, 140)
"""Tokens of the two kinds of text."""


def labelled(n=40, seed=0):
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n):
        tokens = torch.randint(0, 40, (3 + i % 5,), generator=draw).tolist()
        rows.append(([(BAD if i % 2 else GOOD)[token] for token in tokens], bool(i % 2)))
    return rows


def fitted(model, perplexity=None, **settings):
    return TVI(**settings).placed(depth(model)).fit(Material(model, [], labelled(), perplexity=perplexity))


def toxic_column(model, layer="pre_norm"):
    rows = [ids for ids, _ in labelled()]
    return F.normalize(
        fit_probe(pooled_states(model, rows, layer, "mean"), [int(bad) for _, bad in labelled()]).weight, dim=0
    )


def weights(model, block):
    """[neurons, d], by the names of these architectures."""
    if hasattr(model, "transformer"):
        return model.transformer.h[block].mlp.c_proj.weight.detach()
    return model.model.layers[block].mlp.down_proj.weight.detach().T


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_probe_value_and_svd_by_their_definitions(tiny_model, name):
    model = tiny_model(name)
    w = toxic_column(model).double()
    probe, value, svd = (fitted(model, direction=kind, alpha=3.0, top=7) for kind in ("probe", "value", "svd"))
    torch.testing.assert_close(probe.edits[0].vector.double(), 3 * w)
    every = torch.cat([weights(model, block) for block in range(3)]).double()
    cosines = every @ w / every.norm(dim=1)
    best = int(cosines.argmax())
    torch.testing.assert_close(value.edits[0].vector.double(), 3 * every[best])
    neurons = len(weights(model, 0))
    assert value.about["value"] == {
        "block": best // neurons,
        "neuron": best % neurons,
        "cosine": pytest.approx(cosines[best].item()),
    }
    nearest = every[cosines.argsort(descending=True)[:7]]
    unit = nearest / nearest.norm(dim=1, keepdim=True)
    _, vectors = torch.linalg.eigh(unit.T @ unit)
    first = vectors[:, -1] * (vectors[:, -1] @ w).sign()
    torch.testing.assert_close(svd.edits[0].vector.double(), 3 * first, atol=1e-5, rtol=1e-5)
    assert svd.about["values"] == 7 and svd.about["cosine"] > 0


def test_the_main_direction_points_towards_the_probe_whatever_svd_says():
    vectors = torch.tensor([[2.0, 0.0, 0.2], [5.0, 0.1, 0.0], [0.5, 0.0, 0.0]])
    for towards in (torch.tensor([1.0, 0, 0]), torch.tensor([-1.0, 0, 0])):
        found = main_direction(vectors, towards)
        assert found @ towards > 0.99 and found.norm() == pytest.approx(1)


def test_a_block_brings_no_more_than_its_share(tiny_model):
    model, towards = tiny_model(), torch.zeros(32)
    towards[0] = 1.0
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[:, 0] += 100.0
    found = nearest_values(model, towards, 128)
    assert [value.block for value in found].count(1) == PER_BLOCK and len(found) == 128
    cosines = [value.cosine for value in found]
    assert cosines == sorted(cosines, reverse=True) and found[0].block == 1


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gemma3_text", "olmo2", "olmo3", "phi3"])
def test_a_value_vector_is_what_one_neuron_adds(tiny_model, name):
    """The output layer is fed one neuron alone; what comes into the stream has the direction of `added_values`."""
    model = tiny_model(name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    block = blocks(model)[1]
    mlp, vectors = block.mlp, added_values(model, 1)
    output = mlp.c_proj if name == "gpt2" else mlp.down_proj
    neuron = torch.zeros(1, 1, len(vectors))
    neuron[..., 5] = 1.0
    ids, mask = torch.tensor([[4, 9, 2]]), torch.ones(1, 3, dtype=torch.long)

    def stream(fed):
        handles = [output.register_forward_pre_hook(lambda module, args: (fed.expand_as(args[0]),))]
        with torch.no_grad():
            found = hidden_states(model, ids, mask, (2,))[2]
        handles[0].remove()
        return found

    added = stream(neuron) - stream(torch.zeros_like(neuron))
    torch.testing.assert_close(F.normalize(added[0], dim=-1), F.normalize(vectors[[5] * 3], dim=-1), atol=1e-3, rtol=1e-3)


def test_it_lowers_what_the_probe_sees_and_the_other_block_has_its_own_probe(tiny_model):
    model = tiny_model("llama")
    rows, w = [ids for ids, _ in labelled()], toxic_column(model, 2)
    before = pooled_states(model, rows, 2, "mean") @ w
    steering = fitted(model, block=1, alpha=2.5)
    assert steering.edits[0].at == "model.layers.1"
    with steering.attached(model):
        after = pooled_states(model, rows, 2, "mean") @ w
    torch.testing.assert_close(after, before - 2.5, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("direction", "alpha", "depth"), [("probe", 50.0, 24), ("value", 20.0, 24), ("svd", 100.0, 12), ("svd", 100.0, 1)]
)
def test_null_is_the_papers_strength_and_the_last_block(direction, alpha, depth):
    method = TVI(direction=direction)
    assert (method.alpha, method.block) == (None, None)
    placed = method.placed(depth)
    assert (placed.alpha, placed.block) == (alpha, depth - 1)
    assert {default.source for default in method.defaults(depth).values()} == {"paper"}


@pytest.mark.parametrize(("wanted", "start"), [(1.02, 50.0), (1.02, 1e-3), (3.0, 1.0), (1.5, 700.0)])
def test_strength_is_found_from_either_side(wanted, start):
    asked = []

    def ratio(alpha):
        asked.append(alpha)
        return math.exp((alpha / 40) ** 2)

    alpha, found = strength(ratio, wanted, start)
    assert found == ratio(alpha) == pytest.approx(wanted, rel=1e-3)
    assert len(asked) < 40


def test_strength_that_is_not_there():
    with pytest.raises(ExpungeError, match="does not rise so far"):
        strength(lambda alpha: 1.0, 1.02, 1.0)
    with pytest.raises(ExpungeError, match="jumps over it"):
        strength(lambda alpha: 9.0 if alpha > 3 else 1.0, 1.02, 1.0)
    assert strength(lambda alpha: math.nan if alpha > 8 else 1 + alpha / 10, 1.5, 64.0)[0] == pytest.approx(5, rel=1e-2)


def test_perplexity_is_matched_on_the_model_itself(tiny_model):
    """Of text that it finds likely, its own: any direction makes that less so."""
    model = tiny_model("llama")
    ids = model.generate(torch.tensor([[30, 31]]), max_new_tokens=20, do_sample=False, eos_token_id=None)

    @torch.no_grad()
    def perplexity():
        return model(input_ids=ids, labels=ids).loss.exp().item()

    own = perplexity()
    steering = fitted(model, perplexity, match_perplexity=1.3)
    assert perplexity() == own
    with steering.attached(model):
        assert perplexity() / own == pytest.approx(1.3, rel=2e-3) == steering.about["perplexity_ratio"]
    assert steering.about["alpha"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -1.0}, "alpha=-1.0: tvi wants 0 or more"),
        ({"top": 0}, "top=0"),
        ({"match_perplexity": 1.0}, "match_perplexity=1.0: tvi wants more than 1"),
        ({"alpha": 2.0, "match_perplexity": 1.02}, "give one of them"),
        ({"direction": "mean"}, "expected one of probe, value, svd"),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    with pytest.raises(ExpungeError, match=message):
        TVI(**settings)


def test_what_is_missing_is_said(tiny_model, tokenizer, pairs, tmp_path):
    model = tiny_model()
    with pytest.raises(ExpungeError, match="block 3"):
        TVI(block=3).placed(3)
    with pytest.raises(ExpungeError, match=r"give data\.probe"):
        TVI().placed(3).fit(Material(model, []))
    with pytest.raises(ExpungeError, match=r"give monitor\.corpus"):
        fitted(model, match_perplexity=1.1)
    with pytest.raises(ExpungeError, match="fitted and applied, not trained"):
        UnlearnTrainer(model, TVI(), UnlearnConfig(output_dir=str(tmp_path)), pairs, tokenizer)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_fitted_and_applied_to_a_model(tiny_model, tokenizer, pairs, tmp_path, name):
    """Of GPT-2 the weights have it, and `from_pretrained` is enough; of Llama it lies beside them."""
    model = tiny_model(name)
    probed = [(pair.prompt + side, bad) for pair in pairs for side, bad in ((pair.chosen, False), (pair.rejected, True))]
    bias = [p.clone() for key, p in model.named_parameters() if key.endswith("h.2.mlp.c_proj.bias")]
    plain = model(input_ids=torch.arange(6)[None]).logits
    about = fit_and_apply(model, tokenizer, TVI(alpha=2.0), probe_data=probed)
    assert about["folded"] is (name == "gpt2") and about["alpha"] == 2.0
    steered = model(input_ids=torch.arange(6)[None]).logits
    assert not torch.allclose(plain, steered, atol=1e-2)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=torch.arange(6)[None]).logits
    torch.testing.assert_close(loaded, steered if about["folded"] else plain)
    if bias:
        assert (model.transformer.h[2].mlp.c_proj.bias - bias[0]).norm().item() == pytest.approx(2.0, rel=1e-4)
        assert detach(model) is None
    else:
        assert isinstance(detach(model), nn.Module)
