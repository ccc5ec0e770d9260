"""Densities whose score is known: what a regularised auto-encoder is held against.

Gaussian mixtures in any dimension have everything in closed form: log density, score, Hessian, the density smoothed by the noise, and
through it the exact optimum of the denoising criterion (R1'). Two densities of the first author's experiments are known by their energy.
Every closed form goes through log-sum-exp, so that it stays finite far from the data. Names R1 ... R8: results of Sec. 3 of the paper, see README.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

Field = Callable[[Tensor], Tensor]


class Density(Protocol):
    """What the experiments ask of a density."""

    def log_prob(self, x: Tensor) -> Tensor: ...

    def score(self, x: Tensor) -> Tensor: ...

    def hessian(self, x: Tensor) -> Tensor: ...

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor: ...


# ---- Gaussian mixtures ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """p(x) = sum_k weights_k N(x; means_k, covs_k), d >= 1.

    Args:
        weights: (K,) positive, sum 1.
        means: (K, d).
        covs: (K, d, d) symmetric positive definite.
    Raises:
        ValueError: shapes that do not fit, weights that are no distribution, a covariance that is not positive definite (the component is named).
    """

    weights: Tensor
    means: Tensor
    covs: Tensor

    def __post_init__(self) -> None:
        k, d = self.means.shape if self.means.ndim == 2 else (0, 0)
        if self.weights.shape != (k,) or self.covs.shape != (k, d, d) or k == 0:
            found = [tuple(t.shape) for t in (self.weights, self.means, self.covs)]
            raise ValueError(f"mixture: expected weights (K,), means (K, d), covs (K, d, d), found {found}; reshape them")
        if not bool((self.weights > 0).all()) or abs(float(self.weights.sum()) - 1) > 1e-6:
            raise ValueError(
                f"mixture weights: expected positive numbers of sum 1, found {self.weights.tolist()}; divide them by their sum"
            )
        for index, cov in enumerate(self.covs):
            smallest = float(torch.linalg.eigvalsh(cov).min()) if torch.equal(cov, cov.mT) or torch.allclose(cov, cov.mT) else math.nan
            if not smallest > 0:
                what = "not symmetric" if math.isnan(smallest) else f"with eigenvalue {smallest:.3g}"
                raise ValueError(
                    f"mixture component {index}: expected a positive definite covariance, found one {what}; add to its diagonal"
                )

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    @cached_property
    def _whiten(self) -> Tensor:
        """(K, d, d) inverse Cholesky factors W: W^T W is the precision."""
        eye = torch.eye(self.dim, dtype=self.means.dtype, device=self.means.device).expand_as(self.covs)
        return torch.linalg.solve_triangular(torch.linalg.cholesky(self.covs), eye, upper=False)

    @cached_property
    def _log_scale(self) -> Tensor:
        log_det = self._whiten.diagonal(dim1=1, dim2=2).log().sum(1)
        return self.weights.log() + log_det - 0.5 * self.dim * math.log(2 * math.pi)

    @cached_property
    def _smoothed(self) -> dict[float, Mixture]:
        return {}

    def _whitened(self, x: Tensor) -> Tensor:
        """(N, d) to (K, N, d): W_k (x - mean_k)."""
        return (x[None] - self.means[:, None]) @ self._whiten.mT

    def _joint(self, white: Tensor) -> Tensor:
        """(K, N) log of weight times component density."""
        return self._log_scale[:, None] - 0.5 * white.square().sum(2)

    def log_prob(self, x: Tensor) -> Tensor:
        """(N, d) to (N,)."""
        return self._joint(self._whitened(x)).logsumexp(0)

    def score(self, x: Tensor) -> Tensor:
        """(N, d) to (N, d): gradient of log p."""
        white = self._whitened(x)
        share = self._joint(white).softmax(0)
        return -((share[:, :, None] * white) @ self._whiten).sum(0)

    def hessian(self, x: Tensor) -> Tensor:
        """(N, d) to (N, d, d): second derivatives of log p: the mean of minus the precisions plus the covariance of the component scores."""
        white = self._whitened(x)
        share = self._joint(white).softmax(0)
        scores = -white @ self._whiten
        apart = scores - (share[:, :, None] * scores).sum(0)
        precision = self._whiten.mT @ self._whiten
        return torch.einsum("kn,kni,knj->nij", share, apart, apart) - torch.einsum("kn,kij->nij", share, precision)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """(count, d) draws."""
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.dim, dtype=self.means.dtype, device=self.means.device, generator=generator)
        return self.means[which] + torch.einsum("nij,nj->ni", torch.linalg.cholesky(self.covs)[which], noise)

    def smoothed(self, sigma: float) -> Mixture:
        """p_sigma: this density convolved with N(0, sigma^2 I)."""
        if sigma not in self._smoothed:
            eye = torch.eye(self.dim, dtype=self.covs.dtype, device=self.covs.device)
            self._smoothed[sigma] = Mixture(self.weights, self.means, self.covs + sigma**2 * eye)
        return self._smoothed[sigma]


def gaussian(mean: Tensor, cov: Tensor) -> Mixture:
    """N(mean (d,), cov (d, d)) as a mixture of one component."""
    return Mixture(torch.ones(1, dtype=mean.dtype, device=mean.device), mean[None], cov[None])


def two_bumps() -> Mixture:
    """2-D test density of the author: two crossed elongated bumps at (-5, 0) and (5, 0), variances 40 and 5 along the diagonals, mirrored."""
    plus, minus = torch.tensor([1.0, 1.0]).double() / math.sqrt(2), torch.tensor([1.0, -1.0], dtype=torch.float64) / math.sqrt(2)
    first = 40 * torch.outer(plus, plus) + 5 * torch.outer(minus, minus)
    second = 5 * torch.outer(plus, plus) + 40 * torch.outer(minus, minus)
    return Mixture(
        torch.full((2,), 0.5).double(), torch.tensor([[-5.0, 0.0], [5.0, 0.0]], dtype=torch.float64), torch.stack([first, second])
    )


def three_gaussians() -> Mixture:
    """2-D mixture on which trained networks are compared."""
    means = torch.tensor([[-1.2, 0.0], [1.0, 0.9], [0.8, -1.0]], dtype=torch.float64)
    covs = torch.tensor([[[0.15, 0.08], [0.08, 0.15]], [[0.2, -0.1], [-0.1, 0.12]], [[0.1, 0.0], [0.0, 0.3]]], dtype=torch.float64)
    return Mixture(torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64), means, covs)


def manifold_mixture(frequency: Tensor, exponent: Tensor, components: int, ratio: float) -> Mixture:
    """Gaussians along a curve in d dimensions, flat across it: a 1-D manifold of thickness `ratio` (sampling experiment).

    Args:
        frequency: (d,) in (-1, 1); exponent: (d,) 1 or 2. The means are sin(2 pi frequency t)^exponent at even t in [0, 1].
        ratio: standard deviation across the curve over that along it, 0 < ratio <= 1.
    """
    if components < 2 or not 0 < ratio <= 1:
        raise ValueError(
            f"manifold mixture: expected at least 2 components and 0 < ratio <= 1, found {components} and {ratio}; change them"
        )
    t = torch.linspace(0, 1, components, dtype=torch.float64)
    means = torch.sin(2 * math.pi * t[:, None] * frequency.double()) ** exponent
    step = means.diff(dim=0)
    step = torch.cat([step, step[-1:]])
    length = step.square().sum(1)
    eye = torch.eye(means.shape[1], dtype=torch.float64)
    covs = ratio**2 * length[:, None, None] * eye + (1 - ratio**2) * step[:, :, None] * step[:, None, :]
    return Mixture(torch.full((components,), 1 / components, dtype=torch.float64), means, covs)


def random_manifold(dim: int, components: int, ratio: float, seed: int) -> Mixture:
    """A `manifold_mixture` with frequencies uniform in (-1, 1) and exponents 1 or 2 drawn from `seed`."""
    rng = np.random.default_rng(seed)
    frequency = torch.from_numpy(rng.uniform(-1, 1, dim))
    return manifold_mixture(frequency, torch.from_numpy(rng.integers(1, 3, dim)), components, ratio)


# ---- densities known by their energy ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EnergyDensity:
    """p(x) = exp(-energy(x)) / Z on a box, energy >= 0 there; Z by an even grid (d = 1 or 2), samples by rejection, derivatives by autograd.

    Args:
        energy: (N, d) to (N,), twice differentiable.
        dim: 1 or 2.
        low, high: the box in every dimension; the density outside is taken as 0 in Z and in the samples.
    """

    energy: Field
    dim: int
    low: float
    high: float

    def grid(self, points: int) -> Tensor:
        """(points ** dim, dim) even grid over the box, both ends included."""
        axis = torch.linspace(self.low, self.high, points, dtype=torch.float64)
        return torch.cartesian_prod(*[axis] * self.dim).reshape(-1, self.dim)

    @cached_property
    def log_normaliser(self) -> float:
        points = 20001 if self.dim == 1 else 1001
        cell = self.dim * math.log((self.high - self.low) / (points - 1))
        return float((-self.energy(self.grid(points))).logsumexp(0)) + cell

    def log_prob(self, x: Tensor) -> Tensor:
        return -self.energy(x) - self.log_normaliser

    def score(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return -torch.autograd.grad(self.energy(x).sum(), x)[0]

    def hessian(self, x: Tensor) -> Tensor:
        return -torch.func.vmap(torch.func.hessian(lambda row: self.energy(row[None])[0]))(x)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        kept: list[Tensor] = []
        found = 0
        while found < count:
            x = self.low + (self.high - self.low) * torch.rand(200_000, self.dim, dtype=torch.float64, generator=generator)
            inside = x[torch.rand(len(x), dtype=torch.float64, generator=generator).log() < -self.energy(x)]
            kept.append(inside)
            found += len(inside)
        return torch.cat(kept)[:count]


def author_energy(x: Tensor) -> Tensor:
    """(N, 1) to (N,): the 1-D energy of the author's experiments, three minima on [-1.5, 1.5]."""
    u = x[:, 0]
    return (10 * (u + 1) ** 2 + 1) * (20 * u**2 + 1) * (30 * (u - 1) ** 2 + 1) / 1000


