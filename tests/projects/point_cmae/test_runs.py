"""From recipe to record on embedded data: learning, exact resume, evaluation, several processes, every script."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common import results
from common.checkpoint import load_model
from common.engine import Training
from common.masking import from_hidden
from common.recipe import read
from common.results import read_records
from projects.point_cmae import evaluate, finetune, pretrain, segment
from projects.point_cmae.classifier import PointClassifier
from projects.point_cmae.data import Clouds
from projects.point_cmae.model import PointCMAE
from projects.point_cmae.optim import adamw, local_batch, synchronised
from projects.point_cmae.weights import official_names

RECIPES = Path(pretrain.__file__).parent / "recipes"
SIZE = {"dim": 16, "depth": 3, "num_heads": 2, "num_group": 8, "group_size": 6, "widths": [8, 8, 16]}
ONE = {"training": Training(epochs=2, log_every=1), "batch": 8, "sizes": [16, 24, 24], "points": 64}


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder where this test's records and pictures go."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "PROJECTS", tmp_path / "projects")
    return tmp_path / "report" / "demo" / "point_cmae"


def tiny(out: Path, **changes: Any) -> pretrain.Recipe:
    base = read(pretrain.Recipe, RECIPES / "demo-pretrain.yaml", out=str(out))
    return replace(base, model=replace(base.model, **SIZE, decoder_heads=2), **(ONE | changes))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_demo_is_the_whole_method() -> None:
    recipe = read(evaluate.Recipe, RECIPES / "demo.yaml")
    model = recipe.pretrain.model
    assert (model.branches, model.class_token, model.contrast, model.mask_ratio, model.mask) == (2, True, "dense", 0.6, "random")
    assert (recipe.pretrain.augmentation, model.reconstruction_weight, len(recipe.seeds)) == ("scale_translate", 1000, 3)
    alone = read(pretrain.Recipe, RECIPES / "demo-pretrain.yaml")
    assert replace(alone, name="demo") == replace(recipe.pretrain, name="demo")


def test_the_papers_recipe_has_the_papers_figures() -> None:
    recipe = read(pretrain.Recipe, RECIPES / "shapenet55.yaml")
    assert (recipe.lr, recipe.batch, recipe.weight_decay, recipe.training.epochs, recipe.training.clip_norm) == (1e-3, 128, 0.05, 301, None)
    assert 275 in recipe.keep_epochs
    tuned = read(finetune.Recipe, RECIPES / "scanobjectnn-hardest-linear.yaml")
    assert (tuned.lr, tuned.batch, tuned.training.clip_norm, tuned.points, tuned.model.num_group) == (1e-4, 32, 10, 2048, 128)
    baseline = read(pretrain.Recipe, RECIPES / "shapenet55-mae.yaml").model
    assert (baseline.branches, baseline.class_token, baseline.reconstruction_weight) == (1, False, 1)


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny(tmp_path / "a", training=Training(epochs=2, log_every=1, checkpoint_every=1))
    whole = pretrain.main(recipe)
    forward, calls = PointCMAE.forward, []

    def failing(self: PointCMAE, *args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(PointCMAE, "forward", failing)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main(replace(recipe, out=str(tmp_path / "b")))
    again = pretrain.main(replace(recipe, out=str(tmp_path / "b")))
    assert len(calls) == 3 + 2  # two steps were kept
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    kept = load_model(PointCMAE, replace(recipe, out=str(tmp_path / "b")).folder)
    assert torch.equal(kept.class_tokens[1], whole.class_tokens[1])


def test_pre_training_learns_and_contrast_makes_features_agree(tmp_path: Path) -> None:
    long = {"training": Training(steps=120, log_every=10, checkpoint_every=0), "batch": 16, "sizes": [64, 24, 24]}
    cosine = {}
    for contrast in ("dense", "none"):
        recipe = tiny(tmp_path, name=contrast, **long)
        recipe = replace(recipe, lr=4e-3, model=replace(recipe.model, contrast=contrast))
        held = evaluate.held_out(pretrain.main(recipe), recipe, count=24)
        cosine[contrast] = held.cosine
        told = lines(recipe.folder)
        assert told[-1]["reconstruction"] < 0.6 * told[0]["reconstruction"]
    assert cosine["dense"] > cosine["none"] + 0.2


def test_epochs_asked_for_are_kept_and_started_from(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, keep_epochs=[0])
    last = pretrain.main(recipe)
    kept = load_model(PointCMAE, recipe.folder / "epoch-0")
    assert not torch.equal(kept.class_tokens[0], last.class_tokens[0])
    assert lines(recipe.folder)[0]["lr"] == pytest.approx(1e-6)  # the first step of the warm-up


def test_an_epoch_that_was_not_kept_is_refused() -> None:
    with pytest.raises(ValueError, match=r"start_epoch=250: shapenet55-mae.yaml keeps epochs \[275\]"):
        pretrain.pretrained("shapenet55-mae", epoch=250, seed=0, data_root=None, out="runs")


def test_every_recipe_is_a_row_or_what_one_starts_from_or_is_named_by_the_readme() -> None:
    content = results.tables("point_cmae")
    used = {row["recipe"] for row in content["rows"] + content["demo"]["rows"] if row.get("recipe")}
    for row in sorted(used):
        text = (RECIPES.parent / row).read_text()
        if "# script: finetune" in text or "# script: segment" in text:
            kind = finetune.Recipe if "# script: finetune" in text else segment.Recipe
            used.add(f"recipes/{read(kind, RECIPES.parent / row).start}.yaml")
    readme = (RECIPES.parent / "README.md").read_text()
    assert not [path.name for path in RECIPES.glob("*.yaml") if f"recipes/{path.name}" not in used and path.stem not in readme]


@pytest.mark.parametrize("style", ["moco", "byol"])
def test_class_contrast_trains_and_leaves_the_students_weights(tmp_path: Path, style: Any) -> None:
    base = tiny(tmp_path, name=style)
    recipe = replace(base, class_contrast=style, model=replace(base.model, branches=1, contrast="none"))
    model = pretrain.main(recipe)
    assert {"loss", "reconstruction", "contrast"} <= lines(recipe.folder)[0].keys()
    assert torch.equal(load_model(PointCMAE, recipe.folder).class_tokens[0], model.class_tokens[0])


def test_a_row_trains_probes_compares_draws_and_records(tmp_path: Path, records: Path) -> None:
    recipe = replace(
        read(evaluate.Recipe, RECIPES / "demo.yaml", out=str(tmp_path / "runs")),
        pretrain=tiny(tmp_path / "runs"),
        seeds=[0, 1],
        labels=2,
        draws=2,
    )
    recipe = replace(recipe, compare=["one-branch", "untrained", "moments"])
    found = evaluate.main(recipe)
    told = read_records(records)
    rows = {(record["extra"]["row"], record["metric"]) for record in told}
    assert {what for what, _ in rows} == {"full", *recipe.compare}
    assert ("one-branch", "SVM accuracy (%)") in rows
    assert {record["extra"]["features"] for record in told if record["extra"]["row"] == "one-branch"} == {"mean_max"}
    assert ("one-branch", "cosine, held-out") not in rows  # it has one feature a token
    assert {record["extra"]["pre_training"] for record in told if record["extra"]["row"] in ("untrained", "moments")} == {"none"}
    assert all(len(record["values"]) == 2 for record in told)
    assert (records / "reconstruction.png").stat().st_size > 10_000
    before = (tmp_path / "runs/demo/seed-0/metrics.jsonl").read_text()
    assert evaluate.main(replace(recipe, compare=[]))["full"] == found["full"]  # nothing is trained or measured again
    assert (tmp_path / "runs/demo/seed-0/metrics.jsonl").read_text() == before
    with pytest.raises(ValueError, match=r"begun with another recipe: .*svm_c"):
        evaluate.main(replace(recipe, svm_c=1.0))


def tuned(out: Path, **changes: Any) -> finetune.Recipe:
    base = read(finetune.Recipe, RECIPES / "demo-classify.yaml", out=str(out), start="none", seeds=[0])
    return replace(base, **({**ONE, "model": replace(base.model, **SIZE), "votes": 2} | changes))


def test_fine_tuning_keeps_the_best_epoch_and_votes_with_it(tmp_path: Path, records: Path) -> None:
    recipe = tuned(tmp_path / "runs", training=Training(epochs=3, log_every=1))
    assert finetune.main(recipe) is not None
    record = read_records(records)[0]
    told = [line["test_accuracy"] for line in lines(recipe.folder) if "test_accuracy" in line]
    assert (len(told), record["values"][0], record["extra"]["last_epoch"][0]) == (3, max(told), told[-1])
    best = json.loads((recipe.folder / "best" / "score.json").read_text())
    assert (best["accuracy"], best["epoch"]) == (max(told), record["extra"]["best_epoch"][0]) == (max(told), told.index(max(told)))
    model = load_model(PointClassifier, recipe.folder / "best")
    assert finetune.accuracy(model, finetune.splits(recipe)[1], 64) == pytest.approx(max(told))
    votes = json.loads((recipe.folder / "score.json").read_text())["votes"]
    assert len(votes) == 2
    assert {record["metric"] for record in read_records(records)} == {"accuracy (%)", "accuracy, voting (%)"}
    early = replace(recipe, start_epoch=250, votes=0, training=Training(epochs=1, log_every=1))
    assert finetune.main(early) is not None  # a row and a run folder of its own
    assert read_records(records)[-1]["metric"] == "accuracy (%), from epoch 250"
    assert (early.folder / "score.json").is_file()
    assert early.folder != recipe.folder


def test_a_stopped_fine_tuning_goes_on_and_keeps_its_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tuned(tmp_path / "a", training=Training(epochs=3, log_every=1), votes=0)
    whole = finetune.run(recipe)
    forward, calls = PointClassifier.forward, []

    def failing(self: PointClassifier, points: Tensor) -> Tensor:
        calls.extend([0] * self.training)
        if self.training and len(calls) == 8:  # in the third epoch of three steps each
            raise KeyboardInterrupt
        return forward(self, points)

    monkeypatch.setattr(PointClassifier, "forward", failing)
    stopped = replace(recipe, out=str(tmp_path / "b"))
    with pytest.raises(KeyboardInterrupt):
        finetune.run(stopped)
    again = finetune.run(stopped)
    assert len(calls) == 8 + 3
    assert {name: again[name] for name in ("best", "epoch", "last")} == {name: whole[name] for name in ("best", "epoch", "last")}
    one, two = (load_model(PointClassifier, of.folder / "best").state_dict() for of in (recipe, stopped))
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.mark.parametrize("protocol", ["linear", "mlp3", "frozen_linear"])
def test_other_protocols_train_from_a_checkpoint(tmp_path: Path, records: Path, protocol: Any) -> None:
    torch.manual_seed(0)
    before = PointCMAE(**SIZE, decoder_depth=1, decoder_heads=2)
    state = {official: before.state_dict()[name] for name, official in official_names(before, "two_branches").items()}
    torch.save({"base_model": state}, tmp_path / "pretrain.pth")
    recipe = tuned(tmp_path / "runs", protocol=protocol, start="pretrain.pth", data_root=str(tmp_path), votes=0)
    finetune.main(recipe)
    after = load_model(PointClassifier, recipe.folder)
    assert torch.equal(after.encoder.positions[0].weight, before.encoder.positions[0].weight)
    moved = not torch.equal(after.encoder.embed.first_norm.running_mean, before.encoder.embed.first_norm.running_mean)
    assert moved is not protocol.startswith("frozen")
    assert "cls_token" in json.loads((recipe.folder / "score.json").read_text())["missing"]


def test_a_whole_official_classifier_is_evaluated_untrained(tmp_path: Path, records: Path) -> None:
    torch.manual_seed(0)
    model = PointClassifier(12, **SIZE)
    names = official_names(model, "classifier")
    torch.save({"base_model": {names[k]: v for k, v in model.state_dict().items()}}, tmp_path / "scan.pth")
    recipe = tuned(tmp_path / "runs", whole=True, start=str(tmp_path / "scan.pth"), votes=1)
    assert finetune.main(recipe) is not None
    record = read_records(records)[0]
    assert record["weights"] == "official, converted"
    assert record["values"][0] == pytest.approx(finetune.accuracy(model, finetune.splits(recipe)[1], 64))
    torch.save({"base_model": {"MAE_encoder.norm.weight": torch.zeros(16)}}, tmp_path / "scan.pth")
    with pytest.raises(ValueError, match="it has no head"):
        finetune.run(replace(recipe, seed=1))


def test_few_shot_runs_a_fold_with_the_larger_head(tmp_path: Path, records: Path) -> None:
    rng = np.random.default_rng(0)
    rows = {
        part: [(rng.normal(size=(80, 6)).astype(np.float32) + i % 5, i % 5, 9) for i in range(5 * n)]
        for part, n in (("train", 10), ("test", 20))
    }
    path = tmp_path / "ModelNetFewshot" / "5way_10shot" / "0.pkl"
    path.parent.mkdir(parents=True)
    path.write_bytes(pickle.dumps(rows))
    recipe = tuned(tmp_path / "runs", way=5, shot=10, folds=[0], classes=40, batch=32, votes=0, data_root=str(tmp_path))
    made = finetune.main(replace(recipe, data="modelnet40"))
    assert made is not None
    assert json.loads(made.read_text())["data"]["name"].endswith("5-way 10-shot")
    assert load_model(PointClassifier, recipe.folder).classes == 40
    assert lines(recipe.folder)[-1]["step"] == 2  # 50 samples, 32 a step: one step an epoch


@pytest.mark.parametrize("legacy", [False, True])
def test_part_segmentation_trains_and_records_both_means(tmp_path: Path, records: Path, legacy: bool) -> None:
    base = read(segment.Recipe, RECIPES / "demo-parts.yaml", out=str(tmp_path / "runs"), start="none")
    recipe = replace(base, **ONE, model=replace(base.model, **SIZE), legacy_double_step=legacy)
    segment.main(recipe)
    written = read_records(records)
    assert [record["metric"] for record in written] == ["instance mIoU (%)", "class mIoU (%)"]
    assert all(0 < record["values"][0] < 100 for record in written)
    told = lines(recipe.folder)
    assert told[-1]["loss"] < told[0]["loss"]


def test_the_double_step_steps_with_whole_then_clipped_gradients() -> None:
    def once(double: bool) -> Tensor:
        layer = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(layer.weight)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        layer.weight.grad = torch.full((1, 1), 20.0)
        (segment.double_step(optimizer, 10.0) if double else optimizer).step()  # type: ignore[arg-type]
        return layer.weight.detach()

    assert once(False).item() == pytest.approx(1 - 2)
    assert once(True).item() == pytest.approx(1 - 2 - 1, abs=1e-5)


# -- bad input ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pretrain: {model: {contrast: cosine}}", "contrast"),
        ("pretrain: {model: {dim: 10}}", "multiple of num_heads"),
        ("pretrain: {points: 16}", "points=16"),
        ("pretrain: {model: {mask_ratio: 1.5}}", "mask_ratio"),
        ("compare: [moment]", "moment"),
        ("pretrain: {class_contrast: moco}", "model.branches=1"),
        ("svm: 2", "svm"),
    ],
)
def test_recipes_with_a_typo_or_a_wrong_value_name_it(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text + "\n")
    with pytest.raises(ValueError, match=message):
        read(evaluate.Recipe, tmp_path / "r.yaml")


def test_batches_that_cannot_be_normalised_or_split_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="batch=1 over 1 processes"):
        local_batch(1, samples=10)
    with pytest.raises(ValueError, match="the data set has 10 samples"):
        local_batch(32, samples=10)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="batch=32: expected a multiple of the 3 processes"):
        local_batch(32, samples=100)


def test_every_cloud_is_counted_once() -> None:
    clouds = torch.rand(7, 64, 3) * 2 - 1
    data = Clouds("x", torch.zeros(7, dtype=torch.int64), ["a", "b"], clouds.__getitem__)
    model = PointClassifier(2, "linear", **SIZE)
    with torch.no_grad():
        model.head[0].weight.zero_()
        model.head[0].bias.copy_(torch.tensor([1.0, 0.0]))
    assert finetune.accuracy(model, data, 32, batch=3) == 100.0


# -- two processes -----------------------------------------------------------------------------------------------------------------


def _train(rank: int, out: str) -> dict[str, Tensor]:
    recipe = tiny(Path(out), training=Training(steps=2, log_every=1))
    return {name: value.clone() for name, value in pretrain.main(recipe).state_dict().items()}


def test_two_processes_end_with_one_model(two_processes: Any, tmp_path: Path) -> None:
    first, second = two_processes(_train, str(tmp_path))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert (tmp_path / "demo-pretrain/seed-0/model.safetensors").is_file()


def _gradient(rank: int, halves: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = PointCMAE(**SIZE, decoder_depth=1, decoder_heads=2, drop_path=0.0, reconstruction_weight=1.0).train()
    generator = torch.Generator().manual_seed(0)
    points = 2 * torch.rand(4, 64, 3, generator=generator) - 1
    hidden = [torch.rand(4, 8, generator=generator).argsort(1) < 5 for _ in range(2)]
    part = slice(2 * rank, 2 * rank + 2) if halves else slice(None)
    if halves:
        model = synchronised(model)
    model(points[part], [from_hidden(mask[part]) for mask in hidden]).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    for grad in grads.values() if halves else ():  # what DDP does
        torch.distributed.all_reduce(grad)
        grad /= 2
    return grads | {"running_var": model.encoder.embed.third_norm.running_var}


def test_two_halves_give_the_gradient_of_the_whole_batch(two_processes: Any) -> None:
    whole = _gradient(0, False)
    # the bias before a batch norm has no gradient but rounding, which grows with the gradients around it
    rounding = 3e-6 * max(grad.norm() for grad in whole.values())
    for part in two_processes(_gradient, True):
        for name, grad in part.items():
            assert (grad - whole[name]).norm() <= 2e-4 * whole[name].norm() + rounding, name


def test_synchronised_changes_nothing_alone() -> None:
    model = synchronised(PointClassifier(3, **SIZE))
    assert type(model.encoder.embed.first_norm) is torch.nn.BatchNorm1d
    assert len(adamw(model, 1e-3, 0.05).param_groups) == 2
