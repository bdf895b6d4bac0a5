import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from expunge.adapters import add_lora
from expunge.anatomy import block_names, check_blocks, mlp_output, parameters_in, value_vectors
from expunge.errors import ExpungeError
from expunge.models import blocks


def test_the_output_of_the_mlp_is_one_matrix_a_block(tiny_model, architecture):
    """By what it does: no other matrix maps the MLP's neurons to the residual stream."""
    model = tiny_model(architecture)
    names = parameters_in(model, [0, 2], "mlp_out")
    neurons, d = (128 if architecture == "gpt2" else 48), 32
    found = dict(model.named_parameters())
    for block, name in zip((0, 2), names, strict=True):
        prefix = block_names(model)[block]
        assert name.startswith(f"{prefix}.mlp.")
        shape = (neurons, d) if architecture == "gpt2" else (d, neurons)
        alike = [n for n, p in found.items() if n.startswith(f"{prefix}.") and tuple(p.shape) == shape]
        assert alike == [name]
        assert mlp_output(model, block).weight is found[name]


def test_no_place_in_a_list_means_the_same_everywhere(tiny_model):
    """Parameter 6 of a block, which RMU's code trains in Llama, is the attention's output matrix in Qwen 2."""
    for architecture, sixth in (("llama", "mlp.down_proj.weight"), ("qwen2", "self_attn.o_proj.weight")):
        model = tiny_model(architecture)
        assert [name for name, _ in blocks(model)[1].named_parameters()][6] == sixth
        assert parameters_in(model, [1], "mlp_out") == ["model.layers.1.mlp.down_proj.weight"]
    assert parameters_in(model, [1], "o_proj") == ["model.layers.1.self_attn.o_proj.weight"]


def test_what_a_neuron_adds_to_the_residual_stream(tiny_model, architecture):
    """Row i of the value vectors is the output of the layer for neuron i alone."""
    layer = mlp_output(tiny_model(architecture), 1)
    values = value_vectors(layer)
    bias = 0 if getattr(layer, "bias", None) is None else layer.bias
    torch.testing.assert_close(layer(torch.eye(len(values))) - bias, values)


def test_all_of_a_block_and_parts_of_names(tiny_model):
    model = tiny_model()
    whole = {name for name, _ in model.named_parameters() if name.startswith(("transformer.h.0.", "transformer.h.1."))}
    assert set(parameters_in(model, [0, 1], "all_block")) == whole
    assert parameters_in(model, [1], "mlp.c_fc") == ["transformer.h.1.mlp.c_fc.weight", "transformer.h.1.mlp.c_fc.bias"]
    both = parameters_in(model, [2], "c_proj.weight")
    assert both == ["transformer.h.2.attn.c_proj.weight", "transformer.h.2.mlp.c_proj.weight"]


def test_block_1_is_not_block_10():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=11, n_head=1, n_positions=8))
    assert parameters_in(model, [1], "mlp_out") == ["transformer.h.1.mlp.c_proj.weight"]


def test_of_an_adapted_model_the_adapters_weights_are_meant(tiny_model):
    model = add_lora(tiny_model("llama"), r=2)
    prefix = "base_model.model.model.layers.1.mlp.down_proj.lora_"
    assert parameters_in(model, [1], "mlp_out") == [f"{prefix}A.default.weight", f"{prefix}B.default.weight"]
    assert len(parameters_in(model, [1], "all_block")) == 2 * 7


def test_a_name_that_matches_nothing_lists_what_there_is(tiny_model):
    model = tiny_model("llama")
    with pytest.raises(ExpungeError) as caught:
        parameters_in(model, [0, 1], "c_proj")
    assert str(caught.value) == (
        "method.parameters='c_proj': no trainable weight of blocks 0, 1 is called so; expected all, mlp_out, all_block, or "
        "a part of: input_layernorm, mlp.down_proj, mlp.gate_proj, mlp.up_proj, post_attention_layernorm, self_attn.k_proj, "
        "self_attn.o_proj, self_attn.q_proj, self_attn.v_proj"
    )
    with pytest.raises(ExpungeError, match=r"'own_proj': no trainable"):
        parameters_in(model, [0], "own_proj")  # the end of a name is no part of it
    with pytest.raises(ExpungeError, match="or a part of: none, as all are frozen"):
        parameters_in(model.requires_grad_(False), [0], "mlp_out")
    with pytest.raises(
        ExpungeError, match=r"no single output layer of the MLP in block 0; linear layers: .*self_attn.q_proj"
    ):
        model.model.layers[0].mlp = torch.nn.Identity()
        mlp_output(model, 0)


@pytest.mark.parametrize("block", [3, -1])
def test_a_block_that_does_not_exist_names_the_depth(tiny_model, block):
    wanted = f"block {block}: the model has 3 blocks, 0 to 2"
    for call in (lambda: parameters_in(tiny_model(), [0, block], "mlp_out"), lambda: mlp_output(tiny_model(), block)):
        with pytest.raises(ExpungeError, match=f"^{wanted}$"):
            call()
    with pytest.raises(ExpungeError, match=wanted):
        check_blocks([block], 3)
