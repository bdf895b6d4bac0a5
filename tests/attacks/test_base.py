"""What attacks share: cases of a grid, what is lacking, budgets, and a copy that shares weights and leaks nothing."""

import copy
import importlib
import mmap
import os
import resource
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from transformers import GPT2Config

from expunge import provenance
from expunge.attacks import ATTACKS, Attack, AttackData, Budget, Meter, attack, cases
from expunge.attacks.search.targets import Target
from expunge.data import Text
from expunge.errors import ExpungeError
from expunge.generation import _quiet_inference
from expunge.models import Description, batching, check_model, evaluating, frozen, sharing_copy
from expunge.provenance import peak_memory_bytes
from expunge.registry import UnknownName


@pytest.fixture
def made():
    @attack("made_up")
    class MadeUp(Attack):
        """For these tests."""

        needs: ClassVar[tuple[str, ...]] = ("reference", "forget")
        budgets: ClassVar = {"small": {"seed": [0, 1], "scale": [0.5, 1.0], "layers": [[1, 2]]}}
        scale: float = 1.0
        layers: list[int] | None = None

    yield MadeUp
    del ATTACKS._entries["made_up"]


def test_every_combination_of_a_budgets_values_is_a_case(made):
    found = cases("made_up", "small")
    assert [(one.seed, one.scale, one.layers) for one in found] == [(s, c, [1, 2]) for s in (0, 1) for c in (0.5, 1.0)]
    assert len(cases("made_up", "small", {"scale": 2, "seed": 7})) == 1
    assert [one.layers for one in cases("made_up", "none", {"layers": [[0], [1]]})] == [[0], [1]]
    assert [one.layers for one in cases("made_up", "none", {"layers": [0, 1]})] == [[0, 1]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scall": 1}, r"attack\.made_up\.scall.*did you mean 'scale'"),
        ({"scale": "big"}, r"attack\.made_up\.scale='big': expected a number"),
        ({"scale": []}, r"attack\.made_up\.scale=\[\]"),
        ({"seed": -1}, r"attack\.made_up\.seed=-1"),
    ],
)
def test_a_setting_that_is_none_is_one_line(made, settings, message):
    with pytest.raises(ExpungeError, match=message):
        cases("made_up", "small", settings)


def test_an_unknown_attack_is_one_line():
    with pytest.raises(UnknownName, match="did you mean 'gcg'"):
        cases("gcgg", "small")


def test_what_is_lacking_is_named(made, tokenizer):
    full, model = AttackData(tokenizer, forget=[Text("a", " b")]), Description(GPT2Config())
    made().check(model, model, full)
    with pytest.raises(ExpungeError, match="give --reference"):
        made().check(model, None, full)
    with pytest.raises(ExpungeError, match="forget set is empty"):
        made().check(model, model, AttackData(tokenizer))
    with pytest.raises(ExpungeError, match="these are quantized"):
        made().check(replace(model, quantized=True), model, full)


def test_a_budget_of_nothing_is_refused_and_one_that_is_spent_says_so():
    for bad in ({"steps": 0}, {"queries": -1}, {"seconds": 0}, {"seconds": float("nan")}):
        with pytest.raises(ExpungeError, match="budget"):
            Budget(**bad)
    meter = Meter(Budget(steps=2, queries=100))
    meter.step(loss=3)
    assert not meter.spent
    meter.queries += 100
    assert meter.spent
    meter.step(loss=2)
    assert meter.spent and [line["loss"] for line in meter.trace] == [3, 2]
    result = meter.result(torch.nn.Linear(1, 1), about={"found": 1})
    assert (result.steps, result.queries) == (2, 100) and result.peak_memory_bytes > 0


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system forgets no peak of memory")
def test_the_peak_is_the_attacks_own_and_the_process_keeps_its():
    held(256)
    before = peak_memory_bytes()
    meter = Meter(Budget())
    held(64)
    with_64 = meter.result(torch.nn.Linear(1, 1)).peak_memory_bytes
    without = Meter(Budget()).result(torch.nn.Linear(1, 1)).peak_memory_bytes
    assert without + 48 * 2**20 < with_64 < before - 128 * 2**20
    assert peak_memory_bytes() == before


@pytest.mark.parametrize("status", [None, "Name: python\nVmRSS: 1 kB\n"], ids=["no /proc", "no VmHWM"])
def test_where_the_system_tells_no_peak_it_is_that_of_the_resources(tmp_path, monkeypatch, status):
    if status:
        (tmp_path / "status").write_text(status)
    monkeypatch.setattr(provenance, "STATUS", tmp_path / "status")
    known = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert provenance.recent_peak_bytes() in (known, known * 1024)


