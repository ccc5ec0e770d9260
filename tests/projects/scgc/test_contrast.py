"""The sparse contrast against loops and against all its N x N arrays; structure weights in parts; sparse features against dense ones."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from common.contrastive import unit, weighted_positives
from projects.scgc.contrast import EPS, Structure, contrast, dense
from projects.scgc.features import Features
from projects.scgc.graph import add_wrong_edges, facts, knn_edges, shuffle_nodes, symmetric, transition, weights


def random_graph(nodes: int = 30, lines: int = 60, seed: int = 0) -> np.ndarray:
    """Edge lines among all but the last two nodes."""
    return np.random.default_rng(seed).integers(nodes - 2, size=(lines, 2))


def structure_of(nodes: int = 30, order: int = 2, cumulative: bool = False, dtype: torch.dtype = torch.float64) -> tuple[Structure, Tensor]:
    matrix = weights(transition(random_graph(nodes), nodes), order, cumulative)
    return Structure.of(matrix, dtype), torch.from_numpy(matrix.toarray()).to(dtype)


def embeddings(nodes: int = 30, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(nodes, 10, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def by_loops(z: Tensor, w: Tensor, tau: float) -> float:
    """The formula of Sec. 3.4 with Python numbers."""
    rows = [[float(v) for v in row] for row in z]
    total = 0.0
    for i, a in enumerate(rows):
        positives = denominator = 0.0
        for j, b in enumerate(rows):
            cosine = 0.0 if i == j else sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
            positives += float(w[i, j]) * math.exp(tau * cosine)
            denominator += math.exp(tau * cosine)
        total -= math.log(positives / denominator + 1e-8)
    return total / len(rows)


@pytest.mark.parametrize(("order", "cumulative", "tau"), [(1, False, 0.25), (2, False, 2.25), (3, True, 1.0)])
def test_value_and_gradient_are_those_of_the_dense_form_and_of_loops(order: int, cumulative: bool, tau: float) -> None:
    structure, full = structure_of(order=order, cumulative=cumulative)
    z, same = embeddings(), embeddings()
    loss = contrast(z, structure, tau).per_row.mean()
    loss.backward()
    want = dense(same, full, tau).per_row.mean()
    want.backward()
    assert float(loss.detach()) == pytest.approx(by_loops(z, full, tau), rel=1e-12)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(z.grad, same.grad, rtol=1e-9, atol=1e-14)


def test_gradient_by_finite_differences() -> None:
    structure, _ = structure_of(nodes=9)
    z = embeddings(9)
    assert torch.autograd.gradcheck(lambda z: contrast(z, structure, 2.25).per_row.sum(), z)


def test_large_batch_in_tiles_is_the_dense_form_and_the_shared_loss() -> None:
    """1,300 nodes take the tiled path in float32."""
    structure, full = structure_of(1300, dtype=torch.float32)
    z, same, third = (embeddings(1300, dtype=torch.float32) for _ in range(3))
    contrast(z, structure, 0.25).per_row.mean().backward()
    dense(same, full, 0.25).per_row.mean().backward()
    index = full.nonzero().t()
    weighted_positives(unit(third), index, full[index[0], index[1]], 0.25).loss.backward()
    assert (z.grad - same.grad).norm() < 3e-6 * same.grad.norm()
    assert (z.grad - third.grad).norm() < 3e-6 * same.grad.norm()


def test_memory_grows_with_nodes_and_entries_alone() -> None:
    """50,000 nodes and 1.45 million weights, value and gradient, in a process of their own; one N x N array would take 9.3 GiB."""
    code = """
