"""Whole runs at a tiny size: full batch, mini-batches, two processes, kill and resume, records, robustness."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common import results
from common.checkpoint import load_model
from common.engine import NonFiniteLoss, Training
from common.probes import kmeans
from common.results import read_records
from projects.scgc import cluster, evaluate, pretrain, robustness
from projects.scgc.cluster import Pretraining, Recipe
from projects.scgc.data import Blocks, Links
from projects.scgc.metrics import scores
from projects.scgc.model import SCGC
from projects.scgc.pretrain import Network, Plan, shares
from tests.processes import Pair

TINY = Recipe(
    name="tiny",
    data="blocks",
    blocks=Blocks(nodes=101, classes=3, words=90),
    graph=Links(edges=250),
    network=Network(encoder=[16, 12, 24], embedding=6, decoder=[24, 12, 16]),
    pretrain=Pretraining(training=Training(epochs=3), batch_size=32),
    alpha=1.0,
    order=2,
    lr=3e-3,
    restarts=3,
    training=Training(epochs=6, log_every=1, checkpoint_every=2),
    seeds=[0, 1],
)


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Records and pictures of runs made here go to a folder of their own."""
    monkeypatch.setattr(results, "PROJECTS", tmp_path / "projects")
    monkeypatch.setattr(results, "demo_folder", lambda paper: tmp_path / "demo" / paper)
    return tmp_path / "projects" / "scgc" / "results"


def state(run: cluster.Clustering) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def close(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float = 1e-4, atol: float = 2e-6) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("variant", ["scgc", "scgc_star"])
def test_a_batch_of_all_nodes_is_the_full_batch(variant: Any, tmp_path: Path) -> None:
    base = replace(TINY, variant=variant, out=str(tmp_path))
    full = cluster.main(replace(base, name="full"))
    for size in (101, 5000):
        batch = cluster.main(replace(base, name=f"batch-{size}", batch_size=size))
        assert (batch.assignments == full.assignments).all()
        close(state(batch), state(full), rtol=0, atol=0)
    kept = set(full.model.state_dict())
    assert any(name.startswith("ae.dec") or name.startswith("ae.x_bar") for name in kept) == (variant == "scgc")


def test_one_batch_in_another_order_is_the_full_batch() -> None:
    """The mini-batch path itself, permuted, against the full path: loss, terms and gradients."""
    data = cluster.read(TINY)
    x = cluster.Features(data.x)
    structure = cluster.Structure.of(cluster.weights(cluster.transition(data.edges, 101), 2, False))
    torch.manual_seed(0)
    model = cluster.build(TINY, data)
    found = []
    for nodes in (None, torch.randperm(101, generator=torch.Generator().manual_seed(1))):
        loss = cluster.losses(TINY, x, structure, _Nowhere())  # type: ignore[arg-type]
        terms = loss(model, pretrain.Step(0, True, nodes))
        model.zero_grad()
        terms["loss"].backward()
        found.append((terms, {name: p.grad.clone() for name, p in model.named_parameters()}))
    (full, full_grad), (batch, batch_grad) = found
    for name in ("loss", "contrast", "cluster", "reconstruction"):
        torch.testing.assert_close(batch[name], full[name], rtol=1e-5, atol=1e-7)
    close(batch_grad, full_grad, rtol=1e-3, atol=1e-6)


class _Nowhere:
    """A diary that keeps nothing."""

    def write(self, *_: Any) -> None:
        pass


def test_mini_batches_cover_every_node_and_refresh_the_target_once_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(10, 4, Training(epochs=2), seed=3)
    assert (len(plan), plan.per_epoch, plan.epochs) == (6, 3, 2)
    assert [step.first for step in plan] == [True, False, False] * 2
    for epoch in range(2):
        nodes = torch.cat([step.nodes for step in list(plan)[3 * epoch : 3 * epoch + 3]])
        assert sorted(nodes.tolist()) == list(range(10))
    assert plan[0].nodes.tolist() != plan[3].nodes.tolist()
    with pytest.raises(ValueError, match="accumulation=2: expected 1"):
        Plan(10, 4, Training(epochs=2, accumulation=2), seed=0)

    seen = []
    write = cluster.Diary.write
    monkeypatch.setattr(cluster.Diary, "write", lambda self, epoch, *rest: (seen.append(epoch), write(self, epoch, *rest)))
    run = cluster.main(replace(TINY, name="mini", batch_size=40, out=str(tmp_path)))
    assert seen == list(range(6))
    frequencies = np.load(tmp_path / "mini/seed-0/frequencies.npy")
    np.testing.assert_allclose(frequencies.sum(1), 101, rtol=1e-5)
    assert run.assignments.shape == (6, 101)


