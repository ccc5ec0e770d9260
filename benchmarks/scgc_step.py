"""SCGC's training step, its contrastive term alone, and inference, each beside a plainer form: `python -m benchmarks.steps scgc`.

Step: the spec's reference step (N 1024, d 512; target pass, loss pass, backward, Adam), and one of ACM's size. Contrast: value and gradient on a graph of ACM's size and
degrees (N 3025) and of USPS's degrees and hops (N 4057). Inference: the encoder alone against a graph convolution of the same widths.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import Built, Forms, parameters
from projects.scgc.contrast import Structure, contrast
from projects.scgc.features import Features
from projects.scgc.graph import transition, weights
from projects.scgc.model import EMBEDDING, SCGC, WIDTHS, objective, soft_assignment
from projects.scgc.pretrain import adam

NODES, DIM, CLUSTERS, NEIGHBOURS = 1024, 512, 4, 8
ACM, FAR = (3025, 13_128, 2), (4057, 9_360, 4)
"""Nodes, undirected edges, hops."""


def random_neighbours(nodes: int, each: int) -> np.ndarray:
    """(nodes * each, 2) directed pairs."""
    other = np.random.default_rng(0).integers(nodes, size=(nodes, each))
    return np.stack([np.arange(nodes).repeat(each), other.ravel()], 1)


def near_edges(nodes: int, edges: int) -> np.ndarray:
    """(edges, 2) pairs at most 20 numbers apart: a few hops reach few nodes, as in graphs of neighbours."""
    random = np.random.default_rng(0)
    start = random.integers(nodes, size=edges)
    return np.stack([start, (start + random.integers(1, 21, size=edges)) % nodes], 1)


def plain_losses(z: Tensor, weight: Tensor, eye: Tensor, tau: float) -> Tensor:
    """The contrastive term as the released code writes it: every N x N array is made."""
    norm = z.norm(dim=1, keepdim=True)
    similarity = z @ z.t() / (norm @ norm.t()) * (1 - eye)
    exponent = (tau * similarity).exp()
    return -((exponent * weight).sum(1) / exponent.sum(1) + 1e-8).log().mean()


def step(star: bool, ours: bool, words: bool = False) -> Built:
    """One training step; plain: dense contrast, a second forward for the target, Adam as it comes. `words`: ACM's size and sparse features."""
    torch.manual_seed(0)
    nodes, dim = (ACM[0], 1870) if words else (NODES, DIM)
    x = (torch.rand(nodes, dim) < 0.045).float() if words else torch.rand(nodes, dim)
    model = SCGC(dim, CLUSTERS, decoder=None if star else WIDTHS[::-1])
    edges = near_edges(*ACM[:2]) if words else random_neighbours(NODES, NEIGHBOURS)
    matrix = weights(transition(edges, nodes), 2, star)
    settings = {"tau": 0.25, "alpha": 1.0 if star else 0.5, "beta": 0.1}
    if ours:
        features, structure, update = Features(x), Structure.of(matrix), adam(model, 1e-3)

        def run() -> Tensor:
            update.zero_grad()
            loss = objective(model(features), structure, width=dim, **settings).loss
            loss.backward()
            update.step()
            return loss.detach()

        return Built(run, parameters(model))
    weight, eye = torch.from_numpy(matrix.toarray()).float(), torch.eye(nodes)
    update = torch.optim.Adam(model.parameters(), lr=1e-3)

    def forward() -> tuple[Tensor, Tensor, Tensor | None]:
        h = x
        for layer in (model.ae.enc_1, model.ae.enc_2, model.ae.enc_3):
            h = F.relu(layer(h))
        z = model.ae.z_layer(h)
        return z, soft_assignment(z, model.cluster_layer), None if star else model.ae.reconstruct(z)

    def plain() -> Tensor:
        with torch.no_grad():
            q = forward()[1]
            p = q**2 / q.sum(0)
            p = p / p.sum(1, keepdim=True)
        z, q, x_bar = forward()
        loss = settings["alpha"] * plain_losses(z, weight, eye, settings["tau"]) + settings["beta"] * F.kl_div(
            q.log(), p, reduction="batchmean"
        )
        if x_bar is not None:
            loss = loss + F.mse_loss(x_bar, x)
        update.zero_grad()
        loss.backward()
        update.step()
        return loss.detach()

    return Built(plain, parameters(model))


def term(size: tuple[int, int, int], ours: bool) -> Built:
    """The contrastive term with its gradient, at tau 0.25."""
    nodes, edges, order = size
    z = torch.randn(nodes, EMBEDDING, generator=torch.Generator().manual_seed(0))
    matrix = weights(transition(near_edges(nodes, edges), nodes), order, False)
    if ours:
        structure = Structure.of(matrix)
        loss: Callable[[Tensor], Tensor] = lambda z: contrast(z, structure, 0.25).per_row.mean()  # noqa: E731
    else:
        weight, eye = torch.from_numpy(matrix.toarray()).float(), torch.eye(nodes)
        loss = lambda z: plain_losses(z, weight, eye, 0.25)  # noqa: E731

    def run() -> Tensor:
        leaf = z.clone().requires_grad_()
        value = loss(leaf)
        value.backward()
        return value.detach()

    return Built(run, 0)


class GCN(nn.Module):
    """Graph convolutions of the encoder's widths: relu(A h W) a layer, the last one linear."""

    def __init__(self, dim: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip((dim, *widths[:-1]), widths, strict=True))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = adjacency @ layer(x)
            x = x if number == len(self.layers) - 1 else F.relu(x)
        return x


def inference(form: str, nodes: int = 3025, dim: int = 1870, edges: int = 13_128) -> Built:
    """Embeddings of all nodes, ACM's sizes and density: our encoder, or a GCN of its widths on a dense or sparse adjacency, or of two layers."""
    torch.manual_seed(0)
    x = (torch.rand(nodes, dim) < 0.045).float()
    widths = (*WIDTHS, EMBEDDING)
    if form.startswith("encoder"):
        encoder = SCGC(dim, 3, decoder=None).ae
        features = Features(x, sparse=False if "dense" in form else None)
        return Built(torch.inference_mode()(lambda: encoder.encode(features).sum()), parameters(encoder))
    step = transition(near_edges(nodes, edges), nodes)
    adjacency = torch.from_numpy(step.toarray()).float()
    adjacency = adjacency.to_sparse_csr() if "sparse" in form else adjacency
    gcn = GCN(dim, (WIDTHS[0], EMBEDDING) if "two layers" in form else widths)
    return Built(torch.inference_mode()(lambda: gcn(x, adjacency).sum()), parameters(gcn))


def configurations() -> dict[str, Forms]:
    """By name, the forms of a step, ours first."""
    return {
        "SCGC": {"ours": lambda: step(False, True), "dense": lambda: step(False, False)},
        "SCGC*": {"ours": lambda: step(True, True), "dense": lambda: step(True, False)},
        "SCGC, ACM's size": {"ours": lambda: step(False, True, True), "dense": lambda: step(False, False, True)},
        "SCGC*, ACM's size": {"ours": lambda: step(True, True, True), "dense": lambda: step(True, False, True)},
        "contrast alone, 3025 nodes, R 2": {"ours": lambda: term(ACM, True), "dense": lambda: term(ACM, False)},
        "contrast alone, 4057 nodes, R 4": {"ours": lambda: term(FAR, True), "dense": lambda: term(FAR, False)},
        "inference, 3025 nodes": {
            form: partial(inference, form)
            for form in ("encoder", "encoder, dense features", "GCN, dense", "GCN, sparse", "GCN of two layers, dense")
        },
    }