def one_dimensional() -> EnergyDensity:
    """Density of `author_energy` on [-1.6, 1.6]."""
    return EnergyDensity(author_energy, 1, -1.6, 1.6)


def ninja_star_energy(x: Tensor) -> Tensor:
    """(N, 2) to (N,): (rho - 2)^2 + (x^2 - y^2)^2 + log(rho^2 + 1) / 2 with rho = |(x, y)|."""
    square = x.square()
    rho = (square.sum(1) + 1e-24).sqrt()  # the tiny addend keeps the gradient finite at the origin
    return (rho - 2) ** 2 + (square[:, 0] - square[:, 1]) ** 2 + 0.5 * torch.log(rho**2 + 1)


def ninja_star() -> EnergyDensity:
    """2-D test density of the author, four points of a star on a ring of radius 2."""
    return EnergyDensity(ninja_star_energy, 2, -5.0, 5.0)


# ---- exact optima -----------------------------------------------------------------------------------------------------------------


def reconstruction(density: Mixture, y: Tensor, sigma: float) -> Tensor:
    """r*(y) = y + sigma^2 grad log p_sigma(y), (N, d): the DAE optimum for every sigma (R1, R1')."""
    return y + sigma**2 * density.smoothed(sigma).score(y)


def reconstruction_jacobian(density: Mixture, y: Tensor, sigma: float) -> Tensor:
    """J*(y) = I + sigma^2 Hess log p_sigma(y) = Cov(clean | y) / sigma^2, (N, d, d) symmetric, positive semi-definite (R1')."""
    return torch.eye(density.dim, dtype=y.dtype, device=y.device) + sigma**2 * density.smoothed(sigma).hessian(y)


