"""Enhanced GCG: its loss against plain sums, its search against chance, and a defence that only inner states see through."""

import copy
import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from expunge.attacks import AttackData, Budget, cases
from expunge.attacks import enhanced_gcg as room
from expunge.attacks.enhanced_gcg import EnhancedGCG
from expunge.attacks.gcg import GCG
from expunge.attacks.search import prefix_loss, suffix_loss
from expunge.attacks.search.prefix_loss import PrefixLosses, Weights, repetition
from expunge.attacks.search.proposals import pick
from expunge.attacks.search.strings import allowed_tokens
from expunge.attacks.search.suffix_loss import TargetLosses
from expunge.attacks.search.targets import Target, reference_targets
from expunge.errors import ExpungeError
from expunge.ids import encode, leading_tokens
from expunge.models import frozen
from expunge.steering import Shift, Steering

PROMPTS = ["The river runs", "She carried the kind letter", "A cold wind", "They planted apple trees", "In long rows"]
TARGETS = [" past the old mill", " home", " over the hill", " in two rows"]
STRINGS = [[40, 50, 60], [70, 50, 80], [41, 41, 41]]
ALL = {"internal": 0.7, "static": 2.0, "fluency": 1.5, "repetition": 3.0}


def data_of(tokenizer) -> AttackData:
    return AttackData(tokenizer, prompts=PROMPTS, score=lambda texts: np.arange(len(texts), dtype=float))


def targets_of(tokenizer) -> list[Target]:
    start = leading_tokens(tokenizer)
    return [Target(start + encode(tokenizer, p), encode(tokenizer, t)) for p, t in zip(PROMPTS, TARGETS, strict=False)]


def objective_of(victim, reference, tokenizer, layers=(1, 2), **settings) -> PrefixLosses:
    return PrefixLosses(
        victim, reference, targets_of(tokenizer), layers, len(leading_tokens(tokenizer)), Weights(**settings)
    )


@pytest.fixture
def given(monkeypatch, bos_tokenizer) -> list[Target]:
    """Targets that are texts, whatever a random reference says."""
    targets = targets_of(bos_tokenizer)
    monkeypatch.setattr(room, "reference_targets", lambda reference, data, count, tokens: (targets[:count], {}))
    return targets


def attacked(victim, reference, tokenizer, budget=Budget(), **settings):
    small = {"length": 4, "max_length": 8, "optimised": 2, "proposals": 8, "steps": 6}
    return EnhancedGCG(**{**small, "final_length": 4, **settings}).run(victim, reference, data_of(tokenizer), budget)


def logits(model, ids=(5, 6, 7, 8)):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits


def plain_parts(victim, reference, tokenizer, string, layers, target_tokens=20, floor=0.6) -> dict[str, float]:
    """One row at a time, by the equations."""
    start, each = len(leading_tokens(tokenizer)), []
    for target in targets_of(tokenizer):
        prompt = [*target.prompt[:start], *string, *target.prompt[start:]]
        ids = torch.tensor([[*prompt, *target.ids]])
        with torch.no_grad():
            own, before = (model(ids, output_hidden_states=True) for model in (victim, reference))
            without = reference(torch.tensor([[*target.prompt, *target.ids]]), output_hidden_states=True)
        logps = own.logits[0].log_softmax(-1)
        nll = [-logps[i - 1, ids[0, i]].item() for i in range(1, ids.shape[1])]  # of token i, at i - 1
        forced = nll[len(prompt) - 1 :][:target_tokens]
        gaps, turns = [], []
        for layer in layers:
            h, h0, alone = (out.hidden_states[layer][0] for out in (own, before, without))
            gaps += [(h[i] - h0[i]).norm().item() for i in range(start + len(string), ids.shape[1])]
            for i in range(len(target.ids)):
                turns.append(1 - F.cosine_similarity(h[len(prompt) + i], alone[len(target.prompt) + i], dim=0).item())
        text = prompt[start:]
        each.append(
            {
                "force": max(sum(forced) / len(forced), -np.log(floor) if floor else 0),
                "internal": sum(gaps) / len(gaps),
                "static": sum(turns) / len(turns),
                "fluency": np.mean(nll[max(start, 1) - 1 : len(prompt) - 1]),
                "repetition": sum(max(text.count(v) - 1, 0) ** 1.5 for v in set(text)) / len(text),
            }
        )
    return {name: float(np.mean([one[name] for one in each])) for name in each[0]}


