"""The theory's statements on densities whose score is known, and the exact optima."""

from __future__ import annotations

import math

import pytest
import torch

from projects.regularized_ae import densities, measures, optima
from projects.regularized_ae.densities import Mixture
from projects.regularized_ae.model import AutoEncoder, batch_jacobian

DENSITIES = {
    "mixture": densities.three_gaussians,
    "bumps": densities.two_bumps,
    "star": densities.ninja_star,
    "line": densities.one_dimensional,
    "manifold": lambda: densities.random_manifold(4, 6, 0.3, 0),
}


def draws(density: densities.Density, count: int, seed: int = 0) -> torch.Tensor:
    return density.sample(count, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", DENSITIES)
def test_score_and_hessian_are_the_derivatives_of_log_p(name: str) -> None:
    density = DENSITIES[name]()
    x = draws(density, 20).requires_grad_()
    grad = torch.autograd.grad(density.log_prob(x).sum(), x)[0]
    torch.testing.assert_close(density.score(x.detach()), grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        density.hessian(x.detach()),
        batch_jacobian(density.score, x.detach()) if name not in ("star", "line") else _differences(density, x.detach()),
        rtol=1e-5,
        atol=1e-5,
    )


def _differences(density: densities.Density, x: torch.Tensor, step: float = 1e-6) -> torch.Tensor:
    columns = [(density.score(x + step * e) - density.score(x - step * e)) / (2 * step) for e in torch.eye(x.shape[1], dtype=x.dtype)]
    return torch.stack(columns, 2)


@pytest.mark.parametrize("name", ["star", "line"])
def test_energy_densities_integrate_to_one_and_are_sampled(name: str) -> None:
    density = DENSITIES[name]()
    points = 801 if name == "star" else 8001
    cell = ((density.high - density.low) / (points - 1)) ** density.dim
    assert float(density.log_prob(density.grid(points)).exp().sum()) * cell == pytest.approx(1, abs=1e-6)
    x = draws(density, 40_000)
    if name == "line":  # against the cumulative distribution
        grid = density.grid(8001)[:, 0]
        below = float(density.log_prob(grid[grid < 0.5, None]).exp().sum()) * cell
        assert float((x[:, 0] < 0.5).double().mean()) == pytest.approx(below, abs=0.01)
    else:  # E of the score vanishes
        assert density.score(x).mean(0).abs().max() < 0.05


def test_closed_forms_stay_finite_far_from_the_data() -> None:
    density = densities.three_gaussians()
    far = torch.tensor([[300.0, -400.0]], dtype=torch.float64)
    for value in (density.log_prob(far), density.score(far), density.hessian(far)):
        assert value.isfinite().all()
    data = draws(density, 50)
    nearest = data[torch.cdist(far, data).argmin()]
    torch.testing.assert_close(optima.posterior_mean(far, data, 0.05)[0], nearest)
    assert optima.parzen_log_density(far, data, 0.05).isfinite().all()


# R1, R1', R5


def test_optimum_is_the_posterior_mean_by_brute_force_quadrature() -> None:
    density, sigma = densities.three_gaussians(), 0.2
    axis = torch.linspace(-5, 5, 801, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    y = draws(density, 6) + 0.3
    weight = (density.log_prob(grid) - torch.cdist(y, grid).square() / (2 * sigma**2)).softmax(1)
    mean = weight @ grid
    torch.testing.assert_close(densities.reconstruction(density, y, sigma), mean, rtol=1e-9, atol=1e-9)
    apart = grid[None] - mean[:, None]
    cov = torch.einsum("nm,nmi,nmj->nij", weight, apart, apart)
    torch.testing.assert_close(densities.reconstruction_jacobian(density, y, sigma), cov / sigma**2, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["mixture", "manifold"])
def test_jacobian_of_the_optimum_is_symmetric_positive_semidefinite_and_gives_the_least_loss(name: str) -> None:
    density, sigma = DENSITIES[name](), 0.3
    x = draws(density, 40_000)
    y = x + sigma * torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    jacobian = densities.reconstruction_jacobian(density, y, sigma)
    torch.testing.assert_close(jacobian, jacobian.mT)
    assert torch.linalg.eigvalsh(jacobian).min() > -1e-12
    trace = sigma**2 * float(jacobian.diagonal(dim1=1, dim2=2).sum(1).mean())
    loss = float((densities.reconstruction(density, y, sigma) - x).square().sum(1).mean())
    assert loss == pytest.approx(trace, rel=0.02)
    worse = float(((1.02 * densities.reconstruction(density, y, sigma)) - x).square().sum(1).mean())
    assert worse > loss


def test_gaussian_optimum_agrees_with_the_mixture_and_satisfies_the_rcae_condition() -> None:
    mean = torch.tensor([0.5, -1.0], dtype=torch.float64)
    cov = torch.tensor([[1.0, 0.4], [0.4, 0.5]], dtype=torch.float64)
    best, density, sigma = densities.gaussian_optimum(mean, cov, 0.7), densities.gaussian(mean, cov), 0.7
    x = draws(density, 10)
    torch.testing.assert_close(best.reconstruct(x), densities.reconstruction(density, x, sigma))
    # r_i - x_i = sigma^2 (laplacian r_i + s . grad r_i); r is affine, so the Laplacian is 0 (R2')
    torch.testing.assert_close(best.reconstruct(x) - x, sigma**2 * density.score(x) @ best.jacobian.mT)
    torch.testing.assert_close(best.dae_loss, best.rcae_loss)


# R4: slope and next order, on the exact optimum


def test_error_of_the_exact_optimum_falls_with_order_two() -> None:
    density = densities.three_gaussians()
    x, sigmas = draws(density, 500), [0.1, 0.05, 0.02, 0.01]
    truth = density.score(x)
    errors = [measures.relative_error((densities.reconstruction(density, x, s) - x) / s**2, truth) for s in sigmas]
    slopes = measures.orders(sigmas, errors)
    assert 1.8 < slopes[0] < slopes[1] < slopes[2] < 2.01
    assert slopes[2] > 1.98
    hessians = [
        measures.relative_error((densities.reconstruction_jacobian(density, x, s) - torch.eye(2).double()) / s**2, density.hessian(x))
        for s in sigmas
    ]
    assert measures.orders(sigmas, hessians)[-1] == pytest.approx(2, abs=0.03)


def test_one_dimensional_optima_have_the_measured_errors_and_slopes() -> None:
    density = densities.one_dimensional()
    x = torch.linspace(-1.6, 1.6, 6401, dtype=torch.float64)
    log_p, score = density.log_prob(x[:, None]), density.score(x[:, None])
    sigmas = [0.1, 0.05, 0.02, 0.01]
    expected = {"dae": [0.429, 0.197, 0.0436, 0.0116], "rcae": [0.415, 0.183, 0.0380, 0.0088]}
    for name, solve in (("dae", optima.dae_on_grid), ("rcae", optima.rcae_on_grid)):
        errors = [measures.relative_error(((solve(x, log_p, s) - x) / s**2)[:, None], score, log_p.exp()) for s in sigmas]
        assert errors == pytest.approx(expected[name], rel=0.01)
        if name == "dae":
            assert 1.8 < measures.orders(sigmas, errors)[-1] < 2.1


def test_bias_coefficients_of_both_optima() -> None:
    density = Mixture(*(torch.tensor(v, dtype=torch.float64) for v in ([0.4, 0.6], [[-1.0], [1.0]], [[[0.5]], [[0.3]]])))
    x = torch.linspace(-6, 6, 24_001, dtype=torch.float64)
    log_p, sigma = density.log_prob(x[:, None]), 0.02
    dae, rcae = densities.bias_coefficients(density, x[:, None])
    inside = slice(8000, 16_001, 100)
    gap = (densities.reconstruction(density, x[:, None], sigma) - x[:, None]) / sigma**2 - density.score(x[:, None])
    assert measures.relative_error(gap[inside] / sigma**2, dae[inside]) < 0.005
    r = optima.rcae_on_grid(x, log_p, sigma)
    # the left-end rule shifts r by half a step; the condition of R2' shows the solver exact up to that step
    assert optima.rcae_condition_residual(x, log_p, r, sigma)[inside].abs().max() < 5e-6
    finer = [
        optima.rcae_on_grid(g, density.log_prob(g[:, None]), 0.1)
        for n in (6001, 12_001, 24_001)
        for g in [torch.linspace(-6, 6, n, dtype=torch.float64)]
    ]
    coarse, middle = ((finer[i] - finer[2][:: 4 >> i])[1000 << i : -1000 << i].abs().max() for i in (0, 1))
    assert coarse > 1.5 * middle  # converges with the step
    assert measures.relative_error(dae[inside], rcae[inside]) > 0.05  # the two optima differ at this order


def test_rcae_on_grid_is_the_dense_minimiser_and_never_cancels() -> None:
    x, sigma, dx = torch.linspace(-2, 2, 41, dtype=torch.float64), 0.4, 0.1
    weight = (-x.square().square()).exp()
    matrix, right = torch.zeros(41, 41, dtype=torch.float64), torch.zeros(41, dtype=torch.float64)
    for i in range(40):
        spring = sigma**2 * weight[i] / dx
        matrix[i, i] += weight[i] * dx + spring
        matrix[i + 1, i + 1] += spring
        matrix[i, i + 1] -= spring
        matrix[i + 1, i] -= spring
        right[i] = weight[i] * dx * x[i]
    torch.testing.assert_close(optima.rcae_on_grid(x, weight.log(), sigma), torch.linalg.solve(matrix, right), rtol=1e-8, atol=1e-8)
    steep = optima.rcae_on_grid(x, -60 * x.square().square(), sigma)  # the density falls by a factor of 10^400
    assert steep[-1] == steep[-2]
    assert bool((steep.diff() > -1e-15).all())  # rising, and finite
    torch.testing.assert_close(steep, optima.rcae_on_grid(x, 500 - 60 * x.square().square(), sigma))


def test_dae_on_grid_is_the_weighted_mean() -> None:
    x = torch.linspace(-1, 1, 51, dtype=torch.float64)
    log_p, sigma = -x.abs(), 0.3
    weight = (log_p.exp() * (-(x[:, None] - x).square() / (2 * sigma**2)).exp()) / 1
    torch.testing.assert_close(optima.dae_on_grid(x, log_p, sigma), (weight @ x) / weight.sum(1))


# R6


def test_empirical_optimum_is_attention_over_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    data, y, sigma = (torch.randn(n, 3, dtype=torch.float64, generator=generator) for n in (40, 7)), None, 0.5
    data, y = data
    weight = (-torch.cdist(y, data).square() / (2 * sigma**2)).softmax(1)
    torch.testing.assert_close(optima.posterior_mean(y + 100, data + 100, sigma), weight @ data + 100)  # centred: nothing cancels
    parzen = torch.distributions.MultivariateNormal(torch.zeros(3).double(), sigma**2 * torch.eye(3).double())
    density = parzen.log_prob(y[:, None] - data).logsumexp(1) - math.log(40)
    torch.testing.assert_close(optima.parzen_log_density(y, data, sigma), density)
    torch.testing.assert_close(
        optima.posterior_jacobian(y, data, sigma), batch_jacobian(lambda q: optima.posterior_mean(q, data, sigma), y)
    )
    whole = optima.posterior_mean(y, data, sigma), optima.posterior_jacobian(y, data, sigma), optima.parzen_log_density(y, data, sigma)
    monkeypatch.setattr(optima, "TILE", 80)  # tiles of two queries, and of one
    tiled = optima.posterior_mean(y, data, sigma), optima.posterior_jacobian(y, data, sigma), optima.parzen_log_density(y, data, sigma)
    torch.testing.assert_close(tiled, whole)


# R3, R7, R8


def test_dae_is_rcae_plus_second_order_term_to_fourth_order() -> None:
    from projects.regularized_ae.model import second_order_term

    torch.manual_seed(0)
    model = AutoEncoder(2, [6], sigma=1.0, init="uniform").double()
    x = torch.randn(5, 2, dtype=torch.float64)
    node, weight = densities.np.polynomial.hermite_e.hermegauss(12)
    node, weight = torch.from_numpy(node), torch.from_numpy(weight / weight.sum())
    noise, share = torch.cartesian_prod(node, node), torch.cartesian_prod(weight, weight).prod(1)
    gaps = []
    with torch.no_grad():
        for sigma in (0.2, 0.1):
            dae = sum(share[k] * model(x, noise=(sigma * noise[k]).expand_as(x), scaled=False).loss for k in range(len(share)))
            rcae = model(x, criterion="rcae", weight=sigma**2, scaled=False).loss
            gaps.append(float(dae - rcae - sigma**2 * second_order_term(model.reconstruct, x)))
    assert math.log(abs(gaps[0] / gaps[1])) / math.log(2) == pytest.approx(4, abs=0.3)


def test_criteria_are_score_matching_in_disguise() -> None:
    """R7: L_RCAE = sigma^2 d + 2 sigma^4 (|s|^2 / 2 + trace) + sigma^6 ||ds/dx||^2, L_DAE = sigma^4 E|s(y) - (x - y) / sigma^2|^2."""
    torch.manual_seed(1)
    sigma = 0.4
    model = AutoEncoder(3, [5], residual=True, sigma=sigma).double()
    x = torch.randn(8, 3, dtype=torch.float64)
    slopes = batch_jacobian(model.score, x)
    matching = model(x, criterion="score_matching").loss
    rcae = sigma**2 * 3 + 2 * sigma**4 * matching + sigma**6 * slopes.square().sum((1, 2)).mean()
    torch.testing.assert_close(model(x, criterion="rcae", scaled=False).loss, rcae)
    noise = sigma * torch.randn(8, 3, dtype=torch.float64)
    denoising = sigma**4 * (model.score(x + noise) + noise / sigma**2).square().sum(1).mean()
    torch.testing.assert_close(model(x, noise=noise, scaled=False).loss, denoising)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_local_moments_give_the_score(dim: int) -> None:
    eye = torch.eye(dim, dtype=torch.float64)
    density = Mixture(
        torch.tensor([0.5, 0.5], dtype=torch.float64), torch.stack([-eye[0], 0.5 * eye[0]]), torch.stack([0.6 * eye, 0.4 * eye])
    )
    x = draws(density, 5)
    gaps = []
    for delta in (0.2, 0.1, 0.05):
        found = densities.local_moments(density.log_prob, x, delta)
        gaps.append(float(((found.mean - x) * (dim + 2) / delta**2 - density.score(x)).abs().max()))
        flat = delta**2 / (dim + 2) * eye
        assert float((found.cov - flat).abs().max()) < (0.05 if dim < 3 else 0.1) * delta**2
    if dim < 3:
        assert gaps[0] / gaps[2] == pytest.approx(16, rel=0.2)  # o(delta^3) of a shift of order delta^2: the ratio falls like delta^2
    else:
        assert gaps[1] < 0.1
