"""PPLM against a plain form written from the equations, on every architecture, and that it pushes where the probe points."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import DynamicCache, MambaConfig, MambaForCausalLM

from expunge.data import pplm
from expunge.data.builders import BestOfN, build_pairs, draw
from expunge.data.pplm import PPLM, PRESETS, perturbed
from expunge.errors import ExpungeError
from expunge.generation import until_end
from expunge.models import body
from expunge.probes import Probe
from expunge.scorers import Scorer

PROMPTS = [[5, 17, 9, 30], [8, 11], [40, 3, 7, 60], [12]]
FAST = PPLM(max_new_tokens=5, min_tokens=1, iterations=3, samples=2)


def probe_of(model, seed=0) -> Probe:
    width = model.config.get_text_config().hidden_size
    return Probe(torch.randn(width, generator=torch.Generator().manual_seed(seed)), 0.1, 1.0)


def plain_form(model, ids, probe, recipe, tokens):
    """Fused log-weights before each of `tokens`, one row of GPT-2 in a loop: no batch, no cache but the moved one.

    The plain model is run anew on the whole text each time; its distribution and states come from there.
    """
    table = model.transformer.wte.weight
    past = DynamicCache()
    if len(ids) > 1:
        with torch.no_grad():
            past = model(torch.tensor([ids[:-1]]), use_cache=True).past_key_values
    found = []
    for token in tokens:
        last, text = torch.tensor([[ids[-1]]]), torch.tensor([ids])
        with torch.no_grad():
            whole = model(text, output_hidden_states=True, use_cache=True)
        plain_log = whole.logits[0, -1].log_softmax(-1)
        before = whole.hidden_states[-1][0, :-1].sum(0)
        if len(ids) == 1:
            found.append(whole.logits[0, -1])
            past = whole.past_key_values
        else:
            layers = [(layer.keys.clone(), layer.values.clone()) for layer in past.layers]
            moves = [[torch.zeros_like(k), torch.zeros_like(v)] for k, v in layers]
            for _ in range(recipe.iterations):
                for pair in moves:
                    for i in (0, 1):
                        pair[i] = pair[i].detach().requires_grad_()
                output = model(last, past_key_values=filled(layers, moves), output_hidden_states=True)
                log_p = output.logits[0, -1].log_softmax(-1)
                kl = (log_p.exp() * (log_p - plain_log)).sum()
                grown = filled([(layer.keys, layer.values) for layer in whole.past_key_values.layers])
                soft = (log_p.exp() @ table)[None, None]
                ahead = model(inputs_embeds=soft, past_key_values=grown, output_hidden_states=True)
                now = output.hidden_states[-1][0, -1].detach()
                mean = (before + now + ahead.hidden_states[-1][0, -1]) / (len(ids) + 1)
                loss = -torch.sigmoid(probe.logit(mean)).log() + recipe.kl_scale * kl
                loss.backward()
                for pair in moves:
                    norm = torch.stack([tensor.grad for tensor in pair]).norm() + 1e-10
                    for i in (0, 1):
                        pair[i] = pair[i].detach() - recipe.step_size * pair[i].grad / norm**recipe.gamma
            with torch.no_grad():
                output = model(last, past_key_values=filled(layers, moves), use_cache=True)
            past = output.past_key_values
            moved = (output.logits[0, -1] / recipe.temperature).softmax(-1)
            found.append((moved**recipe.gm_scale * plain_log.exp() ** (1 - recipe.gm_scale)).log())
        ids = [*ids, token]
    return torch.stack(found)


def filled(layers, moves=None) -> DynamicCache:
    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        move = moves[number] if moves else (0, 0)
        cache.update(keys + move[0], values + move[1], number)
    return cache


@pytest.mark.parametrize("settings", [{}, {"gamma": 1.5, "step_size": 0.3, "temperature": 0.7, "kl_scale": 5.0}])
@pytest.mark.parametrize("prompt", [[5, 17, 9, 30], [8]])
def test_equals_a_plain_form(tiny_model, tokenizer, monkeypatch, settings, prompt):
    model = tiny_model()
    probe, recipe = probe_of(model), dataclasses.replace(FAST, samples=1, top_k=50, **settings)
    seen = []
    draw = pplm.keyed_top_p

    def spy(logits, keys, top_p):
        seen.append(logits)
        return draw(logits, keys, top_p)

    monkeypatch.setattr(pplm, "keyed_top_p", spy)
    [[new]] = perturbed(model, tokenizer, [prompt], probe, recipe)
    wanted = plain_form(model, prompt, probe, recipe, new)
    for logits, plain in zip(seen, wanted, strict=True):
        kept = logits[0] > -torch.inf
        assert int(kept.sum()) == 50
        offset = (logits[0] - plain)[kept]
        torch.testing.assert_close(offset, offset.mean().expand(50), atol=2e-3, rtol=0)  # equal but for a constant


def test_a_batch_equals_one_by_one_and_leaves_the_model_as_it_was(architecture, tiny_model, tokenizer):
    model = tiny_model(architecture).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    probe = probe_of(model)
    together = perturbed(model, tokenizer, PROMPTS, probe, FAST)
    assert together == [perturbed(model, tokenizer, [prompt], probe, FAST, batch_size=1)[0] for prompt in PROMPTS]
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_soft_token_that_is_certain_is_the_token(architecture, tiny_model):
    model = tiny_model(architecture)
    ids = torch.tensor([[5, 17, 9], [8, 11, 40]])
    soft = torch.nn.functional.one_hot(ids, 320).float() @ pplm.embeddings(model, 320)
    states = [body(model)(**inputs).last_hidden_state for inputs in ({"input_ids": ids}, {"inputs_embeds": soft})]
    torch.testing.assert_close(*states, atol=1e-5, rtol=1e-5)


def test_without_a_push_it_draws_from_the_plain_model(tiny_model, tokenizer):
    """The plain keys and values are not touched by the moved ones: gm_scale = 0 is step_size = 0 whatever the push."""
    model = tiny_model()
    drawn = [
        perturbed(model, tokenizer, PROMPTS, probe_of(model), dataclasses.replace(FAST, **settings))
        for settings in ({"gm_scale": 0.0, "step_size": 3.0}, {"step_size": 0.0}, {"iterations": 0})
    ]
    assert drawn[0] == drawn[1] == drawn[2]
    assert drawn[0] != perturbed(model, tokenizer, PROMPTS, probe_of(model), dataclasses.replace(FAST, step_size=3.0))
    for prompt, samples in zip(PROMPTS, drawn[0], strict=True):
        for sample in samples:
            logits = model(torch.tensor([[*prompt, *sample]])).logits[0, len(prompt) - 1 : -1]
            ranks = (logits > logits.gather(1, torch.tensor(sample)[:, None])).sum(1)
            assert (ranks < FAST.top_k).all()


def test_it_ends_before_any_end_token_of_the_model(tiny_model, tokenizer):
    model = tiny_model()
    free = perturbed(model, tokenizer, PROMPTS, probe_of(model), FAST)
    ends = [free[0][0][2], free[1][0][3]]
    model.generation_config.eos_token_id = ends
    cut = [[until_end(ids, ends) for ids in group] for group in free]
    assert perturbed(model, tokenizer, PROMPTS, probe_of(model), FAST) == cut != free


def test_it_pushes_towards_the_probe_and_kl_holds_it_back(tiny_model, tokenizer):
    model = tiny_model()
    probe, prompts = probe_of(model), [[i, i + 1, i + 2] for i in range(1, 41)]

    def mean_logit(**settings):
        recipe = dataclasses.replace(FAST, max_new_tokens=8, iterations=8, **settings)
        drawn = perturbed(model, tokenizer, prompts, probe, recipe)
        rows = [[*prompt, *new] for prompt, group in zip(prompts, drawn, strict=True) for new in group]
        with torch.no_grad():
            states = [body(model)(input_ids=torch.tensor([row])).last_hidden_state[0].mean(0) for row in rows]
        return float(probe.logit(torch.stack(states)).mean())

    plain = mean_logit(step_size=0.0)
    assert mean_logit(step_size=0.5) > plain + 0.1
    assert mean_logit(step_size=0.5) > mean_logit(step_size=0.5, kl_scale=100.0)


def test_settings_and_models_that_cannot_be(tiny_model, tokenizer):
    for settings in ({"iterations": -1}, {"gm_scale": 2}, {"temperature": 0}, {"horizon": 0}, {"toxic": 0.1}):
        with pytest.raises(ExpungeError, match="need"):
            PPLM(**settings)
    assert {name: PPLM(**settings).iterations for name, settings in PRESETS.items()} == {"lee2024": 50, "pplm": 3}
    with pytest.raises(ExpungeError, match="context"):
        perturbed(tiny_model(), tokenizer, [[1] * 59], probe_of(tiny_model()), FAST)


def test_a_model_that_keeps_more_than_keys_is_refused_before_any_work(tokenizer):
    config = MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=3, state_size=8, eos_token_id=0)
    with pytest.raises(ExpungeError, match="MambaForCausalLM keeps something else; use best-of-n"):
        perturbed(MambaForCausalLM(config), tokenizer, [[5, 17, 9]], Probe(torch.zeros(32), 0.0, 1.0), FAST)


class LengthScorer(Scorer):
    name, digest = "length", "0"

    def score(self, texts):
        return np.array([len(text) % 7 / 7 for text in texts])


def test_pairs_keep_the_greedy_side(model, tokenizer):
    prompts = ["The river", "A film", "It is", "The boats", "About a man", "It was good", "The sea"]
    recipe = dataclasses.replace(FAST, benign=0.5, toxic=0.51, variety=0.0, similarity=1.0, samples=4)
    pairs, report = build_pairs(model, tokenizer, prompts, LengthScorer(), recipe, probe=probe_of(model))
    assert report.pairs == report.greedy == len(pairs) > 0
    greedy = dataclasses.replace(BestOfN(), max_new_tokens=5, min_tokens=1, samples=1)
    for pair in pairs:
        [[first, _]] = draw(model, tokenizer, [pair.prompt], LengthScorer(), greedy)
        assert pair.chosen == first.text
    with pytest.raises(ExpungeError, match="needs a probe"):
        build_pairs(model, tokenizer, prompts, LengthScorer(), recipe)