@dataclass(frozen=True)
class GaussianOptimum:
    """What both criteria reach on N(mean, cov) (R5)."""

    jacobian: Tensor
    """(d, d), constant: cov (cov + sigma^2 I)^-1."""
    mean: Tensor
    """(d,)"""
    dae_loss: Tensor
    """0-d: sigma^2 trace(jacobian)."""
    rcae_loss: Tensor
    """0-d: E||r(x) - x||^2 + sigma^2 ||jacobian||_F^2."""

    def reconstruct(self, x: Tensor) -> Tensor:
        """(N, d) to (N, d)."""
        return self.mean + (x - self.mean) @ self.jacobian.mT


def gaussian_optimum(mean: Tensor, cov: Tensor, sigma: float) -> GaussianOptimum:
    """The affine optimum of DAE and RCAE on a Gaussian (R5): r(x) = mean + cov (cov + sigma^2 I)^-1 (x - mean)."""
    eye = torch.eye(len(mean), dtype=cov.dtype, device=cov.device)
    jacobian = torch.linalg.solve(cov + sigma**2 * eye, cov).mT
    off = jacobian - eye
    rcae = (off @ cov @ off.mT).trace() + sigma**2 * jacobian.square().sum()
    return GaussianOptimum(jacobian, mean, sigma**2 * jacobian.trace(), rcae)


