"""From recipe to record on embedded data: learning, exact resume, evaluation, several processes, checkpoints; and real data where it is at hand."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from common import results
from common.checkpoint import load_model
from common.engine import Training
from common.recipe import read
from common.results import read_records
from projects.graphmae import data, evaluate, finetune, molecules, pretrain, pretrain_molecules
from projects.graphmae.model import GraphMAE
from projects.graphmae.molecule import Classifier, MoleculeGraphMAE
from projects.graphmae.weights import load_reference

RECIPES = Path(pretrain.__file__).parent / "recipes"


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder where this test's records and pictures go."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "PROJECTS", tmp_path / "projects")
    return tmp_path / "report" / "demo" / "graphmae"


def tiny(out: Path, **changes: Any) -> pretrain.Recipe:
    base = read(pretrain.Recipe, RECIPES / "demo.yaml", out=str(out), seeds=[0], compare=[])
    model = replace(base.model, hidden=16, heads=2)
    return replace(
        base,
        **(
            {"model": model, "training": Training(epochs=4, checkpoint_every=1, log_every=1), "probe": replace(base.probe, epochs=5)}
            | changes
        ),
    )


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_demo_recipe_is_the_full_method() -> None:
    recipe = read(pretrain.Recipe, RECIPES / "demo.yaml")
    assert (recipe.data, recipe.model.encoder, recipe.model.decoder, recipe.model.loss) == ("topic-graph", "gat", "gat", "sce")
    assert recipe.model.mask
    assert recipe.model.remask
    assert (recipe.model.mask_rate, recipe.model.replace_rate, recipe.model.gamma, len(recipe.seeds)) == (0.5, 0.05, 3, 3)


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = data.topic_graph(0, nodes=300, words=80, topics=3)
    whole = pretrain.main(tiny(tmp_path / "a"), task)
    forward, calls = GraphMAE.forward, []

    def failing(self: GraphMAE, *args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GraphMAE, "forward", failing)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main(tiny(tmp_path / "b"), task)
    again = pretrain.main(tiny(tmp_path / "b"), task)
    assert len(calls) == 3 + 2  # two steps were kept
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    kept = load_model(GraphMAE, pretrain.run_folder(tiny(tmp_path / "b")))
    assert torch.equal(kept.enc_mask_token, whole.enc_mask_token)


def test_the_token_decays_and_the_rate_changes_once_an_epoch(tmp_path: Path) -> None:
    graphs = data.shapes(graphs=12)
    recipe = replace(
        read(pretrain.Recipe, RECIPES / "shapes.yaml", out=str(tmp_path)), batch_size=4, training=Training(epochs=4, log_every=1)
    )
    pretrain.main(recipe, graphs)
    rates = [json.loads(line)["lr"] for line in (pretrain.run_folder(recipe) / "metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([1e-3 * (1 + cos) / 2 for cos in (1, 2**-0.5, 0, -(2**-0.5)) for _ in range(3)])
    group = pretrain.adam(GraphMAE(3, hidden=4, heads=1), 1e-3, 2e-4).param_groups[0]
    assert (len(group["params"]), group["weight_decay"], group["decoupled_weight_decay"]) == (
        len(list(GraphMAE(3, hidden=4, heads=1).parameters())),
        2e-4,
        False,
    )


def test_node_row_trains_evaluates_compares_and_records(tmp_path: Path, records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = data.topic_graph
    monkeypatch.setattr(data, "topic_graph", lambda seed: make(seed, nodes=400, words=80, topics=3))
    recipe = tiny(
        tmp_path / "runs",
        seeds=[0, 1],
        compare=["raw", "untrained", "no-mask", "no-remask", "mlp-decoder", "mse"],
        training=Training(epochs=12, log_every=1),
    )
    evaluate.main(recipe)
    found = read_records(records)
    assert {r["extra"].get("row") for r in found} == {"full", *recipe.compare}
    assert all(len(r["values"]) == 2 and r["metric"] == "accuracy (%)" for r in found)
    assert (records / "embedding.png").stat().st_size > 10_000
    curve = losses(pretrain.run_folder(recipe, 0))
    assert sum(curve[-3:]) < sum(curve[:3]) * 0.9
    evaluate.main(replace(recipe, compare=[]))
    assert read_records(records)[-1]["values"] == found[0]["values"]  # nothing is trained again


def test_graph_row_uses_ten_folds_and_refuses_small_classes(tmp_path: Path, records: Path) -> None:
    recipe = replace(read(pretrain.Recipe, RECIPES / "shapes.yaml", out=str(tmp_path / "runs")), seeds=[0], training=Training(epochs=2))
    record = json.loads(evaluate.main(recipe).read_text())
    assert record["data"]["split"] == "10 stratified folds"
    assert record["values"][0] > 60  # the readout of even a hardly trained encoder tells rings, trees and cliques apart
    evaluate.main(replace(recipe, compare=["readout-mean", "readout-sum"]))
    mean, total = read_records(records)[-2:]
    assert (mean["metric"], total["metric"]) == ("accuracy, mean readout (%)", "accuracy, sum readout (%)")
    assert total["values"] == record["values"] != mean["values"]  # the same weights, read out as the row has it and otherwise
    with pytest.raises(ValueError, match=r"at least 10 samples each"):
        evaluate.probe_graphs(lambda batch: batch.x, data.shapes(graphs=15), recipe)


def test_a_readout_beside_a_node_row_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"compare: \['readout-sum'\] are for graph tasks, topic-graph is a node task"):
        evaluate.main(tiny(tmp_path, compare=["readout-sum"]))
    assert not list(tmp_path.iterdir())


def test_another_recipe_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    task = data.topic_graph(0, nodes=300, words=80, topics=3)
    pretrain.main(tiny(tmp_path), task)
    with pytest.raises(ValueError, match=r"begun with another recipe: .*lr"):
        pretrain.main(tiny(tmp_path, lr=0.5), task)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pool: sum", "pool"),
        ("model: {gama: 2}", "gama"),
        ("data: cora2", "cora2"),
        ("model: {gamma: 0.5}", "gamma"),
        ("model: {hidden: 10}", "multiple"),
        ("lr: fast", "lr"),
    ],
)
def test_recipes_with_a_typo_or_a_wrong_value_name_it(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text + "\n")
    with pytest.raises(ValueError, match=message):
        read(pretrain.Recipe, tmp_path / "r.yaml")


def test_labels_of_the_other_mode_are_refused(tmp_path: Path) -> None:
    task = data.topic_graph(0, nodes=300, words=80, topics=3)
    with pytest.raises(ValueError, match=r"multi_label|multi-label"):
        evaluate.probe_nodes(evaluate.raw, replace(task, multi_label=True), tiny(tmp_path))


def test_neighbour_sampling_trains(tmp_path: Path) -> None:
    task = data.topic_graph(0, nodes=300, words=80, topics=3)
    recipe = tiny(tmp_path, neighbours=[3], batch_size=100, training=Training(epochs=2, log_every=1))
    pretrain.main(recipe, task)
    assert len(losses(pretrain.run_folder(recipe))) == 6


# -- molecules


def test_molecules_pre_train_then_fine_tune_and_record(tmp_path: Path, records: Path) -> None:
    out = str(tmp_path / "runs")
    before = read(pretrain_molecules.Recipe, RECIPES / "molecules-drawn.yaml", out=out)
    model = pretrain_molecules.main(before)
    assert losses(pretrain_molecules.run_folder(before))[-1] < 0.8 * losses(pretrain_molecules.run_folder(before))[0]
    batch = molecules.drawn(seed=5, molecules=100).batch(torch.arange(100))
    untrained = MoleculeGraphMAE(before.layers, before.width)
    with torch.no_grad():
        scored = [
            1 - float(m(batch.x, batch.bonds, batch.molecule_of, generator=torch.Generator().manual_seed(0)).loss)
            for m in (model.eval(), untrained.eval())
        ]
    assert scored[0] > scored[1] + 0.3  # cosine with the hidden atom's type, on molecules not seen
    recipe = read(finetune.Recipe, RECIPES / "drawn.yaml", out=out, seeds=[0])
    record = json.loads(finetune.main(recipe).read_text())
    assert record["extra"]["pre_training"] == "molecules-drawn"
    assert record["extra"]["molecules"] == {"train": 320, "val": 40, "test": 40}
    assert record["values"][0] > 70


def test_fine_tuning_decays_the_rate_by_epochs(tmp_path: Path, records: Path) -> None:
    recipe = read(finetune.Recipe, RECIPES / "drawn.yaml", out=str(tmp_path), seeds=[0], start="none", decay_every=2)
    recipe = replace(recipe, training=Training(epochs=5, log_every=10))
    finetune.main(recipe)
    rates = [json.loads(line)["lr"] for line in (tmp_path / "drawn/seed-0/metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([1e-3, 1e-3, 3e-4, 3e-4, 9e-5])


# -- checkpoints


def test_pyg_branch_names_load_and_mismatches_are_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = GraphMAE(6, hidden=8, heads=2), GraphMAE(6, hidden=8, heads=2)
    renamed: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        name = name.replace(".fc.", ".lin_src.").replace(".attn_l", ".att_src").replace(".attn_r", ".att_dst")
        renamed[name] = value
        if "lin_src" in name:
            renamed[name.replace("lin_src", "lin_dst")] = value
    torch.save(renamed, tmp_path / "checkpoint.pt")
    load_reference(other, tmp_path / "checkpoint.pt")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match=r"enc_mask_token: \(1, 6\) in the file, \(1, 7\) in the model"):
        load_reference(GraphMAE(7, hidden=8, heads=2), model.state_dict())
    with pytest.raises(ValueError, match=r"missing .*encoder.layers.0.eps.*unexpected .*gat_layers"):
        load_reference(GraphMAE(6, encoder="gin", decoder="gin", hidden=8), model.state_dict())


def test_the_classifier_of_a_fine_tuned_molecule_model_is_pointed_out() -> None:
    tuned = Classifier(2, layers=2, width=6)
    with pytest.raises(ValueError, match=r"begin with gnn.: a fine-tuned molecule model"):
        load_reference(MoleculeGraphMAE(2, 6).encoder, tuned.state_dict())
    fresh = Classifier(2, layers=2, width=6)
    load_reference(fresh, tuned.state_dict())
    assert torch.equal(fresh.graph_pred_linear.weight, tuned.graph_pred_linear.weight)


# -- two processes


def _train(rank: int, out: str) -> dict[str, Tensor]:
    graphs = data.shapes(graphs=16)
    recipe = read(pretrain.Recipe, RECIPES / "shapes.yaml", out=out)
    recipe = replace(recipe, batch_size=8, model=replace(recipe.model, in_drop=0.0), training=Training(steps=1, log_every=1))
    return {name: value.clone() for name, value in pretrain.main(recipe, graphs).state_dict().items()}


def test_two_processes_end_with_one_model(two_processes: Any, tmp_path: Path) -> None:
    first, second = two_processes(_train, str(tmp_path))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def _row(rank: int, out: str) -> Path | None:
    recipe = read(pretrain.Recipe, RECIPES / "shapes.yaml", out=f"{out}/runs", seeds=[0], compare=["no-mask", "readout-mean"])
    with mock.patch.multiple(results, ROOT=Path(out), PROJECTS=Path(out) / "projects"):
        return evaluate.main(replace(recipe, training=Training(epochs=1, log_every=1)))


def test_two_processes_train_a_graph_row_with_its_variants_and_write_once(two_processes: Any, tmp_path: Path) -> None:
    path, none = two_processes(_row, str(tmp_path))
    assert none is None
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["extra"]["row"] for r in found] == ["full", "no-mask", "readout-mean"]


def _gradient(rank: int, halves: bool) -> dict[str, Tensor]:
    from common.engine import mean_over_processes
    from projects.graphmae.layers import batch_norms_over_processes

    graphs = data.shapes(graphs=6)
    torch.manual_seed(0)
    model = GraphMAE(
        4, encoder="gin", decoder="gin", hidden=8, norm="batchnorm", in_drop=0.0, attn_drop=0.0, replace_rate=0.0, gamma=2.0
    ).double()
    pick, masked = torch.arange(6), torch.arange(0, int(graphs.union.nodes.sum()), 3)
    if halves:
        model = batch_norms_over_processes(model)
        pick = pick[:2] if rank == 0 else pick[2:]
        nodes = int(graphs.union.nodes[:2].sum())
        masked = masked[masked < nodes] if rank == 0 else masked[masked >= nodes] - nodes
    batch = graphs.batch(pick)
    out = model(batch.x.double(), batch.graph, mask_nodes=masked)
    if not halves:
        out.loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}
    mean_over_processes(out.loss * len(masked), len(masked)).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    for grad in grads.values():  # what DDP does
        torch.distributed.all_reduce(grad)
        grad /= 2
    return grads


def test_two_unequal_halves_give_the_gradient_of_the_whole_batch(two_processes: Any) -> None:
    whole = _gradient(0, False)
    for part in two_processes(_gradient, True):
        for name, grad in part.items():
            torch.testing.assert_close(grad, whole[name], rtol=1e-10, atol=1e-13)


# -- real data


def test_cora_learns_from_its_files(shared_data: Path, tmp_path: Path, records: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = data.load("cora", data_root=str(shared_data), cache=str(tmp_path / "cache"))
    recipe = read(pretrain.Recipe, RECIPES / "cora.yaml", out=str(tmp_path))
    recipe = replace(recipe, model=replace(recipe.model, hidden=128), training=Training(epochs=60), probe=replace(recipe.probe, epochs=100))
    scores = evaluate.score_seed(recipe, task)
    raw = evaluate.probe_nodes(evaluate.raw, task, recipe)
    assert scores["final"] > raw["final"] + 5


def test_node_tasks_share_their_seeds_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "1",
        "LOCAL_WORLD_SIZE": "2",
    }.items():
        monkeypatch.setenv(name, value)
    assert evaluate._alone() == (1, 2)
    assert "WORLD_SIZE" not in os.environ  # each process now trains its own seeds as if it were alone
