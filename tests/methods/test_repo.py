import copy
import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from expunge.engine import Head, States, Step, collate, run_step
from expunge.errors import ExpungeError
from expunge.layout import Side, pack
from expunge.losses import domain_bce
from expunge.methods.repo import REPO
from expunge.models import Reference

ROWS = [
    {"retain": ([5, 6, 7], [8, 9]), "forget": ([5, 6, 7], [10, 11, 12])},
    {"retain": ([20], [21, 22, 23, 24]), "forget": ([20], [25])},
]


def heads_of(method: REPO, width: int = 32) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {name: head.double() for name, head in method.heads(width).items()}


def step_of(model, reference, method: REPO, rows=ROWS, heads=None, progress: float = 0.0) -> Step:
    heads = heads or heads_of(method)
    return run_step(model, reference, collate(rows), method.layers, method.ref_layers, heads, progress)


@pytest.fixture
def model(tiny_model):
    return tiny_model(dtype=torch.double)


def test_with_weight_zero_nothing_pulls_at_the_reference(model):
    method = REPO(weight=0.0)
    step = step_of(model, Reference(model), method)
    losses = method.loss(step)
    assert losses["anchor"].item() == 0
    sum(losses.values()).backward()
    assert max(p.grad.abs().max() for p in model.parameters() if p.grad is not None) < 1e-12
    assert step.heads["discriminator"][0].weight.grad.abs().max() > 0  # D learns all the same


def test_the_model_climbs_the_loss_that_the_discriminator_descends(model):
    method = REPO(weight=0.3)
    step = step_of(model, Reference(model), method)
    discriminator = step.heads["discriminator"]
    masks = {side: step.mask(side, "continuation") for side in ("retain", "forget")}
    plain = domain_bce({side: discriminator(step.hidden(side)).squeeze(-1) for side in masks}, masks)
    wanted = [model.transformer.h[0].mlp.c_fc.weight, discriminator[0].weight]
    theta, phi = torch.autograd.grad(plain, wanted, retain_graph=True)
    erase = method.loss(step)["erase"]
    torch.testing.assert_close(erase, plain)
    theta_reversed, phi_same = torch.autograd.grad(erase, wanted)
    assert theta.abs().max() > 1e-6
    torch.testing.assert_close(theta_reversed, -0.3 * theta)
    torch.testing.assert_close(phi_same, phi)


@pytest.mark.parametrize(
    "method",
    [
        REPO(),
        REPO(layer=1),
        REPO(layer="pre_norm"),
        REPO(segment=2),
        REPO(segment=0),
        REPO(kl="reverse"),
        REPO(erase_on="all", anchor_on="continuation"),
        REPO(depth=3, width=5),
        REPO(depth=0),
    ],
    ids=str,
)
def test_every_option_ignores_padding_and_the_order_of_the_batch(model, method):
    reference, heads = Reference(model), heads_of(method)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight.mul_(1.5)
    plain = method.loss(step_of(model, reference, method, heads=heads))
    flipped = method.loss(step_of(model, reference, method, ROWS[::-1], heads))
    batch = collate(ROWS)
    for side in batch.values():
        side["ids"] = torch.cat([side["ids"], torch.full((2, 5), 77)], 1)
    padded = method.loss(run_step(model, reference, batch, method.layers, method.ref_layers, heads, 0.0))
    assert plain["anchor"] > 0
    for name, value in plain.items():
        torch.testing.assert_close(flipped[name], value)
        torch.testing.assert_close(padded[name], value)


def test_which_tokens_are_anchored(model):
    reference = Reference(model)
    with torch.no_grad():
        model.transformer.wte.weight[6] += 1.0  # a token of one prompt
    step = step_of(model, reference, REPO())
    everywhere, continuation = (REPO(anchor_on=where).loss(step)["anchor"] for where in ("all", "continuation"))
    torch.testing.assert_close(everywhere, step.token_kl("retain", "all"))
    torch.testing.assert_close(continuation, step.token_kl("retain", "continuation"))
    assert everywhere != continuation


def test_neutral_text_is_anchored_where_there_is_any(model):
    reference, method = Reference(model), REPO()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(1.1)
    step = step_of(model, reference, method, [{**row, "anchor": ([], [40, 41, 42])} for row in ROWS])
    losses = method.loss(step)
    assert set(losses) == {"anchor", "anchor_text", "erase"}
    torch.testing.assert_close(losses["anchor_text"], step.token_kl("anchor", "all"))


def parameters(method: REPO, width: int) -> int:
    return sum(p.numel() for p in method.heads(width)["discriminator"].parameters())


def test_the_discriminator_has_the_size_that_is_asked_for():
    d = 48
    assert parameters(REPO(depth=0), d) == d + 1
    assert parameters(REPO(depth=0, layer=2), d) == d + 1  # the norm before it has no parameters
    assert parameters(REPO(depth=1, width=256), d) == d * 256 + 256 + 256 + 1
    assert parameters(REPO(depth=2, width=10), d) == d * 10 + 10 + 10 * 10 + 10 + 10 + 1


def test_states_that_are_not_normed_are_normed_before_the_discriminator():
    states = 1000 * torch.randn(2, 3, 16)
    for layer in (1, "pre_norm"):
        discriminator = REPO(layer=layer).heads(16)["discriminator"]
        torch.testing.assert_close(discriminator(states), discriminator(7 * states))
    assert REPO(layer=1).layers == ("final", 1)
    assert REPO().layers == REPO(layer=1).ref_layers == ("final",)


def test_the_ramp_rises_from_nothing_to_the_weight():
    method = REPO(weight=0.5, ramp=True)
    assert method.pressure(0.0) == 0
    assert method.pressure(0.1) == pytest.approx(0.5 * (2 / (1 + math.exp(-1)) - 1))
    assert method.pressure(1.0) == pytest.approx(0.5, rel=1e-3)
    assert REPO(weight=0.5).pressure(0.0) == 0.5


