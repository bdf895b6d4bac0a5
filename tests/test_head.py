"""From final states to logits: the form of a head is proved, and everything else asks the model's own forward."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from expunge.adapters import add_lora
from expunge.engine import collate, run_step
from expunge.errors import ExpungeError
from expunge.models import Form, Reference, check_model, head_form, head_logits, hidden_states, vocabulary
from expunge.models import head as room

IDS = torch.tensor([[5, 17, 250, 33, 8, 91], [60, 7, 7, 300, 2, 9]])
MASK = torch.ones_like(IDS)
ROWS = [{"retain": ([3, 4, 5], [8, 9]), "forget": ([3, 4, 5], [6, 7, 2])}]


class Bent(LlamaForCausalLM):
    """A Llama whose forward does more to its logits than a configuration says."""

    def bend(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def forward(self, *args, **inputs):
        output = super().forward(*args, **inputs)
        output.logits = self.bend(output.logits)
        return output


class Scaled(Bent):
    factor = 0.0195

    def bend(self, logits):
        return logits * self.factor


class Capped(Bent):
    def bend(self, logits):
        return 15 * torch.tanh(logits * 0.7 / 15)


class Learned(Bent):
    """Its scale is trained."""

    def __init__(self, config):
        super().__init__(config)
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def bend(self, logits):
        return logits * self.temperature


class Masked(Bent):
    """Some tokens never come, as image tokens of Chameleon."""

    def bend(self, logits):
        return logits.index_fill(-1, torch.tensor([7]), torch.finfo(logits.dtype).min)


class Squared(Bent):
    def bend(self, logits):
        return logits + 0.1 * logits.square()


@pytest.fixture
def bent(tiny_model):
    def make(kind: type[Bent], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        torch.manual_seed(0)
        return kind(tiny_model("llama").config).to(dtype).eval()

    return make


def own(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("kind", "form"), [(Bent, Form()), (Scaled, Form(0.0195)), (Capped, Form(0.7, 15.0))], ids=["plain", "scaled", "capped"]
)
def test_a_form_is_found_without_a_name(bent, kind, form, dtype):
    model = bent(kind, dtype)
    found = head_form(model)
    close = 1e-6 if dtype.itemsize >= 4 else 3e-3
    assert found is not None
    assert found.scale == pytest.approx(form.scale, rel=close)
    assert found.cap == (None if form.cap is None else pytest.approx(form.cap, rel=close))
    if kind is Bent:
        assert found.scale == 1  # a product with 1.0000001 would be another figure


@pytest.mark.parametrize("kind", [Learned, Masked, Squared])
def test_a_head_of_no_such_form_asks_the_model(bent, kind):
    model = bent(kind)
    check_model(model)
    assert head_form(model) is None
    states = hidden_states(model, IDS, MASK, ["final"])["final"]
    assert torch.equal(head_logits(model, states), own(model))
    step = run_step(model, Reference(model), collate(ROWS), ("final",), ("final",), {}, progress=0)
    logps = own_logps(model, [3, 4, 5, 8, 9])
    torch.testing.assert_close(step.logps("retain")[0][0], logps[2] + logps[3])
    torch.testing.assert_close(step.logps("retain", ref=True)[0][0], logps[2] + logps[3])
    assert step.token_kl("retain").abs() < 1e-6


def own_logps(model: PreTrainedModel, row: list[int]) -> torch.Tensor:
    logps = model(torch.tensor([row])).logits[0, :-1].log_softmax(-1)
    return logps.gather(1, torch.tensor(row)[1:, None]).squeeze(1)


@pytest.mark.parametrize("kind", [Scaled, Capped, Learned, Squared])
def test_gradients_are_those_of_the_model_s_own_forward(bent, kind):
    model = bent(kind)
    for logits in (head_logits(model, hidden_states(model, IDS, MASK, ["final"])["final"]), own(model)):
        model.zero_grad()
        logits.log_softmax(-1)[..., 3].sum().backward()
        found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        if logits.requires_grad and "first" not in locals():
            first = found
    for name, gradient in found.items():
        torch.testing.assert_close(first[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_reference_of_a_copied_body_keeps_its_own_head(bent):
    """With weights moved since, the reference's logits are those of what it was, whatever the form of the head."""
    model = bent(Learned)
    before, reference = copy.deepcopy(model), Reference(model)
    with torch.no_grad():
        model.temperature.fill_(9.0)
        model.lm_head.weight.add_(0.1)
    step = run_step(model, reference, collate(ROWS), ("final",), ("final",), {}, progress=0)
    logps = own_logps(before, [3, 4, 5, 8, 9])
    torch.testing.assert_close(step.logps("retain", ref=True)[0][0], logps[2] + logps[3])


def test_stored_states_of_a_head_of_no_such_form_are_refused_before_training(bent):
    with pytest.raises(ExpungeError, match=r"Learned: its head is more than one layer.*training\.reference=live"):
        Reference(bent(Learned), stored=object())  # type: ignore[arg-type]


def test_a_wrong_scale_fails_the_check(bent):
    """The positive control: a form that is not the model's own."""
    check_model(bent(Scaled))
    wrong = bent(Scaled)
    room._FORMS[wrong] = (room.weakref.ref(wrong.lm_head), Form(0.0196))
    with pytest.raises(ExpungeError, match="its logits do not follow from the final states of its body"):
        check_model(wrong)


def test_a_form_goes_with_the_head_that_it_was_proved_of(tiny_model):
    model = tiny_model("llama")
    assert head_form(model) == Form()
    model.set_output_embeddings(nn.Sequential(nn.Linear(32, 320), nn.Tanh()))
    assert head_form(model) == Form()  # that module, whatever it is, gives out the logits
    adapted = add_lora(tiny_model("llama"), target_modules=["lm_head"])
    assert head_form(adapted) == Form()
    assert vocabulary(adapted) == 320


def test_the_body_is_back_after_its_stand_in(bent):
    model = bent(Scaled)
    before = own(model)
    model.model.forward = held = model.model.forward  # as accelerate's hooks lie on the instance
    room.own_logits(model, torch.zeros(2, 32))
    assert vars(model.model)["forward"] is held
    assert torch.equal(own(model), before)
    del model.model.forward

    def breaks(*args, **kwargs):
        raise RuntimeError("in the head")

    model.lm_head.forward = breaks
    with pytest.raises(RuntimeError, match="in the head"):
        room.own_logits(model, torch.zeros(2, 32))
    assert "forward" not in vars(model.model)


def test_a_model_whose_forward_does_not_call_its_body_is_refused(bent, monkeypatch):
    class Alone(Bent):
        def forward(self, input_ids, **inputs):
            held = self.model.layers
            return type("Output", (), {"logits": self.lm_head(self.model.embed_tokens(input_ids)), "blocks": held})()

    with pytest.raises(ExpungeError, match="Alone is not supported: its forward does not call its body"):
        check_model(bent(Alone))
