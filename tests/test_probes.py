"""Probes: pooled states against one text at a time, the regression against scikit-learn's own, controls at both ends."""

import logging

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from expunge import probes
from expunge.errors import ExpungeError
from expunge.probes import fit_probe, pooled_states, pooled_states_at

ROWS = [[5, 17, 9, 30], [8], [40, 3, 7, 60, 2, 2], [12, 13]]


def labelled(n=200, d=6, gap=3.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    x = rng.normal(size=(n, d)) * np.arange(1, d + 1) + 5.0
    x[:, 2] += gap * labels
    return torch.from_numpy(x).float(), labels


@pytest.mark.parametrize("layer", ["final", "pre_norm", 0, 2])
@pytest.mark.parametrize("pool", ["mean", "last"])
def test_pooled_states_equal_one_text_at_a_time(tiny_model, layer, pool):
    model = tiny_model()
    output = [model(torch.tensor([row]), output_hidden_states=True).hidden_states for row in ROWS]
    found = pooled_states(model, ROWS, layer, pool)
    if layer == "pre_norm":  # transformers gives the last block's output after the norm alone
        found, layer = model.transformer.ln_f(pooled_states(model, ROWS, layer, "last")), "final"
        pool = "last"
    states = [hidden[-1 if layer == "final" else layer][0] for hidden in output]
    wanted = torch.stack([s.mean(0) if pool == "mean" else s[-1] for s in states])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_states_at_several_layers_take_one_forward_of_each_row(tiny_model, monkeypatch):
    model, forwards = tiny_model(), []
    each = {layer: pooled_states(model, ROWS, layer, "last") for layer in (0, 2, "final")}
    monkeypatch.setattr(probes, "BATCH_TOKENS", 1)  # a row at a time
    handle = model.transformer.register_forward_pre_hook(lambda *args: forwards.append(1))
    found = pooled_states_at(model, ROWS, [0, 2, "final"], "last")
    handle.remove()
    assert list(found) == [0, 2, "final"] and len(forwards) == len(ROWS)
    for layer, states in found.items():
        torch.testing.assert_close(states, each[layer], atol=1e-5, rtol=1e-5)


def test_the_probe_in_raw_space_decides_as_scikit_learn_does():
    states, labels = labelled()
    probe = fit_probe(states, labels, c=0.5)
    x = states.double().numpy()
    scaled = (x - x.mean(0)) / x.std(0)
    oracle = LogisticRegression(C=0.5, max_iter=1000).fit(scaled, labels)
    torch.testing.assert_close(
        probe.logit(states).double(), torch.from_numpy(oracle.decision_function(scaled)), atol=1e-4, rtol=1e-4
    )
    assert probe.auc > 0.7


def test_shuffled_labels_give_chance_and_a_warning(caplog):
    states, labels = labelled(n=600)
    with caplog.at_level(logging.WARNING, "expunge"):
        probe = fit_probe(states, np.random.default_rng(1).permutation(labels), name="the probe of the second floor")
    assert 0.4 < probe.auc < 0.6
    said = f"the probe of the second floor hardly tells the labels apart: AUC {probe.auc:.2f} in cross-validation"
    assert f"{said}, 0.5 is chance" in caplog.text


def test_what_cannot_be_fitted(tiny_model):
    states, _ = labelled(n=20)
    with pytest.raises(ExpungeError, match="the rarer one has 0"):
        fit_probe(states, [1] * 20)
    with pytest.raises(ExpungeError, match="not all finite"):
        fit_probe(torch.full((20, 3), torch.inf), [0, 1] * 10)
    with pytest.raises(ExpungeError, match="without tokens"):
        pooled_states(tiny_model(), [[1], []])