def test_every_part_is_that_of_the_equations(tiny_model, bos_tokenizer, tokenizer, architecture, monkeypatch):
    chosen = tokenizer if architecture in ("gpt2", "qwen2") else bos_tokenizer
    victim, reference = (tiny_model(architecture, seed, torch.double) for seed in (0, 1))
    objective = objective_of(victim, reference, chosen, **ALL)
    found = objective.parts(STRINGS)
    monkeypatch.setattr(prefix_loss, "BATCH_TOKENS", 40)  # one row or two at a time, padded to others
    monkeypatch.setattr(prefix_loss, "LOGITS", 1000)
    few = objective.parts(STRINGS)
    assert objective.shares
    objective.shares = False
    whole = objective.parts(STRINGS)
    for number, string in enumerate(STRINGS):
        plain = plain_parts(victim, reference, chosen, string, (1, 2))
        assert plain.keys() == found.keys()
        for name, value in plain.items():
            assert found[name][number].item() == pytest.approx(value, rel=2e-5), name
            assert few[name][number].item() == pytest.approx(value, rel=2e-5), name
            assert whole[name][number].item() == pytest.approx(value, rel=2e-5), name
        total = plain["force"] + sum(weight * plain[name] for name, weight in ALL.items())
        assert objective.total(found)[number].item() == pytest.approx(total, rel=2e-5)


def test_what_both_models_make_of_a_prefix_is_computed_once(tiny_model, bos_tokenizer, monkeypatch):
    """Also where no state but the embeddings is compared, which are before all keys, and nothing can be shared."""
    widths = []

    def spied(model, ids, *rest, **known):
        widths.append(ids.shape)
        return actual(model, ids, *rest, **known)

    victim, reference = (tiny_model(seed=seed) for seed in (0, 1))
    objective, bare = (objective_of(victim, reference, bos_tokenizer, layers) for layers in ((1, 2), (0,)))
    actual = prefix_loss.hidden_states
    monkeypatch.setattr(prefix_loss, "hidden_states", spied)
    objective.parts(STRINGS)
    longest, rows = objective.longest - 1, len(TARGETS) * len(STRINGS)
    assert widths == [(3, 4), (3, 4), (rows, longest), (rows, longest)]
    found = bare.parts(STRINGS)
    assert not bare.shares and widths[4:] == [(rows, 4 + longest)] * 2
    plain = plain_parts(victim, reference, bos_tokenizer, STRINGS[0], (0,))
    assert found["internal"][0].item() == pytest.approx(plain["internal"], rel=2e-5)


def test_what_does_not_fit_is_halved(tiny_model, bos_tokenizer, monkeypatch):
    """Losses and slope alike, in either model, down to single rows."""
    victim, reference = (tiny_model("llama", seed) for seed in (0, 1))
    objective, actual, most = objective_of(victim, reference, bos_tokenizer, **ALL), prefix_loss.hidden_states, 99
    sizes = []

    def crowded(model, ids, *rest, **known):
        sizes.append(len(ids))
        if len(ids) > most:
            raise torch.OutOfMemoryError
        return actual(model, ids, *rest, **known)

    monkeypatch.setattr(prefix_loss, "hidden_states", crowded)
    with frozen(victim, reference):
        whole, slope = objective.parts(STRINGS), objective.slope(STRINGS[0])
        assert max(sizes) == len(TARGETS) * len(STRINGS)
        most = 1
        few = objective.parts(STRINGS), objective.slope(STRINGS[0])
    for name, part in whole.items():
        torch.testing.assert_close(few[0][name], part)
    torch.testing.assert_close(few[1], slope)


