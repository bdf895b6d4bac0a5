"""Relearning against a plain PyTorch loop, and a shallow unlearning that ten texts undo."""

import copy
import math
import random

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer

from expunge.adapters import add_lora, merge
from expunge.attacks import AttackData, Budget, cases, relearn
from expunge.attacks.relearn import RelearnBenign, RelearnForget, RelearnRetain, causal_batch, draw
from expunge.data import Text, load_pairs
from expunge.errors import ExpungeError
from expunge.generation import Decoding, generate
from expunge.metrics.perplexity import row_nll
from expunge.models import load_model
from expunge.steering import Shift, Steering, detach

IDS = torch.tensor([[5, 17, 250, 33, 8, 91]])
SUBJECTS = ("river", "wind", "letter", "mill", "rain", "tree", "window", "house")
PLACES = ("mill", "sea", "hill", "house", "window", "river", "rows", "rain")


def texts_about(verb: str) -> list[Text]:
    """64 sentences of one kind, which share all but two words."""
    return [Text(f"The {one}", f" {verb} the old {other}.") for one in SUBJECTS for other in PLACES]


TAUGHT = texts_about("runs past")
random.Random(0).shuffle(TAUGHT)
FORGET, HELD_OUT = TAUGHT[:32], TAUGHT[32:]
RETAIN = texts_about("came over")
NEUTRAL = " ".join(f"They planted the {one} behind the house and read by the window." for one in SUBJECTS)


@pytest.fixture(scope="module")
def data(tokenizer) -> AttackData:
    limits = {"max_prompt_tokens": 16, "max_continuation_tokens": 24}
    return AttackData(tokenizer, forget=FORGET, retain=RETAIN, validation=HELD_OUT, neutral=NEUTRAL, **limits)


def mean_nll(model, rows) -> float:
    """Of all tokens but a row's first."""
    nll, tokens = row_nll(model, [(prompt + continuation, 1) for prompt, continuation in rows])
    return float(nll.sum() / tokens.sum())


def descend(model, rows, steps: int, rate: float, sign: float = 1.0) -> None:
    batch, optimizer = causal_batch(rows), torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    for _ in range(steps):
        optimizer.zero_grad()
        (sign * model(**batch).loss).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def original(tiny_model, data):
    """A model that was taught all the sentences, those that are held out here too."""
    model = tiny_model("llama")
    descend(model, [*data.rows("forget"), *data.rows("validation")], steps=30, rate=1e-2)
    return model.eval()


@pytest.fixture(scope="module")
def shallow(original, data):
    """The same after an unlearning of small norm: a rank-1 adapter that went up the loss of the forget set, merged."""
    torch.manual_seed(0)
    adapted = add_lora(copy.deepcopy(original), r=1, target_modules=["down_proj"])
    descend(adapted, data.rows("forget"), steps=6, rate=1e-2, sign=-1.0)
    return merge(adapted).eval()


@pytest.fixture
def victim(tiny_model):
    """Untaught, in training mode, with a weight that takes no gradients."""
    model = tiny_model().train()
    model.transformer.wpe.weight.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    return model


def state_of(model):
    training, modules = model.training, list(model.modules())
    model.eval()
    with torch.no_grad():
        logits = model(IDS).logits
    model.train(training)
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return logits, hooks, flags, training, [(type(module), getattr(module, "p", None)) for module in modules]


def assert_untouched(model, before) -> None:
    logits, *others = state_of(model)
    assert torch.equal(logits, before[0]) and others == list(before[1:])


def test_ten_texts_undo_a_shallow_unlearning_on_texts_that_they_do_not_hold(original, shallow, data, tiny_model):
    """The positive control: what comes back was there; ten texts do not teach it to a model that never knew it."""
    attack = RelearnForget(learning_rate=3e-3, seed=1)
    was, gone = (mean_nll(model, data.rows("validation")) for model in (original, shallow))
    assert gone > was + 0.7
    result = attack.run(shallow, original, data, Budget())
    assert mean_nll(result.model, data.rows("validation")) < was + 0.2 * (gone - was)
    fresh = attack.run(tiny_model("llama"), None, data, Budget()).model
    assert mean_nll(fresh, data.rows("validation")) > gone

    drawn = draw(attack, data, "forget", 10, 64)
    assert not [row for row in drawn if row in data.rows("validation")]
    assert result.steps == 6 and result.about["samples"] == 10
    assert result.about["tokens"] == sum(len(prompt) + len(continuation) for prompt, continuation in drawn)
    assert result.about["loss"] == pytest.approx(mean_nll(result.model, drawn))
    assert result.about["loss"] < mean_nll(shallow, drawn) - 0.5 and result.trace[-1]["loss"] < result.trace[0]["loss"]