import resource
import numpy as np, torch
from projects.scgc.contrast import Structure, contrast
from projects.scgc.graph import transition
torch.set_num_threads(1)
nodes = 50_000
start = np.arange(nodes).repeat(14)
edges = np.stack([start, (start + np.tile(np.arange(1, 15), nodes)) % nodes], 1)
structure = Structure.of(transition(edges, nodes))
z = torch.randn(nodes, 10, generator=torch.Generator().manual_seed(0)).requires_grad_()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss = contrast(z, structure, 0.25).per_row.mean()
loss.backward()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(structure.entries, bool(z.grad.isfinite().all()), (after - before) / 1024, float(loss.detach()))
"""
    root = Path(__file__).parents[3]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout.split()
    assert out[:2] == ["1450000", "True"]
    assert float(out[2]) < 400, "MiB above what the graph and the embeddings take"
    assert float(out[3]) == pytest.approx(math.log(50_000), rel=0.05)  # random embeddings: every pair weighs alike


def test_the_temperature_multiplies_and_the_self_term_stays() -> None:
    """Equal embeddings: E = e^tau but 1 for a node with itself, whatever the embedding."""
    structure, full = structure_of(6, order=1)
    z = torch.ones(6, 10, dtype=torch.float64)
    own = full.diagonal()
    for tau in (0.25, 2.0):
        e = math.exp(tau)
        want = -(((1 - own) * e + own) / (5 * e + 1) + EPS).log()
        torch.testing.assert_close(contrast(z, structure, tau).per_row, want)


def test_isolated_nodes_are_pushed_from_all_and_star_rows_sum_to_the_order() -> None:
    step = transition(random_graph(), 30)
    np.testing.assert_allclose(np.asarray(weights(step, 3, True).sum(1)).ravel(), 3)
    np.testing.assert_allclose(np.asarray(weights(step, 3, False).sum(1)).ravel(), 1)
    assert (weights(step, 1, True) != weights(step, 1, False)).nnz == 0
    found = contrast(embeddings(), Structure.of(weights(step, 3, True), torch.float64), 0.25)
    torch.testing.assert_close(found.per_row[-1], found.denominator[-1].log() - math.log(3))
    assert facts(random_graph(), 30)["isolated nodes"] >= 2


def test_a_zero_row_has_no_nan() -> None:
    structure, _ = structure_of()
    z = embeddings().detach()
    z[3] = 0
    z.requires_grad_()
    contrast(z, structure, 0.25).per_row.mean().backward()
    assert z.grad.isfinite().all()


def test_parts_of_the_weights() -> None:
    structure, full = structure_of()
    nodes = torch.tensor([4, 29, 0, 7, 12, 28, 3])
    part = structure.among(nodes)
    torch.testing.assert_close(part.matrix().to_dense(), full[nodes][:, nodes])
    assert part.column[part.oneself].tolist() == list(range(7))
    own = structure.own(11, 19)
    torch.testing.assert_close(own.matrix().to_dense(), full[11:19])
    assert own.column[own.oneself].tolist() == list(range(11, 19))
    z = embeddings()
    rows = contrast(z[11:19], own, 0.25, keys=z, offset=11).per_row
    torch.testing.assert_close(rows, contrast(z, structure, 0.25).per_row[11:19])
    with pytest.raises(ValueError, match="expected weights of 29 rows and 29 columns as the embeddings have, found 30 and 30"):
        contrast(z[1:], structure, 0.25)


@pytest.mark.parametrize("wide", [True, False], ids=["wide", "narrow"])
def test_sparse_features_give_the_numbers_of_dense_ones(wide: bool) -> None:
    """First layer and reconstruction error with gradients; `wide` takes the form without an N x d array."""
    random = torch.Generator().manual_seed(0)
    count, width, dim = (40, 6, 120) if wide else (40, 60, 50)
    x = (torch.rand(count, dim, generator=random, dtype=torch.float64) < 0.06).double()
    assert (count + dim) * width < count * dim if wide else (count + dim) * width >= count * dim
    grads = []
    for sparse in (True, False):
        torch.manual_seed(1)
        first, last = nn.Linear(dim, width).double(), nn.Linear(width, dim).double()
        features = Features(x, sparse=sparse)
        assert features.sparse == sparse
        hidden = features.linear(first)
        error = features.squared_error(hidden, last)
        error.backward()
        order = torch.tensor([5, 2, 9])
        torch.testing.assert_close(features.rows(order).linear(first), nn.functional.linear(x[order], first.weight, first.bias))
        torch.testing.assert_close(features.rows(slice(3, 8)).dense(), x[3:8])
        grads.append([error.detach(), *(p.grad for p in [*first.parameters(), *last.parameters()])])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    part = Features(x, sparse=True).rows(torch.tensor([1, 4]))
    part.linear(first).sum().backward()  # a slice is not sorted again
    with torch.inference_mode():
        torch.testing.assert_close(part.linear(first), nn.functional.linear(x[[1, 4]], first.weight, first.bias))


def test_features_choose_their_form_by_their_share_of_zeros() -> None:
    assert Features(np.eye(20, dtype=np.uint8)).sparse
    assert not Features(np.ones((3, 2))).sparse


# -- graphs --------------------------------------------------------------------------------------------------------------


def test_directed_and_repeated_lines() -> None:
    """max(C, C'): twice 0 -> 1 and once 1 -> 0 count two; 2 -> 0 counts both ways; a self-loop line adds to the one that every node has."""
    edges = np.array([[0, 1], [0, 1], [1, 0], [2, 0], [1, 1]])
    assert symmetric(edges, 4).toarray().tolist() == [[0, 2, 1, 0], [2, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(
        transition(edges, 4).toarray(), [[1 / 4, 1 / 2, 1 / 4, 0], [1 / 2, 1 / 2, 0, 0], [1 / 2, 0, 1 / 2, 0], [0, 0, 0, 1]]
    )


def test_a_hub_is_refused_before_its_square_is_built() -> None:
    hub = np.stack([np.zeros(199, dtype=np.int64), np.arange(1, 200)], 1)
    step = transition(hub, 200)
    with pytest.raises(ValueError, match=r"order=2: the weights would have 40,000 entries \(0.0 GiB\), allowed are 1,000"):
        weights(step, 2, False, most=1000)
    assert weights(step, 2, False, most=40_000).nnz == 40_000
    ring = np.stack([np.arange(200), (np.arange(200) + 1) % 200], 1)
    assert weights(transition(ring, 200), 2, True, most=1000).nnz == 1000  # the cheap bound says 1,800


def test_nearest_neighbours_by_brute_force_and_those_without_themselves() -> None:
    x = np.random.default_rng(0).normal(size=(50, 4))
    distance = ((x[:, None] - x) ** 2).sum(2)
    np.fill_diagonal(distance, np.inf)
    for rows in (7, 1024):
        found = knn_edges(x, 3, "heat", rows=rows)
        assert found.shape == (150, 2)
        for node in range(50):
            assert set(found[found[:, 0] == node, 1]) == set(distance[node].argsort()[:3])
    counted = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 1], [0, 0, 1, 1]])
    found = knn_edges(counted, 1, "cos")  # node 0 shares 3 words with node 1, as many as with itself
    assert {tuple(pair) for pair in found.tolist() if pair[0] == 2} <= {(2, 1), (2, 0)}
    sums = counted / counted.sum(1, keepdims=True)
    ncos = knn_edges(counted, 2, "ncos")
    similar = sums @ sums.T
    for node in range(4):
        others = set(ncos[ncos[:, 0] == node, 1])
        worst = np.sort(similar[node])[::-1][2]
        assert all(similar[node, j] >= worst for j in others)
        assert len(others) in (2, 3)
    with pytest.raises(ValueError, match="k=50: expected 1 to 49 neighbours among 50 nodes"):
        knn_edges(x, 50)


def test_wrong_edges_join_classes_and_leave_the_rest() -> None:
    edges, labels = random_graph(), np.arange(30) % 3
    half = sp.triu(symmetric(edges, 30), 1)
    worse = add_wrong_edges(edges, labels, 0.5, seed=1)
    added = worse[len(edges) :]
    assert (worse[: len(edges)] == edges).all()
    assert len(added) == 2 * round(0.5 * half.nnz)
    assert (labels[added[:, 0]] != labels[added[:, 1]]).all()
    assert facts(worse, 30, labels)["undirected edges"] == half.nnz + len(added) / 2
    with pytest.raises(ValueError, match=r"expected at most \d+ free pairs"):
        add_wrong_edges(edges, labels, 100.0, seed=1)
    shuffled = shuffle_nodes(edges, 30, seed=1)
    assert facts(shuffled, 30)["undirected edges"] == half.nnz
    assert (shuffled != edges).any()
