"""Linear layers on a CPU through oneDNN, float32 in and out: about twice as fast as torch's own call (MKL) where that does not use AVX-512, as on AMD.

`python -m benchmarks.point_cmae_step` measures it. Elsewhere (CUDA, autocast, compiled, other types, torch built without oneDNN) these are torch's.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (n, k) times the transpose of b (m, k)."""
    return torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b), bias, "none", [], "")


def _dense(matrix: Tensor) -> Tensor:
    """A transposed matrix is taken as it is; any other strided view (a slice of columns) would go by oneDNN's reference code."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        of_x = _product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        of_weight = _product(grad.t(), x.t()) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, grad.sum(0) if ctx.biased and ctx.needs_input_grad[2] else None


def on_plain_cpu(*tensors: Tensor) -> bool:
    """Whether all are float32 on a CPU, outside of autocast and torch.compile."""
    return not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")) and all(
        tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., D) mapped by weight (C, D) and bias (C,): (..., C). The gradient cannot be differentiated again."""
    if not (_AVAILABLE and torch.backends.mkldnn.enabled and on_plain_cpu(x, weight)) or x.numel() == 0:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    return _Linear.apply(rows, weight, bias).view(*x.shape[:-1], len(weight))


class Linear(nn.Linear):
    """torch's, by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def with_fast_linears(model: M) -> M:
    """Let every nn.Linear of the model, in place, go by `linear`; names and parameters stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    return model
