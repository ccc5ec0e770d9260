"""Energy differences, chains and the figures that judge them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from projects.regularized_ae import densities, measures
from projects.regularized_ae.sampler import Chains, energy_difference, langevin, metropolis_hastings, over_processes, random_walk
from tests.processes import Pair

MIXTURE = densities.three_gaussians()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("rule", "order"), [("paper", 1), ("trapezoid", 2), ("midpoint", 2)])
def test_rules_converge_with_their_order(rule: str, order: int) -> None:
    x, x_star = MIXTURE.sample(200, generator()), MIXTURE.sample(200, generator(1))
    exact = MIXTURE.log_prob(x) - MIXTURE.log_prob(x_star)
    errors = [float((energy_difference(MIXTURE.score, x, x_star, rule=rule, points=n) - exact).norm()) for n in (80, 160)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def test_first_order_rule_and_antisymmetry() -> None:
    x, x_star = MIXTURE.sample(10, generator()), MIXTURE.sample(10, generator(1))
    slope = -(MIXTURE.score(x) * (x_star - x)).sum(1)
    torch.testing.assert_close(energy_difference(MIXTURE.score, x, x_star, rule="first_order"), slope)
    there, back = energy_difference(MIXTURE.score, x, x_star), energy_difference(MIXTURE.score, x_star, x)
    torch.testing.assert_close(there, -back)
    line = energy_difference(lambda y: torch.ones_like(y), x, x_star, points=2)
    torch.testing.assert_close(line, -(x_star - x).sum(1))  # exact on a linear energy; uphill is positive


class Counted:
    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return MIXTURE.score(x)


@pytest.mark.parametrize(
    ("rule", "first", "each"), [("trapezoid", 3, 3 * 7), ("paper", 3, 3 * 7), ("midpoint", None, 3 * 8), ("first_order", 3, 3)]
)
def test_one_call_a_step_with_the_current_gradient_kept(rule: str, first: int | None, each: int) -> None:
    counted = Counted()
    metropolis_hastings(counted, MIXTURE.sample(3, generator()), steps=5, proposal_std=0.5, rule=rule, points=8, generator=generator(1))
    assert counted.calls == ([first] if first else []) + [each] * 5


@pytest.mark.parametrize("rule", ["trapezoid", "midpoint", "first_order"])
def test_chains_equal_a_plain_loop(rule: str) -> None:
    x0, steps = MIXTURE.sample(4, generator()), 70  # more than one block of random numbers
    z, u = (
        torch.randn(steps, 4, 2, dtype=torch.float64, generator=generator(1)),
        torch.rand(steps, 4, dtype=torch.float64, generator=generator(2)),
    )
    chains = metropolis_hastings(
        MIXTURE.score, x0, steps=steps, proposal_std=0.7, rule=rule, points=6, temperature=1.5, normals=z, uniforms=u
    )
    for c in range(4):
        x = x0[c : c + 1]
        for step in range(steps):
            y = x + 0.7 * z[step, c]
            rise = energy_difference(MIXTURE.score, x, y, rule=rule, points=6)
            if math.log(u[step, c]) <= -float(rise) / 1.5:
                x = y
            torch.testing.assert_close(chains.samples[step, c], x[0])
            assert float(chains.differences[step, c]) == pytest.approx(float(rise), rel=1e-9)
    assert chains.acceptance == pytest.approx(float(chains.accepted.double().mean()))
    torch.testing.assert_close(chains.last, chains.samples[-1])


def test_long_chains_reach_the_density_and_balance_in_detail() -> None:
    density = densities.Mixture(*(torch.tensor(v, dtype=torch.float64) for v in ([0.3, 0.7], [[-1.0], [1.0]], [[[0.3]], [[0.2]]])))
    chains = metropolis_hastings(
        density.score, density.sample(400, generator()), steps=600, proposal_std=1.5, burn_in=100, points=20, generator=generator(3)
    )
    left = chains.samples[..., 0] < 0
    from scipy.stats import norm

    expected = 0.3 * norm.cdf(1 / 0.3**0.5) + 0.7 * norm.cdf(-1 / 0.2**0.5)
    assert float(left.double().mean()) == pytest.approx(expected, abs=0.015)
    forth, back = ((a & ~b).sum() for a, b in ((left[:-1], left[1:]), (~left[:-1], ~left[1:])))
    assert forth > 1000
    assert abs(int(forth - back)) < 4 * math.sqrt(float(forth + back))
    cells = torch.bucketize(chains.samples[..., 0], torch.tensor([-1.0, -0.3, 0.5, 1.0], dtype=torch.float64))
    flow = torch.zeros(5, 5).index_put((cells[:-1].flatten(), cells[1:].flatten()), torch.ones(1), accumulate=True)
    total = flow + flow.T
    assert (((flow - flow.T).abs() / total.clamp_min(1).sqrt()).max()) < 4  # each pair of cells is crossed as often one way as the other
    cold = metropolis_hastings(
        density.score, density.sample(200, generator()), steps=200, proposal_std=1.0, temperature=0.2, burn_in=50, generator=generator(3)
    )
    assert density.log_prob(cold.samples.flatten(0, 1)).mean() > density.log_prob(chains.samples.flatten(0, 1)).mean() + 0.3


def test_one_point_rule_is_biased_and_random_walk_diffuses() -> None:
    x0 = MIXTURE.sample(300, generator())
    exact = MIXTURE.sample(3000, generator(9))
    run = {"steps": 150, "burn_in": 50, "thin": 10}
    path = metropolis_hastings(MIXTURE.score, x0, proposal_std=0.6, generator=generator(1), **run)
    point = metropolis_hastings(MIXTURE.score, x0, proposal_std=0.6, rule="first_order", generator=generator(1), **run)
    walk = random_walk(x0, proposal_std=0.6, generator=generator(1), **run)
    distance = [measures.energy_distance(chains.samples.flatten(0, 1), exact) for chains in (path, point, walk)]
    assert distance[0] < 0.01
    assert 15 * distance[0] < 5 * distance[1] < distance[2]
    assert (path.samples.shape, walk.acceptance) == ((10, 300, 2), 1)


@pytest.mark.parametrize("form", ["euler", "reconstruct"])
def test_langevin_with_a_small_step_keeps_the_density(form: str) -> None:
    gaussian = densities.gaussian(torch.zeros(2).double(), torch.eye(2).double())
    chains = langevin(
        gaussian.score, gaussian.sample(2000, generator()), steps=60, sigma=0.2, form=form, burn_in=40, thin=20, generator=generator(1)
    )
    spread = chains.samples.flatten(0, 1).var(0)
    expected = {"euler": 1 / (1 - 0.02), "reconstruct": 0.96**2 * 0.08 / (1 - 0.96**2)}[form]  # both biased at order sigma^2
    torch.testing.assert_close(spread, torch.full((2,), expected).double(), rtol=0.06, atol=0)


@pytest.mark.filterwarnings("ignore:acceptance")
def test_non_finite_energies_are_rejected_and_counted() -> None:
    x0 = torch.zeros(100, 1, dtype=torch.float64)
    uphill = torch.ones(2, 100, 1, dtype=torch.float64)
    uphill[1, 0] = 50.0

    def score(x: Tensor) -> Tensor:
        return torch.where(x > 10, math.nan, -x)

    chains = metropolis_hastings(
        score, x0, steps=2, proposal_std=1.0, points=2, normals=uphill, uniforms=torch.full((2, 100), 0.1).double()
    )
    assert (chains.non_finite, bool(chains.accepted[1, 0])) == (1, False)
    assert chains.last.isfinite().all()


# measures


def test_energy_distance() -> None:
    a, b = (
        torch.randn(400, 2, dtype=torch.float64, generator=generator()),
        torch.randn(300, 2, dtype=torch.float64, generator=generator(1)) + 1,
    )
    naive = 2 * (a[:, None] - b).norm(dim=2).mean() - (a[:, None] - a).norm(dim=2).mean() - (b[:, None] - b).norm(dim=2).mean()
    assert measures.energy_distance(a, b) == pytest.approx(float(naive), rel=1e-9)
    assert measures.energy_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_effective_sample_size() -> None:
    noise = torch.randn(2000, 10, 2, dtype=torch.float64, generator=generator())
    assert measures.effective_sample_size(noise) == pytest.approx(20_000, rel=0.1)
    slow = noise.clone()
    for i in range(1, 2000):
        slow[i] = 0.8 * slow[i - 1] + 0.6 * noise[i]
    assert measures.effective_sample_size(slow) == pytest.approx(20_000 * 0.2 / 1.8, rel=0.25)
    stuck = torch.randn(1, 10, 2, dtype=torch.float64, generator=generator()).expand(500, 10, 2)
    assert measures.effective_sample_size(stuck + 0.01 * noise[:500]) < 60


def test_curve_field_and_attractors() -> None:
    angle = torch.linspace(0, 2 * math.pi, 4001, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()], 1)

    def half_way(x: Tensor) -> Tensor:
        return 0.5 * (torch.nn.functional.normalize(x, dim=1) - x)

    found = measures.curve_field(half_way, circle, 0.05)
    assert (found.cosine, found.ratio) == (pytest.approx(1, abs=1e-3), pytest.approx(0.5, abs=1e-2))
    assert measures.curve_field(lambda x: -half_way(x), circle, 0.05).cosine == pytest.approx(-1, abs=1e-3)
    starts = torch.tensor([[0.5, 0.0], [-0.5, 0.1], [3.0, 3.0]], dtype=torch.float64)
    pulled = measures.attractors(
        lambda x: torch.where(x[:, :1] < 0, torch.zeros_like(x) - 0.2, x + half_way(x)), starts, circle, iterations=60
    )
    assert (pulled.spurious.tolist(), pulled.share) == ([False, True, False], pytest.approx(1 / 3))
    assert measures.attractors(lambda x: x * 1e200, starts, circle, iterations=3).share == 1  # a divergent iteration counts


# two real processes


def _split_chains(rank: int, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    chains = over_processes(lambda x, g: metropolis_hastings(MIXTURE.score, x, steps=6, proposal_std=0.4, generator=g), x0, seed=5)
    return chains.samples.clone(), chains.accepted.clone(), chains.last.clone()


@pytest.mark.timeout(240)
def test_two_processes_share_the_chains(two_processes: Pair) -> None:
    x0 = MIXTURE.sample(5, generator())
    first, second = two_processes(_split_chains, x0)
    assert [tuple(part.shape) for part in first] == [(6, 5, 2), (6, 5), (5, 2)]
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for rank, part in ((0, x0[:3]), (1, x0[3:])):  # each process drew from its own seed, in the order of the starts
        alone: Chains = metropolis_hastings(MIXTURE.score, part, steps=6, proposal_std=0.4, generator=generator(5 * 1009 + rank))
        torch.testing.assert_close(first[0][:, :3] if rank == 0 else first[0][:, 3:], alone.samples, rtol=1e-12, atol=1e-12)
