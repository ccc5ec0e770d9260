"""GraphMAE for molecules: atoms hidden and guessed, then a classifier on the encoder (reference folder `chem`, which has its own model; Sec. 4.3).

Atoms are [type 0..118, chirality 0..2], bonds [type 0..3, direction 0..2]; self-loops, which each layer adds, are bonds [4, 0]. A hidden atom
is [119, 0]: the mask token is a row of the type table. Parameter names are the reference's; its released encoder loads by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from projects.graphmae.layers import Graph, Path, PReLU, dropout, neighbour_sum, spread
from projects.graphmae.model import Output, readout, sce

ATOM_TYPES, MASK_TYPE = 119, 119  # atomic number - 1; the row after the last type stands for a hidden atom
BOND_TYPES, LOOP, DIRECTIONS = 6, 4, 3
JumpingKnowledge = Literal["last", "concat", "max", "sum"]


@dataclass
class Bonds:
    """Bonds with self-loops: edges sorted by target, their attributes (E, 2), and `counts` (N, 9) of each type and direction coming into an atom."""

    graph: Graph
    attributes: Tensor
    counts: Tensor

    @classmethod
    def of(cls, edge_index: Tensor, edge_attr: Tensor, atoms: int) -> Bonds:
        """From bonds both ways (2, E) and their [type, direction] (E, 2), without self-loops.

        Raises:
            ValueError: shapes that do not match, or a type or direction outside the tables.
        """
        if edge_attr.shape != (edge_index.shape[1], 2):
            raise ValueError(f"edge_attr: expected ({edge_index.shape[1]}, 2), found {tuple(edge_attr.shape)}")
        edge_index, edge_attr = edge_index.long(), edge_attr.long()
        for column, (name, size) in enumerate((("type", BOND_TYPES), ("direction", DIRECTIONS))):
            if len(edge_attr) and not 0 <= int(edge_attr[:, column].min()) <= int(edge_attr[:, column].max()) < size:
                raise ValueError(
                    f"edge_attr: expected bond {name} 0 to {size - 1}, found {int(edge_attr[:, column].min())} to {int(edge_attr[:, column].max())}"
                )
        loop = torch.arange(atoms, device=edge_index.device)
        graph = Graph.from_edges(torch.cat([edge_index, loop.expand(2, -1)], dim=1), atoms)
        attributes = torch.cat([edge_attr, torch.tensor([[LOOP, 0]], device=edge_attr.device).expand(atoms, -1)])[graph.order]
        return cls(graph, attributes, bond_counts(graph, attributes))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Bonds:
        return Bonds(
            self.graph.to(device, non_blocking),
            self.attributes.to(device, non_blocking=non_blocking),
            self.counts.to(device, non_blocking=non_blocking),
        )


def bond_counts(graph: Graph, attributes: Tensor) -> Tensor:
    """(targets, 9): how many incoming bonds of each type, then of each direction."""
    counts = torch.zeros(graph.targets, BOND_TYPES + DIRECTIONS, device=attributes.device)
    ones = torch.ones(len(attributes), device=attributes.device)
    counts.index_put_((graph.target, attributes[:, 0]), ones, accumulate=True)
    return counts.index_put_((graph.target, attributes[:, 1] + BOND_TYPES), ones, accumulate=True)


class MoleculeLayer(nn.Module):
    """MLP(sum over incoming bonds of (h_u + B1[type] + B2[direction])), width -> 2 · width -> out; no (1 + eps) term: the self-loop is the atom itself."""

    def __init__(self, width: int, out_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, out_dim))
        self.edge_embedding1 = nn.Embedding(BOND_TYPES, width)
        self.edge_embedding2 = nn.Embedding(DIRECTIONS, width)
        for table in (self.edge_embedding1, self.edge_embedding2):
            nn.init.xavier_uniform_(table.weight)

    def forward(self, bonds: Bonds, h: Tensor, path: Path, rows: Tensor | None = None) -> Tensor:
        """h (N, width) -> (N, out), or (len(rows), out) for rising atom numbers `rows`."""
        if path == "plain":
            message = h[bonds.graph.source] + self.edge_embedding1(bonds.attributes[:, 0]) + self.edge_embedding2(bonds.attributes[:, 1])
            out = self.mlp(torch.zeros_like(h).index_add(0, bonds.graph.target, message))
            return out if rows is None else out[rows]
        # the bonds' embeddings add up to how often each occurs, times the two small tables
        tables = torch.cat([self.edge_embedding1.weight, self.edge_embedding2.weight])
        graph, counts = (bonds.graph, bonds.counts) if rows is None else (bonds.graph.into(rows), bonds.counts[rows])
        return self.mlp(neighbour_sum(graph, h, path) + counts.to(tables.dtype) @ tables)


class MoleculeEncoder(nn.Module, PyTorchModelHubMixin):
    """Embedding of the atoms, then layers with batch norm, ReLU (not after the last) and dropout.

    Args:
        jk: which outputs make an atom's embedding: the last, all side by side (the input embedding among them), their maximum or sum.
    """

    def __init__(self, layers: int = 5, width: int = 300, *, jk: JumpingKnowledge = "last", drop: float = 0.0) -> None:
        super().__init__()
        if jk not in ("last", "concat", "max", "sum"):
            raise ValueError(f"jk={jk!r}: expected last, concat, max or sum")
        self.jk, self.drop, self.out_dim = jk, drop, width * (layers + 1) if jk == "concat" else width
        self.x_embedding1 = nn.Embedding(ATOM_TYPES + 1, width)
        self.x_embedding2 = nn.Embedding(3, width)
        for table in (self.x_embedding1, self.x_embedding2):
            nn.init.xavier_uniform_(table.weight)
        self.gnns = nn.ModuleList(MoleculeLayer(width, width) for _ in range(layers))
        self.batch_norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(layers))

    def forward(self, x: Tensor, bonds: Bonds, path: Path = "efficient") -> Tensor:
        """x (N, 2) int64 -> (N, out_dim)."""
        states = [self.x_embedding1(x[:, 0]) + self.x_embedding2(x[:, 1])]
        for level, (layer, norm) in enumerate(zip(self.gnns, self.batch_norms, strict=True)):
            h = norm(layer(bonds, states[-1], path))
            states.append(dropout(h if level == len(self.gnns) - 1 else F.relu(h), self.drop, self.training))
        if self.jk == "last":
            return states[-1]
        if self.jk == "concat":
            return torch.cat(states, dim=1)
        stacked = torch.stack(states)
        return stacked.amax(0) if self.jk == "max" else stacked.sum(0)


class MoleculeDecoder(nn.Module):
    """PReLU -> bias-free map -> hidden atoms' codes := 0 -> one layer that scores the 119 atom types."""

    def __init__(self, width: int, in_dim: int | None = None) -> None:
        super().__init__()
        self.conv = MoleculeLayer(width, ATOM_TYPES)
        self.enc_to_dec = nn.Linear(in_dim or width, width, bias=False)
        self.activation = PReLU()
        self.dec_token = nn.Parameter(torch.zeros(1, width), requires_grad=False)  # the reference holds it and never uses it

    def forward(self, bonds: Bonds, states: Tensor, rows: Tensor, path: Path = "efficient") -> Tensor:
        """Scores (len(rows), 119) of the hidden atoms `rows`, rising."""
        hidden = torch.zeros(len(states), dtype=torch.bool, device=states.device)
        hidden[rows] = True
        if path == "plain":
            code = self.enc_to_dec(self.activation(states)).masked_fill(hidden[:, None], 0.0)
            return self.conv(bonds, code, path, rows)
        reached = torch.zeros_like(hidden)
        reached[bonds.graph.source[hidden[bonds.graph.target]]] = True
        seen = (reached & ~hidden).nonzero().flatten()
        code = self.enc_to_dec(self.activation(states[seen]))
        return self.conv(bonds, spread(code, seen, len(states)), path, rows)


