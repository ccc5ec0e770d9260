"""Every closed-form case, by its kind."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from projects.regularized_ae import densities, optima
from projects.regularized_ae.densities import Mixture
from projects.regularized_ae.model import AutoEncoder, encoder_penalty, jacobian_penalty, second_order_term
from projects.regularized_ae.sampler import Rule, energy_difference, metropolis_hastings
from tests.parity import Case, cases, check


def _sigmas(case: Case) -> list[float]:
    return [float(s) for s in case.config["sigmas"]]


def _mixture(case: Case) -> Mixture:
    return Mixture(*(case.files[name] for name in ("weights", "means", "covs")))


def _optimal_score(density: Mixture, sigma: float) -> Callable[[Tensor], Tensor]:
    return lambda x: (densities.reconstruction(density, x, sigma) - x) / sigma**2


def gaussian(case: Case) -> dict[str, Tensor]:
    mu, cov, x = (case.files[name] for name in ("mu", "cov", "x"))
    density = densities.gaussian(mu, cov)
    out = {"sigmas": torch.tensor(_sigmas(case), dtype=torch.float64), "logp": density.log_prob(x), "score": density.score(x)}
    for i, sigma in enumerate(_sigmas(case)):
        best = densities.gaussian_optimum(mu, cov, sigma)
        r = best.reconstruct(x)
        out |= {
            f"r_{i}": r,
            f"score_estimate_{i}": (r - x) / sigma**2,
            f"jacobian_{i}": best.jacobian,
            f"posterior_cov_{i}": sigma**2 * best.jacobian,
        }
        out |= {f"dae_loss_{i}": best.dae_loss.view(1), f"rcae_loss_{i}": best.rcae_loss.view(1)}
    return out


def mixture(case: Case) -> dict[str, Tensor]:
    case.raw.setdefault(
        "tolerances", {f"{name}_bias_coefficient": 1e-5 for name in ("dae", "rcae")}
    )  # central differences, says tolerance_note
    density, x = _mixture(case), case.files["x"]
    dae, rcae = densities.bias_coefficients(density, x)
    out = {
        "sigmas": torch.tensor(_sigmas(case), dtype=torch.float64),
        "logp": density.log_prob(x),
        "score": density.score(x),
        "hessian": density.hessian(x),
    }
    out |= {"dae_bias_coefficient": dae, "rcae_bias_coefficient": rcae}
    for i, sigma in enumerate(_sigmas(case)):
        r, jacobian = densities.reconstruction(density, x, sigma), densities.reconstruction_jacobian(density, x, sigma)
        out |= {f"r_{i}": r, f"jacobian_{i}": jacobian, f"score_estimate_{i}": (r - x) / sigma**2}
        out[f"hessian_estimate_{i}"] = (jacobian - torch.eye(density.dim).double()) / sigma**2
    return out


def empirical_dae(case: Case) -> dict[str, Tensor]:
    data, x, sigma = case.files["data"], case.files["x"], float(case.config["sigma"])
    return {"r": optima.posterior_mean(x, data, sigma), "jacobian": optima.posterior_jacobian(x, data, sigma)}


def energy_differences(case: Case) -> dict[str, Tensor]:
    density, x, x_star, sigma = _mixture(case), case.files["x"], case.files["x_star"], float(case.config["sigma"])
    scores = {"": density.score, "dae_": _optimal_score(density, sigma)}
    smooth = {"": density, "dae_": density.smoothed(sigma)}
    rules: dict[str, Rule] = {"mean": "paper", "trapezoid": "trapezoid", "midpoint": "midpoint"}
    out = {}
    for key in case.expected:
        prefix, name, points = re.fullmatch(r"(dae_)?(exact|first_order|mean|trapezoid|midpoint)(?:_(\d+))?", key).groups(default="")
        if name == "exact":
            out[key] = smooth[prefix].log_prob(x) - smooth[prefix].log_prob(x_star)
        else:
            out[key] = energy_difference(scores[prefix], x, x_star, rule=rules.get(name, "first_order"), points=int(points or 1))
    return out


def losses(case: Case) -> dict[str, Tensor]:
    case.raw.setdefault(
        "tolerances", {key: 1e-6 for key in case.expected if key.startswith("rcae_grad_")}
    )  # central differences, says tolerance_note
    sigma = float(case.config["sigma"])
    model = AutoEncoder(case.config["d"], [case.config["hidden"]], sigma=sigma).double()
    names = {"W": "layers.0.weight", "b": "layers.0.bias", "V": "layers.1.weight", "c": "layers.1.bias"}
    model.load_state_dict({ours: case.files[theirs] for theirs, ours in names.items()})
    x, noise, probes = (case.files[name] for name in ("x", "noise", "probes"))
    rcae = model(x, criterion="rcae", penalty="closed_form", scaled=False)
    rcae.loss.backward()
    exact = jacobian_penalty(model, x, "exact")
    torch.testing.assert_close(rcae.penalty, exact, rtol=1e-12, atol=0)
    out = {
        "reconstruction": rcae.reconstruction,
        "frobenius": exact,
        "encoder_frobenius": encoder_penalty(model, x),
        "rcae": rcae.loss,
        "dae": model(x, noise=noise, scaled=False).loss,
        "hutchinson": jacobian_penalty(model, x, "hutchinson", probes),
        "second_order": second_order_term(model.reconstruct, x),
    }
    gradients = {f"rcae_grad_{theirs}": model.get_parameter(ours).grad for theirs, ours in names.items()}
    return {key: value.detach().view(1) for key, value in out.items()} | gradients


def local_moments(case: Case) -> dict[str, Tensor]:
    f = case.files
    line = Mixture(f["w"], f["mu"][:, None], f["s"].square()[:, None, None])
    plane = Mixture(f["weights2"], f["means2"], f["covs2"])
    x, x2 = f["x"][:, None], f["x2"]
    deltas = [float(d) for d in case.config["deltas"]]
    out = {"deltas": torch.tensor(deltas, dtype=torch.float64), "score": line.score(x)[:, 0], "score2": plane.score(x2)}
    for i, delta in enumerate(deltas):
        one, two = densities.local_moments(line.log_prob, x, delta), densities.local_moments(plane.log_prob, x2, delta)
        out |= {f"mean1_{i}": one.mean[:, 0], f"var1_{i}": one.cov[:, 0, 0], f"mean2_{i}": two.mean, f"cov2_{i}": two.cov}
    return out


def manifold_mixture(case: Case) -> dict[str, Tensor]:
    density = densities.manifold_mixture(case.files["freq"], case.files["exponent"], case.config["components"], case.config["ratio"])
    x = case.files["x"]
    return {"means": density.means, "covs": density.covs, "logp": density.log_prob(x), "score": density.score(x)}


def one_d(case: Case) -> dict[str, Tensor]:
    x, log_p = case.files["x"], case.files["p"].log()
    out = {}
    for i, sigma in enumerate(_sigmas(case)):
        out |= {f"rcae_{i}": optima.rcae_on_grid(x, log_p, sigma), f"dae_{i}": optima.dae_on_grid(x, log_p, sigma)}
    return (
        out
        | {key: case.files[key] for key in case.expected if key in ("x", "p")}
        | {"sigmas": torch.tensor(_sigmas(case), dtype=torch.float64)}
    )


def mh_chain(case: Case) -> dict[str, Tensor]:
    density, c = _mixture(case), case.config
    dae = _optimal_score(density, float(c["sigma_train"]))
    rule: Rule = {"mean": "paper"}.get(c.get("rule", "mean"), c.get("rule"))
    runs = {
        "exact_score": (density.score, rule, 1.0),
        "dae": (dae, rule, 1.0),
        "first_order": (dae, "first_order", 1.0),
        "tempered": (dae, rule, float(c["temperature"])),
    }
    out = {}
    for name, (score, how, temperature) in runs.items():
        chains = metropolis_hastings(
            score, case.files["x0"], steps=c["steps"], proposal_std=c["proposal_std"], rule=how, points=c["path_points"],
            temperature=temperature, normals=case.files["normals"], uniforms=case.files["uniforms"],
        )  # fmt: skip
        out |= {f"{name}_states": chains.samples, f"{name}_accepted": chains.accepted.to(torch.uint8), f"{name}_dE": chains.differences}
    return out


RUNNERS: Mapping[str, Callable[[Case], dict[str, Tensor]]] = {
    "gaussian": gaussian,
    "mixture": mixture,
    "empirical_dae": empirical_dae,
    "energy_difference": energy_differences,
    "losses": losses,
    "local_moments": local_moments,
    "manifold_mixture": manifold_mixture,
    "one_d": one_d,
    "mh_chain": mh_chain,
}


@pytest.mark.parametrize("case", cases("regularized_ae"), ids=str)
def test_case(case: Case) -> None:
    check(case, RUNNERS)
