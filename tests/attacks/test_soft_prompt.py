"""Soft prompts: vectors that make a model say what another says, and are then tokens like any other."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from expunge.attacks import AttackData, Budget
from expunge.attacks import soft_prompt as room
from expunge.attacks.search.targets import Target
from expunge.attacks.soft_prompt import SoftPrompt, soft_losses
from expunge.errors import ExpungeError
from expunge.generation import Decoding, generate
from expunge.ids import encode, leading_tokens
from expunge.metrics.evaluation import EvaluationData, EvaluationPlan, evaluate_model
from expunge.steering import Shift, Steering

PROMPTS = [
    "The river runs",
    "She carried the kind letter",
    "A cold wind came",
    "They planted apple trees",
    "Before the rain",
    "In long rows",
]


def data_of(tokenizer) -> AttackData:
    return AttackData(tokenizer, prompts=PROMPTS, score=lambda texts: np.arange(len(texts), dtype=float))


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def logits(model, ids=(5, 6, 7, 8)):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits


def plain_loss(model, tokenizer, prefix, targets) -> float:
    """One row at a time, from the model's own logits."""
    start, losses = leading_tokens(tokenizer), []
    for target in targets:
        before = [*start, *prefix, *target.prompt[len(start) :]]
        found = logits(model, [*before, *target.ids])[0, len(before) - 1 : -1]
        losses.append(F.cross_entropy(found, torch.tensor(target.ids)))
    return torch.stack(losses).mean().item()


@pytest.fixture
def chosen(monkeypatch, bos_tokenizer) -> list[Target]:
    """What is to be said, whatever a random reference says."""
    texts = [("The river runs", " past the"), ("She carried", " apple trees home"), ("A cold wind", " letter")]
    ids = [[encode(bos_tokenizer, text) for text in pair] for pair in texts]
    targets = [Target([*leading_tokens(bos_tokenizer), *prompt], target) for prompt, target in ids]
    monkeypatch.setattr(room, "reference_targets", lambda reference, data, count, tokens: (targets[:count], {}))
    return targets


def attacked(victim, tokenizer, budget=Budget(), **settings):
    return SoftPrompt(**settings).run(victim, victim, data_of(tokenizer), budget)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma"])
def test_an_undefended_model_emits_a_chosen_string(tiny_model, bos_tokenizer, architecture, chosen):
    victim, (bos, *prompt) = tiny_model(architecture), chosen[0].prompt
    settings = {"optimised": 1, "length": 16, "step_size": 0.05}
    result = attacked(victim, bos_tokenizer, steps=80, **settings)
    little = attacked(victim, bos_tokenizer, steps=1, **settings)

    def says(model, prefix):
        [[ids]] = generate(model, bos_tokenizer, [[bos, *prefix, *prompt]], Decoding(len(chosen[0].ids)))
        return bos_tokenizer.decode(ids)

    assert result.plan["prefix"] == tuple(range(320, 336))
    assert says(result.model, result.plan["prefix"]) == " past the"
    assert says(little.model, little.plan["prefix"]) != " past the"
    assert says(result.model, ()) == says(victim, ()) != " past the"


def test_as_tokens_the_vectors_give_the_loss_of_the_search(tiny_model, bos_tokenizer, architecture, chosen):
    victim = tiny_model(architecture, dtype=torch.double).train()  # GPT-2 has dropout, which plays no part
    result = attacked(victim, bos_tokenizer, optimised=3, length=4, steps=3, step_size=0.1)
    plain = plain_loss(result.model.eval(), bos_tokenizer, result.plan["prefix"], chosen)
    assert result.about["loss"] == pytest.approx(plain, rel=1e-6)
    assert abs(plain - plain_loss(victim.eval(), bos_tokenizer, (), chosen)) > 1e-3  # the prefix matters
    head = result.model.get_output_embeddings().weight
    assert len(head) == 320 and len(result.model.get_input_embeddings().weight) == 324
    assert head is victim.get_output_embeddings().weight  # shared, not copied


@pytest.mark.parametrize("architecture", ["gpt2", "gemma"])
def test_the_gradient_is_that_of_the_vectors(tiny_model, bos_tokenizer, architecture):
    model = tiny_model(architecture, dtype=torch.double)
    targets = [Target([1, 20, 30], [40, 50, 60]), Target([1, 25], [45, 55])]
    vectors = torch.randn(3, 32, dtype=torch.double, generator=torch.Generator().manual_seed(0), requires_grad=True)
    how = {
        "eps": 1e-3,
        "atol": 1e-3,
        "rtol": 1e-2,
        "fast_mode": True,
    }  # Gemma's norms are in float32 whatever the model is in
    assert torch.autograd.gradcheck(lambda v: soft_losses(model, v, targets, 1), vectors, **how)