def test_the_rates_of_the_budget_undo_a_shallow_unlearning_of_the_built_in_model():
    """Rates that are too small would flatter every defence."""
    original, tokenizer = load_model("builtin", dtype="float32")
    texts = [
        [Text(pair.prompt, pair.rejected) for pair in load_pairs(name, limit=16, tokenizer=tokenizer)]
        for name in ("builtin", "builtin-validation")
    ]
    data = AttackData(tokenizer, forget=texts[0], validation=texts[1])
    torch.manual_seed(0)
    adapted = add_lora(copy.deepcopy(original), r=1)
    descend(adapted, data.rows("forget"), steps=6, rate=1e-3, sign=-1.0)
    shallow = merge(adapted).eval()
    moved = [(one - other).detach() for one, other in zip(shallow.parameters(), original.parameters(), strict=True)]
    assert (
        torch.cat([m.flatten() for m in moved]).norm() < 0.1 * torch.cat([p.flatten() for p in original.parameters()]).norm()
    )
    attacked = [attack.run(shallow, None, data, Budget()).model for attack in cases("relearn_forget", "small", {"seed": 0})]
    was, gone, *back = (mean_nll(model, data.rows("validation")) for model in (original, shallow, *attacked))
    assert gone > was + 0.5 and min(back) < was + 0.3 * (gone - was)


def test_an_adapter_relearns_too_and_generates(original, shallow, data, tokenizer):
    result = RelearnForget(learning_rate=1e-2, lora=8, seed=1).run(shallow, None, data, Budget())
    was, gone, back = (mean_nll(model, data.rows("validation")) for model in (original, shallow, result.model))
    assert back < was + 0.2 * (gone - was)
    [(answer,)] = generate(result.model, tokenizer, [data.rows("validation")[0][0]], Decoding(12))
    assert " past the old " in tokenizer.decode(answer)


def test_no_epoch_changes_nothing(victim, data):
    before = state_of(victim)
    result = RelearnForget(epochs=0).run(victim, None, data, Budget())
    assert result.idle == "epochs=0: nothing is trained" and (result.steps, result.queries, result.trace) == (0, 0, [])
    for one, other in zip(result.model.parameters(), victim.parameters(), strict=True):
        assert torch.equal(one, other)
    assert_untouched(victim, before)