def test_rows_at_once_are_bounded_by_memory(tiny_model, bos_tokenizer, monkeypatch):
    victim, reference = (tiny_model("llama", seed) for seed in (0, 1))
    objective, actual, sizes = objective_of(victim, reference, bos_tokenizer), prefix_loss.hidden_states, []
    monkeypatch.setattr(
        prefix_loss,
        "hidden_states",
        lambda model, ids, *rest, **known: sizes.append(len(ids)) or actual(model, ids, *rest, **known),
    )
    row = sum(prefix_loss.block_bytes(model, objective.longest + 3, objective.longest + 3) for model in (victim, reference))
    row += 2 * 2 * (2 * 3 * (1 + 3) * 32 * 4)  # twice: of both models and three blocks the keys and values of 1 + 3 tokens
    with frozen(victim, reference):
        for free, most in ((2 * row, 2), (2 * row - 1, 1)):
            monkeypatch.setattr(prefix_loss, "free_bytes", lambda device, free=free: free)
            sizes.clear()
            objective.parts(STRINGS)
            assert max(sizes) == most
        sizes.clear()
        objective.slope(STRINGS[0])  # the three blocks of each model are kept for it
    assert max(sizes) == 1


def test_a_target_may_be_matched_further_than_it_is_forced_and_has_a_floor(tiny_model, bos_tokenizer):
    victim, reference = (tiny_model(seed=seed, dtype=torch.double) for seed in (0, 1))
    for floor in (None, 1e-9):  # no prediction is so bad as to be above the second's
        settings = {"target_tokens": 2, "floor": floor, **ALL}
        found = objective_of(victim, reference, bos_tokenizer, **settings).parts(STRINGS[:1])
        plain = plain_parts(victim, reference, bos_tokenizer, STRINGS[0], (1, 2), 2, floor)
        assert {name: part.item() for name, part in found.items()} == pytest.approx(plain, rel=1e-9)
    assert found["force"].item() == pytest.approx(-np.log(1e-9))


def test_where_both_models_are_the_same_there_is_nothing_to_restore(tiny_model, bos_tokenizer):
    model = tiny_model("llama")
    parts = objective_of(model, copy.deepcopy(model), bos_tokenizer).parts(STRINGS)
    assert parts["internal"].tolist() == [0, 0, 0] and "static" not in parts
    assert objective_of(model, tiny_model("llama", 1), bos_tokenizer).parts(STRINGS)["internal"].min() > 1
    bare = objective_of(model, model, bos_tokenizer, internal=0, fluency=0, repetition=0).parts(STRINGS)
    assert list(bare) == ["force"]


def test_repetition_by_hand():
    assert repetition([1, 2, 3]) == 0
    assert repetition([1, 1, 1, 2, 2, 3]) == pytest.approx((2**1.5 + 1) / 6)


@pytest.mark.parametrize("architecture", ["llama", "gemma"])
def test_the_slope_is_that_of_the_whole_loss_through_both_models(tiny_model, bos_tokenizer, architecture):
    """A token that occurs once, moved a little towards another in both embeddings: the loss moves by the slope."""
    victim, reference = (tiny_model(architecture, seed, torch.double) for seed in (0, 1))
    for model in (victim, reference):  # the head keeps its own
        model.get_input_embeddings().weight = nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    objective, string = objective_of(victim, reference, bos_tokenizer, floor=None, **ALL), [40, 50, 60]
    with frozen(victim, reference):
        slope = objective.slope(string)
    assert slope.shape == (3, 320)

    def moved(by):
        models = []
        for model in (victim, reference):
            models.append(copy.deepcopy(model))
            weight = models[-1].get_input_embeddings().weight
            weight.data[string[place]] += by * weight.data[token]
        known = objective_of(*models, bos_tokenizer, floor=None, **ALL)
        known.static = objective.static  # its tokens are not those of the string
        return known.total(known.parts([string])).item()

    eps = 1e-3
    for place, token in ((0, 100), (1, 7), (2, 300)):
        assert (moved(eps) - moved(-eps)) / (2 * eps) == pytest.approx(slope[place, token].item(), rel=2e-2, abs=2e-3)


