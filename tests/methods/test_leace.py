"""LEACE: the theorem on random states, the equation in plain double precision, moments in batches, several layers."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from expunge.errors import ExpungeError
from expunge.fitting import fit_and_apply
from expunge.folding import fold
from expunge.methods import Material
from expunge.methods.leace import LEACE, Moments, eraser, moments, shrunk
from expunge.models import depth, hidden_states
from expunge.steering import detach

D = 6


def drawn(n=400, gap=1.5, seed=0, d=D):
    """Correlated states `[n, d]`, labels `[n, 1]`, in float64; the labels move two coordinates."""
    draw = torch.Generator().manual_seed(seed)
    z = torch.randint(0, 2, (n, 1), generator=draw).double()
    x = torch.randn(n, d, generator=draw, dtype=torch.float64) @ torch.randn(d, d, generator=draw, dtype=torch.float64) + 3
    x[:, :2] += gap * z
    return x, z


def covariances(x, z):
    x, z = x - x.mean(0), z - z.mean(0)
    return x.T @ x / len(x), x.T @ z / len(x)


def erased(x, left, right, mean=None):
    return x - (x - (x.mean(0) if mean is None else mean)) @ right @ left.T


def oracle(xx, xz):
    """P = I - W^+ P_(W xz) W with W = xx^(-1/2), for an invertible xx and one label."""
    values, vectors = np.linalg.eigh(xx.numpy())
    w = vectors @ np.diag(values**-0.5) @ vectors.T
    a = w @ xz.numpy()
    projection = a @ a.T / (a.T @ a)
    return torch.from_numpy(np.eye(len(w)) - np.linalg.inv(w) @ projection @ w)


def test_it_is_the_equation():
    xx, xz = covariances(*drawn())
    left, right = eraser(xx, xz)
    torch.testing.assert_close(torch.eye(D, dtype=torch.float64) - left @ right.T, oracle(xx, xz))


@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
def test_no_covariance_with_the_label_is_left(shrinkage):
    x, z = drawn()
    xx, xz = covariances(x, z)
    left, right = eraser(shrunk(xx, shrinkage), xz)
    found = erased(x, left, right)
    assert covariances(x, z)[1].abs().max() > 0.1
    assert covariances(found, z)[1].abs().max() < 1e-10
    torch.testing.assert_close(found.mean(0), x.mean(0))
    means = [found[z[:, 0] == label].mean(0) for label in (0, 1)]
    torch.testing.assert_close(means[0], means[1])


def test_a_fresh_probe_is_at_chance():
    x, z = drawn(n=1000)
    labels = z[:, 0].numpy()
    found = erased(x, *eraser(*covariances(x, z)))
    kept, left = (LogisticRegression(C=1e6, max_iter=1000).fit(s.numpy(), labels) for s in (x, found))
    assert kept.score(x.numpy(), labels) > 0.7
    assert left.score(found.numpy(), labels) == pytest.approx(max(labels.mean(), 1 - labels.mean()))
    assert np.abs(left.coef_).max() < 0.02 * np.abs(kept.coef_).max()


def test_erasing_twice_is_erasing_once():
    x, z = drawn()
    left, right = eraser(*covariances(x, z))
    once = erased(x, left, right)
    torch.testing.assert_close(erased(once, left, right, x.mean(0)), once)


def test_nothing_smaller_would_do():
    """LEACE moves states less, in the mean of squares, than the projection along the difference of the means."""
    x, z = drawn()
    difference = x[z[:, 0] == 1].mean(0) - x[z[:, 0] == 0].mean(0)
    unit = (difference / difference.norm())[:, None]
    moved = [(erased(x, *how) - x).pow(2).sum(1).mean() for how in (eraser(*covariances(x, z)), (unit, unit))]
    assert moved[0] < 0.9 * moved[1]


def test_no_direction_gains_variance():
    """So that a bound on the trace of the covariance, as the authors' code has it, would never bind."""
    xx, xz = covariances(*drawn())
    left, right = eraser(xx, xz)
    kept = torch.eye(D, dtype=torch.float64) - left @ right.T
    assert torch.linalg.eigvalsh(xx - kept @ xx @ kept.T).min() > -1e-10


def test_where_there_is_nothing_to_erase_nothing_is():
    x, z = drawn()
    balanced = torch.cat([x, x])
    label = torch.cat([torch.zeros_like(z), torch.ones_like(z)])
    left, right = eraser(*covariances(balanced, label))
    assert left.shape == right.shape == (D, 0)
    assert torch.equal(erased(balanced, left, right), balanced)


def test_directions_without_variance_stay_out_of_it():
    x, z = drawn()
    flat = torch.cat([x, torch.full_like(x[:, :2], 7.0), x[:, :1]], dim=1)
    left, right = eraser(*covariances(flat, z))
    found = erased(flat, left, right)
    assert covariances(found, z)[1].abs().max() < 1e-10
    torch.testing.assert_close(found[:, D : D + 2], flat[:, D : D + 2])


@pytest.mark.parametrize("sizes", [[400], [1, 399], [150, 50, 200]])
def test_moments_are_the_same_in_any_batches(sizes):
    x, z = drawn()
    found = Moments(D)
    for part in zip(x.split(sizes), z.split(sizes), strict=True):
        found.add(*part)
    xx, xz = covariances(x, z)
    torch.testing.assert_close(found.xx / found.n, xx)
    torch.testing.assert_close(found.xz / found.n, xz)
    torch.testing.assert_close(found.mean, x.mean(0))


