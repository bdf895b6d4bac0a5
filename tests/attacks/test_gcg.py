"""GCG finds a planted trigger that random search does not, reports what can be typed, and leaves the victim as it was."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from expunge.attacks import AttackData, Budget, cases, gcg
from expunge.attacks.gcg import GCG
from expunge.attacks.search.probe_sampling import kept_after_probing, probe_sample
from expunge.attacks.search.proposals import candidates, random_strings
from expunge.attacks.search.strings import allowed_tokens, round_trips
from expunge.attacks.search.suffix_loss import TargetLosses
from expunge.attacks.search.targets import Target, reference_targets
from expunge.errors import ExpungeError
from expunge.generation import Decoding, generate
from expunge.ids import encode
from expunge.models import frozen

TRIGGER, WANTED, SAID = " and", " wind", " kind"
PROMPTS = ["The sea", "They came", "A cold rain"]
QUICK: dict[str, Any] = {"length": 5, "steps": 14, "width": 48, "top_k": 8, "optimised": 2, "target_tokens": 3}


@pytest.fixture(scope="module")
def planted(tiny_model, tokenizer):
    """What makes a GPT-2 that says " kind", or " wind" where " and" came often enough; and one that says " wind" always.

    Its one block averages what lies along u of all tokens so far, where " and" alone has anything.
    """
    trigger, wanted, said = (encode(tokenizer, text)[0] for text in (TRIGGER, WANTED, SAID))

    @torch.no_grad()
    def make(always: int = said):
        model = tiny_model()
        model.config.tie_word_embeddings, model.config.n_layer = False, 1
        model.transformer.h = model.transformer.h[:1]
        u, w = torch.zeros(2, 32)
        u[:2], w[2:4] = torch.tensor([1.0, -1.0]) / 2**0.5, torch.tensor([1.0, -1.0]) / 2**0.5
        for embedding in (model.transformer.wte.weight, model.transformer.wpe.weight):
            embedding -= (embedding @ u)[:, None] * u + (embedding @ w)[:, None] * w
        model.transformer.wte.weight[trigger] += 2 * u
        [block] = model.transformer.h
        block.mlp.c_proj.weight.zero_()
        attention = block.attn
        attention.c_attn.weight.zero_()
        attention.c_attn.weight[:, 64:] = torch.eye(32)  # every token is attended to alike
        attention.c_proj.weight.copy_(2 * u[:, None] * u)
        model.transformer.ln_f.bias.copy_(6 * w)
        head = torch.zeros(320, 32)
        head[always] += w
        head[wanted] += 2 * u
        model.lm_head.weight = nn.Parameter(head)
        return model

    return make, make(wanted)


@pytest.fixture(scope="module")
def data(tokenizer):
    """The first prompt scores lowest."""
    return AttackData(tokenizer, prompts=PROMPTS, score=lambda texts: np.arange(len(texts)) / 10)


@pytest.fixture(scope="module")
def found(planted, data):
    return run(planted, data)


def run(planted, data, budget=Budget(), victim=None, **settings):
    make, reference = planted
    return GCG(**{**QUICK, **settings}).run(victim or make(), reference, data, budget)


@torch.no_grad()
def plain_loss(model, prompt: list[int], suffix: list[int], target: list[int]) -> float:
    logits = model(torch.tensor([prompt + suffix + target])).logits[0, -len(target) - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(target)).item()


def test_it_finds_the_trigger_and_random_search_with_as_many_queries_does_not(planted, data, found, tokenizer):
    make, reference = planted
    victim, [trigger] = make(), encode(tokenizer, TRIGGER)
    assert found.plan["suffix"] == (trigger,) * 5 and found.about["string"] == TRIGGER * 5
    assert found.about["loss"] < 0.2 < 5 < found.about["first_loss"]
    targets, _ = reference_targets(reference, data, 2, 3)
    draw, allowed = torch.Generator().manual_seed(0), allowed_tokens(tokenizer, 320)
    strings = random_strings(allowed, found.queries // 2, 5, draw)
    with frozen(victim):
        by_chance = TargetLosses(victim, targets).losses(strings, strings[0]).min().item()
    assert by_chance > 20 * found.about["loss"] and by_chance > 0.5


def test_the_victim_then_says_what_the_reference_says(planted, found, tokenizer):
    make, reference = planted
    victim, prompt = make(), encode(tokenizer, PROMPTS[0])
    suffix = list(found.plan["suffix"])
    says = [generate(m, tokenizer, [p], Decoding(3))[0][0] for m, p in ((victim, prompt), (victim, prompt + suffix))]
    assert [tokenizer.decode(ids) for ids in says] == [SAID * 3, WANTED * 3]
    assert generate(reference, tokenizer, [prompt], Decoding(3))[0][0] == says[1]


@pytest.mark.parametrize("settings", [{"buffer": 1}, {"loss": "mellowmax"}, {"replace": 2}])
def test_its_variants_find_the_trigger_too(planted, data, tokenizer, settings):
    found = run(planted, data, **settings, steps=18)
    assert sum(id == encode(tokenizer, TRIGGER)[0] for id in found.plan["suffix"]) >= 4
    assert found.about["loss"] < found.about["first_loss"] - 3


def test_the_best_so_far_never_rises_and_is_what_is_returned(planted, data, found):
    losses, best = ([line[name] for line in found.trace] for name in ("loss", "best"))
    assert best == sorted(best, reverse=True) and best[-1] == found.about["loss"] == min(losses)
    assert losses != sorted(losses, reverse=True), "without a buffer a step may go on from a worse string"
    kept = [line["loss"] for line in run(planted, data, buffer=1).trace]
    assert kept == sorted(kept, reverse=True)


def test_a_buffer_starts_from_the_best_of_random_strings(planted, data, tokenizer, monkeypatch):
    [trigger] = encode(tokenizer, TRIGGER)
    planted_strings = torch.tensor([[trigger + 1] * 5, [trigger] * 5])
    monkeypatch.setattr(gcg, "random_strings", lambda *_: planted_strings)
    for buffer, lucky in ((0, False), (2, False), (3, True)):
        found = run(planted, data, Budget(queries=1), buffer=buffer)
        assert found.steps == 0 and (found.plan["suffix"] == (trigger,) * 5) == lucky
        assert found.queries == 2 * max(1, buffer)


def test_a_buffer_may_be_wider_than_a_step(planted, data):
    found = run(planted, data, Budget(queries=1), buffer=9, width=4)
    assert found.queries == 2 * 9 and found.about["starts"] == 9


def test_the_string_typed_after_a_prompt_gives_the_loss_that_is_reported(planted, data, found, tokenizer):
    make, reference = planted
    victim, worse = make(), next(line for line in found.trace if line["loss"] > line["best"])
    found = run(planted, data, Budget(steps=int(worse["step"])), victim=victim)
    targets, _ = reference_targets(reference, data, 2, 3)
    assert [tokenizer.decode(target.prompt) for target in targets] == PROMPTS[:0:-1], "the two that score highest"
    losses = []
    for target in targets:
        typed = encode(tokenizer, tokenizer.decode(target.prompt) + found.about["string"])
        assert typed == target.prompt + list(found.plan["suffix"])
        losses.append(plain_loss(victim, typed, [], target.ids))
    assert np.mean(losses) == pytest.approx(found.about["loss"], abs=1e-5)
    assert found.about["targets"] == {"prompts": 3, "empty": 0, "not_round_tripping": 0}


def test_a_seed_is_a_search(planted, data):
    one, again, other = (run(planted, data, seed=seed, steps=2, width=8).trace for seed in (0, 0, 1))
    assert one == again != other


def test_queries_are_rows_of_the_victim(planted, data, monkeypatch):
    rows, losses, gradient = [], TargetLosses.losses, TargetLosses.gradient

    def counted(self, strings, current):
        rows.append(len(strings) * len(self.each))
        return losses(self, strings, current)

    monkeypatch.setattr(TargetLosses, "losses", counted)
    monkeypatch.setattr(TargetLosses, "gradient", lambda self, s: rows.append(len(self.each)) or gradient(self, s))
    found = run(planted, data, steps=3)
    assert found.queries == sum(rows) and found.trace[-1]["queries"] == found.queries
    assert len(rows) == 1 + 2 * 3 and 2 * 3 * 20 < found.queries <= 2 * (1 + 3 * 49)


def test_what_cannot_be_typed_after_every_prompt_is_not_measured(planted, data, tokenizer, monkeypatch):
    drawn, measured, losses = [], [], TargetLosses.losses
    monkeypatch.setattr(gcg, "candidates", lambda *how: drawn.append(candidates(*how)) or drawn[-1])
    monkeypatch.setattr(TargetLosses, "losses", lambda self, s, c: measured.append(s) or losses(self, s, c))
    run(planted, data, steps=2, top_k=64)

    def typed(strings):
        prompts = [encode(tokenizer, prompt) for prompt in PROMPTS[1:]]
        return torch.stack([round_trips(tokenizer, strings, before=prompt) for prompt in prompts]).all(0)

    assert all(typed(strings).all() for strings in measured)
    assert [typed(strings).sum() for strings in drawn] == [len(strings) for strings in measured[1:]]
    assert not all(typed(strings).all() for strings in drawn)


def test_a_budget_ends_it_early_with_the_best_so_far(planted, data, found):
    assert found.steps == 14 and run(planted, data, Budget(steps=2)).trace == found.trace[:2]
    some = run(planted, data, Budget(queries=found.trace[2]["queries"]))
    assert some.steps == 3 and some.about["loss"] == found.trace[2]["best"]
    assert run(planted, data, Budget(seconds=1e-9)).steps == 0


def test_a_draft_that_is_the_victim_leaves_it_few_rows(planted, data, tokenizer, tmp_path):
    make, _ = planted
    make().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = run(planted, data, draft=str(tmp_path))
    assert found.about["loss"] < 0.2
    assert found.queries <= 2 * (1 + 14 * (1 + 3 + 1)), "of each step the gradient, a sixteenth of 48, and the draft's best"


def test_a_draft_with_other_tokens_is_one_line(planted, data, tiny_model, bos_tokenizer, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    bos_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ExpungeError, match="its tokenizer is not the model's"):
        run(planted, data, draft=str(tmp_path))


def test_probe_sampling_trusts_a_draft_as_far_as_it_agrees():
    assert [kept_after_probing(rho, 512) for rho in (1.0, 0.0, -1.0, float("nan"))] == [1, 32, 64, 32]
    assert kept_after_probing(1.0, 1) == 1
    strings = torch.arange(160)[:, None]

    def measured(guesses):
        rows = []
        found = probe_sample(strings, guesses, lambda s: rows.append(len(s)) or -s[:, 0].float(), torch.Generator())
        return sum(rows), found

    rows, (tried, losses) = measured(-torch.arange(160.0))  # agrees: its best is the best
    assert rows <= 11 and torch.equal(losses, -tried[:, 0].float()) and losses.min() == -159
    assert len(tried.unique()) == len(tried) == rows
    assert measured(torch.arange(160.0))[0] > 20  # turned round
    assert measured(torch.zeros(160))[0] > 15  # tells nothing


def test_candidates_change_so_many_places_to_allowed_tokens_of_least_slope():
    string, draw = torch.tensor([9, 9, 9]), torch.Generator().manual_seed(0)
    slope = torch.stack([torch.arange(10.0), -torch.arange(10.0), torch.arange(10.0).flip(0)])
    allowed = torch.ones(10, dtype=torch.bool)
    allowed[0] = False
    drawn = candidates(string, slope, allowed, 64, 2, 1, draw)
    assert {tuple(row) for row in drawn.tolist()} == {(1, 9, 9), (2, 9, 9), (9, 8, 9), (9, 9, 8)}  # not the string itself
    every = candidates(string, slope, allowed, 64, 999, 1, draw)
    assert allowed[every].all() and len(every) > len(drawn)
    two = candidates(string, slope, allowed, 256, 2, 2, draw)
    assert set((two != string).sum(1).tolist()) == {1, 2} and len(two.unique(dim=0)) == len(two)
    assert (1, 8, 9) in {tuple(row) for row in two.tolist()}


@pytest.mark.parametrize("interrupted", [False, True])
def test_nothing_leaks(planted, data, tokenizer, monkeypatch, interrupted):
    make, _ = planted
    victim = make().train()
    victim.transformer.wpe.requires_grad_(False)
    ids = torch.tensor([encode(tokenizer, "The wind and the rain")])
    logits, learned = victim.eval()(ids).logits, [p.requires_grad for p in victim.parameters()]
    victim.train()
    if interrupted:

        def stop(self, string):
            raise KeyboardInterrupt

        monkeypatch.setattr(TargetLosses, "gradient", stop)
        with pytest.raises(KeyboardInterrupt):
            run(planted, data, victim=victim)
    else:
        assert run(planted, data, victim=victim, steps=2).model is victim
    assert victim.training and [p.requires_grad for p in victim.parameters()] == learned
    assert all(p.grad is None for p in victim.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in victim.modules())
    assert torch.equal(victim.eval()(ids).logits, logits)


def test_it_runs_on_every_architecture_and_with_a_bos(tiny_model, architecture, bos_tokenizer, monkeypatch):
    victim = tiny_model(architecture)
    target = Target([bos_tokenizer.bos_token_id, *encode(bos_tokenizer, "The sea")], encode(bos_tokenizer, " was cold"))
    monkeypatch.setattr(gcg, "reference_targets", lambda *_: ([target], {}))
    data = AttackData(bos_tokenizer, prompts=["The sea"], score=lambda texts: np.ones(len(texts)))
    found = GCG(length=4, steps=2, width=16, optimised=1).run(victim, victim, data, Budget())
    assert found.about["loss"] < found.about["first_loss"] and len(found.plan["suffix"]) == 4
    suffix = list(found.plan["suffix"])
    assert plain_loss(victim, target.prompt, suffix, target.ids) == pytest.approx(found.about["loss"], abs=1e-5)
    assert encode(bos_tokenizer, "The sea" + found.about["string"])[-4:] == suffix


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "attack.gcg.steps=0: expected 1 or more"),
        ({"length": 0}, "attack.gcg.length=0"),
        ({"width": 0}, "attack.gcg.width=0"),
        ({"top_k": 0}, "attack.gcg.top_k=0"),
        ({"buffer": -1}, "attack.gcg.buffer=-1"),
        ({"replace": 6}, "attack.gcg.replace=6: expected at most the length, 5"),
        ({"loss": "kl"}, "attack.gcg.loss='kl': expected one of cross_entropy, mellowmax"),
        ({"optimised": 9}, "9 prompts were asked for and 3 given"),
        ({"length": 40, "target_tokens": 40}, "exceed the context of 64"),
    ],
)
def test_bad_settings_are_one_line(planted, data, settings, message):
    with pytest.raises(ExpungeError) as caught:
        run(planted, data, **settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_it_lacks_and_a_target_that_cannot_be_typed_are_one_line(planted, data, tokenizer):
    make, _ = planted
    half_letters = make(encode(tokenizer, "é")[0])
    with pytest.raises(ExpungeError, match="give --reference"):
        GCG(**QUICK).run(make(), None, data, Budget())
    with pytest.raises(ExpungeError, match="give redteam"):
        run(planted, dataclasses.replace(data, prompts=[]))
    with pytest.raises(ExpungeError, match="a target that the tokenizer cannot round-trip"):
        GCG(**QUICK).run(make(), half_letters, data, Budget())


def test_budgets():
    assert [(one.steps, one.width) for name in ("small", "paper", "large") for one in cases("gcg", name)] == [
        (100, 64),
        (250, 512),
        (500, 512),
    ]