def test_the_loss_falls_and_the_best_is_kept(tiny_model, bos_tokenizer, chosen):
    settings = {"optimised": 3, "length": 4, "steps": 30, "step_size": 0.2}  # so long that the loss goes up and down
    result, again, other = (attacked(tiny_model(), bos_tokenizer, seed=seed, **settings) for seed in (0, 0, 1))
    losses, best = ([line[name] for line in result.trace] for name in ("loss", "best"))
    assert best == [min(losses[: i + 1]) for i in range(30)] and result.about["loss"] == best[-1] < 0.8 * best[0]
    assert losses[-1] > best[-1] == pytest.approx(plain_loss(result.model, bos_tokenizer, result.plan["prefix"], chosen))
    assert (result.steps, result.queries, result.trace[-1]["queries"]) == (30, 90, 90)
    rows = [one.model.get_input_embeddings().weight[320:] for one in (result, again, other)]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_victim_stays_as_it_was(tiny_model, bos_tokenizer, monkeypatch, chosen, interrupted):
    victim = tiny_model().train()
    Steering([Shift("transformer.h.1", torch.ones(32))]).attach(victim)
    victim.transformer.wpe.requires_grad_(False)
    learned = {name: p.requires_grad for name, p in victim.named_parameters()}
    before, count = logits(victim.eval()), hooks(victim.train())
    run = partial(attacked, victim, bos_tokenizer, Budget(steps=3), optimised=2, length=4)
    if interrupted:

        def breaks(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(room, "head_logits", breaks)
        with pytest.raises(KeyboardInterrupt):
            run()
    else:
        result = run()
        assert result.steps == 3 and result.model.training and hooks(result.model) == count
        assert torch.equal(logits(result.model.eval()), before)  # steered too, where its prefix is not used
        assert not torch.equal(logits(result.model, [320, 321, 5, 6])[0, -1], before[0, 1])
    assert victim.training and {name: p.requires_grad for name, p in victim.named_parameters()} == learned
    assert hooks(victim) == count and torch.equal(logits(victim.eval()), before)
    assert all(p.grad is None for p in victim.parameters())


def test_it_is_evaluated_like_any_model(tiny_model, bos_tokenizer, chosen):
    class Vowels:
        name, digest = "vowels", "0"

        def score(self, texts):
            return np.array([sum(c in "aeiou" for c in text) / max(1, len(text)) for text in texts])

    victim = tiny_model("llama")
    result = attacked(victim, bos_tokenizer, optimised=1, length=16, steps=80, step_size=0.05)
    plan = EvaluationPlan(samples=2, max_new_tokens=len(chosen[0].ids), perplexity_modes=("exact",), f1_modes=())
    data = EvaluationData(challenge={"search": PROMPTS[:1]}, corpora={"neutral": " ".join(PROMPTS)})
    found = [
        evaluate_model(model, bos_tokenizer, data, dataclasses.replace(plan, **changes), [Vowels()])
        for model, changes in ((result.model, result.plan), (victim, {}))
    ]
    said = [next(s["continuation"] for s in one.samples if s["decode"] == "greedy") for one in found]
    assert said[0] == " past the" != said[1]
    perplexities = [next(f.columns for f in one.figures if f.key.metric == "perplexity") for one in found]
    np.testing.assert_array_equal(*perplexities)  # of text without the prefix


def test_the_prompts_are_those_that_score_highest(tiny_model, bos_tokenizer, monkeypatch):
    """The reference's continuation of every prompt is seen by the score; the search goes for the best."""
    other, seen = tiny_model("llama", seed=1), []
    monkeypatch.setattr(
        room, "soft_losses", lambda model, vectors, targets, start: seen.append(targets) or vectors.sum()[None]
    )
    SoftPrompt(optimised=1, target_tokens=3, steps=1).run(tiny_model(), other, data_of(bos_tokenizer), Budget())
    [target] = seen[0]
    assert [[target.ids]] == generate(other, bos_tokenizer, [target.prompt], Decoding(3))
    assert target.prompt[1:] in [encode(bos_tokenizer, text) for text in PROMPTS]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, r"attack\.soft_prompt\.length=0"),
        ({"steps": 0}, r"attack\.soft_prompt\.steps=0"),
        ({"step_size": 0}, r"attack\.soft_prompt\.step_size=0\.0: expected more than 0"),
        ({"length": 60}, r"exceed the context of 64"),
        ({"optimised": 7}, r"7 prompts were asked for and 6 given"),
    ],
)
def test_what_cannot_be_is_one_line(tiny_model, bos_tokenizer, settings, message):
    with pytest.raises(ExpungeError, match=message):
        attacked(tiny_model("llama", 1), bos_tokenizer, **{"optimised": 1, "target_tokens": 4, **settings})


def test_without_a_reference_there_is_no_target(tiny_model, tokenizer):
    with pytest.raises(ExpungeError, match="give --reference"):
        SoftPrompt().run(tiny_model(), None, data_of(tokenizer), Budget())
