"""Whole runs at a tiny size: training, resuming, recording, two processes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from common import results
from common.engine import Training
from common.recipe import read
from common.results import read_records
from projects.regularized_ae import evaluate, lbfgs, pretrain
from projects.regularized_ae.data import Source, load
from projects.regularized_ae.pretrain import Network, Recipe, Sampling
from tests.processes import Pair

SPIRAL = Recipe(
    name="tiny",
    experiment="spiral",
    optimizer="lbfgs",
    sigmas=[0.2, 0.1, 0.05],
    iterations=[5, 5, 5],
    data=Source(name="spiral", count=60, copies=2, test=40),
    network=Network(hidden=[20], residual=False, init="normal"),
)
ADAM = Recipe(
    name="tiny_adam",
    experiment="score",
    sigmas=[0.5, 0.2],
    batch=32,
    data=Source(name="three_gaussians", count=256, test=200),
    network=Network(hidden=[8, 8]),
    training=Training(steps=12, log_every=4, checkpoint_every=4),
)


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Records and pictures of runs made here go to a folder of their own."""
    monkeypatch.setattr(results, "PROJECTS", tmp_path / "projects")
    monkeypatch.setattr(results, "demo_folder", lambda paper: tmp_path / "demo" / paper)
    return tmp_path


def same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


class Killed(RuntimeError):
    pass


