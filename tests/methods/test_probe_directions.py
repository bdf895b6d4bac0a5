import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from expunge.adapters import add_lora
from expunge.engine import collate, run_step
from expunge.errors import ExpungeError
from expunge.methods import Material
from expunge.methods.probe_directions import ProbeDirections
from expunge.training import UnlearnConfig, UnlearnTrainer


def labelled(n: int = 60) -> list[tuple[list[int], bool]]:
    """Rows of random tokens; those of the kind to be rid of end in token 5, others in 9."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        ids = rng.integers(20, 300, rng.integers(1, 6)).tolist()
        rows.append(([*ids, 5 if i % 2 else 9], bool(i % 2)))
    return rows


def prepared(method, model, rows):
    heads = dict(method.heads(32))
    with torch.no_grad():
        method.prepare(heads, Material(model, [], rows))
    return heads


@pytest.mark.parametrize(("kind", "plain"), [("pair_rows", True), ("pair_rows", False), ("set_rows", True)])
@pytest.mark.parametrize("blocks", [[0, 1, 2], [2], [1]], ids=str)
def test_the_loss_is_that_of_the_equations(moved, request, continuation_states, last_states, blocks, kind, plain):
    model, reference = moved
    rows = request.getfixturevalue(kind)
    method = ProbeDirections(blocks=blocks, alpha0=3.0).placed(3)
    heads = {name: head.double() for name, head in method.heads(32).items()}
    w = heads["probes"].directions.normal_(generator=torch.Generator().manual_seed(2))
    sides = method.ref_sides
    step = run_step(model, reference, collate(rows), method.layers, method.ref_layers, heads, 0.0, sides, plain)
    squares, drifts = [], []
    for place, block in enumerate(blocks):
        last = last_states(model, rows, "forget", block)
        squares.append(((last @ w[place]) ** 2).mean())
        kept, before = (continuation_states(which, rows, "retain", block) for which in (model, reference.copy))
        drifts.append((1 - (kept * before).sum(-1) / kept.norm(dim=-1) / before.norm(dim=-1)).mean())
        cosine = (last @ w[place] / last.norm(dim=-1) / w[place].norm()).abs().mean()
        losses = method.loss(step)
        assert step.logged[f"forget_block_{block}"] == pytest.approx(squares[-1].item())
        assert step.logged[f"cosine_block_{block}"] == pytest.approx(cosine.item(), rel=1e-5)
    torch.testing.assert_close(losses["forget"], torch.stack(squares).mean())
    torch.testing.assert_close(losses["retain"], heads["policy"].alpha * torch.stack(drifts).mean())
    assert step.logged["retain_loss"] == pytest.approx(torch.stack(drifts).mean().item())


@pytest.mark.parametrize("directions", ["unit", "raw"])
@pytest.mark.parametrize("pool", ["last", "mean"])
def test_directions_are_scikit_learn_s_at_each_block(tiny_model, outputs, directions, pool):
    """Fitted on states that the test reads one row at a time, standardised, and mapped back to the raw space."""
    model, rows = tiny_model(), labelled()
    method = ProbeDirections(directions=directions, pool=pool).placed(3)
    probes = prepared(method, model, rows)["probes"]
    labels = [int(bad) for _, bad in rows]
    for place in range(3):
        with torch.no_grad():
            states = [outputs(model, ids)[place] for ids, _ in rows]
        x = torch.stack([s[-1] if pool == "last" else s.mean(0) for s in states]).double().numpy()
        scaler = StandardScaler().fit(x)
        oracle = LogisticRegression(C=1.0, max_iter=1000).fit(scaler.transform(x), labels)
        w = torch.from_numpy(oracle.coef_[0] / scaler.scale_).float()
        torch.testing.assert_close(
            probes.directions[place], w / w.norm() if directions == "unit" else w, rtol=1e-3, atol=1e-4
        )
        assert probes.directions[place] @ torch.from_numpy(x[1::2].mean(0) - x[::2].mean(0)).float() > 0  # towards the bad
        if pool == "last":
            assert probes.auc[place] > 0.9


def test_labels_that_mean_nothing_give_chance(tiny_model, caplog):
    rows = labelled(300)
    shuffled = np.random.default_rng(1).permutation([bad for _, bad in rows])
    with caplog.at_level("WARNING", "expunge"):
        probes = prepared(
            ProbeDirections(blocks=[1]).placed(3), tiny_model(), [(r, b) for (r, _), b in zip(rows, shuffled, strict=True)]
        )
    auc = probes["probes"].auc.item()
    assert 0.4 < auc < 0.6
    assert f"the probe after block 1 hardly tells the labels apart: AUC {auc:.2f} in cross-validation" in caplog.text


def test_without_labelled_texts_is_one_line(tiny_model):
    with pytest.raises(ExpungeError, match=r"^probe_directions fits probes on labelled texts: give data\.probe$"):
        prepared(ProbeDirections().placed(3), tiny_model(), [])


@pytest.fixture
def probed(pairs):
    return [(pair.prompt + side, bad) for pair in pairs for side, bad in ((pair.chosen, False), (pair.rejected, True))]


def trainer_of(model, method, pairs, tokenizer, probed, folder, **changes) -> UnlearnTrainer:
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "max_steps": 30,
    }
    return UnlearnTrainer(model, method, UnlearnConfig(**settings | changes), pairs, tokenizer, probe_data=probed)


def test_probes_are_the_reference_s_where_an_adapter_has_learnt_something(tmp_path, tiny_model, tokenizer, pairs, probed):
    model = add_lora(tiny_model(), r=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    found, wanted = (
        trainer_of(each, ProbeDirections(), pairs, tokenizer, probed, tmp_path).heads["probes"].directions
        for each in (model, tiny_model())
    )
    torch.testing.assert_close(found, wanted)


def test_a_few_steps_make_states_orthogonal_and_hold_the_retain_side(tmp_path, tiny_model, tokenizer, pairs, probed):
    """The positive control. Of the cosines to three directions next to nothing is left; lengths are what they were."""
    trainer = trainer_of(tiny_model(), ProbeDirections(), pairs, tokenizer, probed, tmp_path)
    trainer.train()
    first, *_, last = (line for line in trainer.state.log_history if "loss" in line)
    for block in range(3):
        assert last[f"forget_block_{block}"] < 0.1 * first[f"forget_block_{block}"]
        assert last[f"cosine_block_{block}"] < 0.4 * first[f"cosine_block_{block}"]
    assert last["forget_norm"] > 0.7 * first["forget_norm"]
    assert last["retain_loss"] < 0.1
    assert first["alpha"] != last["alpha"]


def test_bad_hyper_parameters_are_one_line():
    for settings, message in (
        ({"directions": "long"}, "method.directions='long': expected one of unit, raw"),
        ({"pool": "max"}, "method.pool='max': expected one of last, mean"),
        ({"alpha0": -1.0}, "method.alpha0=-1.0: probe_directions wants a number > 0"),
    ):
        with pytest.raises(ExpungeError, match=f"^{message}"):
            ProbeDirections(**settings)
