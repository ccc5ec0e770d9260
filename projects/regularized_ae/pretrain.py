"""Train the auto-encoders of a recipe, for one seed: `python -m projects.regularized_ae.pretrain --config projects/regularized_ae/recipes/<name>.yaml`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn
from torch.utils.data import DataLoader

from common import engine
from common.checkpoint import save_model
from common.engine import Training, seed_everything
from common.recipe import parse, to_yaml
from common.schedule import cosine
from projects.regularized_ae import lbfgs
from projects.regularized_ae.data import Batches, Dataset, Source, check_sigma, load, only
from projects.regularized_ae.densities import parse_sigmas
from projects.regularized_ae.model import AutoEncoder, Criterion, Penalty


@dataclass(frozen=True)
class Network:
    """Shape of the auto-encoder."""

    hidden: list[PositiveInt] = field(default_factory=lambda: [128])
    """Widths of the hidden layers (paper: one)."""
    activation: Literal["tanh", "sigmoid", "silu"] = "tanh"
    """Of the hidden layers."""
    residual: bool = True
    """r(x) = x + sigma^2 net(x): better conditioned for small sigma; the paper's form is plain."""
    output: Literal["identity", "tanh", "sigmoid"] = "identity"
    """On the last layer (plain form)."""
    output_scale: PositiveFloat = 1.0
    """Factor of a tanh output (the author's scripts: 2)."""
    init: Literal["torch", "uniform", "normal"] = "torch"
    """uniform: weights in (-1, 1), biases in (-0.1, 0.1), the author's. normal: see `init_stds`."""
    init_stds: list[PositiveFloat] = field(default_factory=lambda: [10.0, 3.0, 0.1])
    """normal: standard deviations of the first weights, the biases and the last weights."""


@dataclass(frozen=True)
class Sampling:
    """Metropolis-Hastings chains run on the trained score."""

    chains: PositiveInt = 200
    """Started from training examples, split over processes."""
    steps: PositiveInt = 400
    """Of each chain."""
    burn_in: NonNegativeInt = 100
    """Steps left out."""
    thin: PositiveInt = 1
    """Every so many states one is kept."""
    proposal_stds: list[PositiveFloat] = field(default_factory=lambda: [0.1, 0.03])
    """Standard deviations of the proposal, a set of chains each; baselines run at the first."""
    rule: Literal["trapezoid", "paper", "midpoint"] = "trapezoid"
    """Path rule of the energy difference."""
    points: PositiveInt = 20
    """On the path of a proposal."""
    temperature: PositiveFloat = 1.0
    """Of the acceptance."""


@dataclass(frozen=True)
class Recipe:
    """An experiment on what regularised auto-encoders learn. Defaults: the paper's, where it states them."""

    name: str = "custom"
    """File name of the recipe; names run folder and records."""
    experiment: Literal["optimum", "score", "spiral", "sampling", "digits"] = "sampling"
    """What `evaluate` measures."""
    parts: list[str] = field(default_factory=list)
    """Recipe files of this folder that are run instead, their figures recorded under this recipe (the demo)."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Of the runs that `evaluate` makes."""
    seed: int = 0
    """Of the run that `pretrain` makes."""
    data: Source = field(default_factory=Source)
    network: Network = field(default_factory=Network)
    criterion: Criterion = "dae"
    """dae: noise. rcae: penalty sigma^2 on the reconstruction's Jacobian. cae: on the encoder's. score_matching: the limit without noise."""
    penalty: Penalty = "auto"
    """How the Jacobian penalty is computed."""
    sigmas: list[PositiveFloat] = field(default_factory=lambda: [0.1])
    """Noise levels in data units, strictly falling. lbfgs: one network goes through all. adam: a network each."""
    optimizer: Literal["adam", "lbfgs"] = "adam"
    """adam: fresh noise each step, float32. lbfgs: full batch, noise drawn once a level, float64."""
    iterations: list[PositiveInt] = field(default_factory=list)
    """lbfgs: iterations at each noise level."""
    memory: PositiveInt = 25
    """lbfgs: gradient pairs kept."""
    outliers: ClosedUnitInterval = 0.0
    """lbfgs: share of examples with 10 times the noise."""
    restarts: PositiveInt = 1
    """lbfgs: trainings from other initial weights, the best on held-out data with fresh noise is kept (author: 10)."""
    batch: PositiveInt = 512
    """adam: examples a step, over all processes."""
    lr: PositiveFloat = 3e-3
    """adam: first learning rate, falls to 0 along a cosine."""
    training: Training = field(default_factory=lambda: Training(steps=2500, log_every=100, checkpoint_every=500))
    sampling: Sampling = field(default_factory=Sampling)
    out: str = "runs/regularized_ae"
    """Run folders go to <out>/<name>/seed-<seed>."""

    def __post_init__(self) -> None:
        if len(self.sigmas) > 1:
            parse_sigmas(self.sigmas)
        if self.optimizer == "lbfgs" and not self.parts and len(self.iterations) != len(self.sigmas):
            raise ValueError(f"iterations: expected one number for each of the {len(self.sigmas)} sigmas, found {self.iterations}")
        if len(self.network.init_stds) != 3:
            raise ValueError(f"init_stds: expected three numbers (weights, biases, last weights), found {self.network.init_stds}")
        if self.optimizer == "adam" and (self.outliers or self.restarts > 1 or self.data.copies > 1):
            raise ValueError("outliers, restarts and copies belong to optimizer=lbfgs; adam draws fresh noise every step")


