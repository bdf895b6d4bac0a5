import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from expunge.adapters import add_lora
from expunge.errors import ExpungeError
from expunge.models import (
    Reference,
    blocks,
    body,
    context_length,
    head_logits,
    hidden_states,
    in_batches,
    inner_model,
    load_model,
    weights_digest,
    width,
    without_dropout,
)

IDS = torch.tensor([[5, 17, 250, 33, 8, 91], [60, 7, 7, 300, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


def move_adapter(model: nn.Module) -> None:
    """Adapters start as a no-op; make this one change the model."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)


def test_the_head_on_final_states_gives_the_logits_of_the_model(tiny_model, architecture):
    model = tiny_model(architecture)
    with torch.no_grad():
        states = hidden_states(model, IDS, MASK, ["final"])["final"]
        logits = model(input_ids=IDS, attention_mask=MASK).logits
    assert logits.std() > 0.1
    torch.testing.assert_close(head_logits(model, states)[MASK.bool()], logits[MASK.bool()])


def test_the_cap_of_gemma_2_bends_its_logits(tiny_model):
    model = tiny_model("gemma2")
    with torch.no_grad():
        states = hidden_states(model, IDS, MASK, ["final"])["final"]
        uncapped = model.get_output_embeddings()(states)
    assert (head_logits(model, states) - uncapped).abs().max() > 0.1


def test_states_are_those_that_transformers_returns(tiny_model, architecture):
    model = tiny_model(architecture)
    with torch.no_grad():
        states = hidden_states(model, IDS, MASK, [0, 1, 2, "pre_norm", "final"])
        theirs = body(model)(input_ids=IDS, attention_mask=MASK, output_hidden_states=True).hidden_states
        for layer in (0, 1, 2):
            assert torch.equal(states[layer], theirs[layer])
        assert torch.equal(states["final"], theirs[-1])
        norm = next(m for name, m in body(model).named_children() if name in ("ln_f", "norm", "final_layer_norm"))
        torch.testing.assert_close(norm(states["pre_norm"]), states["final"])
    assert not torch.equal(states["pre_norm"], states["final"])


def test_blocks_above_the_deepest_layer_do_not_run(tiny_model, architecture):
    model = tiny_model(architecture)
    stack = list(blocks(model))
    ran = []
    for number, block in enumerate(stack):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    whole = hidden_states(model, IDS, MASK, [0, 1, "final"])
    assert ran == [0, 1, 2]
    part = hidden_states(model, IDS, MASK, [1, 0])
    assert ran == [0, 1, 2, 0]
    assert list(part) == [1, 0]
    assert torch.equal(part[0], whole[0]) and torch.equal(part[1], whole[1])
    assert list(blocks(model)) == stack
    assert torch.equal(hidden_states(model, IDS, MASK, ["final"])["final"], whole["final"])


def test_hooks_are_gone_afterwards_also_when_the_forward_fails(tiny_model):
    model = tiny_model()
    hidden_states(model, IDS, MASK, [1, "pre_norm"])
    with pytest.raises(IndexError):
        hidden_states(model, IDS + 10_000, MASK, [1, "pre_norm"])
    assert all(not block._forward_pre_hooks and not block._forward_hooks for block in blocks(model))


@pytest.mark.parametrize("layer", [3, -1])
def test_a_layer_that_is_not_there_is_an_error(tiny_model, layer):
    with pytest.raises(ExpungeError, match=f"layer {layer}: the model has 3 blocks"):
        hidden_states(tiny_model(), IDS, MASK, [layer])


@pytest.mark.parametrize("above", [(), ("final",)], ids=["stopped", "to-the-end"])
@pytest.mark.parametrize("layer", [0, 1, 2, "pre_norm"])
def test_gradients_flow_through_hooked_states_with_and_without_checkpointing(tiny_model, layer, above):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model = without_dropout(model).train()
        hidden_states(model, IDS, MASK, [layer, *above])[layer].square().sum().backward()
        gradients.append(model.transformer.wte.weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


def of_an_accelerator():
    raise torch.OutOfMemoryError


def of_the_machine():
    torch.empty(2**55)


@pytest.mark.parametrize("run_out", [of_an_accelerator, of_the_machine])
def test_batches_are_halved_where_memory_runs_out(run_out):
    done, tried, shown = [], [], []

    def work(batch):
        tried.append(len(batch))
        if len(batch) > 3:
            run_out()
        done.extend(batch)

    in_batches(range(11), lambda first: 8 if first < 9 else 1, work, lambda *figures: shown.append(figures))
    assert done == list(range(11))
    assert tried == [8, 4, 2, 2, 2, 2, 2, 1]
    assert shown[-1] == (11, 11)
    with pytest.raises(ExpungeError, match="out of memory with a single row"):
        in_batches([1], lambda _: 4, lambda _: run_out())
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        in_batches([1], lambda _: 4, lambda _: torch.ones(2, 3) @ torch.ones(2, 3))


def test_the_parts_of_a_model_are_found_with_and_without_lora(tiny_model, architecture):
    plain = tiny_model(architecture)
    for model in (plain, add_lora(plain, r=2)):
        assert inner_model(model) is plain
        assert len(blocks(model)) == 3
        assert width(model) == 32
        assert context_length(model) == 64


def test_with_its_adapter_off_a_lora_model_is_the_original(tiny_model, architecture):
    original = tiny_model(architecture)
    model = add_lora(tiny_model(architecture), r=4)
    reference = Reference(model)
    move_adapter(model)
    with torch.no_grad():
        expected = hidden_states(original, IDS, MASK, [1, "final"])
        edited = hidden_states(model, IDS, MASK, [1, "final"])
        with reference.of(model) as frozen:
            found = hidden_states(frozen, IDS, MASK, [1, "final"])
            logits = head_logits(frozen, found["final"])
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found["final"], expected["final"])
    torch.testing.assert_close(logits, head_logits(original, expected["final"]))
    assert not torch.allclose(edited["final"], expected["final"], atol=1e-2)


def test_only_the_adapter_is_trained_with_lora(tiny_model):
    model = add_lora(tiny_model("llama"), r=2)
    assert all(("lora_" in name) == parameter.requires_grad for name, parameter in model.named_parameters())


def test_lora_targets_that_are_not_there_are_an_error(tiny_model):
    with pytest.raises(ExpungeError, match=r"^LoRA: .*nowhere"):
        add_lora(tiny_model(), target_modules=["nowhere"])


def test_a_frozen_copy_is_without_gradients_and_does_not_follow(tiny_model):
    model = tiny_model()
    reference = Reference(model)
    before = weights_digest(model)
    with torch.no_grad():
        model.transformer.wte.weight.add_(1.0)
    with reference.of(model) as frozen:
        assert weights_digest(frozen) == before != weights_digest(model)
        assert not hidden_states(frozen, IDS, MASK, ["final"])["final"].requires_grad


@pytest.mark.parametrize(
    "model",
    [
        GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=16)),
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=320,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                attention_dropout=0.3,
            )
        ),
        OPTForCausalLM(
            OPTConfig(vocab_size=320, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, dropout=0.3)
        ),
    ],
    ids=["gpt2", "llama", "opt"],
)
def test_without_dropout_training_mode_is_deterministic(model: nn.Module):
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)  # the control: it had dropout
    without_dropout(model)
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    assert torch.equal(model(IDS).logits, model.eval()(IDS).logits)


def test_a_digest_changes_with_a_weight_its_sign_and_its_name(tiny_model):
    model = tiny_model()
    digest = weights_digest(model)
    assert digest == weights_digest(tiny_model())
    with torch.no_grad():
        model.transformer.ln_f.bias[3] = -0.0
    assert weights_digest(model) != digest
    one, other = (nn.ModuleDict({name: nn.LayerNorm(2)}) for name in "ab")
    assert weights_digest(one) != weights_digest(other)
    assert weights_digest(tiny_model().bfloat16()) != digest


@pytest.mark.parametrize("lora", [False, True])
def test_a_saved_model_is_loaded_with_its_adapter(tmp_path, tiny_model, tokenizer, lora):
    base, out = tmp_path / "base", tmp_path / "out"
    tiny_model("llama").save_pretrained(base)
    tokenizer.save_pretrained(base)
    model, tokenizer = load_model(base)
    if lora:
        model = add_lora(model, r=2)
        move_adapter(model)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    loaded, again = load_model(str(out), dtype="float32", device="cpu", attn_implementation="eager")
    assert loaded.config._attn_implementation == "eager"
    assert not loaded.training
    assert again("The river") == tokenizer("The river")
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_loaded_is_one_line(tmp_path, tiny_model):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExpungeError, match="empty: cannot load") as caught:
        load_model(tmp_path / "empty")
    assert "\n" not in str(caught.value)
    tiny_model().save_pretrained(tmp_path / "bare")
    with pytest.raises(ExpungeError, match="bare: there is a model but no tokenizer"):
        load_model(tmp_path / "bare")


def test_a_model_whose_body_has_another_name_is_one_line(tiny_model, monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(type(model), "base_model_prefix", "language_model")  # as Llama 4's text model
    with pytest.raises(ExpungeError, match="LlamaForCausalLM is not supported: it has no 'language_model'"):
        body(model)
