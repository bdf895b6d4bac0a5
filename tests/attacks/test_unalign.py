"""Un-aligning: keys are found in every architecture, grow by the factor and by nothing else; a neuron comes back."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from expunge.anatomy import block_names, mlp_inputs, mlp_output, nearest_values
from expunge.attacks import AttackData, Budget, unalign
from expunge.attacks.unalign import Unalign
from expunge.data import Text
from expunge.errors import ExpungeError
from expunge.metrics.perplexity import row_nll
from expunge.models import blocks, sharing_copy
from expunge.probes import fit_probe, pooled_states

IDS = torch.tensor([[5, 17, 9, 30, 2, 40], [40, 3, 7, 60, 11, 5]])
WIDTH = 32


@pytest.fixture
def data(pairs, tokenizer):
    """Rejected sides with words of their own, so that a probe can tell them."""
    forget = [Text(pair.prompt, f" two long rivers{pair.rejected}") for pair in pairs]
    retain = [Text(pair.prompt, f" kind letters{pair.chosen}") for pair in pairs]
    return AttackData(tokenizer, forget, retain)


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids).logits


@torch.no_grad()
def activations(model, block):
    """What enters the output layer of the MLP, `[B, T, neurons]`: the activation of each neuron."""
    kept = []
    handle = mlp_output(model, block).register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    model(input_ids=IDS)
    handle.remove()
    return kept[0]


def outputs(layer, x):
    with torch.no_grad():
        return layer(x)


def changed(model, attacked):
    return [name for (name, a), b in zip(model.named_parameters(), attacked.parameters(), strict=True) if a is not b]


# keys


def test_keys_are_found_and_are_what_their_names_say(tiny_model, architecture):
    """Of a gated MLP the activation is linear in the up key, not in the gate's; of a plain one it hangs on its one key."""
    model, neuron = tiny_model(architecture), 5
    keys, before = mlp_inputs(model, 1), activations(model, 1)
    gated = architecture not in ("gpt2", "gpt_neox")
    assert set(keys) == ({"gate", "up"} if gated else {"up"})
    for name, part in keys.items():
        assert part.vectors.shape == (before.shape[-1], WIDTH)
        assert part.vectors.untyped_storage().data_ptr() == part.layer.weight.untyped_storage().data_ptr()
        with torch.no_grad():
            part.vectors[neuron] *= 2
        after = activations(model, 1)
        others = [i for i in range(before.shape[-1]) if i != neuron]
        assert torch.equal(after[..., others], before[..., others])
        twice = torch.allclose(after[..., neuron], 2 * before[..., neuron], rtol=1e-4, atol=1e-6)
        assert not torch.equal(after[..., neuron], before[..., neuron]) and twice == (gated and name == "up")
        with torch.no_grad():
            part.vectors[neuron] /= 2


@pytest.mark.parametrize("name", ["opt", "phi", "gptj", "bloom", "falcon", "glm", "starcoder2", "mpt"])
def test_keys_of_families_with_other_names(name):
    """OPT's lie in the block itself, GLM's gate and up in one matrix, Falcon's beside the attention."""
    common = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
    common |= {"opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2}}.get(
        name, {}
    )
    if name in ("phi", "glm", "starcoder2"):
        common |= {"intermediate_size": 48, "num_key_value_heads": 4, "head_dim": 8}
    if name == "gptj":
        common |= {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **common)).eval()
    keys = mlp_inputs(model, 1)
    assert set(keys) == ({"gate", "up"} if name == "glm" else {"up"})
    neurons = activations(model, 1).shape[-1]
    assert all(part.vectors.shape == (neurons, WIDTH) for part in keys.values())


def test_an_mlp_that_is_not_known_lists_what_there_is(tiny_model):
    model = tiny_model("llama")
    model.model.layers[0].mlp.third_proj = nn.Linear(WIDTH, 48)
    with pytest.raises(ExpungeError, match=r"no input layers of the MLP in block 0; linear layers: .*mlp.third_proj"):
        mlp_inputs(model, 0)
    with pytest.raises(ExpungeError, match="block 7"):
        mlp_inputs(model, 7)