@pytest.mark.parametrize(("kind", "lora"), [(RelearnForget, 0), (RelearnForget, 4), (RelearnRetain, 0), (RelearnBenign, 4)])
def test_the_victim_stays_what_it_was(victim, data, kind, lora):
    before, state = state_of(victim), torch.get_rng_state()
    python = random.getstate()
    result = kind(samples=5, lora=lora, learning_rate=1e-3).run(victim, None, data, Budget())
    assert_untouched(victim, before)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python
    assert not torch.equal(result.model(IDS).logits, before[0]) and not result.model.training
    assert [line["queries"] for line in result.trace] == [5, 10, 15] and result.queries == 20


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_victim_stays_what_it_was_when_training_breaks_off(victim, data, monkeypatch, error, lora):
    before, state, count = state_of(victim), torch.get_rng_state(), iter(range(9))
    own = Trainer.training_step

    def breaks(self, *args, **kwargs):
        if next(count) == 3:
            raise error
        return own(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", breaks)
    with pytest.raises(error):
        RelearnForget(lora=lora).run(victim, None, data, Budget())
    assert_untouched(victim, before)
    assert torch.equal(torch.get_rng_state(), state) and next(count) == 4


def test_with_an_adapter_nothing_but_the_adapter_is_new(victim, data):
    result = RelearnForget(lora=4).run(victim, None, data, Budget())
    known = {parameter.data_ptr() for parameter in victim.parameters()}
    own = {name: p for name, p in result.model.named_parameters() if p.data_ptr() not in known}
    assert known <= {parameter.data_ptr() for parameter in result.model.parameters()}
    assert all("lora_" in name for name in own)
    layers = [(32, 96), (32, 32), (32, 128), (128, 32)]  # of each of 3 blocks, in and out
    assert sum(p.numel() * p.element_size() for p in own.values()) == 3 * sum(4 * (a + b) for a, b in layers) * 4
    full = RelearnForget().run(victim, None, data, Budget()).model
    assert not known & {parameter.data_ptr() for parameter in full.parameters()}
    assert full.lm_head.weight is full.transformer.wte.weight


@pytest.mark.parametrize(("samples", "batch"), [(10, 8), (14, 2)])
def test_the_weights_are_those_of_a_plain_loop(tiny_model, data, monkeypatch, samples, batch):
    """AdamW, decay on matrices, clipping to 1, warm-up over a twentieth, then linearly to 0; all tokens count alike."""
    victim, batches = tiny_model(dtype=torch.double), []

    def recorded(rows):
        batches.append(list(rows))
        return causal_batch(rows)

    monkeypatch.setattr(relearn, "causal_batch", recorded)
    settings = {"samples": samples, "batch": batch, "learning_rate": 1e-3, "weight_decay": 0.1}
    result = RelearnForget(seed=3, **settings).run(victim, None, data, Budget())
    steps = 3 * math.ceil(samples / batch)
    drawn = draw(RelearnForget(seed=3), data, "forget", samples, 64)
    order = [row for rows in batches for row in rows]
    assert len(batches) == result.steps == steps and result.trace[-1]["queries"] == 3 * samples
    for epoch in range(3):
        assert sorted(order[epoch * samples : (epoch + 1) * samples]) == sorted(drawn)
    assert order[:samples] != order[samples : 2 * samples]

    model = tiny_model(dtype=torch.double)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer, warmup, losses = torch.optim.AdamW(groups, lr=1e-3), int(0.05 * steps), []
    for step, rows in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step / warmup if step < warmup else (steps - step) / (steps - warmup))
        sequences = [torch.tensor(prompt + continuation) for prompt, continuation in rows]
        total = sum(F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="sum") for ids in sequences)
        loss = total / sum(len(ids) - 1 for ids in sequences)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    moved = max((a - b).abs().max() for a, b in zip(model.parameters(), victim.parameters(), strict=True))
    assert moved > 1e-3
    for one, other in zip(result.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert [line["loss"] for line in result.trace] == pytest.approx(losses, abs=1e-5)


def test_the_seed_decides_draw_and_order(victim, data):
    zero, again, one = (draw(RelearnForget(seed=seed), data, "forget", 10, 64) for seed in (0, 0, 1))
    assert zero == again and zero != one and all(row in data.rows("forget") for row in zero)
    assert len({str(row) for row in zero}) == 10
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(results))
        results.append(RelearnBenign(samples=3, lora=2, seed=seed).run(victim, None, data, Budget()).model.state_dict())
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name])
        assert "lora_A" not in name or not torch.equal(tensor, results[2][name])


def test_a_budget_ends_the_training_early(victim, data):
    for bound, steps in (({"steps": 2}, 2), ({"queries": 3}, 2), ({"seconds": 1e-9}, 1), ({"steps": 60}, 6)):
        result = RelearnForget(samples=4, batch=2).run(victim, None, data, Budget(**bound))
        assert result.steps == len(result.trace) == steps


def test_a_steered_victim_keeps_its_steering(tiny_model, data):
    model = tiny_model("llama")
    plain = model(IDS).logits
    Steering([Shift("model.layers.1", 5 * torch.ones(32))]).attach(model)
    before = state_of(model)
    for lora in (0, 4):
        attacked = RelearnForget(lora=lora, learning_rate=1e-5, epochs=1).run(model, None, data, Budget()).model
        inner = attacked.get_base_model() if lora else attacked
        steered = attacked(IDS).logits
        torch.testing.assert_close(steered, before[0], atol=0.05, rtol=0)  # hardly trained
        assert detach(inner) is not None
        torch.testing.assert_close(attacked(IDS).logits, plain, atol=0.05, rtol=0)
        assert (steered - plain).abs().max() > 0.5
        assert_untouched(model, before)