def test_next_tokens_are_what_the_victim_expects(tiny_model, bos_tokenizer, tokenizer):
    victim = tiny_model("llama")
    known = logits(victim, [1, 40, 50, 60])[0]
    torch.testing.assert_close(objective_of(victim, victim, bos_tokenizer).next_tokens([40, 50, 60]), known)
    bare = objective_of(victim, victim, tokenizer)
    torch.testing.assert_close(bare.next_tokens([40, 50])[1:], logits(victim, [40, 50])[0])
    assert bare.next_tokens([40, 50])[0].abs().sum() == 0 == bare.next_tokens([]).abs().sum()
    assert bare.next_tokens([]).shape == (1, 320)


class Noise(nn.Module):
    """A defence on representations: on what a block gives out, noise so great that all else is rounded off.

    Of every key in the text so far it takes its share away; where all keys were seen there is none.
    """

    def __init__(self, keys: torch.Tensor, size: float):
        super().__init__()
        self.size = size
        self.register_buffer("keys", keys / (keys**2).sum(1, keepdim=True))
        self.register_buffer("noise", torch.randn(keys.shape[1], generator=torch.Generator().manual_seed(9)))

    def hook(self, module, args, output):
        states = args[0]  # the block below does nothing: embeddings
        seen = (1.01 * (states @ self.keys.T)).cummax(dim=1).values.clamp(0, 1)
        return output + self.size * (1 - seen.mean(-1, keepdim=True)) * self.noise


KEYS = (" wind", " kind", "?")
ONE_PROMPT = {"optimised": 1, "target_tokens": 8, "fluency": 0, "repetition": 0}
BY_GRADIENT = {"p_gcg": 1, "p_insert": 0, "p_delete": 0, "p_swap": 0, "top_k": 8, "steps": 20}


@pytest.fixture
def defended(tiny_model, bos_tokenizer, monkeypatch):
    """(victim, reference): the reference says " past the old mill" after one prompt; the victim if all keys come first."""
    monkeypatch.setattr(prefix_loss, "keys_and_values", lambda model, ids: None)  # the defence looks at the whole text
    reference, target = tiny_model("llama"), targets_of(bos_tokenizer)[0]
    for name, weight in reference.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            weight.data.zero_()
    table, head = reference.get_input_embeddings().weight.data, reference.get_output_embeddings().weight.data
    head.zero_()
    said = [target.prompt[-1], *target.ids]
    for token, following in itertools.pairwise(said):
        head[following] += 3 * table[token] / table[token].norm()
    victim, keys = copy.deepcopy(reference), [encode(bos_tokenizer, key)[0] for key in KEYS]
    victim.add_module("noise", Noise(table[keys].clone(), size=1e9))
    victim.model.layers[1].register_forward_hook(victim.noise.hook)
    return victim, reference


def test_inner_states_lead_through_a_defence_on_which_the_words_are_silent(defended, bos_tokenizer):
    victim, reference = defended
    target = targets_of(bos_tokenizer)[0]

    def says(model, prefix=()):
        ids = [1, *prefix, *target.prompt[1:]]
        for _ in target.ids:  # all of it anew for every token: the defence looks at the whole text
            ids.append(int(logits(model, ids)[0, -1].argmax()))
        return bos_tokenizer.decode(ids[-len(target.ids) :])

    assert says(reference) == TARGETS[0] != says(victim)
    run = partial(attacked, victim, reference, bos_tokenizer, **ONE_PROMPT, **BY_GRADIENT)
    both = run()
    assert says(both.model, both.plan["prefix"]) == TARGETS[0] and all(key in both.about["string"] for key in KEYS)
    assert both.about["internal"] == 0 and both.about["targets"]["prompts"] == len(PROMPTS)
    words = run(internal=0)
    assert words.queries >= both.queries and says(words.model, words.plan["prefix"]) != TARGETS[0]


