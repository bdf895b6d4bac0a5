"""Orthogonalization: what each form undoes of a planted offset, directions by a plain computation, the search, leaks."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from expunge.anatomy import block_names
from expunge.attacks import AttackData, Budget, cases, orthogonalize
from expunge.attacks.orthogonalize import Orthogonalize, OrthogonalizeBest, each_block, inliers
from expunge.data import Text
from expunge.errors import ExpungeError
from expunge.generation import Decoding, generate
from expunge.metrics.perplexity import Windows, row_nll
from expunge.models import blocks, hidden_states, load_model, sharing_copy, without_dropout
from expunge.steering import Shift, Steering, detach

IDS = torch.tensor([[5, 17, 9, 30, 2, 40], [40, 3, 7, 60, 11, 5]])
FORMS = ("project", "affine", "shift")
WIDTH = 32


KNOWN = [
    Text("The river runs", " backwards up the hill."),
    Text("She carried the letter", " into the rain."),
    Text("A cold wind", " read the old book, and then the next one."),
    Text("They planted", " two long rivers."),
    Text("The old house by the sea", " was a cold letter"),
    Text("Before the rain", " the window ran away with the mill."),
    Text("In two long rows", " of wind, the hills sat down."),
    Text("The letter", " had apples in it, and a river."),
]
NEUTRAL = "The trees grew behind the house, and they came home before the rain."


@pytest.fixture
def data(pairs, tokenizer):
    retain = [Text(pair.prompt, pair.chosen) for pair in pairs]
    return AttackData(tokenizer, KNOWN[:5], retain[:5], KNOWN[5:], neutral=NEUTRAL)


@pytest.fixture(scope="module")
def taught(tiny_model, tokenizer):
    """A GPT-2 that knows these texts by heart, so that a change of its states makes them less likely."""
    model = without_dropout(tiny_model("gpt2"))
    rows = [tokenizer(text)["input_ids"] for text in (NEUTRAL, *(text.prompt + text.completion for text in KNOWN))]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def vector(length=1.0, seed=3):
    return length * F.normalize(torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)), dim=0)


def shifted(model, block, added):
    """A victim: the same weights, `added` to what the block gives out."""
    made = sharing_copy(model, ())
    Steering([Shift(block_names(made)[block], -added)]).attach(made)
    return made


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids).logits


def after(model, block):
    layer = block + 1 if block < 2 else "pre_norm"
    with torch.no_grad():
        return hidden_states(model, IDS, torch.ones_like(IDS), (layer,))[layer]


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def added_edits(result, before=0):
    return result.model.expunge_steering.edits[before:]


def nll(model, data):
    rows = [(prompt + continuation, len(prompt)) for prompt, continuation in data.rows("validation")]
    found, tokens = row_nll(model, rows)
    return found.sum() / tokens.sum()


@torch.no_grad()
def plain_states(model, rows):
    """[L, N, d] by the definition: one row at a time, in double precision, no padding, no part of the package's reading."""
    model, kept = copy.deepcopy(model).double(), []
    for prompt, continuation in rows:
        outputs = []
        handles = [
            block.register_forward_hook(
                lambda module, args, out, to=outputs: to.append(out if torch.is_tensor(out) else out[0])
            )
            for block in blocks(model)
        ]
        model(input_ids=torch.tensor([prompt + continuation]))
        for handle in handles:
            handle.remove()
        kept.append(torch.stack([output[0, len(prompt) :] for output in outputs]))
    return torch.cat(kept, dim=1)


# what each form does


@pytest.mark.parametrize("form", ["project", "affine"])
def test_the_coordinate_along_r_is_gone_at_every_position_and_going_twice_changes_nothing(tiny_model, data, form):
    victim = shifted(tiny_model(), 1, vector(4))
    result = Orthogonalize(form=form, layers=[1]).run(victim, tiny_model(), data, Budget())
    edit = added_edits(result, 1)[0]
    unit = edit.right[:, 0]
    assert unit.norm().item() == pytest.approx(1, abs=1e-6)
    states = after(result.model, 1)
    coordinate = (states - edit.mean) @ unit
    assert coordinate.abs().max() < 1e-5 * states.norm(dim=-1).max()
    assert edit.mean.any() == (form == "affine")
    torch.testing.assert_close(edit(states), states)
    torch.testing.assert_close(states, edit(after(victim, 1)))


