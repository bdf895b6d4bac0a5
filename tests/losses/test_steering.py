import math

import pytest
import torch

from expunge.losses import (
    cosine_steer_loss,
    distance_loss,
    masked_mean,
    probe_direction_loss,
    rerouting_loss,
    rmu_forget_loss,
    rmu_retain_loss,
)

STATES = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [9.0, 9.0]], [[0.0, 2.0], [7.0, 7.0], [7.0, 7.0]]])
REFERENCE = torch.tensor([[[4.0, -3.0], [-1.0, 0.0], [0.0, 1.0]], [[0.0, 5.0], [1.0, 1.0], [1.0, 1.0]]])
MASK = torch.tensor([[True, True, False], [True, False, False]])
OF_REFERENCE = (rmu_retain_loss, cosine_steer_loss, rerouting_loss, distance_loss)


def test_squares_by_hand():
    target = torch.tensor([1.0, 0.0])
    torch.testing.assert_close(masked_mean(rmu_forget_loss(STATES, target), MASK), torch.tensor((20 + 0 + 5) / 2 / 3))
    torch.testing.assert_close(masked_mean(rmu_retain_loss(STATES, REFERENCE), MASK), torch.tensor((50 + 4 + 9) / 2 / 3))


def test_angles_by_hand():
    """cos is 0.6, 1 and 0 to the direction; 0, -1 and 1 to the reference, of which rerouting keeps the last."""
    direction = torch.tensor([5.0, 0.0])
    torch.testing.assert_close(masked_mean(cosine_steer_loss(STATES, direction), MASK), torch.tensor((0.4 + 0 + 1) / 3))
    torch.testing.assert_close(masked_mean(cosine_steer_loss(STATES, REFERENCE), MASK), torch.tensor((1 + 2 + 0) / 3))
    torch.testing.assert_close(masked_mean(rerouting_loss(STATES, REFERENCE), MASK), torch.tensor(1 / 3))


def test_distances_by_hand():
    torch.testing.assert_close(masked_mean(distance_loss(STATES, REFERENCE), MASK), torch.tensor((50**0.5 + 2 + 3) / 3))


def test_rmu_is_zero_at_its_target_and_its_square_over_d_at_the_origin():
    u = torch.nn.functional.normalize(torch.rand(6, dtype=torch.double), dim=0)
    mask = torch.ones(2, 3, dtype=torch.bool)
    states = torch.zeros(2, 3, 6, dtype=torch.double, requires_grad=True)
    at_origin = masked_mean(rmu_forget_loss(states, 20 * u), mask)
    assert at_origin.item() == pytest.approx(20**2 / 6)
    at_origin.backward()
    torch.testing.assert_close(states.grad, (-2 * 20 * u / 6 / 6).expand(2, 3, 6))  # 6 tokens; downhill is towards c u
    assert masked_mean(rmu_forget_loss((20 * u).expand(2, 3, 6), 20 * u), mask).item() == 0


def test_at_the_reference_nothing_holds_back_and_all_is_to_be_turned():
    held = REFERENCE.clone().requires_grad_()
    values = {loss: masked_mean(loss(held, REFERENCE), MASK) for loss in OF_REFERENCE}
    assert [round(value.item(), 6) for value in values.values()] == [0, 0, 1, 0]
    for loss, value in values.items():
        (slope,) = torch.autograd.grad(value, held)
        assert torch.isfinite(slope).all() and slope.abs().max() < 1e-6, loss.__name__


@pytest.mark.parametrize("factor", [0.01, 300.0])
def test_no_scale_matters_to_an_angle(factor):
    for loss, target in ((cosine_steer_loss, torch.ones(2)), (cosine_steer_loss, REFERENCE), (rerouting_loss, REFERENCE)):
        torch.testing.assert_close(loss(factor * STATES, target), loss(STATES, target))
        torch.testing.assert_close(loss(STATES, factor * target), loss(STATES, target))


def test_orthogonal_states_are_turned_far_enough_and_opposite_ones_are_left():
    mask = torch.ones(1, 1, dtype=torch.bool)
    reference = torch.tensor([[[1.0, 0.0]]])
    slopes = {}
    for x in (0.6, -0.6):
        states = torch.tensor([[[x, 0.8]]], requires_grad=True)
        loss = masked_mean(rerouting_loss(states, reference), mask)
        (slopes[x],) = torch.autograd.grad(loss, states)
        assert loss.item() == pytest.approx(max(0.0, x))
    assert masked_mean(rerouting_loss(torch.tensor([[[0.0, 3.0]]]), reference), mask).item() == 0
    torch.testing.assert_close(slopes[0.6], torch.tensor([[[0.64, -0.48]]]))  # (w - cos h) / |h|: downhill is away
    assert not slopes[-0.6].any()