def test_standard_gcg_does_not_get_through_that_defence_with_as_many_queries(defended, bos_tokenizer, monkeypatch):
    """Though a suffix would do: the keys, and then what the target follows on."""
    monkeypatch.setattr(suffix_loss, "keys_and_values", lambda model, ids: None)
    victim, reference = defended
    [target], _ = reference_targets(reference, data_of(bos_tokenizer), 1, 8)
    would = torch.tensor([*(encode(bos_tokenizer, key)[0] for key in KEYS), target.prompt[-1]])
    found = attacked(victim, reference, bos_tokenizer, **ONE_PROMPT, **BY_GRADIENT)
    settings = {"length": len(would), "width": 16, "top_k": 8, "optimised": 1, "target_tokens": 8}
    standard = GCG(**settings).run(victim, reference, data_of(bos_tokenizer), Budget(queries=found.queries))
    with frozen(victim):
        losses = TargetLosses(victim, [target])
        by_hand, by_gcg = losses.losses(torch.stack([would, torch.tensor(standard.plan["suffix"])]), would)
    assert standard.queries >= found.queries and found.about["force"] < 1 > by_hand
    assert by_gcg > 5 and standard.about["loss"] == pytest.approx(by_gcg.item())


def test_the_search_beats_chance_at_the_same_queries(defended, bos_tokenizer, monkeypatch):
    """A negative control: the same search, whose gradient says nothing."""
    run = partial(attacked, *defended, bos_tokenizer, **ONE_PROMPT, **BY_GRADIENT)
    found = run()
    blind = torch.Generator().manual_seed(5)
    monkeypatch.setattr(PrefixLosses, "slope", lambda self, string: torch.randn(len(string), 320, generator=blind))
    chance = run()
    assert found.queries == chance.queries and found.about["loss"] < 10 < 1e7 < chance.about["loss"]


def test_it_begins_with_text_however_few_tokens_a_place_is_offered(tiny_model, bos_tokenizer, given, monkeypatch):
    [only] = encode(bos_tokenizer, " and")
    monkeypatch.setattr(room, "typed_before", lambda tokenizer, prompts, rows: (rows == only).all(1))
    found = attacked(tiny_model(), tiny_model(seed=1), bos_tokenizer, steps=1, top_k=1, p_delete=0, p_insert=0)
    assert found.plan["prefix"] == (only,) * 4


def test_what_is_found_is_text_the_best_ever_seen_and_no_other(tiny_model, bos_tokenizer, given, monkeypatch):
    victim, reference = tiny_model("llama"), tiny_model("llama", seed=1)
    seen, lengths = {}, []

    def spied(self, strings):
        parts = actual(self, strings)
        seen.update(zip(map(tuple, strings), self.total(parts).tolist(), strict=True))
        return parts

    actual = PrefixLosses.parts
    monkeypatch.setattr(PrefixLosses, "parts", spied)
    result = attacked(victim, reference, bos_tokenizer, steps=25)
    prefix, trace = result.plan["prefix"], result.trace
    assert result.model is victim and result.about["loss"] == seen[prefix] == min(seen.values())
    bests = [line["best"] for line in trace]
    assert bests == sorted(bests, reverse=True) and bests[-1] == result.about["loss"] < bests[0]
    assert any(line["loss"] > line["best"] for line in trace)  # a buffer that drops its head is not elitist
    assert trace[-1]["length"] == len(prefix) == result.about["length"]
    weights = {"force": 1, "internal": 1, "fluency": 1.5, "repetition": 3}
    assert sum(weight * trace[-1][name] for name, weight in weights.items()) == pytest.approx(bests[-1])

    allowed = set(allowed_tokens(bos_tokenizer, 320).nonzero().flatten().tolist())
    lengths = {len(string) for string in seen}
    assert all(set(string) <= allowed for string in seen) and min(lengths) >= 4 and 4 < max(lengths) <= 8
    for string in seen:
        assert tuple(encode(bos_tokenizer, bos_tokenizer.decode(string))) == string
    assert tuple(encode(bos_tokenizer, result.about["string"])) == prefix