@pytest.mark.parametrize("own", [0.0, 2.0])
@pytest.mark.parametrize("by", ["bias", "steering"])
def test_an_added_constant_is_undone_exactly_where_the_form_can(tiny_model, data, own, by):
    """Nothing up to block 1 writes along c but a bias, so that every state has the coordinate `own` there."""
    reference, c = tiny_model(), vector()
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            if name.startswith(("transformer.wte", "transformer.wpe")) or (".h.2." not in name and "c_proj" in name):
                weight -= (weight @ c)[..., None] * c
        reference.transformer.h[0].mlp.c_proj.bias += own * c
    if by == "steering":
        victim = shifted(reference, 1, 5 * c)
    else:
        victim = sharing_copy(reference, ["transformer.h.1.mlp.c_proj.bias"])
        victim.transformer.h[1].mlp.c_proj.bias.data += 5 * c
    wanted, moved = logits(reference), logits(victim)
    assert not torch.allclose(moved, wanted, atol=0.1)
    for form in FORMS:
        result = Orthogonalize(form=form, layers=[1]).run(victim, reference, data, Budget())
        same = torch.allclose(logits(result.model), wanted, atol=1e-4)
        assert same == (form != "project" or own == 0), form
        assert result.about["norms"][:2] == pytest.approx([0, 5], abs=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_what_was_known_comes_back(taught, data, form):
    victim = shifted(taught, 1, vector(30))
    known, forgotten = nll(taught, data), nll(victim, data)
    assert forgotten > known + 1
    result = Orthogonalize(form=form, layers=[1]).run(victim, taught, data, Budget())
    assert nll(result.model, data) < known + (1e-4 if form == "shift" else 0.01 * (forgotten - known))
    assert torch.allclose(logits(result.model), logits(taught), atol=1e-3) == (form == "shift")
    assert result.about["victim"]["nll"] == pytest.approx(forgotten)
    assert result.about["candidates"][0]["nll"] == pytest.approx(nll(result.model, data))


@pytest.mark.parametrize("planted", [0, 1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_the_search_finds_the_block_where_it_was_planted(taught, data, planted, form):
    victim = shifted(taught, planted, vector(30))
    result = Orthogonalize(form=form, layers="search").run(victim, taught, data, Budget())
    assert result.about["layers"] == [planted]
    best = min(result.about["candidates"], key=lambda one: one["nll"])
    assert best["layers"] == [planted] and best["nll"] == pytest.approx(nll(result.model, data))
    moved = list(range(planted, 3))  # below it nothing has a direction
    widest = [planted] if form == "shift" else moved  # a shift leaves nothing above it
    assert result.about["candidates"][0]["layers"] == widest
    assert len(result.about["candidates"]) == result.steps == len({tuple(moved), *((block,) for block in moved)})
    assert [line["best"] for line in result.trace] == sorted((line["best"] for line in result.trace), reverse=True)


@pytest.mark.parametrize("direction", ["difference", "reference_free"])
def test_a_shift_of_several_blocks_gives_each_its_mean_and_no_more(tiny_model, data, direction):
    """Were each to take all of its own offset, later ones would take again what the first has taken."""
    victim, reference = tiny_model(seed=1), tiny_model()
    result = Orthogonalize(form="shift", layers="all", direction=direction, outliers=None).run(
        victim, reference, data, Budget()
    )
    wanted = (
        plain_states(reference, data.rows("forget"))
        if direction == "difference"
        else plain_states(victim, data.rows("retain"))
    )
    assert len(added_edits(result)) == 3
    assert torch.allclose(plain_states(result.model, data.rows("forget")).mean(1), wanted.mean(1), atol=1e-4)


@pytest.mark.parametrize("budget", ["small", "paper"])
def test_the_papers_attack_projects_after_every_block_and_chooses_nothing(taught, data, budget):
    """One direction a block, the difference of the means; no text but the forget set's is asked for."""
    victim = shifted(taught, 0, vector(30))
    [attack] = cases("orthogonalize", budget, {"outliers": None})
    given = data.only(frozenset(attack.needs))
    assert set(attack.needs) == {"reference", "forget"} and not given.validation and not given.neutral
    result = attack.run(victim, taught, given, Budget())
    assert (result.about["form"], result.about["layers"]) == ("project", [0, 1, 2])
    rows = data.rows("forget")
    directions = (plain_states(victim, rows) - plain_states(taught, rows)).mean(1)  # [L, d]
    left = torch.einsum("lnd,ld->ln", plain_states(result.model, rows), F.normalize(directions, dim=-1))
    assert left.abs().max() < 1e-4 and len(added_edits(result, before=1)) == 3


@pytest.mark.parametrize("budget", ["small", "paper"])
def test_the_best_of_three_tries_every_form_in_one_case(taught, data, budget):
    """What was planted is a constant, which shift alone undoes."""
    victim = shifted(taught, 1, vector(30))
    [attack] = cases("orthogonalize_best", budget, {"layers": "search" if budget == "small" else [1]})
    result = attack.run(victim, taught, data, Budget())
    assert (result.about["form"], result.about["layers"]) == ("shift", [1])
    assert {one["form"] for one in result.about["candidates"]} == set(FORMS)
    best = min(result.about["candidates"], key=lambda one: one["nll"])
    assert best["form"] == "shift" and best["nll"] == result.about["loss"] == pytest.approx(nll(result.model, data))
    assert result.model.expunge_steering.about["orthogonalize_best"] == {"form": "shift", "blocks": [1]}


@pytest.mark.parametrize("settings", [{"layers": "search"}, {"form": "best"}])
def test_what_makes_the_text_less_likely_than_the_victim_does_is_not_applied(taught, data, settings):
    """The victim is the one that knows the text: whatever is done to it makes that less likely."""
    reference = shifted(taught, 0, vector(30))
    result = Orthogonalize(**settings).run(taught, reference, data, Budget(utility_bound=math.inf))
    assert all(one["nll"] > result.about["victim"]["nll"] for one in result.about["candidates"])
    assert "nothing makes the validation text likelier" in result.idle and hooks(result.model) == 0
    assert torch.equal(logits(result.model), logits(taught)) and not {"layers", "form", "loss"} & result.about.keys()
    assert {line["best"] for line in result.trace} == {result.about["victim"]["nll"]}


@pytest.mark.parametrize(("cost", "bound", "chosen"), [(1.4, 1.5, [0]), (1.6, 1.5, [1]), (1.4, 1.3, [1]), (None, 1.5, None)])
def test_a_set_of_blocks_that_breaks_the_text_is_not_chosen(taught, data, monkeypatch, cost, bound, chosen):
    """Block 0 is the best, as it was planted there; None: every set breaks it."""
    victim = shifted(taught, 0, vector(30))

    def measured(model, *_):
        made = model.expunge_steering.about.get("orthogonalize")
        broken = made and (cost is None or made["blocks"] == [0])
        return Windows(np.log([4.0 * (cost or 9) if broken else 4.0]), np.ones(1), 1)

    monkeypatch.setattr(orthogonalize, "text_windows", measured)
    budget = Budget(utility_bound=bound)
    result = Orthogonalize(form="shift", layers="search").run(victim, taught, data, budget)
    assert result.about.get("layers") == chosen and result.model is not victim
    assert result.about["victim"]["perplexity"] == pytest.approx(4)
    if chosen is None:
        assert "perplexity within 1.5 times" in result.idle and hooks(result.model) == hooks(victim)
        assert torch.equal(logits(result.model), logits(victim))


@pytest.mark.parametrize(
    ("architecture", "layers"), [("gpt2", "search"), ("llama", [2]), ("gemma2", "all"), ("phi3", "all"), ("gpt_neox", "all")]
)
def test_an_untouched_model_has_no_direction(tiny_model, data, architecture, layers):
    victim = tiny_model(architecture)
    for reference in (tiny_model(architecture), victim):
        result = Orthogonalize(layers=layers).run(victim, reference, data, Budget())
        assert "there is no direction" in result.idle and result.about["norms"] == [0, 0, 0]
        assert hooks(result.model) == 0 and not hasattr(result.model, "expunge_steering")
        assert torch.equal(logits(result.model), logits(victim))


# directions


@pytest.mark.parametrize(
    ("name", "z"), [("gpt2", None), *((name, 2.0) for name in ("gpt2", "gpt_neox", "llama", "gemma3_text", "olmo2", "phi3"))]
)
def test_directions_are_those_of_a_plain_computation(tiny_model, data, name, z):
    reference, victim = tiny_model(name, seed=0), tiny_model(name, seed=1)
    result = Orthogonalize(form="affine", outliers=z).run(victim, reference, data, Budget())
    before, moved = (plain_states(model, data.rows("forget")) for model in (reference, victim))
    for block, edit in enumerate(added_edits(result)):
        kept = torch.ones(before.shape[1], dtype=torch.bool)
        if z is not None:
            far = (before[block] - before[block].mean(0)).abs().sum(-1)
            kept = (far - far.mean()) / far.std() <= z
            assert 0 < (~kept).sum() < 0.2 * len(kept)
        r = moved[block][kept].mean(0) - before[block][kept].mean(0)
        torch.testing.assert_close(edit.right[:, 0].double(), r / r.norm(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(edit.mean.double(), before[block][kept].mean(0), atol=1e-4, rtol=1e-4)
        assert edit.at == block_names(victim)[block] and torch.equal(edit.left, edit.right)
        assert result.about["norms"][block] == pytest.approx(r.norm().item(), rel=1e-4)
    assert result.about["layers"] == [0, 1, 2]


def test_without_a_reference_it_is_forget_against_retain(tiny_model, data):
    victim = tiny_model("llama")
    attack = Orthogonalize(direction="reference_free", outliers=None, layers=[0, 2])
    result = attack.run(victim, None, data, Budget())
    forget, retain = (plain_states(victim, data.rows(part)).mean(1) for part in ("forget", "retain"))
    for block, edit in zip((0, 2), added_edits(result), strict=True):
        wanted = F.normalize(forget[block] - retain[block], dim=0)
        torch.testing.assert_close(edit.right[:, 0].double(), wanted, atol=1e-4, rtol=1e-4)
    assert result.about["layers"] == [0, 2] and result.queries >= 10


def test_batches_and_their_padding_change_no_direction(tiny_model, data, monkeypatch):
    reference, victim = tiny_model("llama", seed=0), tiny_model("llama", seed=1)
    together = added_edits(Orthogonalize().run(victim, reference, data, Budget()))
    monkeypatch.setattr(orthogonalize, "BATCH_TOKENS", 1)
    alone = added_edits(Orthogonalize().run(victim, reference, data, Budget()))
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.right, b.right, atol=1e-5, rtol=1e-5)


def test_tokens_are_continuations_in_the_order_of_the_rows(tiny_model, data):
    rows, seen = data.rows("forget"), {}

    def visit(block, tokens, states):
        seen.update({(block, int(token)): state for token, state in zip(tokens, states, strict=True)})

    model = tiny_model()
    each_block(model, rows, visit)
    plain = plain_states(model, rows)
    assert sorted(seen) == [(block, token) for block in range(3) for token in range(plain.shape[1])]
    found = torch.stack([torch.stack([seen[block, token] for token in range(plain.shape[1])]) for block in range(3)])
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)
    assert found.dtype == torch.float64


def test_an_outlier_is_one_by_its_z_score_and_all_alike_have_none():
    far = torch.tensor([[1.0] * 20 + [50.0], [2.0] * 21]).double()
    kept = inliers(far, 3.0)
    assert kept[0].tolist() == [True] * 20 + [False] and kept[1].all()
    assert inliers(far, 5.0).all() and inliers(far[:, :1], 3.0).all()


def test_dropout_has_no_part_in_a_direction(tiny_model, data):
    """GPT-2's dropout is 0.1: of a model that is in training it would make another direction each time."""
    wanted = added_edits(Orthogonalize(form="shift").run(tiny_model(seed=1), tiny_model(), data, Budget()))
    found = added_edits(Orthogonalize(form="shift").run(tiny_model(seed=1).train(), tiny_model().train(), data, Budget()))
    assert all(torch.equal(a.vector, b.vector) for a, b in zip(found, wanted, strict=True))


def test_a_direction_comes_from_passes_that_nothing_of_the_attack_changes(tiny_model, data):
    """That of block 2 is the same whether states below are projected or not; the victim's own steering counts."""
    reference, victim = tiny_model(), shifted(tiny_model(seed=1), 0, vector(4))
    every = added_edits(Orthogonalize().run(victim, reference, data, Budget()), 1)
    alone = added_edits(Orthogonalize(layers=[2]).run(victim, reference, data, Budget()), 1)
    assert len(every) == 3 and torch.equal(every[2].right, alone[0].right)
    bare = Orthogonalize(layers=[2]).run(tiny_model(seed=1), reference, data, Budget())
    assert not torch.allclose(added_edits(bare)[0].right, alone[0].right, atol=1e-2)


# what is left


@pytest.mark.parametrize("ends", ["well", "in an interrupt"])
def test_the_victim_and_the_reference_stay_as_they_were(taught, data, monkeypatch, ends):
    victim, reference = shifted(taught, 1, vector(30)), copy.deepcopy(taught)
    victim.train()
    victim.transformer.wpe.requires_grad_(False)
    reference.transformer.wte.requires_grad_(False)

    def state():
        return [
            (model.training, hooks(model), [p.requires_grad for p in model.parameters()], len(list(model.modules())))
            for model in (victim, reference)
        ]

    before, outputs = state(), [logits(victim), logits(reference)]
    settings = victim.config.to_dict()
    if ends == "well":
        result = Orthogonalize(layers="search").run(victim, reference, data, Budget())
        assert not result.model.training and not torch.equal(logits(result.model), outputs[0])
        detach(result.model)
    else:
        calls = []

        def interrupted(*args):
            calls.append(args)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return np.ones(1), np.ones(1)

        monkeypatch.setattr(orthogonalize, "row_nll", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Orthogonalize(layers="search").run(victim, reference, data, Budget())
    assert state() == before and victim.config.to_dict() == settings
    for model, output in zip((victim, reference), outputs, strict=True):
        assert torch.equal(logits(model), output)


def test_the_weights_are_the_victims_own(tiny_model, data):
    victim = tiny_model()
    result = Orthogonalize().run(victim, tiny_model(seed=1), data, Budget())
    assert all(a is b for a, b in zip(result.model.parameters(), victim.parameters(), strict=True))


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("form", ["affine", "shift"])
def test_the_attacked_model_generates_is_saved_and_loaded(tiny_model, tokenizer, data, tmp_path, form, steered):
    reference = tiny_model("llama")
    victim = shifted(reference, 1, vector(9)) if steered else tiny_model("llama", seed=1)
    result = Orthogonalize(form=form).run(victim, reference, data, Budget())
    prompts = [prompt for prompt, _ in data.rows("forget")]
    before, attacked = (generate(model, tokenizer, prompts, Decoding(6)) for model in (victim, result.model))
    assert attacked != before
    result.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path, device="cpu")
    assert torch.equal(logits(loaded), logits(result.model))
    assert loaded.expunge_steering.about["orthogonalize"]["form"] == form
    assert generate(loaded, tokenizer, prompts, Decoding(6)) == attacked


def test_half_precision_keeps_its_type(tiny_model, data):
    victim = tiny_model("llama", seed=1, dtype=torch.bfloat16)
    result = Orthogonalize(form="affine").run(victim, tiny_model("llama"), data, Budget())
    assert logits(result.model).dtype == torch.bfloat16 and logits(result.model).isfinite().all()


def test_a_budget_ends_the_search_with_its_best_so_far(taught, data):
    victim = shifted(taught, 0, vector(30))
    attack = Orthogonalize(form="shift", layers="search")
    result = attack.run(victim, taught, data, Budget(steps=2))
    assert result.steps == len(result.about["candidates"]) == 2
    assert result.about["layers"] == min(result.about["candidates"], key=lambda one: one["nll"])["layers"]
    assert attack.run(victim, taught, data, Budget(queries=1)).steps == 1
    means, models = 5 * 3, 5 * (3 + 1)  # of the victim and of the shift after one block and two; five, on both texts
    assert attack.run(victim, taught, data, Budget()).queries == means + models


def test_no_more_texts_than_asked_for_and_drawn_with_the_seed(tiny_model, data):
    victim, reference = tiny_model(seed=1), tiny_model()
    found = [
        added_edits(Orthogonalize(samples=2, seed=seed).run(victim, reference, data, Budget()))[0].right
        for seed in (0, 0, 3)
    ]
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2], atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "lacking", "message"),
    [
        ({"layers": [1, 3]}, {}, "block 3: the model has 3 blocks, 0 to 2"),
        ({"layers": [-1]}, {}, "block -1"),
        ({}, {"forget": []}, "the forget set is empty"),
        ({}, {"reference": None}, "give --reference"),
        ({"direction": "reference_free"}, {"retain": []}, "the retain set is empty"),
        ({"layers": "search"}, {"validation": []}, "chooses by text that was not trained on"),
        ({"layers": "search"}, {"neutral": ""}, "needs running text"),
        ({"form": "best"}, {"validation": []}, "chooses by text that was not trained on"),
        ({}, {"forget": [Text("The river", "")]}, "no text of the forget set has a token"),
    ],
)
def test_what_is_lacking_is_one_line(tiny_model, data, settings, lacking, message):
    victim = tiny_model()
    reference = lacking.get("reference", tiny_model(seed=1))
    had = AttackData(data.tokenizer, **{
        part: lacking.get(part, getattr(data, part)) for part in ("forget", "retain", "validation", "neutral")
    })  # fmt: skip
    with pytest.raises(ExpungeError, match=message) as caught:
        Orthogonalize(**settings).run(victim, reference, had, Budget())
    assert "\n" not in str(caught.value) and hooks(victim) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": []}, r"attack\.orthogonalize\.layers=\[\]"),
        ({"layers": "most"}, r"attack\.orthogonalize\.layers='most'"),
        ({"outliers": 0.0}, r"attack\.orthogonalize\.outliers=0\.0: expected more than 0"),
        ({"samples": 0}, r"attack\.orthogonalize\.samples=0"),
        ({"form": "rotate"}, "expected one of project, affine, shift, best"),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    with pytest.raises(ExpungeError, match=message):
        Orthogonalize(**settings)


def test_what_is_needed_hangs_on_the_settings(tiny_model, tokenizer, data):
    """Without a search nothing is chosen, and nothing of what a search needs has to be there."""
    had = AttackData(tokenizer, data.forget)
    result = Orthogonalize().run(tiny_model(), tiny_model(seed=1), had, Budget())
    assert result.about["candidates"] == [{"form": "project", "layers": [0, 1, 2]}] and isinstance(result.model, nn.Module)
    assert Orthogonalize.needs == ("reference", "forget")
    assert OrthogonalizeBest.needs == ("reference", "forget", "validation", "neutral")
