"""Energy differences from a score alone, and the chains that run on them (paper: approximate Metropolis-Hastings without partition function).

A score function takes (N, d) points to (N, d): a trained model's `score`, or a known density's as the baseline. Nothing here sees a density.
To compile the step on an accelerator, hand over `torch.compile(model.score)`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Score = Callable[[Tensor], Tensor]
Rule = Literal["trapezoid", "paper", "midpoint", "first_order"]
BLOCK = 64
"""Steps whose random numbers are drawn at once."""
NON_FINITE_SHARE = 0.01
"""Largest share of proposals whose energy difference may be NaN or infinite."""
FAR = 10.0
"""A start whose |score| is this many times the largest on the training data lies outside the trained region."""


def path_rule(rule: Rule, points: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Places t in [0, 1] on the segment and their weights, (n,) each: integral_0^1 g(t) dt is about sum_i weight_i g(t_i).

    paper: n even places with both ends, plain mean, error O(1/n). trapezoid: the same places, ends half, error O(1/n^2).
    midpoint: the middles of n equal parts, error O(1/n^2). first_order: the start alone.

    Raises:
        ValueError: fewer than 2 points for a path rule.
    """
    if rule == "first_order":
        return torch.zeros(1, dtype=dtype, device=device), torch.ones(1, dtype=dtype, device=device)
    if rule not in ("paper", "trapezoid", "midpoint"):
        raise ValueError(f"rule={rule!r}: expected trapezoid, paper, midpoint or first_order")
    if points < 2:
        raise ValueError(f"points={points} with rule={rule}: expected at least 2 on the path; use rule=first_order for one point")
    if rule == "midpoint":
        place = (torch.arange(points, dtype=dtype, device=device) + 0.5) / points
        return place, torch.full_like(place, 1 / points)
    place = torch.linspace(0, 1, points, dtype=dtype, device=device)
    weight = torch.full_like(place, 1 / points)
    if rule == "trapezoid":
        weight = torch.full_like(place, 1 / (points - 1))
        weight[[0, -1]] /= 2
    return place, weight


def _along(score: Score, x: Tensor, x_star: Tensor, place: Tensor) -> Tensor:
    """(n, N, d) scores at the places of each segment, one call."""
    path = x + place[:, None, None] * (x_star - x)
    return score(path.flatten(0, 1)).view(path.shape)


def energy_difference(score: Score, x: Tensor, x_star: Tensor, *, rule: Rule = "trapezoid", points: int = 20) -> Tensor:
    """(N,) E(x_star) - E(x) with E = -log p: minus the line integral of the score along the straight segments (Sec. 3.4).

    Args:
        x, x_star: (N, d).
        points: on each path; `first_order` uses one.
    """
    place, weight = path_rule(rule, points, dtype=x.dtype, device=x.device)
    mean = torch.einsum("n,nbd->bd", weight, _along(score, x, x_star, place))
    return -(mean * (x_star - x)).sum(1)


@dataclass
class Chains:
    """What a sampler returns; S kept states of C chains in d dimensions over T steps."""

    samples: Tensor
    """(S, C, d) states after the kept steps, burn-in left out."""
    last: Tensor
    """(C, d) state to go on from."""
    accepted: Tensor
    """(T, C) bool, every step, burn-in too."""
    differences: Tensor
    """(T, C) energy difference of every proposal."""
    non_finite: int
    """Proposals rejected because their energy difference was NaN or infinite."""
    burn_in: int

    @property
    def acceptance(self) -> float:
        """Share of proposals accepted after burn-in."""
        return float(self.accepted[self.burn_in :].double().mean())