class Killed(RuntimeError):
    pass


@pytest.mark.parametrize("batch_size", [None, 40])
def test_killed_runs_go_on_as_if_never_stopped(batch_size: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(TINY, batch_size=batch_size, out=str(tmp_path / "a"), training=Training(epochs=4, log_every=1, checkpoint_every=2))
    whole = cluster.main(recipe)
    cut = replace(recipe, out=str(tmp_path / "b"))
    objective, calls = cluster.objective, []

    def dies(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # inside an epoch of mini-batches; the state is that of step 2
            raise Killed
        return objective(*arguments, **named)

    monkeypatch.setattr(cluster, "objective", dies)
    with pytest.raises(Killed):
        cluster.main(cut)
    monkeypatch.setattr(cluster, "objective", objective)
    again = cluster.main(cut)
    assert (again.assignments == whole.assignments).all()
    close(state(again), state(whole), rtol=0, atol=0)
    monkeypatch.setattr(cluster, "follow", lambda *_, **__: pytest.fail("a finished run trains again"))
    close(state(cluster.main(cut)), state(whole), rtol=0, atol=0)
    with pytest.raises(ValueError, match="begun with another recipe: tau"):
        cluster.main(replace(cut, tau=0.5))
    cluster.main(replace(cut, settled_below=0.5, compare=["kmeans-x"]))  # only evaluate reads these


def _run(rank: int, recipe: Recipe) -> tuple[dict[str, Tensor], np.ndarray | None]:
    warnings.simplefilter("ignore")
    run = cluster.main(recipe)
    return state(run), run.assignments if rank == 0 else None


@pytest.mark.parametrize(("variant", "batch_size"), [("scgc", None), ("scgc_star", None), ("scgc", 33)])
def test_two_processes_are_one(variant: Any, batch_size: int | None, tmp_path: Path, two_processes: Pair) -> None:
    """101 nodes on two processes (51 and 50), batches of 33 (17 and 16): pre-training and clustering end with the weights of one process."""
    recipe = replace(TINY, variant=variant, batch_size=batch_size, out=str(tmp_path / "one"), training=Training(epochs=3, log_every=1))
    one = cluster.main(recipe)
    (first, assignments), (second, _) = two_processes(_run, replace(recipe, out=str(tmp_path / "two")))
    close(first, second, rtol=0, atol=0)
    for name, want in state(one).items():  # by norm: Adam makes a step of full size from a gradient that is nothing but rounding
        assert (first[name] - want).norm() <= 2e-4 * want.norm(), name
    assert (assignments == one.assignments).mean() > 0.99
    lines = [json.loads(line) for line in (tmp_path / "two/tiny/seed-0/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == len(Plan(101, batch_size, recipe.training, 0))


def test_shares_are_even_and_never_empty() -> None:
    assert shares(101, 4) == [26, 25, 25, 25]
    smallest = [Plan(101, size, TINY.training, 0).smallest for size in (None, 50, 101, 33)]
    assert smallest == [101, 1, 101, 2]
    with pytest.raises(ValueError, match="batch of 1 nodes: expected at least one for each of 2 processes"):
        shares(1, 2)


def test_a_row_in_one_command(tmp_path: Path, records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = replace(TINY, compare=["kmeans-x", "kmeans-ae", "kmeans-unit", "no-structure", "shuffled"], out=str(tmp_path / "runs"))
    found = evaluate.main(recipe)
    assert set(found) == {"tiny", "kmeans-x", "kmeans-ae", "kmeans-unit", "no-structure", "shuffled"}
    assert "ACC at epochs [5, 5]" in capsys.readouterr().out  # the last ones
    for score in found["tiny"].values():
        assert all(score["best"][name] >= score["last"][name] for name in ("ACC", "NMI", "ARI", "F1"))
        assert score["last_epoch"] == 5
        assert len(score["curve"]["ACC"]) == 6
        assert score["best"]["ACC"] == pytest.approx(max(score["curve"]["ACC"]), abs=0.01)
    for seed in (0, 1):  # epoch 0 is K-means on the auto-encoder
        assert found["tiny"][seed]["start"]["ACC"] == pytest.approx(found["kmeans-ae"][seed]["only"]["ACC"])
    kept = read_records(records)
    assert len(kept) == 3 * 4 * 3 + 3 * 4  # three rows of training by three rules, three of K-means
    best = next(r for r in kept if r["metric"] == "ACC (%), best epoch" and r["extra"]["row"] == "tiny")
    assert best["values"] == [found["tiny"][seed]["best"]["ACC"] for seed in (0, 1)]
    assert "labels choose the epoch" in best["extra"]["rule"]
    assert len(best["extra"]["epochs"]) == 2
    assert (records / "tiny_embedding.png").is_file()
    count = len(list((tmp_path / "runs").rglob("model.safetensors")))
    evaluate.main(recipe)
    assert len(list((tmp_path / "runs").rglob("model.safetensors"))) == count
    loaded = load_model(SCGC, tmp_path / "runs/tiny/seed-0")
    x = cluster.Features(cluster.read(TINY).x)
    assert loaded.predict(x).shape == (101,)
    code = torch.nn.functional.normalize(loaded.ae.encode(x).detach(), dim=1)
    again = kmeans(code, 3, restarts=TINY.restarts, seed=0).labels.numpy()
    assert found["kmeans-unit"][0]["only"]["ACC"] == pytest.approx(100 * scores(cluster.read(TINY).y, again)["ACC"])


def test_figures_of_the_demo_stay_out_of_results(tmp_path: Path, records: Path) -> None:
    evaluate.main(replace(TINY, name="demo_tiny", seeds=[0], out=str(tmp_path / "runs")))
    assert not read_records(records)
    assert len(read_records(tmp_path / "demo/scgc", "demo_tiny")) == 3 * 4
    assert (tmp_path / "demo/scgc/demo_tiny_embedding.png").is_file()


def test_one_auto_encoder_for_all_repetitions_where_the_recipe_says_so() -> None:
    shared = replace(TINY, pretrain=replace(TINY.pretrain, seed=7))
    assert {replace(shared, seed=seed).autoencoder.folder for seed in range(3)} == {Path("runs/scgc/autoencoder_blocks_16_12_24/seed-7")}
    assert len({replace(TINY, seed=seed).autoencoder.folder for seed in range(3)}) == 3


def test_robustness_turns_one_knob(tmp_path: Path, records: Path) -> None:
    base = replace(TINY, out=str(tmp_path / "runs"), seeds=[0], training=Training(epochs=2))
    found = robustness.main(robustness.Recipe(name="wrong", knob="wrong_edges", points=[0.0, 1.0], base=base))
    assert {method: list(by_value) for method, by_value in found.items()} == {
        method: [0.0, 1.0] for method in ("scgc_star", "scgc", "smoothed")
    }
    kept = read_records(records)
    by_row = {record["extra"]["row"]: record for record in kept}
    assert by_row["scgc_star 1"]["extra"]["homophily"][0] == pytest.approx(by_row["scgc_star 0"]["extra"]["homophily"][0] / 2, abs=0.01)
    assert (records / "wrong.png").is_file()
    order = robustness.Recipe(name="order", knob="order", points=[3.0], base=base)
    assert robustness.turned(order, "scgc", 3.0, 1).order == 3
    assert robustness.turned(order, "scgc", 3.0, 1).alpha == TINY.alpha / 2
    assert robustness.turned(replace(order, knob="homophily", points=[0.5]), "scgc_star", 0.5, 1).graph.inside == 0.5
    with pytest.raises(ValueError, match=r"expected base\.data=blocks"):
        robustness.Recipe(knob="homophily", base=replace(base, data="acm"))
    with pytest.raises(ValueError, match="whole numbers of hops"):
        robustness.Recipe(knob="order", points=[1.5])


def test_a_loss_that_is_not_finite_and_dead_embeddings_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(TINY, out=str(tmp_path))
    objective = cluster.objective

    def broken(*arguments: Any, **named: Any) -> Any:
        out = objective(*arguments, **named)
        return replace(out, loss=out.loss * float("nan"))

    monkeypatch.setattr(cluster, "objective", broken)
    with pytest.raises(NonFiniteLoss, match="step 0: term 'loss' is nan"):
        cluster.main(recipe)
    monkeypatch.setattr(cluster, "objective", objective)

    def dead(model: SCGC, *_: Any) -> None:
        with torch.no_grad():
            model.ae.z_layer.weight.zero_()
            model.ae.z_layer.bias.zero_()

    monkeypatch.setattr(cluster, "place_centres", dead)
    with pytest.raises(ValueError, match="epoch 0: 101 embeddings are exactly zero"):
        cluster.main(replace(recipe, name="dead"))
