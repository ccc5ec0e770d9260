"""Figures instead of impressions: errors against a true score, order of convergence, fields on curves, attractors, samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from projects.regularized_ae.densities import parse_sigmas

Field = Callable[[Tensor], Tensor]


def relative_error(estimate: Tensor, truth: Tensor, weights: Tensor | None = None) -> float:
    """sqrt(sum |estimate - truth|^2 / sum |truth|^2) over points (N, d), weighted (N,) where the points are a grid."""
    weights = torch.ones(len(truth), dtype=truth.dtype) if weights is None else weights
    error = (weights * (estimate - truth).square().flatten(1).sum(1)).sum()
    return float((error / (weights * truth.square().flatten(1).sum(1)).sum()).sqrt())


def orders(sigmas: Sequence[float], errors: Sequence[float]) -> list[float]:
    """Slopes of log error over log sigma between neighbours of a strictly falling grid: 2 is what the theory predicts for the exact optimum.

    Raises:
        ValueError: the grid is unsorted or repeats a value, or an error is not positive.
    """
    grid = parse_sigmas(sigmas)
    if len(errors) != len(grid) or any(not error > 0 for error in errors):
        raise ValueError(f"slope: expected {len(grid)} positive errors, found {list(errors)}")
    logs = [(math.log(sigma), math.log(error)) for sigma, error in zip(grid, errors, strict=True)]
    return [(below - above) / (smaller - larger) for (larger, above), (smaller, below) in pairwise(logs)]


def _mean_distance(a: Tensor, b: Tensor, rows: int = 1024) -> float:
    return float(sum(torch.cdist(part, b).sum() for part in a.split(rows))) / (len(a) * len(b))


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| over all pairs of two samples (n, d), (m, d); 0 for equal distributions, up to O(1/n) + O(1/m)."""
    return 2 * _mean_distance(x, y) - _mean_distance(x, x) - _mean_distance(y, y)


def effective_sample_size(samples: Tensor) -> float:
    """Independent draws that the chains (S, C, d) are worth: S C over the autocorrelation time (Geyer's positive pairs), smallest over dimensions.

    The autocorrelation is taken about the mean of all chains, so chains that never mix count for little.
    """
    steps, chains, _ = samples.shape
    centred = samples - samples.mean((0, 1))
    spectrum = torch.fft.rfft(centred, n=2 * steps, dim=0).abs().square()
    covariance = torch.fft.irfft(spectrum, dim=0)[:steps].mean(1) / torch.arange(steps, 0, -1, dtype=samples.dtype)[:, None]
    correlation = covariance / covariance[:1].clamp_min(torch.finfo(samples.dtype).tiny)
    pairs = correlation[: steps // 2 * 2].unflatten(0, (-1, 2)).sum(1)
    positive = (pairs > 0).cumprod(0)
    time = (2 * (pairs * positive).sum(0) - 1).clamp_min(1.0)
    return steps * chains / float(time.max())


@dataclass
class CurveField:
    """How a displacement field points back to a curve at one distance from it."""

    distance: float
    cosine: float
    """mean cosine between r(x) - x and the direction to the nearest point of the curve: 1 is perfect."""
    ratio: float
    """mean |r(x) - x| over the distance to the curve: 1 goes all the way back."""


def curve_field(displacement: Field, curve: Tensor, distance: float, *, count: int = 500) -> CurveField:
    """The field at `distance` on both sides of a plane curve, given by ordered dense points (n, 2); the curve's ends are left out.

    Args:
        count: places along the curve, evenly spread over its points.
    """
    inner = torch.linspace(0.02 * len(curve), 0.98 * len(curve) - 1, count).long()
    tangent = torch.nn.functional.normalize(curve[inner + 1] - curve[inner - 1], dim=1)
    normal = torch.stack([-tangent[:, 1], tangent[:, 0]], 1)
    x = torch.cat([curve[inner] + distance * normal, curve[inner] - distance * normal])
    back = curve[torch.cdist(x, curve).argmin(1)] - x
    with torch.no_grad():
        move = displacement(x)
    cosine = torch.nn.functional.cosine_similarity(move, back, dim=1)
    return CurveField(distance, float(cosine.mean()), float((move.norm(dim=1) / back.norm(dim=1)).mean()))


@dataclass
class Attractors:
    ends: Tensor
    """(N, d) where the iteration of r ended."""
    spurious: Tensor
    """(N,) bool: farther than the tolerance from all data."""

    @property
    def share(self) -> float:
        return float(self.spurious.double().mean())


def attractors(reconstruct: Field, starts: Tensor, data: Tensor, *, iterations: int = 300, tolerance: float = 0.03) -> Attractors:
    """Iterate r from each start (N, d); an end far from the data (n, d) is a spurious attractor (a divergent iteration counts as one)."""
    x = starts
    with torch.no_grad():
        for _ in range(iterations):
            x = reconstruct(x)
        nearest = torch.cat([torch.cdist(part, data).min(1).values for part in x.split(1024)])
    return Attractors(x, ~(nearest <= tolerance))