def _check_start(score: Score, x0: Tensor, training_data: Tensor | None) -> None:
    if x0.ndim != 2 or not bool(x0.isfinite().all()):
        raise ValueError(f"chain starts: expected finite (C, d), found shape {tuple(x0.shape)}; one row a chain")
    if training_data is not None:
        start, usual = float(score(x0).norm(dim=1).max()), float(score(training_data).norm(dim=1).max())
        if start > FAR * usual:
            warnings.warn(
                f"a chain starts where |score| is {start:.3g}, over {FAR:g} times the training data's largest ({usual:.3g}): "
                "outside the trained region, energies are not to be trusted; start from data",
                stacklevel=3,
            )


def _kept(steps: int, burn_in: int, thin: int) -> list[int]:
    if not 0 <= burn_in < steps or thin < 1:
        raise ValueError(f"steps={steps}, burn_in={burn_in}, thin={thin}: expected 0 <= burn_in < steps and thin >= 1")
    return list(range(burn_in + thin - 1, steps, thin))


@torch.no_grad()
def metropolis_hastings(
    score: Score,
    x0: Tensor,
    *,
    steps: int,
    proposal_std: float,
    rule: Rule = "trapezoid",
    points: int = 20,
    temperature: float = 1.0,
    burn_in: int = 0,
    thin: int = 1,
    normals: Tensor | None = None,
    uniforms: Tensor | None = None,
    generator: torch.Generator | None = None,
    training_data: Tensor | None = None,
) -> Chains:
    """Metropolis-Hastings on estimated energy differences (Sec. 3.5): x* = x + proposal_std z, accepted where log u <= -dE / temperature.

    All chains and path points go through the score in one call a step; the score at the current state is kept, so a path rule with both ends
    costs points - 1 evaluations a chain and the one-point rule costs one. The chain targets the density that the score belongs to: with a DAE
    the data blurred by its sigma.

    Args:
        x0: (C, d) one start a chain, best taken from the data.
        burn_in, thin: steps left out at first; then every `thin`-th state is kept.
        normals (T, C, d), uniforms (T, C): the random draws, for tests; else from `generator`.
        training_data: (n, d), to warn of starts outside the trained region.
    Raises:
        FloatingPointError: more than 1 % of the energy differences were NaN or infinite.
    """
    if not proposal_std > 0 or not temperature > 0:
        raise ValueError(f"proposal_std={proposal_std}, temperature={temperature}: expected positive numbers")
    keep = set(_kept(steps, burn_in, thin))
    _check_start(score, x0, training_data)
    place, weight = path_rule(rule, points, dtype=x0.dtype, device=x0.device)
    cached = rule != "midpoint"  # the rule looks at the current state itself
    x, chains = x0.clone(), len(x0)
    grad = score(x) if cached else torch.zeros_like(x)
    samples: list[Tensor] = []
    accepted = torch.empty(steps, chains, dtype=torch.bool, device=x.device)
    differences = torch.empty(steps, chains, dtype=x.dtype, device=x.device)
    for first in range(0, steps, BLOCK):
        block = min(BLOCK, steps - first)
        z = (
            torch.randn(block, *x.shape, dtype=x.dtype, device=x.device, generator=generator)
            if normals is None
            else normals[first : first + block]
        )
        u = (
            torch.rand(block, chains, dtype=x.dtype, device=x.device, generator=generator)
            if uniforms is None
            else uniforms[first : first + block]
        )
        for i in range(block):
            proposal = x + proposal_std * z[i]
            if rule == "first_order":
                mean, there = grad, score(proposal)
            elif cached:
                rest = _along(score, x, proposal, place[1:])
                mean, there = weight[0] * grad + torch.einsum("n,nbd->bd", weight[1:], rest), rest[-1]
            else:
                mean, there = torch.einsum("n,nbd->bd", weight, _along(score, x, proposal, place)), grad
            difference = -(mean * (proposal - x)).sum(1)
            take = u[i].log() <= -difference / temperature  # false for NaN
            take &= difference.isfinite()
            x, grad = torch.where(take[:, None], proposal, x), torch.where(take[:, None], there, grad)
            accepted[first + i], differences[first + i] = take, difference
            if first + i in keep:
                samples.append(x)
        bad = int((~differences[: first + block].isfinite()).sum())
        if bad > NON_FINITE_SHARE * (first + block) * chains:
            raise FloatingPointError(
                f"{bad} of {(first + block) * chains} energy differences are NaN or infinite, over {NON_FINITE_SHARE:.0%}: the score is not to be trusted there; "
                "use float64, a smaller proposal_std or starts from data"
            )
    out = Chains(torch.stack(samples) if samples else x.new_empty(0, *x.shape), x, accepted, differences, bad, burn_in)
    rate = out.acceptance
    if not 0.01 <= rate <= 0.95:
        advice = "lower" if rate < 0.01 else "raise"
        warnings.warn(f"acceptance {rate:.1%} with proposal_std={proposal_std:g}: expected 1 % to 95 %; {advice} it", stacklevel=2)
    return out


