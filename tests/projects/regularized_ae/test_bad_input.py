"""Section 14 of the notes: each mistake gets one sentence that says what was expected, what was found and what to do."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.recipe import parse, read, to_yaml
from projects.regularized_ae import densities, measures, optima
from projects.regularized_ae.data import Source, check_array, check_sigma, load, load_array
from projects.regularized_ae.densities import Mixture
from projects.regularized_ae.model import AutoEncoder, hessian_estimate, jacobian_penalty
from projects.regularized_ae.pretrain import Recipe
from projects.regularized_ae.sampler import energy_difference, metropolis_hastings, path_rule

ROWS = np.random.default_rng(0).normal(size=(20, 3))


def test_sigma_against_the_scale_of_the_data() -> None:
    data = torch.from_numpy(ROWS)
    for sigma in (0.0, -1.0):
        with pytest.raises(ValueError, match=rf"sigma={sigma}.*standard deviation is [\d.]+ to"):
            check_sigma(sigma, data)
    with pytest.warns(UserWarning, match=r"sigma=5 exceeds the per-feature standard deviation .*bias"):
        check_sigma(5.0, data)
    with pytest.warns(UserWarning, match="use float64 or the residual form"):
        check_sigma(1e-4, data, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_sigma(1e-4, data, dtype=torch.float32, residual=True)
        check_sigma(1e-4, data)
        assert "of the median per-feature standard deviation" in check_sigma(0.1, data)
    for make in (
        lambda: AutoEncoder(3, sigma=0.0),
        lambda: optima.posterior_mean(data, data, -0.1),
        lambda: densities.local_moments(lambda x: x[:, 0], data, 0.0),
    ):
        with pytest.raises(ValueError, match="positive"):
            make()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.where(np.arange(60).reshape(20, 3) == 7, np.nan, ROWS), r"NaN or infinity in 1 rows, the first \[2\]"),
        (np.where(np.arange(60).reshape(20, 3) % 30 == 7, np.inf, ROWS), r"in 2 rows, the first \[2, 12\]"),
        (np.arange(256.0).reshape(64, 4), "integers 0 to 255; divide by 255"),
        (ROWS[:1], "at least 2 rows"),
        (ROWS[:, 0], "one row an example"),
    ],
)
def test_data_that_is_refused(array: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_array(array)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.hstack([ROWS, np.ones((20, 1))]), r"features \[3\] are constant"),
        (ROWS * [1, 1, 1000], "scale the features"),
        (ROWS[:, :1], "one column"),
        (np.vstack([ROWS, ROWS[:4]]), "4 of 24 rows are duplicates"),
    ],
)
def test_data_that_is_warned_of(array: np.ndarray, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        check_array(array)


def test_user_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ROWS)
    np.savez(tmp_path / "a.npz", x=ROWS)
    np.savetxt(tmp_path / "plain.csv", ROWS, delimiter=",")
    np.savetxt(tmp_path / "header.csv", ROWS, delimiter=",", header="a,b,c", comments="")
    for name in ("a.npy", "a.npz", "plain.csv", "header.csv"):
        np.testing.assert_allclose(load_array(tmp_path / name).numpy(), ROWS)
    data = load(Source(name="file", path=str(tmp_path / "a.npy")))
    assert (data.train.shape, data.test.shape, len(data.sha256)) == ((18, 3), (2, 3), 64)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:150])
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "words.csv").write_text("a,b\n1,2\nx,y\n")
    (tmp_path / "a.txt").write_text("1 2")
    for name in ("cut.npy", "pickled.npy", "words.csv", "a.txt"):
        with pytest.raises(ValueError, match=rf"{name}: expected an array of numbers"):
            load_array(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="found nothing there"):
        load_array(tmp_path / "absent.npy")
    with pytest.raises(ValueError, match=r"expected data\.path"):
        load(Source(name="file"))


def test_path_points() -> None:
    x = torch.zeros(1, 2)
    for rule in ("paper", "trapezoid", "midpoint"):
        with pytest.raises(ValueError, match="use rule=first_order for one point"):
            energy_difference(lambda y: y, x, x, rule=rule, points=1)
    with pytest.raises(ValueError, match="expected trapezoid, paper"):
        path_rule("simpson", 5)  # type: ignore[arg-type]


def _chains(score: Any, x0: torch.Tensor | None = None, **changes: Any) -> None:
    x0 = torch.zeros(50, 2, dtype=torch.float64) if x0 is None else x0
    metropolis_hastings(score, x0, generator=torch.Generator().manual_seed(0), **{"steps": 20, "proposal_std": 1.0, **changes})


def test_chains_that_are_refused_or_warned_of() -> None:
    density = densities.three_gaussians()
    data = density.sample(100, torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="outside the trained region, energies are not to be trusted"):
        _chains(density.score, 100 + data[:5], training_data=data, proposal_std=0.3)
    with pytest.warns(UserWarning, match=r"acceptance 9\d\.\d% with proposal_std=0\.001: .*; raise it"):
        _chains(density.score, data, proposal_std=0.001)
    with pytest.warns(UserWarning, match=r"acceptance 0\.\d% with proposal_std=500: .*; lower it"):
        _chains(lambda x: -x, proposal_std=500.0)
    with pytest.raises(FloatingPointError, match=r"energy differences are NaN or infinite, over 1%"):
        _chains(lambda x: x / 0.0)
    with pytest.raises(ValueError, match="finite"):
        _chains(density.score, torch.full((2, 2), math.nan, dtype=torch.float64))
    for changes in ({"proposal_std": 0.0}, {"temperature": -1.0}, {"burn_in": 20}, {"thin": 0}):
        with pytest.raises(ValueError, match="expected"):
            _chains(density.score, data, **changes)


def test_unknown_sigma_leaves_the_direction() -> None:
    model, x = AutoEncoder(3, [4]), torch.randn(2, 3)
    assert model.displacement(x).shape == (2, 3)
    with pytest.raises(ValueError, match="sigma unknown: only the direction is defined"):
        model.score(x)
    with pytest.raises(ValueError, match="sigma unknown: only the direction is defined"):
        model(x)
    with pytest.raises(ValueError, match="sigma unknown: only the direction is defined"):
        hessian_estimate(model.reconstruct, x, model.sigma)


def test_penalties_that_cannot_be_computed() -> None:
    wide = AutoEncoder(257, [3, 3], sigma=0.1)
    with pytest.raises(ValueError, match=r"257 dimensions.*penalty=hutchinson"):
        jacobian_penalty(wide, torch.zeros(1, 257))
    with pytest.raises(ValueError, match="use penalty=exact"):
        jacobian_penalty(wide, torch.zeros(1, 257), "closed_form")
    with pytest.raises(ValueError, match="probes"):
        jacobian_penalty(wide, torch.zeros(1, 257), "hutchinson")
    for changes in ({"residual": True}, {"residual": True, "sigma": 0.1, "output": "tanh"}):
        with pytest.raises(ValueError, match="residual form"):
            AutoEncoder(2, **changes)
    with pytest.raises(ValueError, match="hidden layer"):
        AutoEncoder(2, [])


def test_densities_that_are_none() -> None:
    weights, means = torch.tensor([0.5, 0.5]), torch.zeros(2, 2)
    eye = torch.eye(2).expand(2, 2, 2)
    flat, skew = eye.clone(), eye.clone()
    flat[1, 0, 0], skew[0, 0, 1] = -1, 0.5
    with pytest.raises(ValueError, match="component 1: expected a positive definite covariance, found one with eigenvalue -1"):
        Mixture(weights, means, flat)
    with pytest.raises(ValueError, match=r"component 0: .* not symmetric"):
        Mixture(weights, means, skew)
    with pytest.raises(ValueError, match="divide them by their sum"):
        Mixture(2 * weights, means, eye)
    with pytest.raises(ValueError, match="mixture: expected weights"):
        Mixture(weights, means[0], eye)
    with pytest.raises(ValueError, match="manifold mixture"):
        densities.manifold_mixture(torch.ones(3), torch.ones(3), 5, 0.0)


def test_grids_of_a_slope() -> None:
    for grid in ([0.1, 0.2], [0.2, 0.2, 0.1], [0.1], [0.1, 0.0]):
        with pytest.raises(ValueError, match="strictly falling"):
            measures.orders(grid, [1.0] * len(grid))
    with pytest.raises(ValueError, match="positive errors"):
        measures.orders([0.2, 0.1], [1.0, 0.0])


def test_one_dimensional_grids() -> None:
    x = torch.linspace(-1, 1, 11, dtype=torch.float64)
    with pytest.raises(ValueError, match="even, rising"):
        optima.rcae_on_grid(x.flip(0), x, 0.1)
    with pytest.raises(ValueError, match="even, rising"):
        optima.dae_on_grid(x**3, x, 0.1)
    with pytest.raises(ValueError, match="narrow the interval"):
        optima.rcae_on_grid(x, x.log(), 0.1)


def test_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--sigmas", "[0.1, 0.2]"], "strictly falling"),
        (["--sigmas", "[-0.1]"], "sigmas"),
        (["--optimizer", "lbfgs"], "iterations"),
        (["--outliers", "0.5"], "fresh noise"),
        (["--network.init_stds", "[1.0]"], "init_stds"),
        (["--sigma", "0.1"], "sigma"),
        (["--criterion", "vae"], "criterion"),
    ):
        with pytest.raises(SystemExit):
            parse(Recipe, arguments)
        assert message in capsys.readouterr().err
    (tmp_path / "r.yaml").write_text(to_yaml(Recipe(name="mine", sigmas=[0.3])))
    assert read(Recipe, tmp_path / "r.yaml") == Recipe(name="mine", sigmas=[0.3])
