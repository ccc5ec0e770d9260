"""Optima that no network is needed for: the finite training set (R6), and a function on a 1-D grid (both criteria)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

TILE = 1 << 24
"""Weights (queries x points) held at once where they have to be stored."""


def _attention_parts(y: Tensor, points: Tensor, sigma: float, log_weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries y / sigma^2, keys, the bias row log w_i - |x_i|^2 / (2 sigma^2), and the centre that was taken off (it keeps the products small)."""
    if sigma <= 0:
        raise ValueError(f"sigma={sigma}: expected a positive noise level")
    centre = points.mean(0)
    keys = points - centre
    bias = -keys.square().sum(1) / (2 * sigma**2)
    return (y - centre) / sigma**2, keys, bias if log_weights is None else bias + log_weights, centre


def posterior_mean(y: Tensor, points: Tensor, sigma: float, log_weights: Tensor | None = None) -> Tensor:
    """r*(y) for a weighted finite set: sum_i w_i x_i with w = softmax(log_weights_i - |y - x_i|^2 / (2 sigma^2)), (N, d).

    With equal weights this is the DAE optimum of a training set (R6, a Parzen-window mean). It is softmax attention with the data as keys and
    values: one call, in which a fused kernel never stores the (N, n) weights.

    Args:
        y: (N, d) queries. points: (n, d). log_weights: (n,), default equal.
    """
    query, keys, bias, centre = _attention_parts(y, points, sigma, log_weights)
    rows = max(1, TILE // len(points)) if not query.is_cuda else len(query)
    parts = [
        scaled_dot_product_attention(part[None, None], keys[None, None], keys[None, None], attn_mask=bias[None, None, None], scale=1.0)[
            0, 0
        ]
        for part in query.split(rows)
    ]
    return torch.cat(parts) + centre


def parzen_log_density(y: Tensor, points: Tensor, sigma: float) -> Tensor:
    """(N,) log of the mean of N(y; x_i, sigma^2 I): the log-sum-exp of the same logits as `posterior_mean`."""
    query, keys, bias, centre = _attention_parts(y, points, sigma, None)
    parts = [(part @ keys.mT + bias).logsumexp(1) for part in query.split(max(1, TILE // len(points)))]
    square = (y - centre).square().sum(1) / (2 * sigma**2)
    return torch.cat(parts) - square - math.log(len(points)) - 0.5 * y.shape[1] * math.log(2 * math.pi * sigma**2)


def posterior_jacobian(y: Tensor, points: Tensor, sigma: float) -> Tensor:
    """(N, d, d) Jacobian of `posterior_mean`: the weighted covariance of the points over sigma^2 (R1')."""
    query, keys, bias, _ = _attention_parts(y, points, sigma, None)
    found = []
    for part in query.split(max(1, TILE // keys.numel())):
        share = (part @ keys.mT + bias).softmax(1)
        apart = keys - (share @ keys)[:, None]
        found.append(torch.einsum("nm,nmi,nmj->nij", share, apart, apart) / sigma**2)
    return torch.cat(found)


def _check_grid(x: Tensor, log_p: Tensor) -> float:
    step = x.diff()
    if x.ndim != 1 or len(x) < 3 or not torch.allclose(step, step[:1], rtol=1e-6, atol=0) or step[0] <= 0:
        raise ValueError(f"grid: expected at least 3 even, rising points, found shape {tuple(x.shape)}; use torch.linspace")
    if log_p.shape != x.shape or not bool(log_p.isfinite().all()):
        raise ValueError(
            "density on the grid: expected a finite log density at every point, found -inf or NaN; narrow the interval or pass log p itself"
        )
    return float(step[0])


def dae_on_grid(x: Tensor, log_p: Tensor, sigma: float) -> Tensor:
    """DAE optimum on a 1-D grid: sum_j w_j x_j / sum_j w_j with w_j = p_j exp(-(x_i - x_j)^2 / (2 sigma^2)), (n,).

    Args:
        x: (n,) even grid. log_p: (n,) log density there, any constant added.
    """
    _check_grid(x, log_p)
    return posterior_mean(x[:, None], x[:, None], sigma, log_p)[:, 0]


def rcae_on_grid(x: Tensor, log_p: Tensor, sigma: float) -> Tensor:
    """RCAE optimum on a 1-D grid, exactly, by the author's rule (left ends; the last point has no reconstruction term).

    Minimises sum_{i<n-1} p_i dx (r_i - x_i)^2 + sigma^2 p_i (r_{i+1} - r_i)^2 / dx, so r_{n-1} = r_{n-2}. The tridiagonal system is eliminated
    with sums and quotients of positive numbers alone, rows scaled by p_i: nothing cancels however far the density falls.
    """
    dx = _check_grid(x, log_p)
    grid = x.double().tolist()
    ratio = [0.0, *(log_p[:-1] - log_p[1:]).double().exp().tolist()]  # p_{i-1} / p_i
    spring = sigma**2 / dx  # stiffness between i and i + 1, over p_i
    stiff = [0.0] * (len(grid) - 1)  # diagonal without the spring to the right, over p_i
    right = [0.0] * (len(grid) - 1)
    for i in range(len(grid) - 1):
        carried = ratio[i] * spring / (stiff[i - 1] + spring) if i else 0.0
        stiff[i] = dx + carried * (stiff[i - 1] if i else 0.0)
        right[i] = dx * grid[i] + carried * (right[i - 1] if i else 0.0)
    r = [right[-1] / stiff[-1]] * 2
    for i in range(len(grid) - 3, -1, -1):
        r.append((right[i] + spring * r[-1]) / (stiff[i] + spring))
    return torch.tensor(r[::-1], dtype=x.dtype)


def rcae_condition_residual(x: Tensor, log_p: Tensor, r: Tensor, sigma: float) -> Tensor:
    """(n - 2,) r - x - sigma^2 (r'' + score r') at inner grid points by central differences: 0 at the RCAE optimum (R2')."""
    dx = _check_grid(x, log_p)
    second = (r[2:] - 2 * r[1:-1] + r[:-2]) / dx**2
    first = (r[2:] - r[:-2]) / (2 * dx)
    score = (log_p[2:] - log_p[:-2]) / (2 * dx)
    return r[1:-1] - x[1:-1] - sigma**2 * (second + score * first)