@torch.no_grad()
def langevin(
    score: Score,
    x0: Tensor,
    *,
    steps: int,
    sigma: float,
    form: Literal["euler", "reconstruct"] = "euler",
    burn_in: int = 0,
    thin: int = 1,
    generator: torch.Generator | None = None,
) -> Chains:
    """Unadjusted Langevin, biased in its step sigma.

    Args:
        form: euler: x + sigma^2 score(x) + sqrt(2) sigma z. reconstruct: y = x + sqrt(2) sigma z, then r(y) = y + sigma^2 score(y) (the author's).
    """
    keep = set(_kept(steps, burn_in, thin))
    _check_start(score, x0, None)
    x, samples = x0, []
    for step in range(steps):
        noise = math.sqrt(2) * sigma * torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        x = x + sigma**2 * score(x) + noise if form == "euler" else (y := x + noise) + sigma**2 * score(y)
        if step in keep:
            samples.append(x)
    moved = torch.ones(steps, len(x), dtype=torch.bool, device=x.device)
    return Chains(torch.stack(samples), x, moved, x.new_zeros(steps, len(x)), 0, burn_in)


@torch.no_grad()
def random_walk(
    x0: Tensor, *, steps: int, proposal_std: float, burn_in: int = 0, thin: int = 1, generator: torch.Generator | None = None
) -> Chains:
    """Every proposal accepted: the baseline that a sampler must beat."""
    keep = set(_kept(steps, burn_in, thin))
    x, samples = x0, []
    for step in range(steps):
        x = x + proposal_std * torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        if step in keep:
            samples.append(x)
    moved = torch.ones(steps, len(x), dtype=torch.bool, device=x.device)
    return Chains(torch.stack(samples), x, moved, x.new_zeros(steps, len(x)), 0, burn_in)


def over_processes(run: Callable[[Tensor, torch.Generator], Chains], x0: Tensor, seed: int) -> Chains:
    """Chains split over the processes of the group, each with a seed of its own, and gathered: every process gets all of them, in order.

    Args:
        run: (starts of this process, generator) to chains.
        x0: (C, d), the same on every process, C at least the number of processes.
    """
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if grouped else (0, 1)
    if len(x0) < world:
        raise ValueError(f"{len(x0)} chains over {world} processes: expected at least one each; use more chains or fewer processes")
    generator = torch.Generator(x0.device).manual_seed(seed * 1009 + rank)
    mine = run(x0.tensor_split(world)[rank], generator)
    if world == 1:
        return mine
    parts: list[tuple[list[Tensor], int]] = [([], 0)] * world
    tensors = [part.cpu() for part in (mine.samples, mine.last, mine.accepted, mine.differences)]
    torch.distributed.all_gather_object(parts, (tensors, mine.non_finite))
    samples, last, accepted, differences = (
        torch.cat([part[i] for part, _ in parts], dim).to(x0.device) for i, dim in enumerate((1, 0, 1, 1))
    )
    return Chains(samples, last, accepted, differences, sum(count for _, count in parts), mine.burn_in)
