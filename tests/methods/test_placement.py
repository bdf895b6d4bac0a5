import pytest
import torch

from expunge.engine import collate, run_step
from expunge.errors import ExpungeError
from expunge.methods import METHODS
from expunge.methods.placement import after, dispersed, rerouted, states_after, steered, three_up_to

ROWS = [{"retain": ([5, 6, 7], [8, 9]), "forget": ([5, 6, 7], [10, 11, 12])}]
PLACED = ("rmu", "adaptive_rmu", "cosine_rmu", "probe_directions", "circuit_breakers")


@pytest.mark.parametrize(("depth", "layer"), [(32, 7), (60, 13), (24, 5), (16, 4), (12, 3), (6, 1), (3, 1), (2, 0), (1, 0)])
def test_rmu_steers_at_seven_thirty_seconds_of_the_depth(depth, layer):
    default = steered(depth)
    assert default.value == layer
    assert default.source == ("paper" if depth == 32 else "scaled")


def test_rmu_trains_the_steered_block_and_two_below():
    assert three_up_to(7).value == [5, 6, 7]
    assert three_up_to(1).value == [0, 1] and three_up_to(0).value == [0]


@pytest.mark.parametrize(
    ("depth", "blocks"),
    [
        (32, [1, 5, 8, 12, 16, 19, 23, 26, 30]),
        (18, [1, 3, 5, 7, 9, 11, 13, 15, 17]),
        (12, [0, 2, 3, 4, 6, 7, 8, 10, 11]),
        (9, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (4, [0, 1, 2, 3]),
        (1, [0]),
    ],
)
def test_probe_directions_are_three_a_third_or_all_there_are(depth, blocks):
    assert dispersed(depth).value == blocks
    assert ("as there are only" in dispersed(depth).why) is (depth < 9)
    if depth >= 9:
        thirds = [3 * block // depth for block in blocks]
        assert [thirds.count(third) for third in range(3)] == [3, 3, 3]


@pytest.mark.parametrize(("depth", "blocks"), [(32, [10, 20]), (12, [3, 7]), (3, [0, 1]), (2, [0]), (1, [0])])
def test_circuit_breakers_turn_at_one_and_two_thirds(depth, blocks):
    assert rerouted(depth).value == blocks


def test_the_state_after_a_block_enters_the_next(tiny_model):
    """Against a hook on the block's own output."""
    assert states_after([0, 2], 3) == (1, "pre_norm")
    model, found = tiny_model(dtype=torch.double), {}
    for block, module in enumerate(model.transformer.h):
        module.register_forward_hook(lambda _, args, output, block=block: found.update({block: output}))
    layers = states_after(range(3), 3)
    step = run_step(model, None, collate(ROWS), (*layers, "final"), (), {}, 0.0, plain=True)
    for block in range(3):
        torch.testing.assert_close(step.hidden("forget", after(block, 3))[0], found[block][1])


@pytest.mark.parametrize("name", PLACED)
def test_null_becomes_what_the_depth_gives_and_what_is_set_stays(name):
    cls = METHODS.get(name)
    method = cls()
    placed = method.placed(12)
    defaults = method.defaults(12)
    assert placed.model_depth == 12 and method.model_depth == 0
    for field, default in defaults.items():
        assert getattr(method, field) is None
        assert getattr(placed, field) == default.value
        assert default.source in ("paper", "scaled", "ours") and default.why
    place = "blocks" if "blocks" in defaults else "layer"
    assert set(defaults) >= {place}
    own = [4] if place == "blocks" else 4
    assert getattr(cls(**{place: own}).placed(12), place) == own
    assert placed.placed(12) == placed


def test_the_weights_go_with_a_layer_of_ones_own():
    assert METHODS.get("rmu")(layer=9).placed(12).train_blocks == [7, 8, 9]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("rmu", {"layer": 12}, "block 12: the model has 12 blocks, 0 to 11"),
        ("rmu", {"layer": 3, "train_blocks": [-1]}, "block -1: the model has 12 blocks, 0 to 11"),
        (
            "adaptive_rmu",
            {"layer": 3, "train_blocks": [2, 4]},
            "method.train_blocks=[2, 4]: adaptive_rmu wants blocks up to 3",
        ),
        ("cosine_rmu", {"train_blocks": []}, "method.train_blocks=[]: cosine_rmu wants blocks up to 3, where states are"),
        (
            "rmu",
            {"train_blocks": [2, 3], "parameters": "all"},
            "method.train_blocks=[2, 3]: rmu wants null beside method.parameters=all",
        ),
        ("probe_directions", {"blocks": [1, 40]}, "block 40: the model has 12 blocks, 0 to 11"),
        ("probe_directions", {"blocks": []}, "method.blocks=[]: at least one block is needed"),
        ("circuit_breakers", {"blocks": [12]}, "block 12: the model has 12 blocks, 0 to 11"),
        ("circuit_breakers", {"blocks": []}, "method.blocks=[]: at least one block is needed"),
    ],
)
def test_a_place_that_does_not_exist_is_one_line(name, settings, message):
    with pytest.raises(ExpungeError) as caught:
        METHODS.get(name)(**settings).placed(12)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
