"""A GraphMAE training step (forward, loss, backward, Adam) on two generated inputs: ours on both paths, and as a user of torch-geometric would write it;
one fit of the graph protocol's support vector machine, with our kernel matrix and with libsvm's kernel.

`python -m benchmarks.steps graphmae` prints a JSON line each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import make_classification
from sklearn.svm import SVC
from torch import Tensor, nn

from benchmarks.timing import Built, Feed, Forms, parameters
from common.probes import rbf_scale
from projects.graphmae.data import Batches, shapes
from projects.graphmae.layers import Graph, prepare
from projects.graphmae.model import Features, GraphMAE, draw_masks
from projects.graphmae.pretrain import adam

NODE: dict[str, Any] = {"hidden": 256, "heads": 4, "layers": 2, "mask_rate": 0.5, "replace_rate": 0.05, "gamma": 3.0}
GRAPH: dict[str, Any] = {
    "encoder": "gin",
    "decoder": "gin",
    "hidden": 512,
    "layers": 2,
    "norm": "batchnorm",
    "mask_rate": 0.5,
    "replace_rate": 0.0,
    "gamma": 1.0,
}


def _undirected(nodes: int, edges: int, generator: torch.Generator) -> Tensor:
    """`edges` distinct undirected edges, both ways."""
    chosen = torch.triu_indices(nodes, nodes, 1)[:, torch.randperm(nodes * (nodes - 1) // 2, generator=generator)[:edges]]
    return torch.cat([chosen, chosen.flip(0)], dim=1)


def node_input() -> tuple[Tensor, Tensor]:
    """2,700 nodes, 5,300 undirected edges plus loops, 1,433 binary features of density 0.0127, rows divided by their sum."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(2700, 1433, generator=generator) < 0.0127).float()
    return x / x.sum(1, keepdim=True).clamp(min=1), prepare(_undirected(2700, 5300, generator), 2700)


def graph_input() -> tuple[Tensor, Tensor]:
    """32 graphs of 20 nodes and 96 undirected edges plus loops, 136 one-hot features."""
    generator = torch.Generator().manual_seed(0)
    edges = torch.cat([_undirected(20, 96, generator) + 20 * g for g in range(32)], dim=1)
    return F.one_hot(torch.randint(136, (640,), generator=generator), 136).float(), prepare(edges, 640)


class Peer(nn.Module):
    """GraphMAE from torch-geometric's GATConv or GINConv: the same method and sizes, dense input, all nodes at every stage."""

    def __init__(self, kind: str, in_dim: int, hidden: int, layers: int, heads: int) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch_geometric.nn import GATConv, GINConv

        def mlp(a: int, b: int) -> nn.Module:
            return nn.Sequential(nn.Linear(a, hidden), nn.BatchNorm1d(hidden), nn.PReLU(), nn.Linear(hidden, b))

        def conv(a: int, b: int, h: int) -> nn.Module:
            return GATConv(a, b // h, h, dropout=0.1, add_self_loops=False) if kind == "gat" else GINConv(mlp(a, b))

        self.convs = nn.ModuleList(conv(in_dim if level == 0 else hidden, hidden, heads) for level in range(layers))
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden) if kind == "gin" else nn.Identity() for _ in range(layers))
        self.acts = nn.ModuleList(nn.PReLU() for _ in range(layers))
        self.token = nn.Parameter(torch.zeros(1, in_dim))
        self.middle = nn.Linear(hidden, hidden, bias=False)
        self.decoder = conv(hidden, in_dim, 1)

    def forward(self, x: Tensor, edges: Tensor, mask_rate: float, replace_rate: float, gamma: float) -> Tensor:
        masks = draw_masks(len(x), mask_rate, replace_rate)
        h = x.clone()
        h[masks.noise_nodes] = x[masks.noise_source_nodes]
        h[masks.token_nodes] = self.token
        for conv, norm, act in zip(self.convs, self.norms, self.acts, strict=True):
            h = act(norm(conv(F.dropout(h, 0.2, self.training), edges)))
        code = self.middle(h)
        code[masks.mask_nodes] = 0
        out = self.decoder(F.dropout(code, 0.2, self.training), edges)[masks.mask_nodes]
        return (1 - F.cosine_similarity(out, x[masks.mask_nodes], eps=1e-12)).pow(gamma).mean()


def _ours(inputs: Callable[[], tuple[Tensor, Tensor]], settings: dict[str, Any], path: str, weight_decay: float, lr: float) -> Built:
    x, edges = inputs()
    torch.manual_seed(0)
    model = GraphMAE(x.shape[1], **settings)
    update = adam(model, lr, weight_decay)
    features, graph = Features(x), Graph.from_edges(edges, len(x))

    def step() -> Tensor:
        update.zero_grad()
        loss = model(features if path == "efficient" else x, graph, path=path).loss
        loss.backward()
        update.step()
        return loss.detach()

    return Built(step, parameters(model))


def _peer(inputs: Callable[[], tuple[Tensor, Tensor]], kind: str, settings: dict[str, Any], weight_decay: float, lr: float) -> Built:
    x, edges = inputs()
    torch.manual_seed(0)
    model = Peer(kind, x.shape[1], settings["hidden"], settings["layers"], settings.get("heads", 1))
    update = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay)

    def step() -> Tensor:
        update.zero_grad()
        loss = model(x, edges, settings["mask_rate"], settings["replace_rate"], settings["gamma"])
        loss.backward()
        update.step()
        return loss.detach()

    return Built(step, parameters(model))


def _svm(kernel: Any) -> Built:
    """Fit on 2,000 of 2,500 drawn embeddings (512 wide), predict the others."""
    x, y = make_classification(2500, 512, n_informative=60, flip_y=0.15, random_state=0)
    return Built(lambda: SVC(kernel=kernel).fit(x[:2000], y[:2000]).predict(x[2000:]), 0)


def configurations() -> dict[str, Forms]:
    """Node and graph step: the re-ordered efficient path, the plain one, and torch-geometric's layers. The SVM: one kernel matrix, and pair by pair."""
    return {
        "node": {
            "efficient": lambda: _ours(node_input, NODE, "efficient", 2e-4, 1e-3),
            "plain": lambda: _ours(node_input, NODE, "plain", 2e-4, 1e-3),
            "torch-geometric": lambda: _peer(node_input, "gat", NODE, 2e-4, 1e-3),
        },
        "graph": {
            "efficient": lambda: _ours(graph_input, GRAPH, "efficient", 0.0, 1.5e-4),
            "plain": lambda: _ours(graph_input, GRAPH, "plain", 0.0, 1.5e-4),
            "torch-geometric": lambda: _peer(graph_input, "gin", GRAPH, 0.0, 1.5e-4),
        },
        "SVM": {"kernel matrix": lambda: _svm(rbf_scale), "libsvm": lambda: _svm("rbf")},
    }


def loaders() -> dict[str, Feed]:
    """Batches of 32 graphs cut out of one joined set, as every graph recipe has them."""
    return {"batches of 32 of 960 graphs of 10 to 20 nodes": Feed(Batches(shapes(graphs=960), 32, seed=0).loader(), 32)}