def bias_coefficients(density: Density, x: Tensor) -> tuple[Tensor, Tensor]:
    """c in (r* - x) / sigma^2 - score = sigma^2 c(x) + O(sigma^4), for the DAE and the RCAE optimum (R4), each (N, d).

    DAE: grad(lap log p + |score|^2) / 2; RCAE: grad(lap log p + |score|^2 / 2).
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        score, hessian = density.score(x), density.hessian(x)
        laplacian = torch.autograd.grad(hessian.diagonal(dim1=1, dim2=2).sum(), x)[0]
    half_square = torch.einsum("nij,nj->ni", hessian, score).detach()  # grad |s|^2 / 2 = Hess s
    return 0.5 * laplacian + half_square, laplacian + half_square


# ---- local moments (R8) -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    mean: Tensor
    """(N, d)"""
    cov: Tensor
    """(N, d, d)"""


def ball_nodes(dim: int, *, radial: int = 64, angles: int = 128, draws: int = 100_000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Nodes (M, dim) in the unit ball and weights (M,) of sum 1 for averages over it.

    dim 1: Gauss-Legendre; dim 2: Gauss-Legendre in the radius times even angles; higher: `draws` uniform points in pairs +-u.
    """
    node, weight = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(radial))
    if dim == 1:
        return node[:, None], weight / 2
    if dim == 2:
        radius, share = (node + 1) / 2, weight * (node + 1) / 2
        angle = torch.arange(angles, dtype=torch.float64) * (2 * math.pi / angles)
        circle = torch.stack([angle.cos(), angle.sin()], 1)
        return (radius[:, None, None] * circle).reshape(-1, 2), (share[:, None] / angles).expand(-1, angles).reshape(-1)
    generator = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(draws // 2, dim, dtype=torch.float64, generator=generator), dim=1)
    half = direction * torch.rand(draws // 2, 1, dtype=torch.float64, generator=generator) ** (1 / dim)
    return torch.cat([half, -half]), torch.full((2 * len(half),), 0.5 / len(half), dtype=torch.float64)


def local_moments(log_prob: Field, x: Tensor, delta: float, **nodes: int) -> Moments:
    """Mean and covariance of a density restricted to the ball of radius `delta` around each x (N, d), R8.

    As delta falls, mean = x + delta^2 / (d + 2) score + o(delta^3) and covariance = delta^2 / (d + 2) I + o(delta^3).

    Args:
        log_prob: (M, d) to (M,), any constant added.
        nodes: sizes for `ball_nodes`.
    """
    if delta <= 0:
        raise ValueError(f"delta={delta}: expected a positive ball radius")
    offset, weight = ball_nodes(x.shape[1], **nodes)
    offset, weight = delta * offset.to(x), weight.to(x)
    log_weight = torch.stack([log_prob(row + offset) for row in x]) + weight.log()
    share = log_weight.softmax(1)
    shift = share @ offset
    apart = offset[None] - shift[:, None]
    return Moments(x + shift, torch.einsum("nm,nmi,nmj->nij", share, apart, apart))


def parse_sigmas(values: Sequence[float], what: str = "sigmas") -> list[float]:
    """A grid of noise levels (or radii) for a slope fit: positive and strictly falling.

    Raises:
        ValueError: a value that is not positive, repeated or out of order.
    """
    grid = list(values)
    if len(grid) < 2 or any(not value > 0 for value in grid) or any(a <= b for a, b in pairwise(grid)):
        raise ValueError(
            f"{what}: expected at least two positive values, strictly falling, found {grid}; sort them and drop the repeated ones"
        )
    return grid
