"""REINFORCE against mathematics: its estimate's mean and spread, and toys whose best alpha is known."""

import logging
import math
from pathlib import Path

import pytest
import torch

from expunge.methods.policy import SIGMA, AlphaPolicy, score_gradient

MU, C = 1.0, 3.0


def estimates(baseline: float) -> torch.Tensor:
    """Score-function gradients of E[-(zeta - c)^2] by mu, one for each draw of zeta."""
    noise = torch.randn(40_000, generator=torch.Generator().manual_seed(0), dtype=torch.double).tolist()
    return torch.tensor([score_gradient(-((MU + SIGMA * x - C) ** 2) - baseline, x) for x in noise])


def test_the_score_gradient_is_the_gradient_of_the_mean():
    """E[-(zeta - c)^2] = -(mu - c)^2 - sigma^2, whose gradient is -2 (mu - c)."""
    plain, centred = estimates(0.0), estimates(-((MU - C) ** 2) - SIGMA**2)
    assert centred.mean().item() == pytest.approx(-2 * (MU - C), abs=0.1)
    assert plain.mean().item() == pytest.approx(-2 * (MU - C), abs=0.3)
    assert centred.std() < 0.5 * plain.std()


@pytest.fixture
def known(monkeypatch):
    """The recipe of a toy whose best alpha is known."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "recipes/objectives_vary"))
    import known_alpha

    return known_alpha


@pytest.mark.parametrize("start", [0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize(
    ("reward", "speed"), [("normalised", 0.5), ("normalised", 0.05), ("improvement", 0.05), ("product", 0.5)]
)
def test_alpha_is_found_from_wherever_it_starts(known, reward, speed, start):
    """Within 15 %, by 2,000 steps; the spread of the draws puts it e^(0.3^2 / 2), 5 %, above the best fixed one."""
    means = known.learn(AlphaPolicy(start, reward, seed=1), 2000, speed)
    assert known.settled(means) == pytest.approx(known.BEST[reward], rel=0.15)


@pytest.mark.parametrize("reward", ["normalised", "product"])
def test_of_fixed_alphas_the_best_is_the_known_one(known, reward):
    """What the test above goes by: on a grid no other alpha leaves the toy with a higher reward."""
    policy = AlphaPolicy(1.0, reward)
    policy.observe(*known.losses(0.0))
    grid = {
        alpha: policy._reward(*known.losses(1 / (1 + alpha))) for alpha in (0.1, 0.5, 0.9, 1.0, 1.1, 18.0, 20.0, 22.0, 100.0)
    }
    assert max(grid, key=lambda alpha: grid[alpha]) == known.BEST[reward]


def test_the_noise_of_batches_can_drown_what_alpha_does(known):
    """The limit that docs/methods.md states: where a step does little and batches differ much, alpha does not get there."""
    means = known.learn(AlphaPolicy(100.0, "normalised", seed=1), 1000, speed=0.01, noise=0.3)
    assert known.settled(means) > 60


def test_the_literal_reward_has_no_optimum_but_no_retain_loss(known, caplog):
    """L_F + alpha L_R >= L_F: alpha falls until it is stopped."""
    with caplog.at_level(logging.WARNING, "expunge"):
        means = known.learn(policy := AlphaPolicy(1.0, "literal", seed=0), 1300)
    assert means[500] < 0.1 and means[-1] == pytest.approx(1e-3, rel=1e-4)
    [line] = [record.message for record in caplog.records if "run to its bound of 0.001" in record.message]
    assert "nothing in method.reward=literal holds it" in line
    assert 0 < policy.alpha < 1e-2


def test_a_reward_that_rises_with_alpha_runs_to_the_other_bound(caplog):
    policy, retain = AlphaPolicy(5e3, "normalised", rate=0.05), 1.0
    with caplog.at_level(logging.WARNING, "expunge"):
        for _ in range(100):
            used = policy.alpha
            last = policy.observe(1.0, retain)["alpha_mean"]
            retain = 1e3 / used
    assert last == pytest.approx(1e4, rel=1e-2)
    assert "alpha has run to its bound of 10000 at step" in caplog.records[0].message


def test_a_product_takes_an_unbounded_loss_relative_to_its_first():
    """The same toy with L_F a thousand times as large."""
    policy, other = AlphaPolicy(1.0, "product", bounded=True), AlphaPolicy(1.0, "product", bounded=False)
    for forget, retain in ((1.0, 0.0), (0.6, 0.1), (0.7, 0.2), (0.3, 0.3)):
        policy.observe(forget, retain)
        other.observe(1000 * forget, retain)
    assert policy["mu"] != 0
    assert other["mu"] == pytest.approx(policy["mu"])


LOSSES = [(1.0, 0.0), (0.9, 0.02), (0.7, 0.01), (0.5, 0.2), (0.4, 0.1), (0.6, 0.05), (0.2, 0.3), (0.1, 0.2)]


def rewards(reward: str) -> list[float]:
    policy = AlphaPolicy(2.0, reward)
    return [policy.observe(*losses).get("reward", math.nan) for losses in LOSSES]


def test_the_rewards_by_hand():
    """The first step has none: no alpha brought its losses about."""
    assert math.isnan(rewards("product")[0])
    assert rewards("normalised")[1:3] == pytest.approx([-(0.9 + 0.02 / 0.05), -(0.7 + 0.01 / 0.05)])
    assert rewards("improvement")[1:3] == pytest.approx([1.0 - 1.3, 1.3 - 0.9])
    assert rewards("product")[1:3] == pytest.approx([0.1 * 0.98, 0.3 * 0.99])
    policy = AlphaPolicy(2.0, "literal")
    used = policy.alpha
    policy.observe(1.0, 0.5)
    assert policy.observe(0.9, 0.25)["reward"] == pytest.approx(-(0.9 + used * 0.25))


def test_an_update_by_hand():
    """The third reward moves mu: by its distance from the mean of those before, and where the alpha lay that earned it."""
    policy = AlphaPolicy(1.0, "normalised", rate=0.01)
    noises = []
    for losses in LOSSES[:4]:
        noises.append(policy["noise"])
        policy.observe(*losses)
    r = [-(forget + retain / 0.05) for forget, retain in LOSSES[1:4]]
    spread = abs(r[1] - r[0]) / 2  # of the two before
    advantage = max(-3, min(3, (r[2] - (r[0] + r[1]) / 2) / spread))
    gradient = advantage * noises[2] / SIGMA  # the alpha of the third step made the fourth step's losses
    first, second = 0.1 * gradient / (1 - 0.9**3), 0.001 * gradient**2 / (1 - 0.999**3)
    assert abs(gradient) > 1
    assert policy["mu"] == pytest.approx(0.01 * first / (math.sqrt(second) + 1e-8), rel=1e-4)
    assert policy["mean"] == pytest.approx(sum(r) / 3) and policy["variance"] == pytest.approx(
        sum((x - sum(r) / 3) ** 2 for x in r) / 3, rel=1e-4
    )


def trace(policy: AlphaPolicy, losses=LOSSES) -> list[float]:
    return [policy.observe(*pair)["alpha"] for pair in losses]


def test_a_seed_gives_a_trace_and_a_saved_policy_goes_on_with_it():
    whole = trace(AlphaPolicy(2.0, "improvement", seed=5))
    assert trace(AlphaPolicy(2.0, "improvement", seed=5)) == whole
    assert trace(AlphaPolicy(2.0, "improvement", seed=6)) != whole
    cut = AlphaPolicy(2.0, "improvement", seed=5)
    begun = trace(cut, LOSSES[:3])
    resumed = AlphaPolicy(2.0, "improvement", seed=5)
    resumed.load_state_dict(cut.state_dict())
    assert begun + trace(resumed, LOSSES[3:]) == whole


def test_draws_are_of_a_normal_and_the_policy_holds_no_parameter():
    policy = AlphaPolicy(1.0, "normalised", seed=3)
    drawn = []
    for _ in range(1500):
        drawn.append(policy["noise"])
        policy.observe(1.0, 0.0)
    noise = torch.tensor(drawn)
    assert abs(noise.mean()) < 0.1 and 0.93 < noise.std() < 1.07
    assert abs((noise[1:] * noise[:-1]).mean()) < 0.1
    assert not list(policy.parameters())
    assert policy["mu"] == 0, "losses that do not change teach nothing"
