"""One experiment of the paper in one command: train what is missing, measure, draw, record.

`python -m projects.regularized_ae.evaluate --config projects/regularized_ae/recipes/<name>.yaml`
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor

from common.recipe import parse, read
from common.results import Record, picture_path, save_record
from projects.regularized_ae import densities, measures, optima, pictures, pretrain
from projects.regularized_ae.data import Dataset, load, spiral_curve
from projects.regularized_ae.densities import EnergyDensity, Mixture
from projects.regularized_ae.lbfgs import draw_noise
from projects.regularized_ae.model import AutoEncoder, hessian_estimate
from projects.regularized_ae.pretrain import Recipe
from projects.regularized_ae.sampler import Chains, energy_difference, langevin, metropolis_hastings, over_processes, random_walk

PAPER = "regularized_ae"
RECIPES = Path(__file__).parent / "recipes"


@dataclass
class Outcome:
    """What an experiment gives for one seed: `figures` become a record each, `further` stands beside them."""

    figures: dict[str, float]
    data: Dataset
    further: dict[str, float] = field(default_factory=dict)
    split: str = "held-out draws"


Draw = Callable[[str], Path | None]
"""Path for a picture of that name, or None where none is wanted (further seeds, other processes)."""


# ---- E1: the exact optimum in one dimension ---------------------------------------------------------------------------------------


def optimum(recipe: Recipe, draw: Draw, points: int = 6401) -> Outcome:
    """Relative score error of the exact DAE and RCAE optima as the noise falls, with its order: 2 is predicted once sigma is below the narrowest feature."""
    density = densities.one_dimensional()
    x = torch.linspace(density.low, density.high, points, dtype=torch.float64)
    log_p, score = density.log_prob(x[:, None]), density.score(x[:, None])
    figures: dict[str, float] = {}
    errors: dict[str, dict[float, float]] = {}
    kept: dict[float, Tensor] = {}
    for name, solve in (("DAE", optima.dae_on_grid), ("RCAE", optima.rcae_on_grid)):
        errors[name] = {}
        for sigma in recipe.sigmas:
            r = solve(x, log_p, sigma)
            errors[name][sigma] = measures.relative_error(((r - x) / sigma**2)[:, None], score, log_p.exp())
            if name == "DAE":
                kept[sigma] = r
        figures |= {f"score error, {name} optimum, sigma {sigma:g}": value for sigma, value in errors[name].items()}
        figures[f"order, {name} optimum, last pair"] = measures.orders(recipe.sigmas, list(errors[name].values()))[-1]
    mixture = densities.three_gaussians()
    where = mixture.sample(2000, torch.Generator().manual_seed(recipe.seed))
    pair = [0.1, 0.02]
    truth = mixture.score(where)
    estimates = [(densities.reconstruction(mixture, where, s) - where) / s**2 for s in pair]
    figures["order, DAE optimum, 2-D mixture, sigma 0.1 to 0.02"] = measures.orders(
        pair, [measures.relative_error(found, truth) for found in estimates]
    )[0]
    coefficient = densities.bias_coefficients(mixture, where)[0]
    figures["error of the predicted bias coefficient, sigma 0.02"] = measures.relative_error(
        (estimates[1] - truth) / pair[1] ** 2, coefficient
    )
    if path := draw("one_dimensional"):
        chosen = [s for s in (0.3, 0.1, 0.05, 0.02) if s in kept] or list(kept)[:4]
        pictures.one_dimensional(path, x, log_p, score[:, 0], {s: kept[s] for s in chosen}, errors)
    further = {f"predicted order, {name}": 2.0 for name in errors} | {"grid points": float(points)}
    return Outcome(
        figures, Dataset("author_energy", x[:, None], x[:, None], density), further, "grid of 6401 points, weighted by the density"
    )


# ---- E2: trained networks against a known score -----------------------------------------------------------------------------------


def score(recipe: Recipe, draw: Draw) -> Outcome:
    """Relative score error of a network a noise level, against the density (bias and estimation) and against the blurred one (estimation)."""
    data = load(recipe.data, recipe.seed)
    truth = _known(data)
    models = pretrain.main(recipe, data)
    x = data.test
    figures: dict[str, float] = {}
    further: dict[str, float] = {}
    curves: dict[str, dict[float, float]] = {"exact optimum": {}, "trained": {}, "trained, against the blurred density": {}}
    for sigma, model in models.items():
        with torch.no_grad():
            estimate = model.score(x)
            found = hessian_estimate(model.reconstruct, x, sigma)
        figures[f"score error, sigma {sigma:g}"] = curves["trained"][sigma] = measures.relative_error(estimate, truth.score(x))
        further[f"Hessian error, sigma {sigma:g}"] = measures.relative_error(found.value, truth.hessian(x))
        further[f"asymmetry of the Jacobian, sigma {sigma:g}"] = float(found.asymmetry.mean())
        if isinstance(truth, Mixture):
            blurred = truth.smoothed(sigma)
            figures[f"score error against p_sigma, sigma {sigma:g}"] = curves["trained, against the blurred density"][sigma] = (
                measures.relative_error(estimate, blurred.score(x))
            )
            curves["exact optimum"][sigma] = further[f"score error of the exact optimum, sigma {sigma:g}"] = measures.relative_error(
                blurred.score(x), truth.score(x)
            )
            generator = torch.Generator().manual_seed(1)
            ends = x[torch.randperm(len(x), generator=generator)]
            exact = truth.log_prob(x) - truth.log_prob(ends)
            with torch.no_grad():
                off = energy_difference(model.score, x, ends) - exact
            further[f"median energy-difference error, sigma {sigma:g}"] = float(off.abs().median())
    if len(models) > 1 and (path := draw(f"{recipe.name}_error")):
        pictures.error_curves(
            path,
            {name: line for name, line in curves.items() if line},
            title=f"relative score error, {recipe.criterion.upper()}, {'residual' if recipe.network.residual else 'plain'} form",
        )
    if isinstance(truth, Mixture) and truth.dim == 2:
        _energy_picture(recipe, truth, models, draw)
    return Outcome(figures, data, further)


def _known(data: Dataset) -> Mixture | EnergyDensity:
    if data.density is None:
        raise ValueError(f"experiment=score: expected data with a known density, found {data.name}; use experiment=sampling")
    return data.density


def _energy_picture(recipe: Recipe, truth: Mixture, models: dict[float, AutoEncoder], draw: Draw) -> None:
    sigma = min(models, key=lambda s: abs(s - 0.1))
    if not (path := draw(f"{recipe.name}_energy")):
        return
    reach = float(truth.means.abs().max() + 3 * truth.covs.diagonal(dim1=1, dim2=2).max().sqrt())
    axis = torch.linspace(-reach, reach, 81, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    start = truth.means[truth.log_prob(truth.means).argmax()].expand_as(grid)
    with torch.no_grad():
        estimated = energy_difference(models[sigma].score, start, grid, points=40).view(81, 81)
        error = models[sigma].displacement(grid).square().sum(1).view(81, 81)
    maps = {"true energy": -truth.log_prob(grid).view(81, 81), f"path integrals of (r − x)/σ², σ = {sigma:g}": estimated}
    pictures.energy_maps(path, axis, maps, reconstruction_error=error)


# ---- E3: the spiral ---------------------------------------------------------------------------------------------------------------


def spiral(recipe: Recipe, draw: Draw) -> Outcome:
    """A manifold in the plane: does r point back to it, and does iterating r end on it?"""
    data = load(recipe.data, recipe.seed)
    if data.curve is None:
        raise ValueError(f"experiment=spiral: expected data.name=spiral, found {data.name}")
    model = pretrain.main(recipe, data)[recipe.sigmas[-1]]
    axis = torch.linspace(-0.8, 0.8, 41, dtype=torch.float64)
    found = measures.attractors(model.reconstruct, torch.cartesian_prod(axis, axis), data.curve[::5])
    figures = {
        "share of starts that end off the data": found.share,
        "DAE loss / sigma^2, fresh noise": pretrain.validation_loss(model, data.test),
    }
    for distance in (0.01, 0.02, 0.05):
        there = measures.curve_field(model.displacement, data.curve[::2], distance)
        figures[f"cosine to the curve, distance {distance:g}"] = there.cosine
        figures[f"displacement / distance, distance {distance:g}"] = there.ratio
    further = exact_trough(recipe.data.turn)
    if path := draw(recipe.name):
        fine = torch.linspace(-0.8, 0.8, 161, dtype=torch.float64)
        grid = torch.cartesian_prod(fine, fine)
        with torch.no_grad():
            move = model.displacement(grid)
        exact = optima.posterior_mean(grid, data.curve[::10], 0.05) - grid
        levels = " → ".join(f"{s:g}" for s in recipe.sigmas)
        wrong = int(found.spurious.sum())
        title = f"σ = {levels}: " + (
            f"{wrong} of {len(found.ends)} starts end off the curve (red)" if wrong else "every start ends on the curve"
        )
        panels = [(title, grid, move, found.ends[found.spurious]), ("exact optimum, σ = 0.05", grid, exact, None)]
        pictures.field(path, panels, data.curve[::20], (-0.31, -0.06, 0.17))
    return Outcome(figures, data, further)


@lru_cache
def exact_trough(turn: float, sigma: float = 0.05) -> dict[str, float]:
    """|r(x) - x| of the exact optimum between two arms, beside that point, and on the curve: small at a minimum of the density too."""
    points = spiral_curve(torch.linspace(3, turn, 2001, dtype=torch.float64))
    axis = torch.linspace(-0.5, 0.5, 126, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    nearest = torch.cdist(grid, points).min(1).values
    grid = grid[(nearest > 0.06) & (grid.norm(dim=1) > 0.15) & (grid.norm(dim=1) < 0.4)]
    move = partial(_length, points=points, sigma=sigma)
    best = grid[move(grid).argmin()]
    for width in (0.004, 0.001):  # the trough is narrow: refine the grid around its deepest point
        local = best + width * torch.cartesian_prod(*[torch.linspace(-1, 1, 9, dtype=torch.float64)] * 2)
        best = local[move(local).argmin()]
    towards = torch.nn.functional.normalize(points[torch.cdist(best[None], points).argmin()] - best, dim=0)
    return {
        "exact optimum, sigma 0.05: |r - x| between two arms": float(move(best[None])),
        "exact optimum, sigma 0.05: |r - x| 0.03 beside it": float(move((best + 0.03 * towards)[None])),
        "exact optimum, sigma 0.05: |r - x| on the curve": float(move(points[100:-100:20]).mean()),
    }


def _length(x: Tensor, points: Tensor, sigma: float) -> Tensor:
    return (optima.posterior_mean(x, points, sigma) - x).norm(dim=1)


# ---- E4: sampling -----------------------------------------------------------------------------------------------------------------


def sampling(recipe: Recipe, draw: Draw) -> Outcome:
    """Metropolis-Hastings chains on the trained score, beside the exact score, the one-point rule and a random walk; or on user data."""
    data = load(recipe.data, recipe.seed)
    model = pretrain.main(recipe, data)[sigma := recipe.sigmas[-1]]
    plan = recipe.sampling
    generator = torch.Generator().manual_seed(recipe.seed)
    blurred = data.density.smoothed(sigma) if isinstance(data.density, Mixture) else None
    figures = {"DAE loss / sigma^2, fresh noise": pretrain.validation_loss(model, data.test)}
    further: dict[str, float] = {}
    target = None
    if blurred is not None:
        noisy = data.test + sigma * torch.randn(data.test.shape, dtype=torch.float64, generator=generator)
        with torch.no_grad():
            figures["score error against p_sigma, noisy points"] = measures.relative_error(model.score(noisy), blurred.score(noisy))
        target = blurred.sample(5000, generator)
        further["mean log p_sigma of exact samples"] = float(blurred.log_prob(target).mean())
    half = len(data.test) // 2
    further["energy distance of two halves of the held-out data"] = measures.energy_distance(data.test[:half], data.test[half:])

    starts = data.train[torch.randperm(len(data.train), generator=generator)[: plan.chains]]
    run = {"steps": plan.steps, "burn_in": plan.burn_in, "thin": plan.thin}
    path_rule = {"rule": plan.rule, "points": plan.points, "temperature": plan.temperature}
    first = plan.proposal_stds[0]
    samplers: dict[str, Callable[[Tensor, torch.Generator], Chains]] = {}
    if blurred is not None:
        samplers["score of p_sigma"] = lambda x, g: metropolis_hastings(
            blurred.score, x, proposal_std=first, generator=g, **run, **path_rule
        )
    for std in plan.proposal_stds:
        samplers[f"DAE, step {std:g}"] = lambda x, g, std=std: metropolis_hastings(
            model.score, x, proposal_std=std, generator=g, training_data=data.train[:2000], **run, **path_rule
        )
    samplers["DAE, one point"] = lambda x, g: metropolis_hastings(
        model.score, x, proposal_std=first, rule="first_order", temperature=plan.temperature, generator=g, **run
    )
    samplers["DAE, Langevin"] = lambda x, g: langevin(model.score, x, sigma=sigma / 4, generator=g, **run)
    samplers["random walk"] = lambda x, g: random_walk(x, proposal_std=first, generator=g, **run)
    drawn: dict[str, Tensor] = {}
    for name, sampler in samplers.items():
        chains = over_processes(sampler, starts, recipe.seed + 17)
        flat = chains.samples.flatten(0, 1)
        sample = drawn[name] = flat[torch.randperm(len(flat), generator=generator)[:4000]]
        if target is not None and blurred is not None:
            figures[f"energy distance to p_sigma, {name}"] = measures.energy_distance(sample, target)
            further[f"mean log p_sigma, {name}"] = float(blurred.log_prob(sample).mean())
        figures[f"energy distance to held-out data, {name}"] = measures.energy_distance(sample, data.test)
        further[f"effective sample size, {name}"] = measures.effective_sample_size(chains.samples)
        further[f"non-finite proposals, {name}"] = float(chains.non_finite)
        if name not in ("random walk", "DAE, Langevin"):
            figures[f"acceptance, {name}"] = chains.acceptance
        line = f"{name:<20} acceptance {chains.acceptance:.2f}  energy distance to data {figures[f'energy distance to held-out data, {name}']:.4f}"
        _say(line + (f", to p_sigma {figures[f'energy distance to p_sigma, {name}']:.4f}" if target is not None else ""))
    if data.train.shape[1] > 1 and (path := draw(f"{recipe.name}_samples")):
        shown = min(2500, len(data.test))
        noisy = data.test[:shown] + sigma * torch.randn(data.test[:shown].shape, dtype=torch.float64, generator=generator)
        pictures.pairs(
            path, {"data": data.test[:shown], f"data + noise {sigma:g}": noisy, "MH on the DAE": drawn[f"DAE, step {first:g}"][:shown]}
        )
    return Outcome(figures, data, further)


# ---- E5: digits -------------------------------------------------------------------------------------------------------------------


def digits(recipe: Recipe, draw: Draw) -> Outcome:
    """Real images: does the DAE generalise beyond the Parzen mean of its training set, do its energies order images, do its chains move?"""
    data = load(recipe.data, recipe.seed)
    if data.labels is None:
        raise ValueError(f"experiment=digits: expected data.name=digits, found {data.name}")
    model = pretrain.main(recipe, data)[sigma := recipe.sigmas[-1]]
    generator = torch.Generator().manual_seed(recipe.seed)
    x = data.test
    noisy = x.repeat(4, 1) + draw_noise(torch.Size((4 * len(x), x.shape[1])), sigma, recipe.seed + 5)
    parzen = optima.posterior_mean(noisy, data.train, sigma)
    figures = {
        "DAE loss / sigma^2, held-out digits": pretrain.validation_loss(model, x),
        "the same, Parzen optimum of the training set": float((parzen - x.repeat(4, 1)).square().sum(1).mean()) / sigma**2,
        "the same, identity": float((noisy - x.repeat(4, 1)).square().sum(1).mean()) / sigma**2,
    }
    image = x.view(-1, 8, 8)
    erased = image.clone()
    erased[:, 2:6, 2:6] = 0
    shuffled = x.gather(1, torch.rand(x.shape, generator=generator).argsort(1))
    other = x[torch.randperm(len(x), generator=generator)]
    moves = {
        "pixels shuffled": shuffled,
        "centre erased": erased.flatten(1),
        "rolled by 3 pixels": image.roll(3, 2).flatten(1),
        "mean of two digits": (x + other) / 2,
    }
    further: dict[str, float] = {}
    with torch.no_grad():
        for name, ends in moves.items():
            rise = energy_difference(model.score, x, ends)
            figures[f"share with higher energy, {name}"] = float((rise > 0).double().mean())
            further[f"median energy difference, {name}"] = float(rise.median())
    plan = recipe.sampling
    starts = data.train[torch.randperm(len(data.train), generator=generator)[: plan.chains]]
    chains = over_processes(
        lambda s, g: metropolis_hastings(
            model.score, s, steps=plan.steps, proposal_std=plan.proposal_stds[0], rule=plan.rule, points=plan.points, temperature=plan.temperature,
            burn_in=plan.burn_in, thin=plan.thin, generator=g, training_data=data.train,
        ),
        starts, recipe.seed + 17,
    )  # fmt: skip
    ends = chains.last
    with torch.no_grad():
        cleaned = model.reconstruct(ends)
    labels = data.labels[0]
    before, after = (labels[torch.cdist(p, data.train).argmin(1)] for p in (starts, cleaned))
    figures |= {
        "acceptance": chains.acceptance,
        "share of chains that changed class": float((before != after).double().mean()),
        "classes among the chains' ends": float(len(after.unique())),
    }
    noisy_test = x + sigma * torch.randn(x.shape, dtype=torch.float64, generator=generator)
    for name, rows in (
        ("samples", ends),
        ("samples, one reconstruction", cleaned),
        ("held-out digits", x),
        ("held-out digits with noise", noisy_test),
    ):
        further[f"mean distance to the nearest training digit, {name}"] = float(torch.cdist(rows, data.train).min(1).values.mean())
    further["effective sample size"] = measures.effective_sample_size(chains.samples)
    if path := draw("digits"):
        pictures.digits(
            path,
            {
                "start": starts[:14],
                "chain's end": ends[:14],
                "r(chain's end)": cleaned[:14],
                "nearest\ntraining digit": data.train[torch.cdist(cleaned[:14], data.train).argmin(1)],
            },
        )
    return Outcome(figures, data, further, "297 held-out digits")


# ---- running and recording --------------------------------------------------------------------------------------------------------

EXPERIMENTS: dict[str, Callable[[Recipe, Draw], Outcome]] = {
    "optimum": optimum,
    "score": score,
    "spiral": spiral,
    "sampling": sampling,
    "digits": digits,
}


def _say(line: str) -> None:
    if PartialState().is_main_process:
        print(line, flush=True)


def measure(recipe: Recipe, *, recorded_as: str | None = None, demo: bool = False) -> dict[str, list[float]]:
    """Run a recipe for all its seeds, print and record its figures; the first seed is drawn.

    Args:
        recorded_as: name of the recipe that the records belong to; default the recipe's own.
        demo: records and pictures go to the report of embedded defaults.
    Returns:
        the figures by name, one value a seed.
    """
    main_process = PartialState().is_main_process
    began = time.monotonic()
    outcomes: list[Outcome] = []
    for seed in recipe.seeds:

        def draw(name: str, seed: int = seed) -> Path | None:
            return picture_path(PAPER, name, demo=demo) if main_process and seed == recipe.seeds[0] else None

        outcomes.append(EXPERIMENTS[recipe.experiment](replace(recipe, seed=seed), draw))
    hours = (time.monotonic() - began) / 3600
    label = recipe.name
    table = {name: [outcome.figures[name] for outcome in outcomes] for name in outcomes[0].figures}
    further = {name: [outcome.further.get(name, math.nan) for outcome in outcomes] for name in outcomes[0].further}
    data = outcomes[0].data
    about = {"name": data.name, "split": outcomes[0].split, "sha256": data.sha256}
    _say(f"\n{label}: {len(recipe.seeds)} seed{'s' if len(recipe.seeds) > 1 else ''}, {hours * 60:.1f} minutes")
    for number, (name, values) in enumerate((table | further).items()):
        _say(f"  {name:<66} " + "  ".join(f"{value:.4g}" for value in values))
        if main_process and name in table:
            weights = "no training: exact" if recipe.experiment == "optimum" else "trained here"
            extra = {"row": label, "part": recipe.name} | ({"further": further} if number == 0 else {})
            save_record(
                PAPER,
                Record(
                    f"recipes/{recorded_as or recipe.name}.yaml", name, values, list(recipe.seeds), weights, about, round(hours, 4), extra
                ),
                demo=demo,
            )
    return table


def main(recipe: Recipe) -> dict[str, dict[str, list[float]]]:
    """Figures by recipe: one, or the parts of a composed one (the demo)."""
    if not recipe.parts:
        return {recipe.name: measure(recipe)}
    out = {}
    for part in recipe.parts:
        inner = replace(read(Recipe, RECIPES / part), out=recipe.out)
        out[inner.name] = measure(inner, recorded_as=recipe.name, demo=True)
    return out


if __name__ == "__main__":
    main(parse(Recipe))