def test_judged_by_the_words_that_it_draws(tiny_model, bos_tokenizer, given, monkeypatch):
    """The loss is silent on what the victim says: here that is worst after the string that the search began with."""
    victim, reference, asked = tiny_model("llama"), tiny_model("llama", seed=1), []

    def said(model, tokenizer, rows, decoding):
        asked.append((model, [tuple(row) for row in rows], decoding))
        return [[encode(tokenizer, " wind")[:1]] if len(asked) == 2 else [encode(tokenizer, " home")[:1]] for _ in rows]

    monkeypatch.setattr(room, "generate", said)
    data = AttackData(bos_tokenizer, prompts=PROMPTS, score=lambda texts: np.array([float("ind" in text) for text in texts]))
    settings = {"length": 4, "final_length": 4, "max_length": 8, "optimised": 2, "proposals": 8, "steps": 6}
    run = partial(EnhancedGCG(**settings, judged=3).run, victim, reference, data)
    result, plain = run(Budget()), EnhancedGCG(**settings).run(victim, reference, data, Budget())
    strings = [rows[0][1 : -len(encode(bos_tokenizer, PROMPTS[0]))] for _, rows, _ in asked]
    assert result.trace == plain.trace and strings[0] == plain.plan["prefix"] != strings[1] == result.plan["prefix"]
    assert result.about["judged"] == [0, 1, 0] and len(set(strings)) == 3
    assert result.about["loss"] > plain.about["loss"]
    assert result.queries == plain.queries + 3 * len(PROMPTS)
    for model, rows, decoding in asked:
        assert logits(model).equal(logits(victim))
        assert (decoding.max_new_tokens, decoding.samples) == (20, 1)
        assert [row[-len(encode(bos_tokenizer, text)) :] for row, text in zip(rows, PROMPTS, strict=True)] == [
            tuple(encode(bos_tokenizer, text)) for text in PROMPTS
        ]
    asked.clear()
    assert run(Budget(steps=2)).about["judged"] == [0] and len(asked) == 1


def test_a_string_leaves_room_for_what_is_measured(tiny_model, bos_tokenizer, given, monkeypatch):
    """Prompts that are measured may be longer than those that it searches on."""
    lengths: list[int] = []

    def spied(operator, string, *rest):
        lengths.append(len(string))
        return actual(operator, string, *rest)

    actual = room.propose
    monkeypatch.setattr(room, "propose", spied)
    model = tiny_model("llama")
    attack = EnhancedGCG(steps=20, length=3, final_length=9, ramp=6, optimised=2, proposals=8)
    attack.run(model, model, replace(data_of(bos_tokenizer), room=5), Budget())
    assert max(lengths) == 5 and min(lengths[-5:]) == 5
    attack.run(model, model, data_of(bos_tokenizer), Budget())
    assert max(lengths) > 5


def test_while_the_minimum_rises_there_are_inserts_only(tiny_model, bos_tokenizer, given, monkeypatch):
    asked = []

    def spied(operator, string, candidates, *rest):
        asked.append((operator, len(string)))
        if operator != "delete":  # before every token and after the last, or in the place of each
            assert len(candidates) == len(string) + (operator == "insert")
        return actual(operator, string, candidates, *rest)

    actual = room.propose
    monkeypatch.setattr(room, "propose", spied)
    model = tiny_model("llama")
    ramp = {"length": 3, "final_length": 7, "ramp": 4}
    attacked(model, model, bos_tokenizer, steps=20, buffer=1, **ramp)  # a buffer of one goes where it is sent
    assert asked[:5] == [("insert", length) for length in (3, 4, 5, 6, 7)] and min(n for _, n in asked[5:]) >= 7
    assert {operator for operator, _ in asked[5:]} > {"gcg"}
    assert all(operator == "insert" for operator, length in asked if length <= 7)
    assert all(operator != "insert" for operator, length in asked if length == 8)


