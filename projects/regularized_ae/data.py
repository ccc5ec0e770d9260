"""Data sets: samples of the known densities, the spiral, scikit-learn's digits, and any array of the user's. No download."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from common.data import require
from projects.regularized_ae import densities
from projects.regularized_ae.densities import EnergyDensity, Mixture


@dataclass(frozen=True)
class Source:
    """Which data, and how much of it."""

    name: Literal["three_gaussians", "two_bumps", "ninja_star", "author_energy", "manifold", "spiral", "digits", "file"] = "three_gaussians"
    """manifold: the mixture along a curve in `dim` dimensions; file: `path`."""
    count: PositiveInt = 20_000
    """Training examples drawn (digits: the first 1,500; file: all but a tenth)."""
    copies: PositiveInt = 1
    """Copies of each example with noise of their own, where the noise is drawn once (L-BFGS)."""
    test: PositiveInt = 5_000
    """Held-out examples drawn."""
    dim: PositiveInt = 10
    """Manifold: dimensions."""
    components: PositiveInt = 25
    """Manifold: Gaussians along the curve."""
    ratio: PositiveFloat = 0.1
    """Manifold: thickness over length of each Gaussian."""
    density_seed: int = 3
    """Manifold: seed of its frequencies and exponents, so that seeds of a recipe share one density."""
    turn: PositiveFloat = 12.0
    """Spiral: last t; the paper's 12, or 15 as in the author's earlier scripts. The first is 3."""
    thickness: NonNegativeFloat = 0.0
    """Spiral: standard deviation of noise added to the clean points."""
    path: str | None = None
    """file: .npy, .npz or .csv with an array of numbers, one row an example."""


@dataclass
class Dataset:
    """float64 examples, and what is known of where they come from."""

    name: str
    train: Tensor
    """(n, d)"""
    test: Tensor
    """(m, d)"""
    density: Mixture | EnergyDensity | None = None
    curve: Tensor | None = None
    """Spiral: dense ordered points (k, 2)."""
    labels: tuple[Tensor, Tensor] | None = None
    """Digits: class of each training and test example."""

    @property
    def sha256(self) -> str:
        """Over the bytes of the training and the test examples."""
        digest = hashlib.sha256(self.train.numpy().tobytes())
        digest.update(self.test.numpy().tobytes())
        return digest.hexdigest()


def spiral_curve(t: Tensor) -> Tensor:
    """(n,) angles to (n, 2): 0.04 t (sin t, cos t)."""
    return 0.04 * t[:, None] * torch.stack([t.sin(), t.cos()], 1)


def load(source: Source, seed: int = 0) -> Dataset:
    """The data set of a recipe; drawn ones depend on `source` and `seed` alone."""
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    if source.name == "spiral":
        t = 3 + (source.turn - 3) * torch.rand(source.count + source.test, dtype=torch.float64, generator=generator)
        points = spiral_curve(t)
        points = points + source.thickness * torch.randn(points.shape, dtype=torch.float64, generator=generator)
        curve = spiral_curve(torch.linspace(3, source.turn, 20_001, dtype=torch.float64))
        return Dataset(source.name, points[: source.count], points[source.count :], curve=curve)
    if source.name == "digits":
        return _digits(source)
    if source.name == "file":
        if source.path is None:
            raise ValueError("data.name=file: expected data.path, found none; give an .npy, .npz or .csv file")
        rows = load_array(source.path)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        held = max(1, len(rows) // 10)
        return Dataset(Path(source.path).name, rows[held:], rows[:held])
    density = {
        "three_gaussians": densities.three_gaussians,
        "two_bumps": densities.two_bumps,
        "ninja_star": densities.ninja_star,
        "author_energy": densities.one_dimensional,
        "manifold": lambda: densities.random_manifold(source.dim, source.components, source.ratio, source.density_seed),
    }[source.name]()
    return Dataset(source.name, density.sample(source.count, generator), density.sample(source.test, generator), density)


def _digits(source: Source) -> Dataset:
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels in [0, 1]; a fixed shuffle, the last 297 held out."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(bunch.data)))
    images, labels = torch.from_numpy(bunch.data / 16.0)[order], torch.from_numpy(bunch.target)[order]
    train, test = slice(0, min(source.count, 1500)), slice(1500, 1500 + min(source.test, 297))
    return Dataset("digits", images[train], images[test], labels=(labels[train], labels[test]))


# ---- user data --------------------------------------------------------------------------------------------------------------------


def load_array(path: str | Path) -> Tensor:
    """(n, d) float64 from .npy, .npz (its only or its first array) or .csv (a header line is allowed). Pickled objects are not read.

    Raises:
        FileNotFoundError, ValueError: no such file, another format, damaged, or data that fail `check_array`.
    """
    path = require(path, "user data", "give an .npy, .npz or .csv file with one row an example")
    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as files:
                array = files[files.files[0]]
        elif path.suffix == ".csv":
            array = _read_csv(path)
        else:
            raise ValueError(f"found {path.suffix or 'no suffix'}, one of .npy, .npz, .csv is needed")
        array = np.asarray(array, dtype=np.float64)
    except (ValueError, OSError, EOFError, IndexError, KeyError, TypeError) as err:
        raise ValueError(
            f"{path}: expected an array of numbers ({err}); write it again with numpy.save or as a comma-separated table"
        ) from err
    return check_array(array, str(path))


def _read_csv(path: Path) -> np.ndarray:
    with path.open() as stream:
        first = stream.readline()
    try:
        [float(cell) for cell in first.split(",")]
        header = 0
    except ValueError:
        header = 1
    return np.loadtxt(path, delimiter=",", skiprows=header, ndmin=2)


def check_array(array: np.ndarray, name: str = "data") -> Tensor:
    """The array as a float64 tensor, once it is something an auto-encoder can learn a score from.

    Raises:
        ValueError: not two-dimensional, fewer than two rows, NaN or infinite rows, or integers 0 to 255.
    Warns:
        of constant features, duplicate rows and very different scales.
    """
    if array.ndim != 2 or array.shape[0] < 2 or array.shape[1] < 1:
        raise ValueError(
            f"{name}: expected (n, d) with at least 2 rows, found shape {array.shape}; one row an example (a single feature: reshape(-1, 1))"
        )
    bad = np.flatnonzero(~np.isfinite(array).all(1))
    if len(bad):
        raise ValueError(
            f"{name}: expected finite numbers, found NaN or infinity in {len(bad)} rows, the first {bad[:5].tolist()}; remove or fill them"
        )
    if array.max() > 50 and array.max() <= 255 and array.min() >= 0 and np.array_equal(array, np.round(array)):
        raise ValueError(
            f"{name}: expected scaled values, found integers 0 to {array.max():.0f}; divide by 255, since sigma is in data units"
        )
    spread = array.std(0)
    constant = np.flatnonzero(spread <= 1e-12 * (1 + np.abs(array).max(0)))
    if len(constant):
        warnings.warn(
            f"{name}: features {constant[:5].tolist()} are constant; the score is undefined along them, remove them", stacklevel=2
        )
    elif array.shape[1] > 1 and spread.max() > 100 * spread.min():
        warnings.warn(
            f"{name}: standard deviations run from {spread.min():.3g} to {spread.max():.3g}; one sigma does not fit all, scale the features",
            stacklevel=2,
        )
    if array.shape[1] == 1:
        warnings.warn(f"{name}: one column; the density is one-dimensional, is the array transposed?", stacklevel=2)
    copies = len(array) - len(np.unique(array, axis=0))
    if copies:
        warnings.warn(
            f"{name}: {copies} of {len(array)} rows are duplicates; a small sigma turns them into peaks of the density", stacklevel=2
        )
    return torch.from_numpy(np.ascontiguousarray(array))


def check_sigma(sigma: float, data: Tensor, *, dtype: torch.dtype = torch.float64, residual: bool = False) -> str:
    """Hold a noise level against the data's scale; returns the line to print.

    Raises:
        ValueError: sigma is not positive.
    Warns:
        that sigma exceeds the per-feature standard deviation (bias), or that sigma^2 drowns in float32 rounding.
    """
    spread = data.double().std(0)
    said = f"{spread.min():.3g} to {spread.max():.3g}" if len(spread) > 1 else f"{spread[0]:.3g}"
    if not sigma > 0:
        raise ValueError(f"sigma={sigma}: expected a positive noise level; the per-feature standard deviation is {said}, try a tenth of it")
    if sigma > spread.max():
        warnings.warn(
            f"sigma={sigma:g} exceeds the per-feature standard deviation ({said}): the estimated score will be that of the blurred density (bias)",
            stacklevel=2,
        )
    if dtype == torch.float32 and sigma < 1e-3 * spread.max() and not residual:
        warnings.warn(
            f"sigma={sigma:g} with data of scale {spread.max():.3g} in float32: (r - x) / sigma^2 is lost in rounding; use float64 or the residual form",
            stacklevel=2,
        )
    middle = float(spread.median())
    return (
        f"sigma {sigma:g} = {sigma / middle:.3g} of the median per-feature standard deviation ({said})"
        if middle > 0
        else f"sigma {sigma:g}"
    )


# ---- batches ----------------------------------------------------------------------------------------------------------------------


class Batches(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Each item is a whole batch: rows drawn at random, standard-normal noise and +-1 probes for them, new at every visit.

    So one index stands for all that is random in a step, and the engine's per-index seeds make a resumed run draw the same.
    """

    def __init__(self, data: Tensor, rows: int) -> None:
        self.data, self.rows = data, rows

    def __len__(self) -> int:
        return math.ceil(len(self.data) / self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = self.data[torch.randint(len(self.data), (self.rows,))]
        return {"x": x, "normal": torch.randn_like(x), "probes": torch.randint(0, 2, x.shape).to(x) * 2 - 1}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[i] for i in range(len(self)))


def only(items: list[Any]) -> Any:
    """Collate function of a loader whose items are batches."""
    return items[0]