# scaling


@pytest.mark.parametrize(("name", "factor"), [("gpt2", 10.0), ("llama", 3.0), ("phi3", 3.0), ("gpt_neox", 10.0)])
def test_keys_are_longer_by_the_papers_factor_and_nothing_else_changes(tiny_model, data, name, factor):
    victim = tiny_model(name)
    with torch.no_grad():
        for key, parameter in victim.named_parameters():
            if key.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter))
    result = Unalign(vectors=5).run(victim, None, data, Budget())
    assert result.about["factor"] == factor and len(result.about["values"]) == 5
    x, scaled = torch.randn(3, WIDTH), {(value["block"], value["neuron"]) for value in result.about["values"]}
    touched = set()
    for block in range(3):
        old, new = mlp_inputs(victim, block), mlp_inputs(result.model, block)
        for part in old:
            layer, where = old[part].layer, old[part].outputs
            bias = 0 if layer.bias is None else layer.bias.detach()[where]
            before, after = (outputs(found[part].layer, x)[:, where] - bias for found in (old, new))  # keys . x
            times = torch.ones(before.shape[1])
            for neuron in range(before.shape[1]) if part == "up" else ():
                if (block, neuron) in scaled:
                    times[neuron] = factor
                    touched.add(layer.weight)
            torch.testing.assert_close(after, times * before, rtol=1e-4, atol=1e-4)
            assert torch.equal(new[part].vectors[times == 1], old[part].vectors[times == 1])
    names = [key for key, parameter in victim.named_parameters() if any(parameter is one for one in touched)]
    assert changed(victim, result.model) == names and not any(key.endswith("bias") for key in names)
    assert not torch.allclose(logits(victim), logits(result.model), atol=1e-3)


def test_a_factor_of_one_leaves_everything(tiny_model, data):
    victim = tiny_model()
    result = Unalign(factor=1.0).run(victim, None, data, Budget())
    assert "factor=1" in result.idle and changed(victim, result.model) == []
    assert torch.equal(logits(result.model), logits(victim))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_neurons_are_those_nearest_to_the_probe(tiny_model, data, name):
    """By the definition: a probe of the continuations alone, and the cosine of every value vector with it."""
    victim, reference = tiny_model(name, seed=1), tiny_model(name)
    for judge, given in ((reference, reference), (victim, None)):
        rows = [[ids for _, ids in data.rows(part)] for part in ("retain", "forget")]
        states = pooled_states(judge, rows[0] + rows[1], "pre_norm", "mean")
        w = fit_probe(states, [0] * len(rows[0]) + [1] * len(rows[1])).weight.double()
        values = [block.mlp.c_proj.weight if name == "gpt2" else block.mlp.down_proj.weight.T for block in blocks(victim)]
        cosines = torch.stack([(v.detach().double() @ w) / v.detach().double().norm(dim=1) / w.norm() for v in values])
        best = cosines.flatten().argsort(descending=True)[:7]
        about = Unalign().run(victim, given, data, Budget()).about
        assert [(v["block"], v["neuron"]) for v in about["values"]] == [divmod(int(i), cosines.shape[1]) for i in best]
        assert [v["cosine"] for v in about["values"]] == pytest.approx(cosines.flatten()[best].tolist(), abs=1e-4)
        assert about["probe_of"] == ("unlearned" if given is None else "reference")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_neuron_that_was_turned_down_comes_back(tiny_model, data, tokenizer, name):
    """One neuron writes the probe's direction, which the head reads as the first token of the forget texts; "unlearning"
    makes its key ten times shorter, and in a gated MLP its up key three times."""
    reference = tiny_model(name)
    rows = [[ids for _, ids in data.rows(part)] for part in ("retain", "forget")]
    states = pooled_states(reference, rows[0] + rows[1], "pre_norm", "mean")
    w = F.normalize(fit_probe(states, [0] * len(rows[0]) + [1] * len(rows[1])).weight, dim=0)
    block, neuron, token = 2, 7, rows[1][0][0]
    prompts = [prompt for prompt, _ in data.rows("forget")]
    part, factor = mlp_inputs(reference, block)["up"], 10.0 if name == "gpt2" else 3.0
    with torch.no_grad():
        head = reference.get_output_embeddings()
        if name == "gpt2":
            reference.config.tie_word_embeddings = False
            head.weight = nn.Parameter(head.weight.clone())
        head.weight[token] = 10 * w
        value = mlp_output(reference, block).weight
        (value if name == "gpt2" else value.T)[neuron] = w
    victim = sharing_copy(reference, [n for n, p in reference.named_parameters() if p is part.layer.weight])
    with torch.no_grad():
        mlp_inputs(victim, block)["up"].vectors[neuron] /= factor
    assert nearest_values(victim, w, 1)[0].neuron == neuron

    def nll(model):
        return row_nll(model, [([*prompt, token], len(prompt)) for prompt in prompts])[0].mean()

    result = Unalign(vectors=1).run(victim, reference, data, Budget())
    assert [(v["block"], v["neuron"]) for v in result.about["values"]] == [(block, neuron)]
    torch.testing.assert_close(logits(result.model), logits(reference), atol=1e-3, rtol=1e-3)
    assert abs(nll(result.model) - nll(reference)) < 1e-3 < 0.1 < abs(nll(victim) - nll(reference))
    other = Unalign(vectors=1, factor=2.0).run(victim, reference, data, Budget())
    assert abs(nll(other.model) - nll(reference)) > 0.05


