import pytest
import torch
import torch.nn.functional as F

from expunge.engine import collate, run_step
from expunge.errors import ExpungeError
from expunge.methods import Material
from expunge.methods.cosine_rmu import CosineRMU
from expunge.methods.rmu import RMU


def heads_of(method):
    torch.manual_seed(3)
    return {name: head.double() for name, head in method.heads(32).items()}


def step_of(moved, rows, method, heads, plain=True):
    return run_step(*moved, collate(rows), method.layers, method.ref_layers, heads, 0.0, method.ref_sides, plain)


@pytest.mark.parametrize(("kind", "plain"), [("pair_rows", True), ("pair_rows", False), ("set_rows", True)])
@pytest.mark.parametrize("layer", [0, 2])
def test_the_loss_is_that_of_the_equations(moved, request, continuation_states, layer, kind, plain):
    model, reference = moved
    rows = request.getfixturevalue(kind)
    method = CosineRMU(layer=layer, alpha0=2.0).placed(3)
    heads = heads_of(method)
    step = step_of(moved, rows, method, heads, plain)
    forget, kept, before = (
        continuation_states(which, rows, side, layer)
        for which, side in ((model, "forget"), (model, "retain"), (reference.copy, "retain"))
    )
    u, alpha = heads["control"].direction, heads["policy"].alpha
    away = (1 - forget @ u / forget.norm(dim=-1) / u.norm()).mean()
    drift = (1 - (kept * before).sum(-1) / kept.norm(dim=-1) / before.norm(dim=-1)).mean()
    losses = method.loss(step)
    assert alpha != 2.0 and drift > 1e-4
    torch.testing.assert_close(losses["forget"], away)
    torch.testing.assert_close(losses["retain"], alpha * drift)
    assert step.logged == {"forget_loss": pytest.approx(away.item()), "retain_loss": pytest.approx(drift.item())}
    assert set(method.observes) <= step.logged.keys()


def test_no_length_of_states_matters(moved, pair_rows):
    """The last block's output is scaled by 3; its direction stays."""
    model, _ = moved
    method = CosineRMU(layer=2, alpha="fixed", alpha0=4.0).placed(3)
    heads = heads_of(method)
    assert set(heads) == {"control"} and not method.observes
    wanted = method.loss(step_of(moved, pair_rows, method, heads))
    model.transformer.h[2].register_forward_hook(lambda _, args, output: 3 * output)
    found = method.loss(step_of(moved, pair_rows, method, heads))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)


def test_a_fixed_alpha_is_the_weight(moved, pair_rows):
    found = {}
    for alpha0 in (1.0, 4.0):
        method = CosineRMU(alpha="fixed", alpha0=alpha0).placed(3)
        found[alpha0] = method.loss(step_of(moved, pair_rows, method, heads_of(method)))
    torch.testing.assert_close(found[4.0]["retain"], 4 * found[1.0]["retain"])
    torch.testing.assert_close(found[4.0]["forget"], found[1.0]["forget"])


def test_squares_with_a_learned_alpha_are_adaptive_rmu_s(moved, pair_rows, continuation_states):
    """Each of the two changes by itself; the policy sees the retain loss relative to the states' own square."""
    _, reference = moved
    method = CosineRMU(distance="l2", s=2.0).placed(3)
    heads = heads_of(method)
    with torch.no_grad():
        method.prepare(heads, Material(reference.copy, [row["forget"] for row in pair_rows]))
    n = continuation_states(reference.copy, pair_rows, "forget", 1).norm(dim=-1).mean()
    squares = RMU(form="wmdp", c=2 * n.item(), alpha=1.0).placed(3)
    plain = squares.loss(step_of(moved, pair_rows, squares, {"control": heads["control"]}))
    step = step_of(moved, pair_rows, method, heads)
    losses = method.loss(step)
    torch.testing.assert_close(losses["forget"], plain["forget"])
    torch.testing.assert_close(losses["retain"], heads["policy"].alpha * plain["retain"])
    assert step.logged["retain_loss"] == pytest.approx((plain["retain"] / (n**2 / 32)).item())
    assert step.logged["forget_loss"] == pytest.approx(plain["forget"].item())


def test_after_a_step_the_policy_learns_and_draws_anew():
    method = CosineRMU(reward="product", alpha0=3.0).placed(3)
    heads = heads_of(method)
    used = heads["policy"].alpha
    assert method.after_step(heads, {"forget_loss": 1.0, "retain_loss": 0.0}) == {
        "alpha": used,
        "alpha_mean": pytest.approx(3.0),
    }
    assert heads["policy"].alpha != used
    found = method.after_step(heads, {"forget_loss": 0.8, "retain_loss": 0.5})
    assert found["reward"] == pytest.approx(0.2 * 0.5)


def test_the_noise_follows_from_the_seed_of_training():
    alphas = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        alphas.append(CosineRMU().placed(3).heads(32)["policy"].alpha)
    assert alphas[0] == alphas[1] != alphas[2]


def test_forget_states_are_turned_towards_u(moved, pair_rows, continuation_states):
    model, _ = moved
    method = CosineRMU(alpha="fixed", alpha0=0.1).placed(3)
    heads = heads_of(method)
    weight = model.transformer.h[1].mlp.c_proj.weight
    turned = []
    for _ in range(3):
        states = continuation_states(model, pair_rows, "forget", 1)
        turned.append(F.cosine_similarity(states, heads["control"].direction, dim=-1).mean().item())
        losses = method.loss(step_of(moved, pair_rows, method, heads))
        (slope,) = torch.autograd.grad(sum(losses.values()), weight)
        with torch.no_grad():
            weight -= slope
    assert turned[0] < turned[1] < turned[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 3.0}, "method.alpha=3.0: expected one of fixed, learned"),
        ({"alpha0": 0.0}, "method.alpha0=0.0: cosine_rmu wants a number > 0"),
        ({"alpha0": 2e4}, "method.alpha0=20000.0: cosine_rmu wants a number between 0.001 and 10000 where alpha is learned"),
        ({"alpha0": 1e-3}, "method.alpha0=0.001: cosine_rmu wants a number between 0.001 and 10000 where alpha is learned"),
        ({"alpha_learning_rate": 0.0}, "method.alpha_learning_rate=0.0: cosine_rmu wants a number > 0"),
        ({"reward": "best"}, "method.reward='best': expected one of normalised, improvement, product, literal"),
        ({"distance": "cos"}, "method.distance='cos': expected one of cosine, l2"),
        ({"s": 0}, "method.s=0.0: cosine_rmu wants a number > 0"),
    ],
)
def test_bad_hyper_parameters_are_one_line(settings, message):
    with pytest.raises(ExpungeError) as caught:
        CosineRMU(**settings)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_fixed_alpha_has_no_bounds():
    assert CosineRMU(alpha="fixed", alpha0=2e4).alpha0 == 2e4