def draw_masked_atoms(molecule_of: Tensor, rate: float, generator: torch.Generator | None = None) -> Tensor:
    """Rising numbers of the hidden atoms: trunc(n · rate + 1) of each molecule's n atoms (so at least 1, at most all), without replacement."""
    if not 0 <= rate < 1:
        raise ValueError(f"mask_rate={rate}: expected 0 <= mask_rate < 1")
    atoms = torch.bincount(molecule_of)
    wanted = torch.minimum((atoms.double() * rate + 1).long(), atoms)
    order = torch.rand(len(molecule_of), device=molecule_of.device, generator=generator).argsort()
    order = order[molecule_of[order].argsort(stable=True)]  # atoms of each molecule together, in random order
    rank = torch.arange(len(order), device=order.device) - (atoms.cumsum(0) - atoms)[molecule_of[order]]
    return order[rank < wanted[molecule_of[order]]].sort().values


class MoleculeGraphMAE(nn.Module, PyTorchModelHubMixin):
    """Masked atoms, encoder, re-mask, one-layer decoder, scaled cosine error against the one-hot type (or cross entropy)."""

    def __init__(
        self,
        layers: int = 5,
        width: int = 300,
        *,
        jk: JumpingKnowledge = "last",
        drop: float = 0.0,
        mask_rate: float = 0.25,
        gamma: float = 1.0,
        loss: Literal["sce", "ce"] = "sce",
    ) -> None:
        super().__init__()
        if loss not in ("sce", "ce"):
            raise ValueError(f"loss={loss!r}: expected sce or ce")
        self.mask_rate, self.gamma, self.loss = mask_rate, gamma, loss
        self.encoder = MoleculeEncoder(layers, width, jk=jk, drop=drop)
        self.decoder = MoleculeDecoder(width, self.encoder.out_dim)

    def forward(
        self,
        x: Tensor,
        bonds: Bonds,
        molecule_of: Tensor,
        *,
        masked_atoms: Tensor | None = None,
        generator: torch.Generator | None = None,
        path: Path = "efficient",
    ) -> Output:
        """Hide atoms, guess their types.

        Args:
            x: (N, 2) int64 [type, chirality]; not changed (the reference masks in place).
            molecule_of: (N,) rising molecule number of each atom.
            masked_atoms: numbers of the hidden atoms; not given: drawn per molecule.
        Returns:
            Output: loss, hidden atoms (M,) rising, scores (M, 119).
        """
        rows = draw_masked_atoms(molecule_of, self.mask_rate, generator) if masked_atoms is None else masked_atoms.long().sort().values
        masked = x.clone()
        masked[rows] = torch.tensor([MASK_TYPE, 0], device=x.device)
        scores = self.decoder(bonds, self.encoder(masked, bonds, path), rows, path)
        types = x[rows, 0]
        if self.loss == "ce":
            return Output(F.cross_entropy(scores, types), rows, scores)
        return Output(sce(scores, F.one_hot(types, ATOM_TYPES).to(scores.dtype), self.gamma, unit=True), rows, scores)


class Classifier(nn.Module, PyTorchModelHubMixin):
    """Encoder, mean over a molecule's atoms, one logit a task (fine-tuning)."""

    def __init__(
        self,
        tasks: int,
        layers: int = 5,
        width: int = 300,
        *,
        jk: JumpingKnowledge = "last",
        drop: float = 0.5,
        pooling: Literal["mean", "max", "sum"] = "mean",
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.gnn = MoleculeEncoder(layers, width, jk=jk, drop=drop)
        self.graph_pred_linear = nn.Linear(self.gnn.out_dim, tasks)

    def forward(self, x: Tensor, bonds: Bonds, molecule_of: Tensor, molecules: int, path: Path = "efficient") -> Tensor:
        """(molecules, tasks) logits."""
        return self.graph_pred_linear(readout(self.gnn(x, bonds, path), molecule_of, molecules, self.pooling))


def masked_bce(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over the labels that are there of the binary cross entropy, in float64, and how many they are; labels 1, -1, or 0 where missing."""
    there = labels != 0
    terms = F.binary_cross_entropy_with_logits(logits.double(), (labels.double() + 1) / 2, reduction="none")
    return torch.where(there, terms, torch.zeros_like(terms)).sum(), there.sum()
