"""From recipe to record on digits: pseudo-labels, guided training, exact resume, probes, fine-tuning, two processes; and real photographs."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common import results
from common.checkpoint import load_model
from common.engine import Training
from common.recipe import read
from projects.g_simclr import evaluate, finetune, pretrain, pseudo_labels
from projects.g_simclr.augment import Augmentation
from projects.g_simclr.autoencoder import DenoisingAutoencoder
from projects.g_simclr.batches import same_label_pairs
from projects.g_simclr.data import Images, Splits, digits, load
from projects.g_simclr.model import GSimCLR
from projects.g_simclr.stopping import fit_until_flat

RECIPES = Path(pretrain.__file__).parent / "recipes"


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder where this test's records and pictures go."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "PROJECTS", tmp_path / "projects")
    return tmp_path / "report" / "demo" / "g_simclr"


def few(count: int = 120) -> Splits:
    whole = digits()
    return Splits(whole.train.part(torch.arange(count)), whole.test.part(torch.arange(60)))


def tiny(out: Path | str, **changes: Any) -> pretrain.Recipe:
    base = read(pretrain.Recipe, RECIPES / "demo.yaml", out=str(out))
    autoencoder = replace(base.autoencoder, widths=[4, 8], batch_size=32, training=Training(steps=3, log_every=1))
    own = {"seeds": [0], "autoencoder": autoencoder, "clusters": 15, "training": Training(epochs=2, checkpoint_every=1, log_every=1)}
    return replace(base, **(own | changes))


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_demo_recipe_is_the_full_method() -> None:
    recipe = read(pretrain.Recipe, RECIPES / "demo.yaml")
    assert (recipe.data, recipe.batch_size, recipe.clusters, recipe.temperature) == ("digits", 10, 10, 0.1)
    assert recipe.autoencoder.noise == 0.01
    assert recipe.arms == ["random", "reference", "balanced"]
    assert recipe.seeds == [0, 1, 2]


def test_published_recipe_is_the_papers() -> None:
    recipe = read(pretrain.Recipe, RECIPES / "cifar10.yaml")
    assert (recipe.encoder, recipe.blocks, recipe.head, recipe.temperature) == ("cifar-resnet", 4, [256, 128, 50], 0.1)
    assert (recipe.batch_size, recipe.clusters, recipe.lr, recipe.momentum) == (64, 64, 0.1, 0.0)
    assert [round(pretrain.rate(recipe, step, 11715), 4) for step in (0, 500, 1000, 2000, 3000)] == [0.1, 0.05, 0.1, 0.05, 0.1]
    subset = read(pretrain.Recipe, RECIPES / "imagenet-subset.yaml")
    assert [round(pretrain.rate(subset, step, 3800), 4) for step in (0, 500, 1000, 3799)] == [0.1, 0.05, 0.0, 0.0]
    small = read(pretrain.Recipe, RECIPES / "cifar10-small.yaml")
    assert [round(pretrain.rate(small, step, 2000), 4) for step in (0, 1000, 2000)] == [0.1, 0.05, 0.0]
    assert (recipe.training.epochs, recipe.autoencoder.patience, recipe.autoencoder.lr) == (15, 2, 1e-3)
    assert recipe.augmentation == Augmentation(flip=0.5, jitter=0.5, strength=0.2, grey=0.0, per_batch=True)
    assert (recipe.arms, recipe.protocol) == (["reference", "random"], "reference")


@pytest.mark.parametrize("where", ["device", "workers"])
def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    recipe, splits = tiny(tmp_path / "a", augment_on=where, training=Training(steps=14, checkpoint_every=1)), few()
    whole = pretrain.main(recipe, splits)
    forward, calls = GSimCLR.forward, []

    def failing(self: GSimCLR, *args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == 14:  # in the second epoch, which has 12 steps
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GSimCLR, "forward", failing)
    recipe = replace(recipe, out=str(tmp_path / "b"))
    with pytest.raises(KeyboardInterrupt):
        pretrain.main(recipe, splits)
    again = pretrain.main(recipe, splits)
    assert len(calls) == 14 + 1
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    kept = load_model(GSimCLR, pretrain.run_folder(recipe))
    assert torch.equal(kept.head[0].weight, whole.head[0].weight)


def test_composition_is_logged_each_epoch_and_guided_batches_have_fewer_pairs(tmp_path: Path) -> None:
    splits, found = few(), {}
    for arm in ("balanced", "strict", "random", "oracle", "reference"):
        recipe = tiny(tmp_path, batches=arm)
        pretrain.main(recipe, splits)
        epochs = [line for line in lines(pretrain.run_folder(recipe)) if "images_used" in line]
        assert len(epochs) == 2
        found[arm] = epochs[-1]
        assert lines(pretrain.run_folder(recipe))[-1]["loss"] > 0
    assert found["balanced"]["images_used"] == found["reference"]["images_used"] == 1.0
    assert found["strict"]["same_cluster_pairs"] == 0
    assert "same_cluster_pairs" not in found["random"]
    assert found["oracle"]["false_negatives"] < found["balanced"]["false_negatives"] < found["random"]["false_negatives"]
    assert found["balanced"]["same_cluster_pairs"] <= found["reference"]["same_cluster_pairs"]


# -- pseudo-labels


def test_pseudo_labels_are_kept_with_what_they_belong_to(tmp_path: Path) -> None:
    splits, recipe = few(), tiny(tmp_path)
    labels = pretrain.cluster_numbers(recipe, splits)
    assert torch.equal(labels, pretrain.cluster_numbers(replace(recipe, seed=7), splits))  # shared by the seeds
    assert labels.unique().numel() == 15
    path = tmp_path / "demo" / "autoencoder" / "seed-0" / "clusters-15-seed-0.safetensors"
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["sizes"] == labels.bincount(minlength=15).tolist()
    good = {key: about[key] for key in ("images", "order", "clusters", "seed", "autoencoder")}
    assert torch.equal(pseudo_labels.read(path, good), labels)
    other = pseudo_labels.identity(few(100).train, 15, 0, good["autoencoder"])
    with pytest.raises(ValueError, match=r"clusters-15-seed-0.safetensors: expected images 100, found 120"):
        pseudo_labels.read(path, other)
    turned = pseudo_labels.identity(splits.train.part(torch.arange(120).flip(0)), 15, 0, good["autoencoder"])
    with pytest.raises(ValueError, match="expected order of images"):
        pseudo_labels.read(path, turned)
    with pytest.raises(ValueError, match=r"expected autoencoder cccc"):
        pseudo_labels.read(path, good | {"autoencoder": "c" * 64})


def test_clusters_come_from_the_autoencoder_without_noise(tmp_path: Path) -> None:
    splits = few()
    torch.manual_seed(0)
    model = DenoisingAutoencoder(1, (4, 8), noise=5.0).train()
    first, second = (pseudo_labels.embed(model, splits.train) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(pseudo_labels.cluster(first, 5), pseudo_labels.cluster(second, 5))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: m.encoder[0].weight.data.fill_(float("nan")), r"found NaN or infinity; the autoencoder diverged \(loss nan\)"),
        (lambda m: [p.data.zero_() for p in m.parameters()], r"found the same one for all images; .* \(loss 0\.\d+\)"),
    ],
)
def test_spoilt_embeddings_are_named(spoil: Any, message: str) -> None:
    model = DenoisingAutoencoder(1, (4, 8))
    spoil(model)
    with pytest.raises(ValueError, match=message):
        pseudo_labels.embed(model, few().train)


def test_more_clusters_than_images_are_refused() -> None:
    with pytest.raises(ValueError, match="found 9 for 5"):
        pseudo_labels.cluster(torch.rand(5, 3), 9)


def test_early_stopping_restores_the_best_epoch_and_goes_on(tmp_path: Path) -> None:
    """A model that walks away from its optimum after three epochs: trained to there, two epochs of patience, back."""
    splits, given, calls = few(20), [0.9, 0.5, 0.2, 0.4, 0.3, 0.1], []

    def run(limit: int) -> tuple[torch.nn.Module, list[dict[str, float]]]:
        torch.manual_seed(0)
        net = torch.nn.Linear(1, 1)
        loader = torch.utils.data.DataLoader(splits.train, batch_size=10)

        def validation(_net: Any) -> dict[str, float]:
            calls.append(0)
            if len(calls) == limit:
                raise KeyboardInterrupt
            return {"validation_loss": given[len(calls) - 1]}

        def loss(net: Any, batch: Tensor) -> dict[str, Tensor]:
            return {"loss": (net(torch.ones(1, 1)) - 100).square().mean()}

        stage = pseudo_labels.Stage("digits", None, "validation", pseudo_labels.Autoencoder(), 0)
        return fit_until_flat(
            net,
            loss,
            loader,
            torch.optim.SGD(net.parameters(), lr=1e-3),
            Training(epochs=9),
            tmp_path,
            validation,
            patience=2,
            recipe=stage,
        )

    model, scores = run(limit=99)
    assert [line["validation_loss"] for line in scores] == given[:5]
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert torch.equal(model.weight, best["weight"])
    seen = len(calls)
    again, _ = run(limit=99)  # a finished run is only read
    assert len(calls) == seen
    assert torch.equal(again.weight, model.weight)


def test_the_autoencoder_stops_on_held_out_images(tmp_path: Path) -> None:
    stage = pseudo_labels.Stage(
        "digits", None, "validation", replace(tiny(tmp_path).autoencoder, training=Training(epochs=3), patience=1, batch_size=32), 0
    )
    model = pseudo_labels.train_autoencoder(stage, few(), tmp_path / "ae")
    assert not model.training
    scores = [line["validation_loss"] for line in lines(tmp_path / "ae") if "validation_loss" in line]
    assert scores[0] > scores[-1]
    assert (tmp_path / "ae" / "best.pt").is_file()


# -- rows


def test_a_row_trains_probes_compares_and_records(tmp_path: Path, records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "load", lambda *_, **__: few(200))
    measures = ["linear", "neighbour", "few"]
    recipe = tiny(tmp_path / "runs", seeds=[0, 1], probe=pretrain.Probe(measures=measures, epochs=2), clusters=12)
    recipe = replace(recipe, training=Training(epochs=1, checkpoint_every=0), arms=["random", "balanced"])
    found = results.read_records(evaluate.main(recipe).parent)
    rows = {(r["extra"]["row"], r["metric"]) for r in found}
    assert len(found) == len(rows) == 2 * 6
    assert ("SimCLR P1", "top-1 (%)") in rows
    assert ("G-SimCLR, balanced", "false negatives (% of negative pairs)") in rows
    assert all(len(r["values"]) == 2 and min(r["values"]) >= 0 and max(r["values"]) <= 100 for r in found)
    pairs = {r["extra"]["row"].partition(" P")[0]: r["extra"]["same_cluster_pairs"] for r in found}
    assert max(pairs["G-SimCLR, balanced"]) < min(pairs["SimCLR"]) < 10  # against the same clusters
    assert {path.name for path in records.glob("*.png")} == {"demo_clusters.png", "demo_batches.png"}
    monkeypatch.setattr(pretrain, "main", lambda *_: pytest.fail("trained again"))
    evaluate.main(recipe)  # finished runs are read
    with pytest.raises(ValueError, match=r"begun with another recipe: temperature \(0\.1 there, 0\.2 now\)"):
        evaluate.main(replace(recipe, temperature=0.2))


def test_probes_see_images_as_they_are(tmp_path: Path) -> None:
    model, splits = GSimCLR("small", channels=1, head=(16, 8, 4)).train(), few()
    found = evaluate.features(model, splits.train)
    assert {name: tuple(value.shape) for name, value in found.items()} == {"P1": (120, 8), "P2": (120, 16), "P3": (120, 64)}
    model.eval()
    whole = model.probes(splits.train.floats(splits.train.pixels))
    for name in found:
        torch.testing.assert_close(found[name], whole[name])


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_fine_tuning_starts_from_the_arm_and_keeps_the_statistics(
    tmp_path: Path, records: Path, monkeypatch: pytest.MonkeyPatch, precision: Any
) -> None:
    splits = few()
    monkeypatch.setattr(finetune, "load", lambda *_, **__: splits)
    monkeypatch.setattr(finetune, "started", lambda recipe: replace(tiny(tmp_path), seed=recipe.seed, batches=recipe.arms[0]))
    source = replace(tiny(tmp_path), batches="random")
    before = pretrain.main(source, splits)
    recipe = read(finetune.Recipe, RECIPES / "digits-finetune.yaml", out=str(tmp_path), arms=["random"])
    recipe = replace(recipe, training=Training(epochs=3, precision=precision), share=0.5, head_epochs=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = finetune.main(recipe)
    record = json.loads(path.read_text())
    assert record["extra"]["row"] == "SimCLR fine-tune"
    assert record["extra"]["labels"] == 0.5
    folder = tmp_path / "digits-finetune" / "random" / "seed-0"
    losses = torch.tensor([line["validation_loss"] for line in lines(folder) if "validation_loss" in line])
    assert not torch.equal(losses, losses.bfloat16().float())  # evaluated in float32, whatever the training
    tuned = torch.load(folder / "best.pt", weights_only=True)
    for name, value in before.encoder.state_dict().items():
        kept = torch.equal(tuned[f"encoder.{name}"], value.cpu())
        assert kept == ("running" in name or "num_batches" in name), name
    finetune.main(recipe)
    again = results.read_records(path.parent)[1:]  # a second record, no second training
    assert [(r["values"], r["hours"]) for r in again] == [(record["values"], record["hours"])]


def test_the_supervised_baseline_trains_from_scratch(tmp_path: Path, records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "load", lambda *_, **__: few())
    recipe = finetune.Recipe(
        name="none", start="none", data="digits", encoder="small", lr=1e-2, training=Training(epochs=6), out=str(tmp_path), seeds=[0]
    )
    record = json.loads(finetune.main(recipe).read_text())
    assert record["extra"]["row"] == "supervised"
    assert record["values"][0] > 40


def test_a_subset_that_misses_a_class_warns_with_its_name() -> None:
    with pytest.warns(UserWarning, match=r"3 labelled images hold none of .*9|hold none of"):
        part = finetune.subset(few().train, 0.025, 0)
    assert len(part) == 3
    with pytest.warns(UserWarning, match="hold none"):
        drawn = finetune.subset(few(20).train, 1.0, 0, replacement=True)
    assert len(drawn.digests.unique(dim=0)) < 20


# -- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1}, "batch_size=1"),
        ({"batch_size": 10, "batches": "strict", "clusters": 5}, "strict batches of 10 need at least 10 clusters; got 5"),
        ({"head": [8]}, "two layers"),
        ({"weights": "gsimclr_cifar10.h5"}, r"expected the one arm that they belong to, found arms=\['balanced', 'random'\]"),
        ({"autoencoder": pseudo_labels.Autoencoder(kernel=4)}, "odd"),
    ],
)
def test_recipes_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pretrain.Recipe(**changes)


def test_temperature_zero_is_refused_by_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("temperature: 0")
    with pytest.raises(ValueError, match="temperature"):
        read(pretrain.Recipe, tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("changes", "processes", "message"),
    [
        ({"augmentation": Augmentation()}, 1, "digits: 1 channel"),
        ({"batch_size": 121}, 1, "digits: 120 images cannot fill one batch of 121"),
        ({"clusters": 121}, 1, "found 121 for 120"),
        ({"batch_size": 10}, 4, "batch_size=10 on 4 processes"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], processes: int, message: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(ValueError, match=message):
        pretrain.main(tiny(tmp_path, **changes), few())
    assert not list(tmp_path.iterdir())


def test_synchronised_batch_norm_needs_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="expected GPUs, found none"):
        pretrain.synchronised(GSimCLR("small", channels=1, head=(4, 4)), True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = pretrain.synchronised(GSimCLR("small", channels=1, head=(4, 4)), True)
    assert sum(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules()) == 3


# -- two processes


def _gradient(rank: int, halves: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = GSimCLR("small", channels=1, head=(16, 8, 4)).double().eval()  # batch statistics are each process's own
    views = [torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(i)).double() for i in range(2)]
    if halves:
        views = [view[4 * rank : 4 * rank + 4] for view in views]
    model(*views).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    if halves:
        for gradient in gradients.values():  # what DDP does
            torch.distributed.all_reduce(gradient)
            gradient /= 2
    return gradients


def test_two_halves_give_the_gradient_of_the_whole_batch(two_processes: Any) -> None:
    whole = _gradient(0, False)
    for part in two_processes(_gradient, True):
        for name, gradient in part.items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-9, atol=1e-12)


def _train(rank: int, out: str) -> tuple[dict[str, Tensor], list[int], Tensor]:
    splits, seen = few(), []
    take = Images.__getitem__

    def noting(self: Images, index: int) -> Tensor:
        seen.append(index)
        return take(self, index)

    recipe = tiny(out, batches="strict", training=Training(epochs=2, checkpoint_every=0))
    numbers = pretrain.cluster_numbers(recipe, splits)
    Images.__getitem__ = noting  # type: ignore[method-assign]
    try:
        model = pretrain.main(recipe, splits)
    finally:
        Images.__getitem__ = take  # type: ignore[method-assign]
    return {name: p.detach().clone() for name, p in model.named_parameters()}, seen, numbers


def test_two_processes_share_clean_batches_and_end_with_one_model(two_processes: Any, tmp_path: Path) -> None:
    (first, seen, numbers), (second, others, same) = two_processes(_train, str(tmp_path))
    assert torch.equal(numbers, same)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    halves = [torch.tensor(part).view(-1, 5) for part in (seen, others)]
    together = torch.cat(halves, 1)  # what the two processes held at each step
    assert int(same_label_pairs(together, numbers).sum()) == 0
    epochs = together.chunk(2)
    assert not torch.equal(*epochs)
    assert all(epoch.unique().numel() == epoch.numel() for epoch in epochs)


# -- real data


def test_real_photographs_go_from_files_to_a_probe(shared_data: Path, tmp_path: Path) -> None:
    """The 250 test photographs of the five classes at 16 pixels: decoded, clustered, trained on, probed."""
    (tmp_path / "five").mkdir()
    for part in ("train", "test"):
        (tmp_path / "five" / f"{part}.parquet").symlink_to(shared_data / "natural5" / "test.parquet")
    with pytest.warns(UserWarning, match="250 images stand in the training and in the test split"):
        splits = load("five", data_root=str(tmp_path), image_size=16, cache=str(tmp_path / "cache"))
    assert splits.train.pixels.shape == (250, 3, 16, 16)
    autoencoder = pseudo_labels.Autoencoder(widths=[4, 8], patience=0, training=Training(steps=4))
    recipe = pretrain.Recipe(
        name="five", data="five", image_size=16, encoder="resnet18", width=4, clusters=32, batch_size=32, autoencoder=autoencoder,
        training=Training(epochs=1), out=str(tmp_path / "runs"), probe=pretrain.Probe(epochs=40),
    )  # fmt: skip
    found = evaluate.score(replace(recipe, seed=0), splits)
    assert found["values"].keys() == {"linear P1", "linear P2", "linear P3", "false_negatives"}
    assert found["values"]["linear P3"] > 25  # chance is 20