def run_folder(recipe: Recipe) -> Path:
    return Path(recipe.out) / recipe.name / f"seed-{recipe.seed}"


def build(recipe: Recipe, dim: int, sigma: float) -> AutoEncoder:
    """The untrained network of a recipe, in float32."""
    shape = recipe.network
    return AutoEncoder(
        dim,
        list(shape.hidden),
        shape.activation,
        shape.residual,
        sigma,
        shape.output,
        shape.output_scale,
        shape.init,
        list(shape.init_stds),
    )


def validation_loss(model: AutoEncoder, data: torch.Tensor, *, seed: int = 77, draws: int = 4) -> float:
    """DAE loss / sigma^2 on held-out examples with fresh noise (the loss on fixed noise can go below its population value)."""
    generator = torch.Generator().manual_seed(seed)
    x = data.repeat(draws, 1)
    noise = model._sigma() * torch.randn(x.shape, dtype=x.dtype, generator=generator)
    with torch.no_grad():
        return float(model(x, noise=noise).loss)


def main(recipe: Recipe, data: Dataset | None = None) -> dict[float, AutoEncoder]:
    """Train what is missing; a finished or interrupted run goes on where it was.

    Args:
        data: what `load(recipe.data, recipe.seed)` gives, when the caller has it.
    Returns:
        the models by their sigma, float64 on the CPU: one a noise level with adam, the one of the last level with lbfgs.
    """
    state = PartialState()
    data = load(recipe.data, recipe.seed) if data is None else data
    folder = run_folder(recipe)
    dtype = torch.float32 if recipe.optimizer == "adam" else torch.float64
    for sigma in recipe.sigmas if recipe.optimizer == "adam" else recipe.sigmas[-1:]:
        said = check_sigma(sigma, data.train, dtype=dtype, residual=recipe.network.residual)
        if state.is_main_process:
            print(f"{recipe.name}, seed {recipe.seed}: {len(data.train)} examples in {data.train.shape[1]} dimensions, {said}", flush=True)
    if recipe.optimizer == "lbfgs":
        model = _best_of_restarts(recipe, data, folder)
        models = {recipe.sigmas[-1]: model}
        if state.is_main_process:
            save_model(model, folder, recipe=to_yaml(recipe))
        return {sigma: model.cpu() for sigma, model in models.items()}
    models = {}
    for sigma in recipe.sigmas:
        one = replace(recipe, sigmas=[sigma])
        models[sigma] = _adam(one, data, folder if len(recipe.sigmas) == 1 else folder / f"sigma-{sigma:g}")
    return models


def _adam(recipe: Recipe, data: Dataset, folder: Path) -> AutoEncoder:
    state, sigma = PartialState(), recipe.sigmas[0]
    seed_everything(recipe.seed)
    model = build(recipe, data.train.shape[1], sigma)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr)
    rows = max(1, recipe.batch // state.num_processes)
    loader: DataLoader[dict[str, torch.Tensor]] = DataLoader(Batches(data.train.float(), rows), batch_size=1, collate_fn=only)
    total = engine.budget(loader, recipe.training).total

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> object:
        return model(batch["x"], criterion=recipe.criterion, noise=sigma * batch["normal"], penalty=recipe.penalty, probes=batch["probes"])

    fitted = engine.fit(
        model,
        loss,
        loader,
        optimizer,
        recipe.training,
        folder,
        recipe=recipe,
        seed=recipe.seed,
        lr_at=lambda step: cosine(step, total=total, peak=recipe.lr),
    )
    trained = fitted.model
    if not isinstance(trained, AutoEncoder):
        raise TypeError(f"training returned {type(trained).__name__}, expected AutoEncoder")
    if state.is_main_process:
        save_model(trained, folder, recipe=to_yaml(recipe))
    return trained.cpu().double().eval()


def _best_of_restarts(recipe: Recipe, data: Dataset, folder: Path) -> AutoEncoder:
    device, best, lowest = PartialState().device, None, math.inf
    for restart in range(recipe.restarts):
        seed_everything(recipe.seed + 10_000 * restart)
        model = build(recipe, data.train.shape[1], recipe.sigmas[-1]).double().to(device)
        lbfgs.fit(
            model,
            data.train.to(device),
            folder / f"restart-{restart}" if recipe.restarts > 1 else folder,
            sigmas=recipe.sigmas,
            iterations=recipe.iterations,
            recipe=recipe,
            seed=recipe.seed + 10_000 * restart,
            copies=recipe.data.copies,
            criterion=recipe.criterion,
            penalty=recipe.penalty,
            memory=recipe.memory,
            outliers=recipe.outliers,
        )
        value = validation_loss(model.cpu(), data.test) if recipe.restarts > 1 else 0.0
        if value < lowest:
            best, lowest = model, value
    if best is None:
        raise RuntimeError(f"no restart of {folder} reached a finite loss on held-out data; start at a larger sigma")
    return best.cpu().eval()


if __name__ == "__main__":
    main(parse(Recipe))
