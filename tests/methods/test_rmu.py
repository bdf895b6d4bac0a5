import pytest
import torch
import torch.nn.functional as F

from expunge.data import Pair
from expunge.engine import collate, run_step
from expunge.errors import ExpungeError
from expunge.methods.rmu import RMU
from expunge.methods.steered import Control
from expunge.models import Reference
from expunge.training import UnlearnConfig, UnlearnTrainer


def step_of(model, reference, rows, method: RMU, plain: bool = False):
    torch.manual_seed(3)
    heads = {name: head.double() for name, head in method.heads(32).items()}
    return run_step(model, reference, collate(rows), method.layers, method.ref_layers, heads, 0.0, method.ref_sides, plain)


@pytest.mark.parametrize(("kind", "plain"), [("pair_rows", True), ("pair_rows", False), ("set_rows", True)])
@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize(
    ("form", "c", "alpha"),
    [("repo", 500.0, 0.95), ("repo_forget", 500.0, 0.95), ("wmdp", 20.0, 100.0), ("wmdp", 6.5, 1200.0)],
)
def test_the_loss_is_that_of_the_equations(moved, request, continuation_states, form, c, alpha, layer, kind, plain):
    model, reference = moved
    rows = request.getfixturevalue(kind)
    own = {} if (c, alpha) != (6.5, 1200.0) else {"c": c, "alpha": alpha}
    step = step_of(model, reference, rows, method := RMU(form=form, layer=layer, **own).placed(3), plain)
    u = step.heads["control"].direction
    forget, kept, before = (
        continuation_states(which, rows, side, layer)
        for which, side in ((model, "forget"), (model, "retain"), (reference.copy, "retain"))
    )
    away = ((forget - c * u) ** 2).sum(-1).mean() / 32
    drift = ((kept - before) ** 2).sum(-1).mean() / 32
    losses = method.loss(step)
    assert drift > 1e-3
    of_forget, of_retain = {"repo": (0.05, 0.95), "repo_forget": (0.95, 0.05), "wmdp": (1.0, alpha)}[form]
    torch.testing.assert_close(losses["forget"], of_forget * away)
    torch.testing.assert_close(losses["retain"], of_retain * drift)
    assert step.logged["forget_norm"] == pytest.approx(forget.norm(dim=-1).mean().item())
    assert step.logged["retain_norm"] == pytest.approx(kept.norm(dim=-1).mean().item())


def test_at_the_reference_there_is_no_retain_loss_and_forgetting_pulls_towards_u(tiny_model, pair_rows):
    model = tiny_model(dtype=torch.double)
    reference, method = Reference(model), RMU(form="wmdp").placed(3)
    losses = method.loss(step_of(model, reference, pair_rows, method))
    assert losses["retain"].item() < 1e-20
    weight = model.transformer.h[1].mlp.c_proj.weight
    (slope,) = torch.autograd.grad(losses["forget"], weight)
    with torch.no_grad():
        weight -= 1e-2 * slope
    after = method.loss(step_of(model, reference, pair_rows, method))
    assert after["forget"] < losses["forget"] and after["retain"] > 0


def test_the_direction_is_a_unit_vector_drawn_once_for_a_seed():
    def drawn(vector, seed, width=4096):
        torch.manual_seed(seed)
        return Control(width, vector, 3.0)

    for vector in ("uniform", "gaussian"):
        one, again, other = (drawn(vector, seed).direction for seed in (0, 0, 1))
        assert torch.equal(one, again) and not torch.equal(one, other)
        assert one.norm().item() == pytest.approx(1)
    ones = torch.ones(4096)
    uniform, gaussian = (drawn(vector, 0).direction for vector in ("uniform", "gaussian"))
    assert (uniform >= 0).all()
    assert F.cosine_similarity(uniform, ones, dim=0) == pytest.approx(0.75**0.5, abs=0.01)  # E[x] / sqrt(E[x^2])
    assert F.cosine_similarity(gaussian, ones, dim=0).abs() < 0.1
    torch.testing.assert_close(drawn("uniform", 0).target, 3 * uniform)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"c": 0}, "method.c=0.0: rmu wants a number > 0, or null"),
        ({"alpha": 1.5}, "method.alpha=1.5: rmu wants a number from 0 to 1 in the form repo"),
        ({"alpha": -0.1}, "method.alpha=-0.1: rmu wants a number from 0 to 1 in the form repo"),
        ({"form": "repo_forget", "alpha": 2}, "method.alpha=2.0: rmu wants a number from 0 to 1 in the form repo_forget"),
        ({"form": "wmdp", "alpha": -1.0}, "method.alpha=-1.0: rmu wants a number >= 0"),
        ({"form": "wmpd"}, "method.form='wmpd': expected one of repo, repo_forget, wmdp"),
        ({"vector": "ones"}, "method.vector='ones': expected one of uniform, gaussian"),
        ({"layer": 1.5}, "method.layer=1.5: expected a whole number or null"),
        ({"train_blocks": "all"}, "method.train_blocks='all': expected "),
    ],
)
def test_bad_hyper_parameters_are_one_line(settings, message):
    with pytest.raises(ExpungeError) as caught:
        RMU(**settings)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_each_form_has_its_own_numbers():
    for form in ("repo", "repo_forget"):
        assert (RMU(form=form).placed(12).c, RMU(form=form).placed(12).alpha) == (500.0, 0.95)
    wmdp = RMU(form="wmdp").placed(12)
    assert (wmdp.c, wmdp.alpha) == (20.0, 100.0)
    assert RMU(form="wmdp", c=6.5, alpha=1200).placed(32) == RMU(
        form="wmdp", c=6.5, alpha=1200, layer=7, train_blocks=[5, 6, 7]
    )


def test_a_few_steps_move_forget_states_to_the_target_and_no_others(tmp_path, tiny_model, tokenizer, continuation_states):
    """A positive control: forget and retain texts have tokens of their own, so that both losses can be met."""
    model = tiny_model("llama")
    words = {"retain": [" river", " mill", " sea", " hill"], "forget": [" letter", " window", " rain", " apple"]}
    pairs = [
        Pair("The", *("".join(words[side][(i + j) % 4] for j in range(3)) for side in ("retain", "forget")))
        for i in range(4)
    ]
    method = RMU(form="wmdp", c=12.0, alpha=20.0, layer=1)
    args = UnlearnConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        per_device_train_batch_size=4,
        learning_rate=2e-2,
        warmup_steps=0,
        lr_scheduler_type="constant",
        max_steps=60,
    )
    trainer = UnlearnTrainer(model, method, args, pairs, tokenizer)
    rows = [trainer.rows[i] for i in range(4)]
    before = {side: continuation_states(model, rows, side, 1).detach() for side in words}
    trainer.train()
    target = trainer.heads["control"].target
    after = {side: continuation_states(model, rows, side, 1).detach() for side in words}

    def apart(states):
        return (states - target).norm(dim=-1).mean()

    def drift(side):
        return (after[side] - before[side]).norm(dim=-1).mean() / before[side].norm(dim=-1).mean()

    assert apart(after["forget"]) < 0.25 * apart(before["forget"])
    assert (
        F.cosine_similarity(after["forget"], target, dim=-1).mean()
        > 0.9
        > F.cosine_similarity(before["forget"], target, dim=-1).mean() + 0.6
    )
    assert drift("retain") < 0.15 * drift("forget")
