"""Assignment, target, objective, scores and rules on numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from projects.scgc.cluster import Recipe
from projects.scgc.contrast import Structure
from projects.scgc.evaluate import figures
from projects.scgc.features import Features
from projects.scgc.graph import transition, weights
from projects.scgc.metrics import overwrite_empty, scores, settled
from projects.scgc.model import SCGC, AutoEncoder, objective, soft_assignment, target
from projects.scgc.weights import load_autoencoder, load_reference

SIZES = {"encoder": [8, 7, 9, 10], "decoder": [9, 7, 8]}


def test_soft_assignment_by_hand() -> None:
    """Distances 1 and 4 at nu = 1: 1/2 and 1/5; at nu = 3: (1 + d/3)^-2."""
    z, centres = torch.zeros(1, 2), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    torch.testing.assert_close(soft_assignment(z, centres), torch.tensor([[5 / 7, 2 / 7]]))
    a, b = (4 / 3) ** -2, (7 / 3) ** -2
    torch.testing.assert_close(soft_assignment(z, centres, nu=3.0), torch.tensor([[a / (a + b), b / (a + b)]]))


def test_target_by_hand_and_without_gradient() -> None:
    q = torch.tensor([[0.75, 0.25], [0.5, 0.5]], requires_grad=True)
    weight = torch.tensor([[0.5625 / 1.25, 0.0625 / 0.75], [0.25 / 1.25, 0.25 / 0.75]])
    p = target(q)
    torch.testing.assert_close(p, weight / weight.sum(1, keepdim=True))
    assert not p.requires_grad
    torch.testing.assert_close(target(q[:1], q.sum(0)), p[:1])  # a batch with the sums of all nodes


def model_and_structure(star: bool = False) -> tuple[SCGC, Features, Structure]:
    torch.manual_seed(0)
    model = SCGC(12, 3, SIZES["encoder"], None if star else SIZES["decoder"])
    x = torch.rand(15, 12, generator=torch.Generator().manual_seed(1))
    edges = np.random.default_rng(0).integers(15, size=(20, 2))
    return model, Features(x), Structure.of(weights(transition(edges, 15), 1, star))


def test_objective_adds_its_terms() -> None:
    """KL is averaged over nodes, not over N*K; the reconstruction over all entries; the star has none."""
    model, x, structure = model_and_structure()
    code = model(x)
    out = objective(code, structure, width=12, tau=0.25, alpha=0.5, beta=0.1)
    p, q = target(code.q), code.q
    torch.testing.assert_close(out.cluster, sum((p[i] * (p[i] / q[i]).log()).sum() for i in range(15)) / 15)
    torch.testing.assert_close(out.reconstruction, (model.ae.reconstruct(code.z) - x.matrix).square().mean())
    torch.testing.assert_close(out.loss, 0.5 * out.contrast + 0.1 * out.cluster + out.reconstruction)
    without = objective(code, structure, width=12, tau=0.25, alpha=0.0, beta=0.1)
    assert float(without.contrast) == 0
    model, x, structure = model_and_structure(star=True)
    out = objective(model(x), structure, width=12, tau=0.25, alpha=1.0, beta=0.1)
    assert out.reconstruction is None
    torch.testing.assert_close(out.loss, out.contrast + 0.1 * out.cluster)


def test_sizes_are_those_of_the_configurations() -> None:
    counted = {
        (256, 10): (2_802_366, 1_401_110),
        (561, 6): (3_107_631, 1_553_570),
        (2000, 4): (4_548_050, 2_273_050),
        (1870, 3): (4_417_910, 2_208_040),
        (334, 4): (2_880_384, 1_440_050),
        (3703, 6): (6_252_773, 3_124_570),
    }
    for (dim, clusters), want in counted.items():
        found = tuple(sum(p.numel() for p in SCGC(dim, clusters, **form).parameters()) for form in ({}, {"decoder": None}))
        assert found == want
    names = list(SCGC(20, 3, decoder=None).state_dict())
    assert names[:3] == ["cluster_layer", "ae.enc_1.weight", "ae.enc_1.bias"]
    assert not [name for name in names if "dec" in name or "x_bar" in name]


def test_default_initialisation_is_torchs_uniform() -> None:
    weight = AutoEncoder(400).enc_2.weight
    assert float(weight.detach().abs().max()) == pytest.approx(1 / math.sqrt(500), rel=1e-3)


def test_prediction_is_the_nearest_centre() -> None:
    model, x, _ = model_and_structure(star=True)
    z = model.ae.encode(x)
    assert (model.predict(x.matrix) == torch.cdist(z, model.cluster_layer).argmin(1)).all()


# -- weights -------------------------------------------------------------------------------------------------------------


def test_official_auto_encoders_and_what_does_not_fit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = AutoEncoder(12, **SIZES)
    path = tmp_path / "acm.pkl"
    torch.save(source.state_dict(), path)
    whole, encoder = AutoEncoder(12, **SIZES), AutoEncoder(12, SIZES["encoder"], None)
    load_autoencoder(whole, path)
    load_autoencoder(encoder, path)  # SCGC*: the decoder's entries stay unread
    x = Features(torch.rand(4, 12))
    torch.testing.assert_close(encoder.encode(x), source.encode(x))
    torch.testing.assert_close(whole.reconstruct(whole.encode(x)), source.reconstruct(source.encode(x)))
    with pytest.raises(ValueError, match=r"other shape 1 \(enc_1.weight: \(8, 12\) in the file, \(8, 13\) in the model\)"):
        load_autoencoder(AutoEncoder(13, **SIZES | {"decoder": None}), path)
    with pytest.raises(ValueError, match=r"missing 8 \(dec_1.weight; dec_1.bias; dec_2.weight\)"):
        load_autoencoder(whole, encoder.state_dict())
    sdcn = {f"ae.{name}": value for name, value in source.state_dict().items()} | {"gnn_1.weight": torch.zeros(12, 8)}
    with pytest.raises(ValueError, match=r"missing 16 .*unexpected 17 \(ae.enc_1.weight"):
        load_autoencoder(whole, sdcn)
    model = SCGC(12, 3, SIZES["encoder"], None)
    load_reference(model, {f"ae.{name}": value for name, value in source.state_dict().items()} | {"cluster_layer": torch.ones(3, 10)})
    assert float(model.cluster_layer.sum()) == 30
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_autoencoder(whole, "nowhere.pkl")


# -- scores ------------------------------------------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    """Clusters 1, 0 stand for classes 0, 1; one node of each class is wrong. Greedy matching would do worse in the second case."""
    labels, clusters = np.array([0, 0, 0, 1, 1, 1]), np.array([1, 1, 0, 0, 0, 1])
    assert scores(labels, clusters)["ACC"] == pytest.approx(4 / 6)
    assert scores(labels, clusters)["F1"] == pytest.approx(4 / 6)
    counts = np.array([[5, 4], [4, 0]])  # class x cluster; greedy takes 5 + 0, the best matching 4 + 4
    labels = np.repeat([0, 1], counts.sum(1))
    clusters = np.concatenate([np.repeat([0, 1], row) for row in counts])
    assert scores(labels, clusters)["ACC"] == pytest.approx(8 / 13)


def test_empty_clusters_by_either_rule() -> None:
    labels = np.array([1, 1, 2, 2, 3, 3])
    clusters = np.array([0, 0, 1, 1, 1, 1])
    clean = scores(labels, clusters)
    assert clean["ACC"] == pytest.approx(4 / 6)
    assert clean["F1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert overwrite_empty(labels, clusters).tolist() == [2, 0, 1, 1, 1, 1]
    assert scores(labels, clusters, "reference") == scores(labels, np.array([2, 0, 1, 1, 1, 1]))
    assert clusters.tolist() == [0, 0, 1, 1, 1, 1], "the caller's array is left alone"
    more = np.array([0, 1, 2, 3, 2, 3])
    assert scores(labels, more)["ACC"] < 1
    with pytest.raises(ValueError, match="expected at most 3 as there are classes, found 4"):
        scores(labels, more, "reference")


def test_rules_of_reporting() -> None:
    """Best per metric, last, and the first epoch at which hardly a label changes."""
    labels = np.array([0] * 5 + [1] * 5)
    perfect, off = labels.copy(), labels.copy()
    off[:2] = 1
    swapped = 1 - labels
    assignments = np.array([off, perfect, off, off, swapped[::-1]])
    found = figures(Recipe(settled_below=0.0), labels, assignments)
    assert (found["best"]["ACC"], found["best_epoch"]["ACC"], found["last_epoch"]) == (100, 1, 4)
    assert found["start"]["ACC"] == found["settled"]["ACC"] == 80
    assert found["settled_epoch"] == 3
    assert settled(assignments[:3], 0.0) == 2  # never at rest: the last epoch
    assert settled(assignments, 0.2) == 1  # two of ten nodes


def test_gradient_does_not_pass_the_target() -> None:
    """The KL term's gradient is that of cross entropy with p held fixed."""
    model, x, structure = model_and_structure(star=True)
    objective(model(x), structure, width=12, tau=0.25, alpha=0.0, beta=1.0).loss.backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    q = model(x).q
    p: Tensor = q.detach().square() / q.detach().sum(0)
    p = p / p.sum(1, keepdim=True)
    (-(p * q.log()).sum() / 15).backward()
    for a, parameter in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(a, parameter.grad, rtol=1e-4, atol=1e-7)