def test_lbfgs_killed_between_and_inside_levels_goes_on_as_if_never_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pretrain.main(replace(SPIRAL, out=str(tmp_path / "a")))[0.05]
    lines = [json.loads(line) for line in (tmp_path / "a/tiny/seed-0/metrics.jsonl").read_text().splitlines()]
    assert [line["sigma"] for line in lines if "level" in line] == [0.2, 0.1, 0.05]
    assert all({"step", "loss"} <= line.keys() for line in lines)

    cut = replace(SPIRAL, out=str(tmp_path / "b"))
    folder = tmp_path / "b/tiny/seed-0"
    minimise, calls = lbfgs._minimise, []

    def killed(*arguments: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 2:  # the second level has changed the weights, but is not written
            minimise(*arguments)
            raise Killed
        return minimise(*arguments)

    monkeypatch.setattr(lbfgs, "_minimise", killed)
    with pytest.raises(Killed):
        pretrain.main(cut)
    assert sorted(path.name for path in (folder / "levels").iterdir()) == ["0.safetensors"]
    monkeypatch.setattr(lbfgs, "_minimise", minimise)
    same(pretrain.main(cut)[0.05], whole)

    monkeypatch.setattr(lbfgs, "_minimise", lambda *_: pytest.fail("a finished run trains again"))
    same(pretrain.main(cut)[0.05], whole)
    kept = load_file(folder / "levels/2.safetensors")
    torch.testing.assert_close(load_file(folder / "model.safetensors"), kept, rtol=0, atol=0)
    with pytest.raises(ValueError, match="begun with another recipe: memory"):
        pretrain.main(replace(cut, memory=7))


def test_a_kill_between_weights_and_log_repeats_the_level(tmp_path: Path) -> None:
    whole = pretrain.main(replace(SPIRAL, out=str(tmp_path / "a")))[0.05]
    log = tmp_path / "a/tiny/seed-0/metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(line for line in lines if json.loads(line)["sigma"] > 0.05))
    same(pretrain.main(replace(SPIRAL, out=str(tmp_path / "a")))[0.05], whole)


def test_levels_that_do_not_fit_and_losses_that_explode(tmp_path: Path) -> None:
    model = pretrain.build(SPIRAL, 2, 0.05).double()
    data = load(SPIRAL.data).train
    for sigmas, iterations in (([0.1, 0.2], [1, 1]), ([0.1, 0.05], [1]), ([0.1], [1])):
        with pytest.raises(ValueError, match="levels"):
            lbfgs.fit(model, data, tmp_path, sigmas=sigmas, iterations=iterations, recipe=SPIRAL)
    with torch.no_grad():
        model.layers[1].weight.fill_(1e200)
    with pytest.raises(RuntimeError, match=r"level 0 \(sigma 0.05\): the loss became .*start at a larger sigma"):
        lbfgs.fit(model, data, tmp_path, sigmas=[0.05], iterations=[2], recipe=SPIRAL)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_noise_of_a_level() -> None:
    noise = lbfgs.draw_noise(torch.Size((20_000, 2)), 0.1, 3, outliers=0.05)
    wide = (noise.abs() > 0.45).any(1)
    assert float(noise.std()) == pytest.approx(0.1 * (0.95 + 0.05 * 100) ** 0.5, rel=0.06)
    assert 0.03 < float(wide.double().mean()) < 0.05
    assert torch.equal(noise, lbfgs.draw_noise(torch.Size((20_000, 2)), 0.1, 3, outliers=0.05))
    assert float(lbfgs.draw_noise(torch.Size((20_000, 2)), 0.1, 3).std()) == pytest.approx(0.1, rel=0.02)


def test_restarts_keep_the_best_on_held_out_data(tmp_path: Path) -> None:
    recipe = replace(SPIRAL, restarts=2, out=str(tmp_path))
    best = pretrain.main(recipe)[0.05]
    data = load(recipe.data)
    losses = []
    for restart in range(2):
        model = pretrain.build(recipe, 2, 0.05).double()
        model.load_state_dict(load_file(tmp_path / f"tiny/seed-0/restart-{restart}/levels/2.safetensors"))
        losses.append(pretrain.validation_loss(model, data.test))
    assert pretrain.validation_loss(best, data.test) == min(losses) < max(losses)


def test_adam_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from projects.regularized_ae.model import AutoEncoder

    recipe = replace(ADAM, sigmas=[0.2], criterion="rcae", penalty="hutchinson")
    whole = pretrain.main(replace(recipe, out=str(tmp_path / "a")))[0.2]
    forward, calls = AutoEncoder.forward, []

    def killed(self: AutoEncoder, *arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 7:
            raise Killed
        return forward(self, *arguments, **named)

    monkeypatch.setattr(AutoEncoder, "forward", killed)
    with pytest.raises(Killed):
        pretrain.main(replace(recipe, out=str(tmp_path / "b")))
    monkeypatch.setattr(AutoEncoder, "forward", forward)
    same(pretrain.main(replace(recipe, out=str(tmp_path / "b")))[0.2], whole)


def _sharded(rank: int, folder: str) -> dict[str, torch.Tensor]:
    # state_dict by value: the answer travels between processes
    model = pretrain.main(replace(SPIRAL, out=folder))[0.05]
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.timeout(240)
def test_two_processes_take_the_steps_of_one(tmp_path: Path, two_processes: Pair) -> None:
    one = pretrain.main(replace(SPIRAL, out=str(tmp_path / "one")))[0.05].state_dict()
    first, second = two_processes(_sharded, str(tmp_path / "two"))
    for name, value in one.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-6, atol=1e-8)  # sums in another order, through 15 iterations


# experiments


def test_demo_pins_what_it_runs() -> None:
    demo = read(Recipe, evaluate.RECIPES / "demo.yaml")
    parts = [read(Recipe, evaluate.RECIPES / part) for part in demo.parts]
    assert [part.experiment for part in parts] == ["optimum", "spiral", "spiral", "sampling"]
    assert parts[1].seeds == parts[2].seeds == [0, 1]
    assert (parts[3].data.dim, parts[3].sampling.chains) == (10, 200)


def test_tiny_demo_runs_records_and_draws(records: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny = {
        "exact_optimum.yaml": lambda r: replace(r, sigmas=[0.05, 0.02]),
        "demo_spiral_single.yaml": lambda r: replace(r, iterations=[4], data=SPIRAL.data, network=replace(r.network, hidden=[12])),
        "demo_spiral_decreasing.yaml": lambda r: replace(r, iterations=[3] * 4, data=SPIRAL.data, network=replace(r.network, hidden=[12])),
        "demo_sampling.yaml": lambda r: replace(
            r,
            iterations=[3, 3, 3],
            data=replace(r.data, count=100, test=100),
            network=Network(hidden=[8], residual=False),
            sampling=Sampling(chains=20, steps=12, burn_in=4, proposal_stds=[0.1]),
        ),
    }
    monkeypatch.setattr(evaluate, "read", lambda kind, path: tiny[path.name](read(kind, path)))
    found = evaluate.main(replace(read(Recipe, evaluate.RECIPES / "demo.yaml"), out=str(tmp_path / "runs")))
    assert found["exact_optimum"]["order, DAE optimum, last pair"][0] == pytest.approx(1.65, abs=0.1)
    assert len(found["demo_spiral_single"]["share of starts that end off the data"]) == 2
    assert found["demo_sampling"]["energy distance to p_sigma, random walk"][0] > 0
    saved = read_records(records / "demo/regularized_ae")
    assert len(saved) == sum(map(len, found.values()))
    assert {(record["recipe"], len(record["data"]["sha256"])) for record in saved} == {("recipes/demo.yaml", 64)}
    pictures = {path.name for path in (records / "demo/regularized_ae").glob("*.png")}
    assert pictures == {"one_dimensional.png", "demo_spiral_single.png", "demo_spiral_decreasing.png", "demo_sampling_samples.png"}


def test_trained_score_experiment(records: Path, tmp_path: Path) -> None:
    recipe = replace(ADAM, out=str(tmp_path / "runs"), training=Training(steps=200, log_every=100, checkpoint_every=0))
    figures = evaluate.main(recipe)["tiny_adam"]
    assert figures["score error, sigma 0.5"][0] < 1.0 < 3.0
    assert (
        figures["score error against p_sigma, sigma 0.5"][0] < figures["score error, sigma 0.5"][0]
    )  # the bias is not called error of training
    saved = read_records(records / "projects/regularized_ae/results")
    further = next(record["extra"]["further"] for record in saved if "further" in record["extra"])
    assert further["score error of the exact optimum, sigma 0.5"][0] == pytest.approx(0.76, abs=0.05)
    assert {"tiny_adam_error.png", "tiny_adam_energy.png"} == {
        path.name for path in (records / "projects/regularized_ae/results").glob("*.png")
    }


@pytest.mark.filterwarnings("ignore:acceptance")
def test_digits_experiment(records: Path, tmp_path: Path) -> None:
    recipe = replace(
        read(Recipe, evaluate.RECIPES / "digits.yaml"),
        out=str(tmp_path / "runs"),
        batch=128,
        network=Network(hidden=[128], activation="silu"),
        lr=1e-2,
        training=Training(steps=300, log_every=50, checkpoint_every=0),
        sampling=Sampling(chains=20, steps=20, burn_in=5, proposal_stds=[0.05], points=5),
    )
    figures = evaluate.main(recipe)["digits"]
    assert figures["the same, identity"][0] == pytest.approx(64, rel=0.02)
    assert figures["the same, Parzen optimum of the training set"][0] == pytest.approx(28.5, rel=0.03)
    assert figures["DAE loss / sigma^2, held-out digits"][0] < 40
    assert figures["share with higher energy, pixels shuffled"][0] > 0.95
    assert (records / "projects/regularized_ae/results/digits.png").is_file()


def test_user_data_needs_no_density(records: Path, tmp_path: Path) -> None:
    import numpy as np

    angle = np.random.default_rng(0).uniform(0, 6.3, 400)
    np.save(tmp_path / "ring.npy", np.c_[np.cos(angle), np.sin(angle)])
    recipe = Recipe(
        name="mine",
        sigmas=[0.2],
        data=Source(name="file", path=str(tmp_path / "ring.npy")),
        network=Network(hidden=[64], residual=False),
        lr=1e-2,
        training=Training(steps=300, log_every=100, checkpoint_every=0),
        sampling=Sampling(chains=30, steps=60, burn_in=20, proposal_stds=[0.3]),
        out=str(tmp_path / "runs"),
    )
    figures = evaluate.main(recipe)["mine"]
    assert not any("p_sigma" in name for name in figures)
    assert figures["energy distance to held-out data, DAE, step 0.3"][0] < 0.3 * figures["energy distance to held-out data, random walk"][0]
    assert figures["DAE loss / sigma^2, fresh noise"][0] < 1.9  # the identity gives 2
    with pytest.raises(ValueError, match=r"known density, found ring\.npy"):
        evaluate.main(replace(recipe, experiment="score"))
    for experiment in ("spiral", "digits"):
        with pytest.raises(ValueError, match=f"experiment={experiment}: expected data.name"):
            evaluate.main(replace(recipe, experiment=experiment))  # type: ignore[arg-type]


def test_failure_modes_are_shown_by_the_exact_field() -> None:
    """Displacement is smallest between two arms, a minimum of the density, and on the curve: it is no energy."""
    found = evaluate.exact_trough(12.0)
    between, beside, on = (
        found[f"exact optimum, sigma 0.05: |r - x| {where}"] for where in ("between two arms", "0.03 beside it", "on the curve")
    )
    assert between < on < 0.05 < beside