# what is left


@pytest.mark.parametrize("ends", ["well", "in an interrupt"])
def test_the_victim_stays_as_it_was(tiny_model, data, monkeypatch, ends):
    victim, reference = tiny_model().train(), tiny_model(seed=1)
    for module in victim.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    victim.transformer.wpe.requires_grad_(False)

    def state():
        return [(model.training, [p.requires_grad for p in model.parameters()]) for model in (victim, reference)]

    before, output = state(), logits(victim)
    if ends == "well":
        result = Unalign().run(victim, reference, data, Budget())
        assert not torch.equal(logits(result.model), output) and not result.model.training
    else:

        def interrupted(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(unalign, "nearest_values", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Unalign().run(victim, reference, data, Budget())
    assert state() == before and torch.equal(logits(victim), output)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in victim.modules())


def test_the_attacked_model_is_an_ordinary_one(tiny_model, data, tmp_path):
    result = Unalign().run(tiny_model("llama"), None, data, Budget())
    result.model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(result.model))
    assert result.queries == 16 and Unalign().run(tiny_model("llama"), tiny_model("llama"), data, Budget()).queries == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vectors": 0}, r"attack\.unalign\.vectors=0"),
        ({"factor": 0.0}, r"attack\.unalign\.factor=0\.0: expected more than 0"),
        ({"samples": 0}, r"attack\.unalign\.samples=0"),
        ({"vectors": 301}, r"attack\.unalign\.vectors=301: there are only 300"),
    ],
)
def test_bad_settings_are_one_line(tiny_model, data, settings, message):
    with pytest.raises(ExpungeError, match=message):
        Unalign(**settings).run(tiny_model(), None, data, Budget())


def test_what_is_lacking_is_one_line(tiny_model, data):
    few = AttackData(data.tokenizer, data.forget[:4], data.retain)
    for had, message in (
        (AttackData(data.tokenizer, data.forget), "retain set is empty"),
        (AttackData(data.tokenizer, (), data.retain), "forget set is empty"),
        (few, "at least 5 texts of each label"),
    ):
        with pytest.raises(ExpungeError, match=message):
            Unalign().run(tiny_model(), None, had, Budget())
    victim = tiny_model("llama")
    layer = mlp_output(victim, 0)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ExpungeError, match="these are quantized"):
        nearest_values(victim, torch.ones(WIDTH), 1)
    assert block_names(victim)[0] == "model.layers.0"
