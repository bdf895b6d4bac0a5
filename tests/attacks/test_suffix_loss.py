"""Losses of targets under many strings: the same with shared keys as with whole rows, and its gradient that of one-hots."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from expunge.attacks.search import suffix_loss
from expunge.attacks.search.suffix_loss import TargetLosses, first_changes, mellowmax
from expunge.attacks.search.targets import Target
from expunge.errors import ExpungeError
from expunge.models import body, check_model, frozen
from expunge.steering import Shift, Steering, detach

TARGETS = [Target([5, 6, 7], [8, 9, 10, 11]), Target([15, 16, 17, 3, 4, 5, 6, 7], [100, 9, 101])]


def strings_around(length: int = 6, count: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """A string, and others: one token of each is another; the first of them is the string itself."""
    draw = torch.Generator().manual_seed(1)
    current = torch.randint(1, 320, (length,), generator=draw)
    strings = current.repeat(count, 1)
    places = torch.randint(length, (count - 1, 1), generator=draw)
    strings[1:].scatter_(1, places, torch.randint(1, 320, (count - 1, 1), generator=draw))
    return strings, current


@torch.no_grad()
def plain(model, strings, targets=TARGETS, loss="cross_entropy"):
    """Whole rows, one by one, with all logits."""
    found = []
    for string in strings.tolist():
        values = []
        for target in targets:
            row = torch.tensor([target.prompt + string + target.ids])
            logits = model(row).logits[0, -len(target.ids) - 1 : -1].double()
            wanted = torch.tensor(target.ids)
            if loss == "mellowmax":
                chosen = logits[torch.arange(len(wanted)), wanted]
                values.append(torch.log(torch.exp(-chosen).mean()))
            else:
                values.append(F.cross_entropy(logits, wanted))
        found.append(torch.stack(values).mean())
    return torch.stack(found).float()


def agree(model, strings, current, **more):
    with frozen(model):
        return TargetLosses(model, TARGETS, **more).losses(strings, current)


def test_shared_keys_give_the_losses_of_whole_rows(tiny_model, architecture):
    model = tiny_model(architecture)
    strings, current = strings_around()
    with frozen(model):
        shared, whole = TargetLosses(model, TARGETS), TargetLosses(model, TARGETS, share=False)
        assert shared.shares and not whole.shares
        found = shared.losses(strings, current)
        torch.testing.assert_close(found, whole.losses(strings, current), rtol=0, atol=1e-5)
        torch.testing.assert_close(found, plain(model, strings), rtol=0, atol=1e-5)
        assert found.std() > 1e-3
        (loss, slope), (other, same) = (losses.gradient(current) for losses in (shared, whole))
        assert loss.item() == pytest.approx(found[0].item(), abs=1e-5) == other.item()
        torch.testing.assert_close(slope, same, rtol=1e-4, atol=1e-5)


def test_the_gradient_is_that_of_the_one_hot_rows(tiny_model, architecture):
    """Through an explicit product of one-hot rows and what the embedding gives out for every id."""
    model = tiny_model(architecture, dtype=torch.double)
    _, current = strings_around()
    embed = model.get_input_embeddings()
    with frozen(model):
        loss, slope = TargetLosses(model, TARGETS).gradient(current)
        one_hot = F.one_hot(current, 320).double().requires_grad_()
        values = []
        for target in TARGETS:
            middle = one_hot @ embed(torch.arange(320))
            rows = torch.cat([embed(torch.tensor(target.prompt)), middle, embed(torch.tensor(target.ids))])[None]
            logits = model(inputs_embeds=rows).logits[0, -len(target.ids) - 1 : -1]
            values.append(F.cross_entropy(logits, torch.tensor(target.ids)))
        wanted = torch.stack(values).mean()
        wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-5)
    torch.testing.assert_close(slope.double(), one_hot.grad, rtol=1e-4, atol=1e-6)
    assert slope.abs().max() > 1e-3 and all(p.grad is None for p in model.parameters())


def made(kind: str, **settings):
    common = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **common, bos_token_id=0, eos_token_id=0, **settings)
        config.initializer_range = 0.2
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("kind", "settings", "shares"),
    [
        ("bloom", {"n_layer": 2, "n_head": 4}, True),
        ("mistral", {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 9}, True),
        ("mistral", {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 6}, False),
        ("mamba", {"state_size": 4}, False),
        (
            "lfm2",
            {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
            False,
        ),
    ],
    ids=["alibi", "a prompt within the window", "a prompt beyond the window", "recurrent", "convolutions"],
)
def test_other_kinds_of_memory_give_the_losses_of_whole_rows_too(kind, settings, shares):
    model = made(kind, **settings)
    strings, current = strings_around()
    with frozen(model):
        losses = TargetLosses(model, TARGETS)
        assert losses.shares == shares
        found = losses.losses(strings, current)
    torch.testing.assert_close(found, plain(model, strings), rtol=0, atol=1e-5)
    assert found.std() > 1e-3


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_neither_batches_nor_the_order_nor_the_base_string_change_a_loss(monkeypatch, tiny_model, rows):
    model = tiny_model()
    strings, current = strings_around()
    wanted = plain(model, strings)
    monkeypatch.setattr(suffix_loss, "_rows_that_fit", lambda *_: rows)
    monkeypatch.setattr(suffix_loss, "LOGITS", 7 * 320)  # the head takes seven tokens at once
    for base in (current, torch.zeros_like(current), strings[-1]):
        torch.testing.assert_close(agree(model, strings, base), wanted, rtol=0, atol=1e-5)
    order = torch.randperm(len(strings))
    torch.testing.assert_close(agree(model, strings[order], current), wanted[order], rtol=0, atol=1e-5)


def test_a_string_of_one_token_and_a_target_of_one(tiny_model):
    model = tiny_model()
    strings, current = torch.tensor([[5], [6], [7]]), torch.tensor([6])
    targets = [Target([3], [9])]
    with frozen(model):
        losses = TargetLosses(model, targets)
        torch.testing.assert_close(losses.losses(strings, current), plain(model, strings, targets), rtol=0, atol=1e-5)
        assert losses.gradient(current)[1].shape == (1, 320)


def test_rows_start_at_the_first_change_of_their_batch_and_the_head_sees_targets_only(monkeypatch, tiny_model):
    """What makes it quick: counted tokens of the body, and of the head."""
    model = tiny_model()
    current = torch.tensor([3, 4, 5, 6])
    strings = current.repeat(4, 1)
    strings[torch.arange(4), torch.tensor([3, 0, 3, 2])] = 200
    bodies, heads = [], []
    check_model(model)
    model.transformer.h[0].register_forward_hook(lambda module, args, output: bodies.append(tuple(args[0].shape[:2])))
    monkeypatch.setattr(suffix_loss, "_rows_that_fit", lambda *_: 2)
    original = suffix_loss.head_logits
    monkeypatch.setattr(suffix_loss, "head_logits", lambda m, x: heads.append(len(x)) or original(m, x))
    with frozen(model):
        losses = TargetLosses(model, TARGETS[:1])
        losses.losses(strings, current)
    assert bodies == [(1, 3), (1, 3), (2, 4 + 3), (2, 1 + 3)]  # prompt; current; from place 0 on; from place 3 on
    assert heads == [2 * 4, 2 * 4]


def test_the_prompts_keys_are_not_changed_by_what_is_computed_with_them(tiny_model):
    model = tiny_model("llama")
    strings, current = strings_around()
    with frozen(model):
        losses = TargetLosses(model, TARGETS)
        before = [tensor.clone() for one in losses.each for layer in one.context for tensor in layer]
        first = losses.losses(strings, current)
        losses.gradient(current)
        again = losses.losses(strings, current)
    after = [tensor for one in losses.each for layer in one.context for tensor in layer]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and torch.equal(first, again)


def test_a_batch_that_does_not_fit_is_halved_and_a_row_that_does_not_is_one_line(monkeypatch, tiny_model):
    model = tiny_model()
    strings, current = strings_around()
    wanted = plain(model, strings)
    most, forward = 3, suffix_loss._forward

    def crowded(model, cache, **inputs):
        if next(iter(inputs.values())).shape[0] > most:
            raise torch.OutOfMemoryError
        return forward(model, cache, **inputs)

    monkeypatch.setattr(suffix_loss, "_forward", crowded)
    torch.testing.assert_close(agree(model, strings, current), wanted, rtol=0, atol=1e-5)
    with frozen(model):
        losses = TargetLosses(model, TARGETS)
        most = 0
        monkeypatch.setattr(suffix_loss._TargetLoss, "_keys_up_to_last", lambda self, string: None)
        with pytest.raises(ExpungeError, match="out of memory"):
            losses.losses(strings, current)


def test_a_gradient_is_one_row_at_a_time_which_cannot_be_halved(monkeypatch, tiny_model):
    """As the keys of a prompt are: whatever fits one row at all, fits them."""
    model, seen, forward = tiny_model(), [], suffix_loss._forward
    monkeypatch.setattr(
        suffix_loss, "_forward", lambda *given, **rows: seen.append(len(*rows.values())) or forward(*given, **rows)
    )
    with frozen(model):
        TargetLosses(model, TARGETS).gradient(strings_around()[1])
    assert seen == [1] * len(TARGETS)


def test_rows_that_fit_fall_with_length_and_are_at_least_one(tiny_model):
    model = tiny_model()
    fit = suffix_loss._rows_that_fit
    assert fit(model, 100, 30, 2**40) == 1024 // 30
    assert fit(model, 100, 30, 2**20) > fit(model, 200, 130, 2**20) >= 1 == fit(model, 100, 30, 1)


def test_mellowmax_lies_between_mean_and_maximum():
    assert mellowmax(torch.full((5,), 3.0)).item() == pytest.approx(3)
    x = torch.tensor([[0.0, 1.0, 4.0], [2.0, 2.0, 2.0]])
    found = mellowmax(x)
    assert found[1].item() == pytest.approx(2) and x[0].mean() < found[0] < x[0].max()
    assert found[0].item() == pytest.approx(torch.log(torch.exp(x[0]).mean()).item())
    assert mellowmax(x, 50.0)[0] == pytest.approx(4 - torch.tensor(3.0).log().item() / 50, abs=1e-4)


def test_the_mellowmax_of_a_target_is_of_its_tokens_negative_logits(tiny_model):
    model = tiny_model()
    strings, current = strings_around()
    found = agree(model, strings, current, loss="mellowmax")
    torch.testing.assert_close(found, plain(model, strings, loss="mellowmax"), rtol=0, atol=1e-5)


def test_first_changes():
    current = torch.tensor([1, 2, 3])
    strings = torch.tensor([[1, 2, 3], [9, 2, 3], [1, 9, 9], [1, 2, 9], [9, 2, 9]])
    assert first_changes(strings, current).tolist() == [2, 0, 1, 2, 0]


def test_what_is_attached_to_a_model_is_a_part_of_it(tiny_model):
    model = tiny_model()
    strings, current = strings_around()
    without = agree(model, strings, current)
    name = next(name for name, module in model.named_modules() if module is body(model))
    shift = torch.linspace(-1, 1, 32)
    Steering([Shift("transformer.h.1", shift), Shift(name, 0.3 * shift)]).attach(model)
    found = agree(model, strings, current)
    torch.testing.assert_close(found, plain(model, strings), rtol=0, atol=1e-5)
    assert (found - without).abs().max() > 1e-2
    detach(model)
    assert torch.equal(agree(model, strings, current), without)


def test_low_precision_gives_losses_in_float32(tiny_model):
    model = tiny_model("llama", dtype=torch.bfloat16)
    strings, current = strings_around()
    found = agree(model, strings, current)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain(model, strings), rtol=0.02, atol=0.05)
    with frozen(model):
        assert TargetLosses(model, TARGETS).gradient(current)[1].dtype == torch.float32