@pytest.mark.parametrize("lora", [0, 4])
def test_the_victims_files_stay_as_they_are(tiny_model, data, tmp_path, lora):
    """Its weights may be those of the file itself, mapped into memory."""
    tiny_model("llama").save_pretrained(tmp_path)
    data.tokenizer.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    victim, _ = load_model(tmp_path, device="cpu")
    result = RelearnForget(samples=2, learning_rate=1e-2, lora=lora).run(victim, None, data, Budget())
    assert not torch.equal(result.model(IDS).logits, victim(IDS).logits)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_low_precision_is_trained_in_float32(tiny_model, data):
    """A step of 1e-5 on a weight of 0.2 is nothing in bfloat16."""
    victim = tiny_model(dtype=torch.bfloat16)
    full = RelearnForget(samples=2, epochs=1, learning_rate=1e-5).run(victim, None, data, Budget()).model
    assert full.dtype == torch.float32
    moved = [not torch.equal(a, b.float()) for a, b in zip(full.parameters(), victim.parameters(), strict=True)]
    assert all(moved)
    adapted = RelearnForget(samples=2, epochs=1, lora=4).run(victim, None, data, Budget()).model
    assert {p.dtype for name, p in adapted.named_parameters() if "lora_" in name} == {torch.float32}
    assert adapted(IDS).logits.dtype == torch.bfloat16


def test_neutral_text_is_cut_into_passages(data):
    rows = draw(RelearnBenign(), data, "neutral", 5, 64)
    shown = {data.tokenizer.decode(continuation) for _, continuation in rows}
    assert len(shown) == 5 and all(text in NEUTRAL for text in shown)
    assert all(prompt == [data.tokenizer.eos_token_id] and len(own) <= 24 for prompt, own in rows)


def test_padding_and_a_rows_first_token_are_not_learnt():
    batch = causal_batch([([3], [4, 5]), ([0, 6], [7, 8, 9])])
    assert batch["input_ids"].tolist() == [[3, 4, 5, 0, 0], [0, 6, 7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 4, 5, -100, -100], [-100, 6, 7, 8, 9]]


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (RelearnForget, {"samples": 33}, r"attack\.relearn_forget\.samples=33: the forget set has 32 texts"),
        (RelearnRetain, {}, r"attack\.relearn_retain\.samples=100: the retain set has 64 texts"),
        (RelearnBenign, {}, r"attack\.relearn_benign\.samples=50: the neutral text has \d passages"),
        (RelearnForget, {"samples": 0}, r"attack\.relearn_forget\.samples=0: expected 1 or more"),
        (RelearnForget, {"epochs": -1}, r"attack\.relearn_forget\.epochs=-1"),
        (RelearnForget, {"learning_rate": 0}, r"attack\.relearn_forget\.learning_rate=0\.0: expected more than 0"),
        (RelearnForget, {"learning_rate": 1e30}, r"the loss is not a number at step 2; lower"),
    ],
)
def test_what_cannot_be_is_one_line(tiny_model, data, kind, settings, message):
    with pytest.raises(ExpungeError, match=message) as caught:
        kind(**settings).run(tiny_model(), None, data, Budget())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (RelearnForget, {}, "the forget set is empty"),
        (RelearnRetain, {"forget": FORGET}, "the retain set is empty"),
        (RelearnBenign, {"forget": FORGET}, "it needs running text"),
        (RelearnBenign, {"neutral": " \n"}, "the neutral text has 0 passages"),
        (RelearnForget, {"forget": [Text("The river", "")] * 10}, "the forget set has 0 texts"),
        (RelearnForget, {"forget": [Text("The river", " mill" * 64)] * 10}, r"\d\d tokens, the model's context 64"),
    ],
)
def test_what_is_lacking_is_one_line(tiny_model, tokenizer, kind, given, message):
    with pytest.raises(ExpungeError, match=message):
        kind().run(tiny_model(), None, AttackData(tokenizer, **given), Budget())


def test_the_papers_numbers_of_texts_are_among_the_cases():
    assert {one.samples for one in cases("relearn_forget", "large")} == {10, 20, 30, 40, 50}
    assert {one.samples for one in cases("relearn_retain", "large")} == {100, 200, 300, 400, 500, 1000}
    small = cases("relearn_forget", "small")
    assert len(small) == 9 and {one.seed for one in small} == {0, 1, 2} and {one.lora for one in small} == {0}
    assert {(one.lora, one.alpha) for one in cases("relearn_benign", "paper")} == {(128, 16)}