ROWS = [([5, 17, 9, 30], 0, True), ([8, 3], 1, False), ([40, 3, 7, 60, 2, 2], 2, True), ([12, 13, 5], 0, False)]


@pytest.mark.parametrize("pool", ["tokens", "last", "mean"])
def test_the_states_of_each_pool(tiny_model, pool):
    """One text at a time, without padding, against all in a batch and in another order."""
    model, states, labels = tiny_model(), [], []
    for ids, first, bad in ROWS:
        own = hidden_states(model, torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long), (1,))[1][0].detach()[
            first:
        ]
        kept = {"tokens": own, "last": own[-1:], "mean": own.mean(0, keepdim=True)}[pool].double()
        states.append(kept)
        labels += [float(bad)] * len(kept)
    x, z = torch.cat(states), torch.tensor(labels, dtype=torch.float64)[:, None]
    for rows in (ROWS, ROWS[::-1]):
        found = moments(model, rows, 1, pool)
        assert found.n == len(x)
        torch.testing.assert_close(found.xx / found.n, covariances(x, z)[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.xz / found.n, covariances(x, z)[1], atol=1e-5, rtol=1e-5)


def labelled(n=60, seed=0):
    draw = torch.Generator().manual_seed(seed)
    sizes = [3 + i % 5 for i in range(n)]
    return [
        ((torch.randint(0, 40, (size,), generator=draw) + (20 if i % 2 else 100)).tolist(), bool(i % 2))
        for i, size in enumerate(sizes)
    ]


def probe_accuracy(model, layer):
    x = [
        hidden_states(model, torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long), (layer,))[layer][0].detach()
        for ids, _ in labelled()
    ]
    y = np.concatenate([[bad] * len(s) for s, (_, bad) in zip(x, labelled(), strict=True)])
    x = torch.cat(x).double().numpy()
    x = (x - x.mean(0)) / x.std(0)
    return LogisticRegression(max_iter=1000).fit(x, y).score(x, y), max(y.mean(), 1 - y.mean())


@pytest.mark.parametrize("affine", [True, False])
def test_no_probe_finds_it_at_any_of_the_layers(tiny_model, architecture, affine):
    """The deeper ones are fitted with the shallower ones in place: else they would be blind to what those change."""
    model = tiny_model(architecture)
    before = [probe_accuracy(model, layer) for layer in (1, "final")]
    steering = LEACE(at=["final", 0], affine=affine).placed(depth(model)).fit(Material(model, [], labelled()))
    assert [int(found["rank"]) for found in steering.about["erased"].values()] == [1, 1]
    assert all(found > chance + 0.15 for found, chance in before)
    with steering.attached(model):
        for layer in (1, "final"):
            found, chance = probe_accuracy(model, layer)
            assert found == pytest.approx(chance, abs=0.02)
    with steering.attached(model):
        states = moments(model, [(ids, 0, bad) for ids, bad in labelled()], "final", "tokens")
    assert states.xz.abs().max() / states.n < 1e-4


def test_sides_are_the_continuations(tiny_model):
    model = tiny_model()
    forget, retain = ([([7, 8], ids) for ids, bad in labelled() if bad is kind] for kind in (True, False))
    steering = LEACE(fit_on="sides").placed(3).fit(Material(model, forget, retain=retain))
    rows = [(p + c, 2, bad) for side, bad in ((forget, True), (retain, False)) for p, c in side]
    states = moments(model, rows, "final", "tokens")
    left, _ = eraser(states.xx / states.n, states.xz / states.n)
    torch.testing.assert_close(steering.edits[0].left, left.float())
    torch.testing.assert_close(steering.edits[0].mean, states.mean.float())
    assert steering.about["erased"]["final"]["states"] == sum(len(c) for _, c in forget + retain)


def test_without_a_constant_it_becomes_the_head(tiny_model):
    model = tiny_model("llama")
    made = LEACE(affine=False).placed(3).fit(Material(model, [], labelled()))
    with made.attached(model):
        steered = model(input_ids=torch.arange(8)[None]).logits
    assert fold(model, made)
    torch.testing.assert_close(model(input_ids=torch.arange(8)[None]).logits, steered, atol=1e-4, rtol=1e-4)
    assert not fold(model, LEACE().placed(3).fit(Material(model, [], labelled(seed=1))))


def test_fitted_on_pairs(tiny_model, tokenizer, pairs, caplog):
    model = tiny_model()
    about = fit_and_apply(model, tokenizer, LEACE(fit_on="sides", shrinkage=0.1), pairs)
    assert not about["folded"] and about["erased"]["final"]["rank"] == 1
    assert detach(model) is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shrinkage": 1.0}, "shrinkage=1.0"),
        ({"svd_tol": 0.0}, "svd_tol=0.0"),
        ({"at": []}, "at least one place"),
        ({"at": ["last"]}, "method.at"),
        ({"pool": "max"}, "expected one of tokens, last, mean"),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    with pytest.raises(ExpungeError, match=message):
        LEACE(**settings)


def test_what_is_missing_is_said(tiny_model):
    with pytest.raises(ExpungeError, match="block 3"):
        LEACE(at=[3]).placed(3)
    with pytest.raises(ExpungeError, match="texts of both"):
        LEACE().placed(3).fit(Material(tiny_model(), [], [([5, 6], True)]))
