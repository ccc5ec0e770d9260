"""The recorded runs show what the README says of them (orders of magnitude and orderings, on the newest record of each figure)."""

from __future__ import annotations

import pytest

from common import results


def newest(recipe: str, metric: str) -> list[float]:
    found = [r["values"] for r in results.records("regularized_ae") if r["recipe"] == f"recipes/{recipe}.yaml" and r["metric"] == metric]
    assert found, f"no record of {recipe}: {metric}"
    return found[-1]


def mean(recipe: str, metric: str) -> float:
    values = newest(recipe, metric)
    return sum(values) / len(values)


def test_every_row_has_its_record() -> None:
    for row in results.tables("regularized_ae")["rows"]:
        newest(row["recipe"].removeprefix("recipes/").removesuffix(".yaml"), row["metric"])


def test_the_exact_optimum_has_the_predicted_order() -> None:
    assert 1.8 < newest("exact_optimum", "order, DAE optimum, last pair")[0] < 2.1
    assert newest("exact_optimum", "error of the predicted bias coefficient, sigma 0.02")[0] < 0.02


def test_trained_scores_order_as_the_theory_says() -> None:
    sigmas = (0.5, 0.3, 0.2, 0.1, 0.05)
    whole = {
        r: [newest(f"score_{r}", f"score error, sigma {s:g}")[0] for s in sigmas] for r in ("dae_residual", "dae_plain", "rcae_residual")
    }
    own = [newest("score_dae_residual", f"score error against p_sigma, sigma {s:g}")[0] for s in sigmas]
    assert own == sorted(own)  # the DAE's estimation error grows as the noise falls
    assert min(whole["dae_residual"]) == whole["dae_residual"][3]  # so its total is U-shaped, best near 0.1
    assert whole["rcae_residual"] == sorted(whole["rcae_residual"], reverse=True)  # the RCAE keeps improving
    assert whole["dae_plain"][4] > 2 * whole["dae_residual"][4]
    assert newest("score_matching", "score error, sigma 0.05")[0] == pytest.approx(whole["rcae_residual"][4], rel=0.2)


def test_falling_noise_removes_the_attractors() -> None:
    assert max(newest("spiral_single", "share of starts that end off the data")) > 0.02
    assert newest("spiral_decreasing", "share of starts that end off the data") == [0, 0, 0, 0]


def test_chains_order_exact_dae_one_point_random_walk() -> None:
    distance = {
        name: mean("sampling", f"energy distance to p_sigma, {name}")
        for name in ("score of p_sigma", "DAE, step 0.1", "DAE, one point", "random walk")
    }
    exact, dae, point, walk = distance.values()
    assert dae < 2 * exact
    assert 3 * dae < point < walk / 5


def test_digits_generalise() -> None:
    loss, parzen, identity = (
        newest("digits", name)[0]
        for name in ("DAE loss / sigma^2, held-out digits", "the same, Parzen optimum of the training set", "the same, identity")
    )
    assert loss < 0.75 * parzen < 0.5 * identity