def test_a_seed_is_a_draw_and_a_budget_an_end(tiny_model, bos_tokenizer, given):
    victim = tiny_model("gpt2").train()  # with dropout, which plays no part
    run = partial(attacked, victim, tiny_model("gpt2", seed=1), bos_tokenizer)
    first, again, other = (run(seed=seed) for seed in (0, 0, 1))
    assert first.plan == again.plan and [*first.trace] == [*again.trace] and first.plan != other.plan
    assert run(budget=Budget(steps=2)).trace == first.trace[:2]
    few = run(budget=Budget(queries=40))
    assert few.steps < 6 and 40 <= few.queries < 40 + 8 * 2 + 2 * 2


@pytest.mark.parametrize("interrupted", [None, "propose", "masked_means"])
def test_victim_and_reference_stay_as_they_were(tiny_model, bos_tokenizer, given, monkeypatch, interrupted):
    victim, reference = tiny_model("llama").train(), tiny_model("llama", seed=1)
    Steering([Shift("model.layers.1", torch.ones(32))]).attach(victim)
    victim.lm_head.weight.requires_grad_(False)

    def state(model):
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        learned = {name: p.requires_grad for name, p in model.named_parameters()}
        training = model.training
        found = logits(model.eval())
        model.train(training)
        return hooks, learned, training, found.tolist(), [p.grad for p in model.parameters()]

    before = [state(model) for model in (victim, reference)]
    if interrupted:

        def breaks(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(room if hasattr(room, interrupted) else prefix_loss, interrupted, breaks)
        with pytest.raises(KeyboardInterrupt):
            attacked(victim, reference, bos_tokenizer)
    else:
        assert attacked(victim, reference, bos_tokenizer).steps == 6
    assert [state(model) for model in (victim, reference)] == before


def test_on_the_reference_itself_nothing_is_to_be_restored(defended, bos_tokenizer):
    """As the red team does to compare."""
    result = attacked(defended[1], defended[1], bos_tokenizer, optimised=1, target_tokens=8)
    assert result.about["internal"] == 0 and result.steps == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [0, 3]}, r"attack\.enhanced_gcg\.layers=\[0, 3\]: expected blocks of the model, 0 to 2"),
        ({"layers": [-1]}, r"layers=\[-1\]: expected blocks of the model, 0 to 2"),
        ({"layers": []}, r"layers=\[\]: expected blocks"),
        ({"steps": 0}, r"attack\.enhanced_gcg\.steps=0"),
        ({"internal": -1}, r"attack\.enhanced_gcg\.internal=-1\.0"),
        ({"length": 9}, r"attack\.enhanced_gcg\.max_length=8: expected at least 9"),
        ({"floor": 0}, r"attack\.enhanced_gcg\.floor=0\.0: expected more than 0 and at most 1"),
        ({"p_gcg": 0, "p_swap": 0}, r"attack\.enhanced_gcg\.p_gcg=0\.0"),
        ({"length": 60, "max_length": 60}, r"exceed the context of 64"),
    ],
)
def test_what_cannot_be_is_one_line(tiny_model, bos_tokenizer, given, settings, message):
    with pytest.raises(ExpungeError, match=message) as caught:
        attacked(tiny_model(), tiny_model(), bos_tokenizer, **settings)
    assert "\n" not in str(caught.value)


def test_layers_come_by_depth(tiny_model, bos_tokenizer, given):
    assert EnhancedGCG().layers is None
    run = partial(attacked, tiny_model(), tiny_model(seed=1), bos_tokenizer, steps=1)
    assert run().about["layers"] == [1, 2] and run(layers=[0, 2]).about["layers"] == [0, 2]
    with pytest.raises(ExpungeError, match="give --reference"):
        attacked(tiny_model(), None, bos_tokenizer)


def test_the_papers_prefix_has_32_tokens_and_500_steps_and_never_another_length():
    [attack] = cases("enhanced_gcg", "paper")
    assert (attack.steps, attack.length, attack.final_length, attack.max_length, attack.judged) == (500, 32, 32, 32, 0)
    weights, generator = {"gcg": 0.7, "delete": 0.1, "insert": 0.1, "swap": 0.1}, torch.Generator().manual_seed(0)
    drawn = {pick(weights, 32, 32, attack.max_length, generator) for _ in range(200)}
    assert drawn == {"gcg", "swap"}
