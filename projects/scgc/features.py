"""Node features, dense or sparse, and the two places where their sparsity pays: the first layer and the reconstruction error.

Word counts of papers are 1 to 5 % dense, and the first layer would be most of the encoder's work. Where features are sparse
neither N x d products nor the N x d reconstruction exist; the numbers are the same.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

warnings.filterwarnings("ignore", message="Sparse (CSR|CSC|invariant)")  # torch's notes that the layout is young and its checks are off

SPARSE_BELOW = 0.1
"""Share of entries that are not zero under which the sparse products win (5 times faster at 0.045, 15 times at 0.009)."""


class _Product(torch.autograd.Function):
    """features (N, d, sparse, constant) @ dense (d, h)."""

    @staticmethod
    def forward(ctx: Any, features: Features, dense: Tensor) -> Tensor:
        ctx.features = features
        return features.matrix @ dense

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, ctx.features.transposed() @ grad.contiguous()


class Features:
    """Features of N nodes, kept dense or as a sparse matrix.

    Args:
        x: (N, d) array or tensor of numbers; cast to float32 unless it is a float64 tensor.
        sparse: None = by the share of entries that are not zero.
    Raises:
        ValueError: another shape, or entries that are not finite (the first one is named).
    """

    def __init__(self, x: Tensor | np.ndarray, sparse: bool | None = None) -> None:
        x = torch.as_tensor(x)
        if x.ndim != 2 or 0 in x.shape:
            raise ValueError(f"features: expected (N, d) with N and d at least 1, found {tuple(x.shape)}")
        x = x if x.dtype == torch.float64 else x.float()
        bad = (~x.isfinite()).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            raise ValueError(
                f"features: expected finite numbers, found {float(x[row, column])} in row {row}, column {column}; mend or drop that node"
            )
        if sparse is None:
            sparse = float((x != 0).float().mean()) < SPARSE_BELOW
        self.matrix = x.to_sparse_csr() if sparse else x
        self._transposed: Tensor | None = None
        self._whole = True

    @classmethod
    def _of(cls, matrix: Tensor) -> Features:
        part = cls.__new__(cls)
        part.matrix, part._transposed, part._whole = matrix, None, False
        return part

    @property
    def sparse(self) -> bool:
        return self.matrix.layout == torch.sparse_csr

    @property
    def shape(self) -> torch.Size:
        return self.matrix.shape

    def __len__(self) -> int:
        return self.matrix.shape[0]

    def to(self, device: torch.device | str) -> Features:
        moved = Features._of(self.matrix.to(device))
        moved._whole = self._whole
        return moved

    def dense(self) -> Tensor:
        """(N, d) as an ordinary tensor."""
        return self.matrix.to_dense() if self.sparse else self.matrix

    def rows(self, nodes: Tensor | slice) -> Features:
        """The features of some nodes, in the order given."""
        if not self.sparse:
            return Features._of(self.matrix[nodes])
        if isinstance(nodes, slice):
            nodes = torch.arange(*nodes.indices(len(self)), device=self.matrix.device)
        crow, column, value = csr_rows(self.matrix.crow_indices(), self.matrix.col_indices(), self.matrix.values(), nodes)
        return Features._of(torch.sparse_csr_tensor(crow, column, value, size=(len(nodes), self.shape[1])))

    def transposed(self) -> Tensor:
        """(d, N) sparse; that of a whole data set is sorted by column once, which halves the time of every backward pass."""
        if self._transposed is None:
            self._transposed = self.matrix.t().to_sparse_csr() if self._whole else self.matrix.t()
        return self._transposed

    def linear(self, layer: nn.Linear) -> Tensor:
        """(N, h): the layer applied to every node."""
        if not self.sparse:
            return F.linear(self.matrix, layer.weight, layer.bias)
        return _Product.apply(self, layer.weight.t()) + layer.bias

    def squared_error(self, hidden: Tensor, layer: nn.Linear) -> Tensor:
        """0-d: sum over all N*d entries of (layer(hidden) - x)^2, hidden (N, h).

        Where sparse: |H W' + b|^2 - 2 <H W' + b, X> + |X|^2 from the h x h matrices H'H and W'W and the stored entries of X alone.
        """
        count, width = hidden.shape
        if not self.sparse:
            return F.mse_loss(layer(hidden), self.matrix, reduction="sum")
        if (count + self.shape[1]) * width >= count * self.shape[1]:  # narrow features: the product itself is cheaper
            return F.mse_loss(layer(hidden), self.dense(), reduction="sum")
        weight, bias, value = layer.weight, layer.bias, self.matrix.values()
        size = ((hidden.t() @ hidden) * (weight.t() @ weight)).sum()
        size = size + 2 * (hidden.sum(0) @ weight.t() @ bias) + count * bias.square().sum()
        columns = torch.zeros_like(bias).index_add_(0, self.matrix.col_indices(), value)
        product = (hidden * _Product.apply(self, weight)).sum() + columns @ bias
        return size - 2 * product + value.square().sum()


def csr_rows(crow: Tensor, column: Tensor, value: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Some rows of a CSR matrix, in the order given: their crow, columns and values."""
    counts = crow.diff()[rows].long()
    begin = counts.cumsum(0) - counts
    place = torch.arange(int(counts.sum()), device=crow.device) + (crow[rows].long() - begin).repeat_interleave(counts)
    new = torch.zeros(len(rows) + 1, dtype=crow.dtype, device=crow.device)
    new[1:] = counts.cumsum(0)
    return new, column[place], value[place]