@pytest.mark.parametrize("layer", ["final", 1])
def test_under_autocast_the_discriminator_decides_in_float32(tiny_model, layer):
    method, model = REPO(layer=layer, segment=0), tiny_model()
    heads = method.heads(32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = step_of(model, Reference(model), method, heads=heads)
        losses = method.loss(step)
    assert losses["erase"].dtype == torch.float32
    states, masks = {}, {}
    for side in ("retain", "forget"):
        masks[side] = torch.ones(2, 1, dtype=torch.bool)
        rows = zip(step.hidden(side, layer).float(), step.mask(side, "continuation"), strict=True)
        states[side] = heads["discriminator"](torch.stack([row[kept].mean(0) for row, kept in rows]))
    torch.testing.assert_close(losses["erase"], domain_bce(states, masks), rtol=1e-6, atol=1e-6)
    sum(losses.values()).backward()
    assert torch.isfinite(model.transformer.wte.weight.grad).all()


def test_decisions_are_logged(model):
    class Knows(nn.Module):
        """Right on every retain token and on half of the forget side."""

        def __init__(self):
            super().__init__()
            self.shape = nn.Parameter(torch.zeros(1))
            nines = torch.full((2, 6, 1), 9.0)
            self.answers = iter([-nines, nines * torch.tensor([[[1.0]], [[-1.0]]])])

        def forward(self, states):
            return next(self.answers) + self.shape

    rows = [{"retain": ([5, 6], [8, 9]), "forget": ([5, 6], [10, 11])}] * 2
    batch = collate([*rows])
    for side in batch.values():
        side["ids"] = torch.cat([side["ids"], torch.zeros(2, 2, dtype=torch.long)], 1)
    step = run_step(model.float(), Reference(model), batch, ("final",), ("final",), {"discriminator": Knows()}, 0.0)
    REPO().loss(step)
    assert step.logged["discriminator_accuracy"] == pytest.approx((1 + 0.5) / 2)
    assert step.logged["discriminator_forget"] == pytest.approx(0.5, abs=1e-3)
    assert step.logged["discriminator_bce"] == pytest.approx(9 / 4, rel=1e-3)  # of 8 decisions, 2 cost 9 nats


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -0.1}, "method.weight=-0.1: repo wants a number >= 0"),
        ({"weight": "high"}, "method.weight='high': expected a number"),
        ({"width": 0}, "method.width=0: repo wants at least 1 hidden unit"),
        ({"depth": -1}, "method.depth=-1: repo wants 0"),
        ({"segment": -2}, "method.segment=-2: repo wants 1 or more"),
        ({"kl": "sideways"}, "method.kl='sideways': expected one of forward, reverse"),
        ({"layer": "middle"}, "method.layer='middle': expected a whole number or final or pre_norm"),
        ({"layer": -1}, "method.layer=-1: repo wants 0 or more"),
        ({"erase_on": "prompt"}, "method.erase_on='prompt': expected one of continuation, all"),
        ({"anchor_on": "last"}, "method.anchor_on='last': expected one of continuation, all"),
    ],
)
def test_bad_hyper_parameters_are_one_line(settings, message):
    with pytest.raises(ExpungeError) as caught:
        REPO(**settings)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def planted(theta: nn.Embedding, seed: int) -> dict[str, torch.Tensor]:
    """States `[64, 4, d]` of each side: tokens of its own, in a context that adds Gaussian noise."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(8, (64, 4), generator=generator)
    context = {side: torch.randn(64, 4, theta.embedding_dim, generator=generator) for side in ("retain", "forget")}
    return {"retain": theta(tokens) + context["retain"], "forget": theta(8 + tokens) + context["forget"]}


def erase_planted(weight: float, steps: int = 200) -> tuple[float, float]:
    """Train embeddings whose sides lie 6 sigma apart: a fresh linear probe's accuracy on new states, and the anchor."""
    torch.manual_seed(0)
    d = 8
    method = REPO(weight=weight, width=32)
    theta, head, discriminator = nn.Embedding(16, d), nn.Linear(d, 20), method.heads(d)
    with torch.no_grad():
        theta.weight.mul_(0.3)[8:, 0] += 6
    reference = copy.deepcopy(theta).requires_grad_(False)
    optimizer = torch.optim.Adam([*theta.parameters(), *discriminator["discriminator"].parameters()], lr=0.02)
    side = Side(torch.zeros(64, 4, dtype=torch.long), torch.zeros(64, dtype=torch.long), torch.full((64,), 4))
    sides = {"retain": side, "forget": side}
    rows = pack(sides, plain=True)
    for seed in range(steps):
        policy, frozen = (torch.cat(list(planted(table, seed).values())) for table in (theta, reference))
        states, frozen_states = (States(rows, {"final": x}) for x in (policy, frozen))
        step = Step(sides, states, frozen_states, Head(head), Head(head), discriminator, seed / steps)
        losses = method.loss(step)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    with torch.no_grad():
        fit, test = (torch.cat([x.flatten(0, 1) for x in planted(theta, seed).values()]) for seed in (-1, -2))
    labels = torch.arange(2).repeat_interleave(64 * 4)
    return LogisticRegression().fit(fit, labels).score(test, labels), losses["anchor"].item()


def test_what_tells_the_sides_apart_is_erased_and_a_fresh_probe_agrees():
    accuracy, anchor = erase_planted(weight=1.0)
    assert accuracy < 0.65
    assert anchor < 0.1


def test_without_pressure_it_stays():
    accuracy, anchor = erase_planted(weight=0.0)
    assert accuracy > 0.99
    assert anchor < 1e-4
