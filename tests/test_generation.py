"""Generation: the batch changes nothing, samples follow the nucleus, noise is common to two models."""

import math

import pytest
import torch

from expunge.errors import ExpungeError
from expunge.generation import Decoding, end_tokens, generate, keyed_top_p, splitmix64, until_end

PROMPTS = [[5], [9, 40, 77, 12, 3], [8, 8], [], [100, 31, 64, 7, 2, 90, 11], [9, 40, 77, 12, 3]]


def greedy_by_hand(model, prompt, new, eos):
    """Plain argmax, a full forward per token, no cache and no padding."""
    ids = list(prompt)
    for _ in range(new):
        token = model(torch.tensor([ids])).logits[0, -1].argmax().item()
        if token == eos:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("samples", [0, 3])
def test_batch_equals_one_by_one(architecture, samples, tiny_model, tokenizer):
    model = tiny_model(architecture, dtype=torch.float64)
    decoding = Decoding(max_new_tokens=12, samples=samples)
    batched = generate(model, tokenizer, PROMPTS, decoding)
    assert batched == [generate(model, tokenizer, [prompt], decoding, batch_size=1)[0] for prompt in PROMPTS]
    assert batched == generate(model, tokenizer, PROMPTS, decoding, batch_size=4)
    assert [len(group) for group in batched] == [samples or 1] * len(PROMPTS)
    assert any(batched[0][0] != group[0] for group in batched)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_greedy_equals_a_plain_loop(architecture, tiny_model, tokenizer):
    model = tiny_model(architecture, dtype=torch.float64)
    found = generate(model, tokenizer, PROMPTS[:3], Decoding(max_new_tokens=8))
    assert found == [[greedy_by_hand(model, prompt, 8, tokenizer.eos_token_id)] for prompt in PROMPTS[:3]]


def test_an_empty_prompt_starts_from_bos_or_eos(tiny_model, tokenizer, bos_tokenizer):
    model = tiny_model(dtype=torch.float64)
    for tok, start in ((tokenizer, tokenizer.eos_token_id), (bos_tokenizer, bos_tokenizer.bos_token_id)):
        assert generate(model, tok, [[]], Decoding(6)) == generate(model, tok, [[start]], Decoding(6))


def test_the_generation_config_of_the_model_plays_no_part_and_is_put_back(tiny_model, tokenizer):
    model, other = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64)
    own = other.generation_config
    own.repetition_penalty, own.suppress_tokens, own.max_length, own.do_sample = 5.0, list(range(1, 200)), 3, True
    other.train()
    for decoding in (Decoding(10), Decoding(10, samples=2)):
        assert generate(other, tokenizer, PROMPTS, decoding) == generate(model, tokenizer, PROMPTS, decoding)
    assert other.generation_config is own and other.training


def test_a_continuation_ends_before_eos(tiny_model, tokenizer):
    model = tiny_model(dtype=torch.float64)
    free = generate(model, tokenizer, [PROMPTS[4]], Decoding(12))[0][0]
    tokenizer = type("Tokenizer", (), {"eos_token_id": free[3], "bos_token_id": None})()
    assert generate(model, tokenizer, [PROMPTS[4]], Decoding(12))[0][0] == free[: free.index(free[3])]


@pytest.mark.parametrize("samples", [0, 3])
def test_a_continuation_ends_before_any_end_token_of_the_model(tiny_model, tokenizer, samples):
    """As a chat model's: its `generation_config` names the end of a turn, the tokenizer the end of a text."""
    model = tiny_model(dtype=torch.float64)
    decoding = Decoding(12, samples=samples)
    free = generate(model, tokenizer, PROMPTS, decoding)
    first, second = free[4][0][3], free[1][0][5]
    for ends in (first, [second, first]):
        model.generation_config.eos_token_id = ends
        named = {ends} if isinstance(ends, int) else set(ends)
        assert end_tokens(model, tokenizer) == sorted(named | {tokenizer.eos_token_id})
        cut = [[until_end(ids, named) for ids in group] for group in free]
        assert generate(model, tokenizer, PROMPTS, decoding) == cut != free
    model.generation_config.eos_token_id = None
    assert end_tokens(model, tokenizer) == [tokenizer.eos_token_id]


