"""The neighbour-contrastive loss (paper Sec. 3; spec of the released code): sparse structure weights, no N x N array.

    E_ij = exp(tau * cos(z_i, z_j)), E_ii = 1        tau multiplies, and the self term is a constant
    L = -(1/N) sum_i log( sum_j W_ij E_ij / sum_j E_ij + 1e-8 )

The denominator comes from `common.kernels.pair_lse` (tiles on a CPU, Triton on a GPU); the numerator from the stored entries of W, as
a sampled product forwards and two sparse products backwards. `dense` is the same loss with every N x N array, for tests and benchmarks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from common.contrastive import unit
from common.kernels.pair_lse import Path, pair_lse
from projects.scgc.features import csr_rows

EPS = 1e-8


@dataclass(frozen=True)
class Structure:
    """Some rows of the structure weights W as a sparse matrix (rows, columns) in CSR form; no gradient.

    `crow` (rows + 1,), `column` (E,) int32, `value` (E,). `oneself` (<= rows,): places of the entries that join a node with itself.
    By columns, for the backward pass: `down` (columns + 1,), `row` (E,) int32 of the entries in the order `order` (E,) int64.
    """

    crow: Tensor
    column: Tensor
    value: Tensor
    columns: int
    oneself: Tensor
    down: Tensor
    row: Tensor
    order: Tensor

    @classmethod
    def of(cls, matrix: sp.spmatrix, dtype: torch.dtype = torch.float32) -> Structure:
        """From a square SciPy matrix, whole."""
        csr = sp.csr_matrix(matrix)
        csr.sort_indices()
        crow, column = (torch.from_numpy(part.astype(np.int32)) for part in (csr.indptr, csr.indices))
        return cls._made(crow, column, torch.from_numpy(csr.data).to(dtype), csr.shape[1], 0)

    @classmethod
    def _made(cls, crow: Tensor, column: Tensor, value: Tensor, columns: int, offset: int) -> Structure:
        rows = len(crow) - 1
        row = torch.arange(rows, dtype=torch.int32, device=crow.device).repeat_interleave(crow.diff(), output_size=len(column))
        order = column.sort(stable=True).indices
        down = torch.zeros(columns + 1, dtype=torch.int32, device=crow.device)
        down[1:] = torch.bincount(column, minlength=columns).cumsum(0)
        return cls(crow, column, value, columns, (row + offset == column).nonzero().flatten(), down, row[order], order)

    def __len__(self) -> int:
        return len(self.crow) - 1

    @property
    def entries(self) -> int:
        return len(self.value)

    def to(self, device: torch.device | str) -> Structure:
        return Structure(*(part.to(device) if isinstance(part, Tensor) else part for part in vars(self).values()))

    def own(self, start: int, stop: int) -> Structure:
        """Rows start..stop-1 against all columns: what one of several processes holds."""
        rows = torch.arange(start, stop, device=self.crow.device)
        return self._made(*csr_rows(self.crow, self.column, self.value, rows), self.columns, start)

    def among(self, nodes: Tensor) -> Structure:
        """Rows and columns of `nodes` (distinct), numbered in the order given: the weights of a mini-batch."""
        crow, column, value = csr_rows(self.crow, self.column, self.value, nodes)
        place = torch.full((self.columns,), -1, dtype=torch.int32, device=nodes.device)
        place[nodes] = torch.arange(len(nodes), dtype=torch.int32, device=nodes.device)
        column = place[column.long()]
        inside = column >= 0
        kept = torch.zeros(len(column) + 1, dtype=crow.dtype, device=nodes.device)
        kept[1:] = inside.cumsum(0)
        return self._made(kept[crow.long()], column[inside], value[inside], len(nodes), 0)

    def matrix(self, value: Tensor | None = None) -> Tensor:
        """The weights, or other values in their places, as a sparse CSR tensor."""
        return torch.sparse_csr_tensor(self.crow, self.column, self.value if value is None else value, size=(len(self), self.columns))

    def transposed(self, value: Tensor) -> Tensor:
        """The transpose of `matrix(value)`, in CSR form too: its product is many times faster than that of a view."""
        return torch.sparse_csr_tensor(self.down, self.row, value[self.order], size=(self.columns, len(self)))


@dataclass(frozen=True)
class Contrast:
    """`per_row` (N,): the loss of each node; `positives`, `denominator` (N,): the two sums in it."""

    per_row: Tensor
    positives: Tensor
    denominator: Tensor


class _Positives(torch.autograd.Function):
    """(N,) sum_j W_ij exp(tau * u_i . k_j) over stored entries; a node with itself counts exp(0), without gradient. keys None: the rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, keys: Tensor | None, structure: Structure, tau: float) -> Tensor:
        others = rows if keys is None else keys
        empty = structure.matrix(torch.zeros_like(structure.value))
        weight = torch.sparse.sampled_addmm(empty, rows, others.t(), beta=0.0, alpha=tau).values()
        weight[structure.oneself] = 0.0
        weight = weight.exp_().mul_(structure.value)
        ctx.structure, ctx.tau = structure, tau
        ctx.save_for_backward(rows, keys, weight)
        return torch.segment_reduce(weight, "sum", offsets=structure.crow.long(), initial=0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, keys, weight = ctx.saved_tensors
        structure = ctx.structure
        weight = weight * (grad * ctx.tau).repeat_interleave(structure.crow.diff(), output_size=len(weight))
        weight[structure.oneself] = 0.0
        outgoing, incoming = structure.matrix(weight), structure.transposed(weight)
        if keys is None:
            return outgoing @ rows + incoming @ rows, None, None, None
        return outgoing @ keys, incoming @ rows, None, None


def contrast(z: Tensor, structure: Structure, tau: float, *, keys: Tensor | None = None, offset: int = 0) -> Contrast:
    """The loss of each row; O(N + E) memory.

    Args:
        z: (N, D) embeddings, not normalised: a row is divided by max(its norm, 1e-12) here.
        structure: (N, M) weights of these rows.
        tau: multiplies the cosine.
        keys: (M, D) embeddings of all nodes of the batch where `z` are rows offset..offset+N-1 of them; None = z itself.
    Raises:
        ValueError: sizes that do not fit.
    """
    columns = len(z) if keys is None else len(keys)
    if (len(structure), structure.columns) != (len(z), columns):
        raise ValueError(
            f"structure: expected weights of {len(z)} rows and {columns} columns as the embeddings have, found {len(structure)} and {structure.columns}"
        )
    rows = unit(z)
    others = None if keys is None else unit(keys)
    index = torch.arange(columns, dtype=torch.int32, device=z.device)
    own = index if keys is None else index[offset : offset + len(z)]
    path: Path = "tiled" if z.device.type == "cpu" else "auto"  # half the time of the plain form even where that is chosen
    lse, _ = pair_lse(rows, others, tau, own, None if keys is None else index, path=path)
    denominator = 1 + lse.exp()
    if structure.value.dtype != rows.dtype:
        structure = replace(structure, value=structure.value.to(rows.dtype))
    positives = _Positives.apply(rows, others, structure, float(tau))
    return Contrast(-(positives / denominator + EPS).log(), positives, denominator)


def dense(z: Tensor, weights: Tensor, tau: float) -> Contrast:
    """The definition with all its N x N arrays: weights (N, N)."""
    similarity = cosine_without_self(z)
    exponent = (tau * similarity).exp()
    positives, denominator = (weights * exponent).sum(1), exponent.sum(1)
    return Contrast(-(positives / denominator + EPS).log(), positives, denominator)


def cosine_without_self(z: Tensor) -> Tensor:
    """(N, N) cosines with a zero diagonal."""
    rows = unit(z)
    return (rows @ rows.t()) * (1 - torch.eye(len(z), dtype=rows.dtype, device=z.device))