def held(mebibytes: int) -> None:
    """Take so much memory, and give it back."""
    with mmap.mmap(-1, mebibytes * 2**20) as memory:
        for page in range(0, len(memory), mmap.PAGESIZE):
            memory[page] = 1


def test_a_sharing_copy_owns_what_changes_and_nothing_else(tiny_model):
    model = tiny_model()
    name = "transformer.h.1.mlp.c_proj.weight"
    made = sharing_copy(model, [name])
    own = [n for (n, a), b in zip(made.named_parameters(), model.parameters(), strict=True) if a is not b]
    assert own == [name]
    made.get_parameter(name).data.zero_()
    assert model.get_parameter(name).abs().sum() > 0
    made.transformer.h[0].register_forward_hook(lambda *_: None)
    assert not model.transformer.h[0]._forward_hooks


def test_frozen_puts_everything_back_when_the_block_raises(tiny_model):
    model = tiny_model().train()
    model.transformer.wpe.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(KeyboardInterrupt), frozen(model):
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        raise KeyboardInterrupt
    assert model.training and {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("entered", [frozen, evaluating, _quiet_inference])
def test_each_submodule_is_in_its_own_mode_again(tiny_model, entered):
    model = tiny_model().train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    with entered(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before and len(set(before)) == 2


FEW = {"samples": 5, "epochs": 2, "steps": 2, "length": 3, "width": 8, "proposals": 4, "optimised": 1, "vectors": 2}
FEW |= {"form": "best", "final_length": 3, "shares": [0.1, 0.2], "lora": 2}


@pytest.mark.parametrize(("name", "more"), [*((name, {}) for name in ATTACKS.names()), ("relearn_forget", {"lora": 0})])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_attack_that_breaks_midway_leaves_both_models_as_they_were(
    tiny_model, tokenizer, pairs, monkeypatch, name, more, error
):
    """At the third pass through the victim's last block, or else when a step or the attack ends."""
    victim, reference, passes = tiny_model().train(), tiny_model(seed=1), []
    for model in (victim, reference):  # as load_model does; it catches what a forward raises
        check_model(model)
        batching(model)
    victim.transformer.h[0].eval()
    victim.transformer.wpe.requires_grad_(False)

    def breaks(*_, **__):
        raise error("midway")

    def third(*_):
        passes.append(1)
        if len(passes) == 3:
            breaks()

    victim.transformer.h[2].register_forward_hook(third)
    monkeypatch.setattr(Meter, "step", breaks)
    monkeypatch.setattr(Meter, "result", breaks)
    [cls] = [ATTACKS.get(name)]
    module = importlib.import_module(cls.__module__)
    if hasattr(module, "reference_targets"):  # a random reference says what cannot be typed
        monkeypatch.setattr(module, "reference_targets", lambda *_: ([Target([5, 6, 7], [8, 9])], {}))

    def state(model):
        modules, inner = list(model.modules()), (model.config.to_dict(), model.generation_config.to_dict())
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]
        return (
            hooks,
            [m.training for m in modules],
            {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()},
            inner,
        )

    both = (victim, reference)
    before, weights = [state(model) for model in both], [copy.deepcopy(model.state_dict()) for model in both]
    texts = [[Text(pair.prompt, getattr(pair, side)) for pair in pairs] for side in ("rejected", "chosen", "rejected")]
    prompts = [pair.prompt for pair in pairs]
    neutral = " ".join(pair.prompt + pair.chosen for pair in pairs * 2)
    data = AttackData(tokenizer, *texts, prompts, neutral, lambda texts: np.zeros(len(texts)), max_continuation_tokens=24)
    attack = cls(**{key: value for key, value in (FEW | more).items() if key in cls.__dataclass_fields__})
    with pytest.raises(error, match="midway"):
        attack.run(victim, reference if "reference" in attack.needs else None, data, Budget())
    assert [state(model) for model in both] == before
    for model, own in zip(both, weights, strict=True):
        assert model.state_dict().keys() == own.keys()
        assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())


def test_an_attack_is_given_no_more_than_it_needs(tokenizer):
    full = AttackData(tokenizer, [Text("a", " b")], [Text("c", " d")], prompts=["e"], neutral="f", max_prompt_tokens=9)
    some = full.only(("reference", "forget", "neutral"))
    assert (some.forget, some.neutral, some.max_prompt_tokens) == (full.forget, "f", 9)
    assert not some.prompts and not some.retain and some.score is None


def test_texts_are_tokenized_once_and_cut(tokenizer):
    data = AttackData(
        tokenizer, forget=[Text("The river runs past the mill", " and on to the sea")], max_continuation_tokens=3
    )
    [(prompt, continuation)] = data.rows("forget")
    assert tokenizer.decode(prompt) == "The river runs past the mill" and len(continuation) == 3
    assert data.rows("forget") is data.rows("forget")
