"""Steps of the regularised auto-encoders: d = 10, 128 tanh units, float64, batch 10,000; and a Metropolis-Hastings step of 200 chains x 20 path points.

`python -m benchmarks.steps regularized_ae` prints a JSON line each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.timing import Built, Forms, Step
from projects.regularized_ae import optima
from projects.regularized_ae.model import AutoEncoder
from projects.regularized_ae.sampler import metropolis_hastings

DIM, HIDDEN, BATCH, CHAINS, POINTS, STEPS = 10, 128, 10_000, 200, 20, 10
SIGMA = 0.1


def _model() -> AutoEncoder:
    torch.manual_seed(0)
    return AutoEncoder(DIM, [HIDDEN], sigma=SIGMA).double()


def _cleared(model: nn.Module, loss: Callable[[], Tensor]) -> Step:
    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        return value.detach()

    return step


def dae_step() -> tuple[Step, Step, int]:
    """Full-batch DAE loss and gradient; beside the same written with torch.nn.Sequential and mse_loss (no difference is expected)."""
    model = _model()
    x, noise = torch.randn(BATCH, DIM, dtype=torch.float64), SIGMA * torch.randn(BATCH, DIM, dtype=torch.float64)
    plain = nn.Sequential(nn.Linear(DIM, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, DIM)).double()
    plain.load_state_dict(dict(zip(plain.state_dict(), model.state_dict().values(), strict=True)))
    naive = _cleared(plain, lambda: nn.functional.mse_loss(plain(x + noise), x) * DIM / SIGMA**2)
    return _cleared(model, lambda: model(x, noise=noise).loss), naive, sum(p.numel() for p in model.parameters())


def rcae_step() -> tuple[Step, Step, int]:
    """Full-batch RCAE loss and gradient with the penalty in closed form; beside d backward passes through autograd."""
    model = _model()
    x = torch.randn(BATCH, DIM, dtype=torch.float64)

    def by_autograd() -> Tensor:
        y = x.clone().requires_grad_()
        r = model.reconstruct(y)
        rows = [torch.autograd.grad(r[:, i].sum(), y, create_graph=True)[0] for i in range(DIM)]
        penalty = torch.stack([row.square().sum(1) for row in rows]).sum(0).mean()
        return ((r - y).square().sum(1).mean() + SIGMA**2 * penalty) / SIGMA**2

    return (
        _cleared(model, lambda: model(x, criterion="rcae").loss),
        _cleared(model, by_autograd),
        sum(p.numel() for p in model.parameters()),
    )


def mh_step() -> tuple[Step, Step, int]:
    """Metropolis-Hastings steps of all chains: path points batched and the current score kept; beside one call a path point and nothing kept."""
    model = _model()
    x0 = torch.randn(CHAINS, DIM, dtype=torch.float64)
    z = torch.randn(STEPS, CHAINS, DIM, dtype=torch.float64)
    u = torch.rand(STEPS, CHAINS, dtype=torch.float64)

    def ours() -> Tensor:
        return metropolis_hastings(model.score, x0, steps=STEPS, proposal_std=SIGMA, points=POINTS, normals=z, uniforms=u).last

    @torch.no_grad()
    def naive() -> Tensor:
        x = x0
        for step in range(STEPS):
            proposal = x + SIGMA * z[step]
            total = torch.zeros_like(x)
            for i in range(POINTS):
                weight = (0.5 if i in (0, POINTS - 1) else 1.0) / (POINTS - 1)
                total = total + weight * model.score(x + i / (POINTS - 1) * (proposal - x))
            take = u[step].log() <= (total * (proposal - x)).sum(1)
            x = torch.where(take[:, None], proposal, x)
        return x

    return ours, naive, sum(p.numel() for p in model.parameters())


def empirical_step() -> tuple[Step, Step, int]:
    """Optimum of a training set (20,000 points) at 1,000 queries by attention; beside distances and weights that are stored."""
    torch.manual_seed(0)
    data, y = torch.randn(20_000, DIM, dtype=torch.float64), torch.randn(1000, DIM, dtype=torch.float64)

    def naive() -> Tensor:
        return (-(y[:, None] - data).square().sum(2) / (2 * SIGMA**2)).softmax(1) @ data

    return lambda: optima.posterior_mean(y, data, SIGMA), naive, 0


def _pair(make: Callable[[], tuple[Step, Step, int]], calls: int = 1) -> Forms:
    made = functools.cache(make)
    return {form: lambda which=which: Built(made()[which], made()[2], calls) for which, form in enumerate(("ours", "naive"))}


def configurations() -> dict[str, Forms]:
    """Each step beside its naive form; tests/benchmarks checks that the two give the same numbers."""
    return {
        "dae, batch 10,000": _pair(dae_step),
        "rcae, batch 10,000": _pair(rcae_step),
        "mh, 200 chains x 20 points": _pair(mh_step, STEPS),
        "empirical optimum, 20,000 points, 1,000 queries": _pair(empirical_step),
    }
