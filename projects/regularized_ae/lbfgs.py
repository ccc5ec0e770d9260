"""Full-batch L-BFGS over falling noise levels: the author's way to train, and what removes spurious attractors.

A loop of its own, since `common.engine` steps on batches. Each level draws its noise once and keeps it, divides the loss by sigma^2 and starts from
the weights of the level before. A finished level is a file, so a run that is killed goes on at the level it was in, with the same result.
With several processes each holds a part of the rows; loss and gradient are summed inside the closure, and all take the same steps.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist

from common.checkpoint import write_text, written_aside
from common.engine import check_recipe
from common.recipe import to_yaml
from common.weights import load_into, read_state_dict
from projects.regularized_ae.model import AutoEncoder, Criterion, Penalty

LOG_EVERY = 10
"""Evaluations between lines of metrics.jsonl."""


@dataclass
class Level:
    """What one noise level left: the last of its lines in metrics.jsonl."""

    level: int
    sigma: float
    step: int
    """Evaluations of loss and gradient so far, all levels."""
    loss: float
    """over sigma^2, on the level's fixed noise"""
    evaluations: int
    seconds: float


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def draw_noise(shape: torch.Size, sigma: float, seed: int, *, outliers: float = 0.0, outlier_factor: float = 10.0) -> Tensor:
    """(n, d) float64 noise of standard deviation sigma, drawn once for a level; a share `outliers` of the rows gets `outlier_factor` times as much."""
    generator = torch.Generator().manual_seed(seed)
    noise = sigma * torch.randn(shape, dtype=torch.float64, generator=generator)
    if outliers > 0:
        wide = torch.rand(shape[0], 1, dtype=torch.float64, generator=generator) < outliers
        noise = torch.where(wide, outlier_factor * noise, noise)
    return noise


def fit(
    model: AutoEncoder,
    data: Tensor,
    folder: str | Path,
    *,
    sigmas: Sequence[float],
    iterations: Sequence[int],
    recipe: object,
    seed: int = 0,
    copies: int = 1,
    criterion: Criterion = "dae",
    penalty: Penalty = "auto",
    memory: int = 25,
    outliers: float = 0.0,
    outlier_factor: float = 10.0,
) -> list[Level]:
    """Train `model` in place, level after level; the same call goes on after the last finished one.

    Args:
        data: (n, d) clean examples; each is used `copies` times with noise of its own.
        folder: gets recipe.yaml, metrics.jsonl and levels/<i>.safetensors.
        sigmas: strictly falling; the last is the model's own. iterations: L-BFGS iterations of each.
        recipe: dataclass that made all this; a folder begun with another one is refused.
        memory: pairs that L-BFGS keeps.
        outliers, outlier_factor: share of rows with wider noise, see `draw_noise`.
    Raises:
        ValueError: levels that do not fit together, or another recipe's folder.
        RuntimeError: the loss is not finite; names level and last good state.
    """
    folder = Path(folder)
    if len(sigmas) != len(iterations) or not sigmas or any(a <= b for a, b in pairwise(sigmas)):
        raise ValueError(f"levels: expected strictly falling sigmas with iterations each, found {list(sigmas)} and {list(iterations)}")
    if sigmas[-1] != model.sigma:
        raise ValueError(f"levels: the last sigma {sigmas[-1]} is expected to be the model's, found {model.sigma}")
    text = to_yaml(recipe)
    check_recipe(folder, text)
    rank, world = (dist.get_rank(), dist.get_world_size()) if _grouped() else (0, 1)
    if rank == 0 and not (folder / "recipe.yaml").is_file():
        write_text(folder / "recipe.yaml", text)
    log = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    done = [Level(**line) for line in lines if "level" in line]
    if done:
        load_into(model, read_state_dict(folder / "levels" / f"{len(done) - 1}.safetensors"), origin=str(folder))
    clean = data.repeat(copies, 1)
    parameters = list(model.parameters())
    for index in range(len(done), len(sigmas)):
        sigma = model.sigma = float(sigmas[index])
        began = time.monotonic()
        noise = draw_noise(clean.shape, sigma, seed * 9176 + index, outliers=outliers, outlier_factor=outlier_factor).to(clean)
        x, e = clean.tensor_split(world)[rank], noise.tensor_split(world)[rank]
        before = done[-1].step if done else 0
        terms = partial(_share_of_loss, model, x, noise=e, share=len(x) / len(clean), criterion=criterion, penalty=penalty)
        losses = _minimise(terms, parameters, iterations[index], memory, world)
        with torch.no_grad():
            final = _value(terms, world)
        if not math.isfinite(final) or not all(bool(p.isfinite().all()) for p in parameters):
            kept = folder / "levels" / f"{index - 1}.safetensors" if index else "none"
            raise RuntimeError(
                f"level {index} (sigma {sigma:g}): the loss became {final}; the last good state is {kept}; start at a larger sigma"
            )
        evaluations = len(losses)
        lines += [{"step": before + i + 1, "loss": loss, "sigma": sigma} for i, loss in enumerate(losses) if (i + 1) % LOG_EVERY == 0]
        level = Level(index, sigma, before + evaluations, final, evaluations, round(time.monotonic() - began, 2))
        done.append(level)
        lines.append(asdict(level))
        if rank == 0:
            write_level(folder, model, index, lines)
            print(
                f"{'/'.join(folder.parts[-2:])}: sigma {sigma:g}, {evaluations} evaluations, loss/sigma^2 {final:.4g}, {level.seconds:.1f} s",
                flush=True,
            )
    if _grouped():
        dist.barrier()
    model.sigma = float(sigmas[-1])
    return done


def write_level(folder: Path, model: nn.Module, index: int, lines: Sequence[dict[str, Any]]) -> None:
    """Weights first, then the log that says they are there, each written aside and renamed."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with written_aside(folder / "levels" / f"{index}.safetensors") as path:
        save_file(state, path)
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def _share_of_loss(model: AutoEncoder, x: Tensor, *, noise: Tensor, share: float, criterion: Criterion, penalty: Penalty) -> Tensor:
    """This process's part of the mean over all rows, 0-d."""
    loss: Tensor = model(x, criterion=criterion, noise=noise, penalty=penalty).loss
    return loss * share


def _minimise(terms: Callable[[], Tensor], parameters: list[nn.Parameter], iterations: int, memory: int, world: int) -> list[float]:
    """Run L-BFGS with a strong-Wolfe line search on the sum of `terms` over all processes; the loss at every evaluation."""
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=iterations,
        max_eval=2 * iterations,
        history_size=memory,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-10,
        tolerance_change=1e-12,
    )
    losses: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = terms()
        loss.backward()
        loss = loss.detach()
        if world > 1:
            flat = torch.cat([loss.view(1), *(_grad(p).flatten() for p in parameters)])
            dist.all_reduce(flat)
            loss = flat[0]
            nn.utils.vector_to_parameters(flat[1:], [_grad(p) for p in parameters])
        losses.append(float(loss))
        return loss

    optimizer.step(closure)
    return losses


def _grad(parameter: nn.Parameter) -> Tensor:
    return parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)


def _value(terms: Callable[[], Tensor], world: int) -> float:
    loss = terms()
    if world > 1:
        dist.all_reduce(loss)
    return float(loss)