@pytest.mark.parametrize("angle", [0.0, 1e-4, 0.01, 0.5, 1.5])
def test_the_slope_of_rerouting_is_the_sine_over_the_length(angle):
    """|grad cos(h, h0)| = sin(angle) / |h|: none at the reference, where circuit breakers begin."""
    length, mask = 3.0, torch.ones(1, 1, dtype=torch.bool)
    reference = torch.tensor([[[5.0, 0.0]]], dtype=torch.double)
    states = torch.tensor([[[length * math.cos(angle), length * math.sin(angle)]]], dtype=torch.double, requires_grad=True)
    (slope,) = torch.autograd.grad(masked_mean(rerouting_loss(states, reference), mask), states)
    assert slope.norm().item() == pytest.approx(math.sin(angle) / length, rel=1e-6, abs=1e-15)


def test_descent_leaves_the_reference_by_a_growing_angle_and_never_from_it():
    """In two dimensions a small angle grows by the factor 1 + rate / |h|^2 a step; an angle of 0 stays."""
    rate, mask = 0.1, torch.ones(1, 1, dtype=torch.bool)
    reference, angles = torch.tensor([[[1.0, 0.0]]], dtype=torch.double), {}
    for start in (0.0, 1e-6):
        states = torch.tensor([[[math.cos(start), math.sin(start)]]], dtype=torch.double)
        for _ in range(50):
            states.requires_grad_()
            (slope,) = torch.autograd.grad(masked_mean(rerouting_loss(states, reference), mask), states)
            states = (states - rate * slope).detach()
        angles[start] = math.atan2(states[0, 0, 1], states[0, 0, 0])
    assert angles[0.0] == 0
    assert angles[1e-6] == pytest.approx(1e-6 * (1 + rate) ** 50, rel=1e-3)


def test_a_probe_direction_is_squared_on_either_side():
    w = torch.tensor([3.0, 4.0], dtype=torch.double)
    unit = w / 5
    orthogonal, along = torch.tensor([[-4.0, 3.0]], dtype=torch.double), 7 * unit[None]
    assert probe_direction_loss(orthogonal, w).item() == 0
    assert probe_direction_loss(along, unit).item() == pytest.approx(49)
    assert probe_direction_loss(-along, unit).item() == pytest.approx(49)
    assert probe_direction_loss(along, -unit).item() == pytest.approx(49)
    states = torch.tensor([[1.0, 2.0]], dtype=torch.double, requires_grad=True)
    probe_direction_loss(states, w).mean().backward()
    torch.testing.assert_close(states.grad, 2 * (1 * 3 + 2 * 4) * w[None])


def test_probe_directions_of_several_layers_are_averaged():
    states = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 1.0], [1.0, 1.0]]])  # [B, I, d]
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(probe_direction_loss(states, directions).mean(), torch.tensor((1 + 4 + 9 + 1) / 4))
    one_by_one = [probe_direction_loss(states[:, i], directions[i]) for i in (0, 1)]
    torch.testing.assert_close(probe_direction_loss(states, directions), torch.stack(one_by_one).mean(0))


def test_padding_and_the_order_of_rows_are_ignored():
    wrong = torch.full((2, 2, 2), torch.nan)
    padded = (torch.cat([STATES, wrong], 1), torch.cat([REFERENCE, wrong], 1), torch.cat([MASK, MASK[:, :2] & False], 1))
    flipped = (STATES.flip(0), REFERENCE.flip(0), MASK.flip(0))
    for loss in OF_REFERENCE:
        wanted = masked_mean(loss(STATES, REFERENCE), MASK)
        for states, reference, mask in (padded, flipped):
            torch.testing.assert_close(masked_mean(loss(states, reference), mask), wanted)


def test_half_precision_is_compared_in_float32():
    states, reference = (300 * x.half() for x in (STATES, REFERENCE))
    for loss in OF_REFERENCE:
        found = loss(states, reference)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, loss(states.float(), reference.float()))  # 1200^2 is no float16
    assert probe_direction_loss(states[:, 0], torch.full((2,), 100.0)).isfinite().all()
