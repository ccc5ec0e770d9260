"""The network, its criteria and the estimates read off it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.checkpoint import load_model, save_model
from projects.regularized_ae import densities
from projects.regularized_ae.model import AutoEncoder, batch_jacobian, encoder_penalty, hessian_estimate, jacobian_penalty


def make(dim: int = 3, seed: int = 0, **changes: Any) -> AutoEncoder:
    torch.manual_seed(seed)
    return AutoEncoder(dim, **{"hidden": [6], "sigma": 0.3, **changes}).double()


def points(dim: int = 3, count: int = 5) -> Tensor:
    return torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def rows_of_jacobian(model: AutoEncoder, x: Tensor) -> Tensor:
    return torch.stack([torch.autograd.functional.jacobian(lambda row: model.reconstruct(row[None])[0], row) for row in x])


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "silu"])
@pytest.mark.parametrize("residual", [False, True])
def test_penalties_agree_with_the_row_by_row_jacobian(activation: str, residual: bool) -> None:
    model, x = make(activation=activation, residual=residual, init="uniform"), points()
    slow = rows_of_jacobian(model, x)
    torch.testing.assert_close(batch_jacobian(model.reconstruct, x), slow)
    naive = slow.square().sum((1, 2)).mean()
    for penalty in ("closed_form", "exact", "auto"):
        torch.testing.assert_close(jacobian_penalty(model, x, penalty), naive)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 3)
    probed = torch.stack([jacobian_penalty(model, x, "hutchinson", v.expand_as(x)) for v in signs])
    torch.testing.assert_close(probed.mean(), naive)  # over all probes the estimate is exact
    encoder = (
        torch.stack([torch.autograd.functional.jacobian(lambda row: model.encode(row[None])[0], row) for row in x])
        .square()
        .sum((1, 2))
        .mean()
    )
    torch.testing.assert_close(encoder_penalty(model, x), encoder)


def test_closed_form_and_automatic_penalty_have_the_same_gradient() -> None:
    model, x = make(init="uniform"), points()
    grads = [
        torch.autograd.grad(jacobian_penalty(model, x, penalty), [model.layers[0].weight, model.layers[0].bias, model.layers[1].weight])
        for penalty in ("closed_form", "exact")
    ]
    torch.testing.assert_close(*grads)


def test_deep_networks_and_bounded_outputs_take_the_exact_path() -> None:
    deep, x = make(hidden=[5, 4]), points()
    torch.testing.assert_close(jacobian_penalty(deep, x), rows_of_jacobian(deep, x).square().sum((1, 2)).mean())
    slow = (
        torch.stack([torch.autograd.functional.jacobian(lambda row: deep.encode(row[None])[0], row) for row in x])
        .square()
        .sum((1, 2))
        .mean()
    )
    torch.testing.assert_close(encoder_penalty(deep, x), slow)
    bounded = make(output="tanh", output_scale=2.0)
    assert bounded.reconstruct(100 * x).abs().max() <= 2
    torch.testing.assert_close(jacobian_penalty(bounded, x), rows_of_jacobian(bounded, x).square().sum((1, 2)).mean())
    squashed = make(output="sigmoid").reconstruct(100 * x).detach()
    assert 0 <= float(squashed.min()) < float(squashed.max()) <= 1


def test_criteria_and_their_scale() -> None:
    model, x = make(), points()
    noise = torch.full_like(x, 0.1)
    dae, rcae, cae = model(x, noise=noise), model(x, criterion="rcae"), model(x, criterion="cae")
    torch.testing.assert_close(dae.loss * 0.3**2, (model.reconstruct(x + noise) - x).square().sum(1).mean())
    reconstruction = (model.reconstruct(x) - x).square().sum(1).mean()
    torch.testing.assert_close(rcae.loss * 0.3**2, reconstruction + 0.3**2 * jacobian_penalty(model, x))
    torch.testing.assert_close(cae.loss * 0.3**2, reconstruction + 0.3**2 * encoder_penalty(model, x))
    torch.testing.assert_close(model(x, criterion="rcae", weight=0.0, scaled=False).loss, reconstruction)
    seeded = [model(x, generator=torch.Generator().manual_seed(3)).loss for _ in range(2)]
    assert seeded[0] == seeded[1] != model(x, generator=torch.Generator().manual_seed(4)).loss
    drawn = model(x, criterion="rcae", penalty="hutchinson", generator=torch.Generator().manual_seed(3))
    assert 0 < drawn.penalty != rcae.penalty


def test_identity_costs_the_dimension() -> None:
    model = make(dim=4, residual=True)
    torch.nn.init.zeros_(model.layers[-1].weight)
    torch.nn.init.zeros_(model.layers[-1].bias)
    x = points(4, 50_000)
    with torch.no_grad():
        assert float(model(x, generator=torch.Generator().manual_seed(0)).loss) == pytest.approx(4, rel=0.02)
        assert float(model(x, criterion="rcae").loss) == pytest.approx(4)


def test_score_is_the_displacement_over_sigma_squared() -> None:
    x = points()
    for residual in (False, True):
        model = make(residual=residual)
        torch.testing.assert_close(model.score(x), (model.reconstruct(x) - x) / 0.3**2)


def test_hessian_estimate_reads_the_optimum_and_reports_asymmetry() -> None:
    density, sigma = densities.three_gaussians(), 0.05
    x = density.sample(50, torch.Generator().manual_seed(0))
    found = hessian_estimate(lambda y: densities.reconstruction(density, y, sigma), x, sigma)
    torch.testing.assert_close(found.value, density.smoothed(sigma).hessian(x), rtol=1e-6, atol=1e-6)
    assert found.asymmetry.max() < 1e-12
    turn = torch.tensor([[1.0, 0.5], [-0.5, 1.0]]).double()
    skewed = hessian_estimate(lambda y: y @ turn.mT, x[:3], 1.0)
    torch.testing.assert_close(skewed.asymmetry, torch.full((3,), (2 / 2.5) ** 0.5, dtype=torch.float64))
    torch.testing.assert_close(skewed.value, torch.zeros(3, 2, 2).double())


def test_a_saved_model_knows_its_sigma(tmp_path: Path) -> None:
    model, x = make(residual=True, sigma=0.123).float(), points().float()
    save_model(model, tmp_path)
    again = load_model(AutoEncoder, tmp_path)
    assert (again.sigma, again.residual) == (0.123, True)
    torch.testing.assert_close(again.score(x), model.score(x), rtol=0, atol=0)
    torch.testing.assert_close(AutoEncoder.from_pretrained(tmp_path).score(x), model.score(x), rtol=0, atol=0)


def test_initial_weights() -> None:
    uniform = make(hidden=[400], init="uniform")
    assert 0.99 < uniform.layers[0].weight.abs().max() <= 1
    assert 0.09 < uniform.layers[0].bias.abs().max() <= 0.1
    normal = make(hidden=[4000], init="normal", init_stds=[10.0, 3.0, 0.1])
    assert float(normal.layers[0].weight.std()) == pytest.approx(10, rel=0.05)
    assert float(normal.layers[0].bias.std()) == pytest.approx(3, rel=0.05)
    assert float(normal.layers[1].weight.std()) == pytest.approx(0.1, rel=0.05)