def test_an_id_that_the_model_does_not_know_is_one_line(tiny_model, tokenizer):
    with pytest.raises(ExpungeError, match="id 320, and the model's embedding has 320 rows: resize it"):
        generate(tiny_model(), tokenizer, [[1], [5, 320]], Decoding())


def test_a_prompt_without_room_names_itself(tiny_model, tokenizer):
    with pytest.raises(ExpungeError, match="prompt 1: 60 tokens and 20 new ones exceed the context of 64"):
        generate(tiny_model(), tokenizer, [[1], [1] * 60], Decoding())


def test_out_of_memory_halves_the_batch(tiny_model, tokenizer, monkeypatch):
    model = tiny_model(dtype=torch.float64)
    wanted = generate(model, tokenizer, PROMPTS, Decoding(5, samples=4))
    whole, sizes = model.generate, []

    def narrow(*args, **kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 6:
            raise torch.OutOfMemoryError
        return whole(*args, **kwargs)

    monkeypatch.setattr(model, "generate", narrow)
    assert generate(model, tokenizer, PROMPTS, Decoding(5, samples=4), batch_size=20) == wanted
    assert max(sizes) > 6 >= sizes[-1]


def test_equal_logits_give_equal_samples_and_another_seed_others(tiny_model, tokenizer):
    first, second = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64)
    second.lm_head.weight = torch.nn.Parameter(first.lm_head.weight.clone())
    a, b = (generate(m, tokenizer, PROMPTS, Decoding(8, samples=5)) for m in (first, second))
    assert a == b
    assert a != generate(first, tokenizer, PROMPTS, Decoding(8, samples=5, seed=1))


def nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Reference: probabilities of the smallest set of likeliest tokens with mass >= top_p, renormalised."""
    probs, order = logits.double().softmax(-1).sort(descending=True)
    size = next(n for n in range(1, len(probs) + 1) if probs[:n].sum() >= top_p)
    kept = torch.zeros(len(probs), dtype=torch.float64)
    kept[order[:size]] = probs[:size] / probs[:size].sum()
    return kept


def total_variation(logits, draws, top_p):
    observed = torch.bincount(draws, minlength=len(logits)).double() / len(draws)
    return 0.5 * (observed - nucleus(logits, top_p)).abs().sum().item()


@pytest.mark.parametrize("top", [4, 1024])
def test_samples_follow_the_nucleus(top):
    torch.manual_seed(0)
    logits, n = torch.randn(40) * 1.5, 40_000
    draws = keyed_top_p(logits.repeat(n, 1), splitmix64(torch.arange(n)), 0.8, top)
    assert set(draws.tolist()) == set(nucleus(logits, 0.8).nonzero().flatten().tolist())
    assert total_variation(logits, draws, 0.8) < 3 * math.sqrt(40 / n)
    assert total_variation(logits, draws, 0.95) > 3 * math.sqrt(40 / n)


def test_a_wider_nucleus_than_the_sorted_top_gives_the_same_samples():
    torch.manual_seed(1)
    logits, keys = torch.randn(500, 3000) * 0.5, splitmix64(torch.arange(500))
    assert torch.equal(keyed_top_p(logits, keys, 0.9), keyed_top_p(logits, keys, 0.9, top=3000))


def test_the_hash_is_splitmix64():
    golden = 0x9E3779B97F4A7C15
    published = 0xE220A8397B1DCDAF  # first output of the generator seeded with 0
    assert splitmix64(torch.tensor([golden - 2**64])).item() % 2**64 == published


def test_temperature_and_limits_are_checked():
    for bad in ({"top_p": 0.0}, {"temperature": 0.0}, {"max_new_tokens": 0}, {"samples": -1}):
        with pytest.raises(ExpungeError, match=next(iter(bad))):
            Decoding(**bad)


def test_logits_that_are_no_numbers_are_one_line():
    logits = torch.zeros(2, 8)
    logits[1, 3] = torch.nan
    with pytest.raises(ExpungeError, match="not finite"):
        keyed_top_p(logits, torch.tensor([1, 2]), 0.9)
