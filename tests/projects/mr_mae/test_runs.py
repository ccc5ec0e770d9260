"""From recipe to record on drawn parts: learning, exact resume, teachers live and cached, probes, fine-tuning, two processes, bad recipes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL.Image import Resampling
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from common import results
from common.checkpoint import load_model, save_model
from common.engine import NonFiniteLoss, Training, mean_over_processes
from common.masking import random_mask
from common.recipe import read
from common.results import read_records
from projects.mr_mae import evaluate, finetune, pictures, pretrain, pretrain_teacher
from projects.mr_mae.classifier import fine_tuning_groups
from projects.mr_mae.model import MRMAE
from projects.mr_mae.pretrain import Architecture, TeacherSource
from projects.mr_mae.weights import plain_classifier, reference_state

RECIPES = Path(pretrain.__file__).parent / "recipes"
SMALL = Architecture(
    size="own", stage_dims=[8, 12, 16], stage_depths=[1, 1, 2], num_heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2
)
CONV = {"channels": [8, 8, 8, 16], "output_stride": 8, "stem_width": 8}


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder where this test's records and pictures go."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "PROJECTS", tmp_path / "projects")
    return tmp_path / "report" / "demo" / "mr_mae"


def tiny(out: Path, **changes: Any) -> pretrain.Recipe:
    base = read(evaluate.Recipe, RECIPES / "demo.yaml").pretrain
    defaults = {"model": SMALL, "limit": 64, "batch_size": 16, "training": Training(steps=6, log_every=1, checkpoint_every=2)}
    return replace(base, **defaults | {"out": str(out), "cache": str(out / "features")} | changes)


def history(recipe: pretrain.Recipe) -> list[dict[str, float]]:
    return [json.loads(line) for line in (recipe.folder / "metrics.jsonl").read_text().splitlines()]


def equal(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_the_demo_is_the_whole_method() -> None:
    recipe = read(evaluate.Recipe, RECIPES / "demo.yaml")
    run = evaluate.run_of(recipe, "both", 0)
    assert (run.targets, run.mask_ratio, run.norm_pix, run.target_norm, run.distance) == ("both", 0.75, True, "layernorm", "mse")
    assert (run.data, [t.spec for t in run.teachers], len(recipe.seeds)) == ("parts", ["oracle"], 3)
    assert (evaluate.run_of(recipe, "pixels", 0).teachers, evaluate.run_of(recipe, "mimic", 0).targets) == ([], "mimic")


def test_the_paper_recipe_has_the_papers_rate() -> None:
    recipe = read(pretrain.Recipe, RECIPES / "base-dino.yaml")
    assert (recipe.data, recipe.model.size, recipe.training.epochs, recipe.augment, recipe.views) == ("imagenet", "base", 400, "crop", 0)
    assert recipe.base_lr * 3072 / 256 == pytest.approx(1.8e-3)


def test_a_stopped_run_goes_on_to_the_same_weights_and_both_losses_fall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(steps=16, log_every=1, checkpoint_every=2)
    recipe = tiny(tmp_path / "a", training=training, base_lr=0.05)
    whole = pretrain.main(recipe)
    lines = history(recipe)
    for term in ("pixel", "mimic"):
        assert lines[-1][term] < (0.97 if term == "pixel" else 0.7) * lines[0][term]
    forward, calls = MRMAE.forward, []

    def failing(self: MRMAE, *args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    other = tiny(tmp_path / "b", training=training, base_lr=0.05)
    monkeypatch.setattr(MRMAE, "forward", failing)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main(other)
    again = pretrain.main(other)
    assert len(calls) == 8 + 10  # six steps were kept
    equal(whole, again)
    equal(load_model(MRMAE, other.folder), whole)


def test_a_live_teacher_and_a_cached_one_train_alike(tmp_path: Path) -> None:
    source = pretrain_teacher.Recipe(
        data="parts",
        limit=32,
        image_size=64,
        settings=CONV,
        batch_size=16,
        training=Training(epochs=1),
        out=str(tmp_path),
        name="row-teacher",
    )
    pretrain_teacher.main(source)
    teacher = TeacherSource("timm:resnet10t", weights=str(source.folder), settings=CONV)
    common = {"teachers": [teacher], "limit": 32, "training": Training(steps=2, log_every=1)}
    live, cached = tiny(tmp_path, name="live", **common), tiny(tmp_path, name="cached", views=1, **common)
    pretrain.main(live)
    pretrain.main(cached)
    (store,) = (tmp_path / "features").iterdir()
    for a, b in zip(history(live), history(cached), strict=True):
        assert a["mimic"] == pytest.approx(b["mimic"], rel=2e-3)  # half precision on disk
    modified = (store / "manifest.json").stat().st_mtime_ns
    pretrain.main(replace(cached, name="again"))
    assert (store / "manifest.json").stat().st_mtime_ns == modified
    row = evaluate.Recipe(name="row", pretrain=live, seeds=[0], out=str(tmp_path), test_limit=40)
    assert set(evaluate.score_seed(row, "teacher", 0)["scores"]) == {"linear probe (%)", "k-NN (%)"}
    with pytest.raises(ValueError, match="found the oracle"):
        evaluate.teacher_of(tiny(tmp_path))
    with pytest.raises(ValueError, match=r"focus=sample: expected a teacher with a class token, found none in timm:resnet10t"):
        pretrain.main(replace(live, name="focus", focus="sample"))
    with pytest.raises(ValueError, match="all of them cached or all run live"):
        pretrain.main(replace(live, name="both", teachers=[teacher, TeacherSource("oracle")]))


def test_a_vit_teacher_chooses_what_stays_visible(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    settings = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    torch.manual_seed(0)
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64, **settings).state_dict(), tmp_path / "t.safetensors")
    teachers = [TeacherSource("timm:vit_tiny_patch16_224", weights=str(tmp_path / "t.safetensors"), settings=settings)]
    training = Training(steps=1, log_every=1)
    for views in (0, 2):
        recipe = tiny(
            tmp_path, name=f"v{views}", teachers=teachers, augment="crop", views=views, focus="sample", limit=16, training=training
        )
        pretrain.main(recipe)
        assert history(recipe)[0]["mimic"] > 0
    alone = tiny(tmp_path, name="alone", teachers=teachers, focus="top", targets="pixels", limit=16, training=training)
    assert len(pretrain.main(alone).mimics) == 0


def test_a_row_trains_probes_compares_records_and_draws(tmp_path: Path, records: Path) -> None:
    row = read(evaluate.Recipe, RECIPES / "demo.yaml", out=str(tmp_path / "runs"), seeds=[0, 1])
    row = replace(
        row, pretrain=tiny(tmp_path, training=Training(steps=2)), test_limit=80, compare=["pixels", "mimic", "entangled", "random"]
    )
    found = evaluate.main(row)
    kept = read_records(records)
    rows = {(r["extra"]["row"], r["metric"]) for r in kept}
    assert {name for name, _ in rows} == {"both", "pixels", "mimic", "entangled", "random"}
    assert ("mimic", "pixel error") not in rows
    assert ("random", "pixel error") not in rows
    assert all(len(r["values"]) == 2 for r in kept)
    assert all(0 <= v <= 100 for v in found["both"]["linear probe (%)"])
    for name in ("reconstructions", "mimicked", "attended", "orderings"):
        assert (records / f"demo-{name}.png").stat().st_size > 5_000
    assert evaluate.main(row) == found  # nothing is trained again
    assert evaluate.main(replace(row, features="fused", compare=[]))["both"] != found["both"]
    evaluate.main(replace(row, name="ordering", seeds=[0], compare=[]))  # rows that a README shows
    kept = read_records(tmp_path / "projects/mr_mae/results")
    assert {(r["recipe"], r["extra"]["row"]) for r in kept} == {("recipes/ordering.yaml", "both")}
    assert {r["metric"] for r in kept} == {"linear probe (%)", "k-NN (%)", "pixel error"}


def test_a_plain_vit_is_probed_and_becomes_timms(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"backbone": "vit", "stage_patch": (16,), "stage_dims": (16,), "stage_depths": (2,), "mlp_ratio": (4,), "num_heads": 2}
    vit = MRMAE(64, **shape, decoder_dim=16, decoder_depth=1, decoder_heads=2, targets="pixels")
    row, train = evaluate.Recipe(pretrain=tiny(tmp_path)), pretrain.load("parts", "train", limit=40)
    assert set(evaluate.probe(evaluate.encoder_of(vit, row), row, train, train.subset(20))) == {"linear probe (%)", "k-NN (%)"}
    assert 1 < evaluate.pixel_error(vit, train, row) < 3
    save_model(vit, tmp_path / "vit")
    recipe = finetune.Recipe(data="parts", image_size=64, start=str(tmp_path / "vit"))
    net = finetune.build(recipe, 10).eval()
    images = torch.randn(2, 3, 64, 64)
    tokens = vit.eval().encoder.vit(images, taps=[2]).taps[2][:, 1:]
    torch.testing.assert_close(net.features(images), torch.nn.functional.layer_norm(tokens.mean(1), (16,), eps=1e-6))
    scales = {round(group["lr_scale"], 4) for group in fine_tuning_groups(net, 0.5, 0.05)}
    assert scales == {1.0, 0.5, 0.25, 0.125}
    assert finetune.build(replace(recipe, image_size=96), 3)(torch.randn(1, 3, 96, 96)).shape == (1, 3)
    with pytest.raises(ValueError, match="expected a model with backbone='vit'"):
        plain_classifier(pretrain.build(tiny(tmp_path), [5]), 3)


@pytest.mark.parametrize("plain", [False, True])
def test_received_attention_is_that_of_explicit_products(plain: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"backbone": "vit", "stage_patch": (16,), "stage_dims": (16,), "stage_depths": (1,), "mlp_ratio": (4,), "num_heads": 2}
    model = MRMAE(64, **shape, targets="mimic", teacher_dims=[3]) if plain else pretrain.build(tiny(tmp_path), [5])
    model, images = model.eval(), torch.randn(2, 3, 64, 64)
    attention = (model.encoder.vit.stack.blocks if plain else model.encoder.blocks3)[-1].attn
    attention.fused_attn = False
    weights: list[Tensor] = []
    attention.attn_drop.register_forward_pre_hook(lambda _, given: weights.append(given[0]))
    received = pictures.received_attention(model, images)
    among = weights[0][..., int(plain) :, int(plain) :]  # without the class token
    torch.testing.assert_close(received, (among / among.sum(-1, keepdim=True)).mean((1, 2)))
    torch.testing.assert_close(received.sum(1), torch.ones(2))


def test_randaugment_is_bicubic_as_the_crop(tmp_path: Path) -> None:
    recipe = finetune.Recipe(data="parts", image_size=64)
    policy = finetune.Augmented(pretrain.load("parts", "train", limit=2), recipe).policy
    assert {op.kwargs["resample"] for op in policy.ops if "resample" in op.kwargs} == {Resampling.BICUBIC}


@pytest.mark.parametrize("protocol", ["finetune", "linear_probe"])
def test_fine_tuning_and_probing_start_from_a_run_and_learn(tmp_path: Path, records: Path, protocol: Any) -> None:
    before = tiny(tmp_path, training=Training(steps=2))
    pretrain.main(before)
    recipe = read(finetune.Recipe, RECIPES / f"parts-{protocol.replace('_', '-')}.yaml", out=str(tmp_path), limit=48, batch_size=16)
    recipe = replace(recipe, start=str(before.folder), training=Training(epochs=2, log_every=1), seeds=[0])
    record = json.loads(finetune.main(recipe).read_text())
    assert (record["metric"], record["extra"]["row"]) == ("top-1 (%)", protocol)
    lines = [json.loads(line) for line in (recipe.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    assert read_records(finetune.main(recipe).parent)[-1]["values"] == record["values"]


def test_a_linear_probe_leaves_the_backbone_alone(tmp_path: Path) -> None:
    recipe = read(finetune.Recipe, RECIPES / "parts-linear-probe.yaml", out=str(tmp_path), start="none", limit=32, batch_size=16)
    recipe = replace(recipe, model=SMALL, training=Training(epochs=1))
    pictures = pretrain.load("parts", "train", limit=32)
    torch.manual_seed(recipe.seed)
    trained = finetune.train(recipe, pictures)
    fresh = finetune.train(replace(recipe, name="other", base_lr=1e-9), pictures)
    equal(trained.backbone, fresh.backbone)
    assert not torch.equal(trained.head[1].weight, fresh.head[1].weight)
    assert not trained.train().backbone.training


def test_fine_tuning_overfits_a_few_pictures(tmp_path: Path) -> None:
    recipe = read(finetune.Recipe, RECIPES / "parts-finetune.yaml", out=str(tmp_path), start="none", batch_size=16, base_lr=0.1)
    calm = finetune.Augmentation(randaugment=None, erasing=0.0, mixup=0.0, cutmix=0.0, smoothing=0.0)
    recipe = replace(recipe, model=SMALL, augmentation=calm, drop_path=0.0, layer_decay=1.0, training=Training(epochs=25, log_every=1))
    pictures = pretrain.load("parts", "train", limit=16)
    finetune.train(recipe, pictures)
    losses = [json.loads(line)["loss"] for line in (recipe.folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(2.303, abs=0.05)  # the head starts near zero: log 10
    assert losses[-1] < 2.0


# -- two processes


def _train(rank: int, out: str, batch: int) -> dict[str, Tensor]:
    recipe = tiny(Path(out), batch_size=batch, limit=32, training=Training(steps=2, log_every=1), name="pair")
    return {name: value.clone() for name, value in pretrain.main(recipe).state_dict().items()}


def test_two_processes_end_with_one_model(two_processes: Any, tmp_path: Path) -> None:
    first, second = two_processes(_train, str(tmp_path), 8)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def _gradient(rank: int, halves: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = MRMAE(32, **{**SMALL.settings(), "stage_patch": [2, 2, 2]}, teacher_dims=[5]).double()
    images, teacher, noise = (torch.randn(*shape, dtype=torch.float64) for shape in ((6, 3, 32, 32), (6, 16, 5), (6, 16)))
    rows = slice(2 * rank, 2 * rank + 2 + 2 * rank) if halves else slice(6)  # two and four samples
    net = DistributedDataParallel(model) if halves else model
    mask = random_mask(len(images[rows]), 16, 0.75, noise=noise[rows])
    out = net(images[rows], [teacher[rows]], mask)
    count = len(images[rows])
    loss = mean_over_processes(out.loss * count, count) if halves else out.loss
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_two_processes_give_the_gradient_of_one(two_processes: Any) -> None:
    both = two_processes(_gradient, True)
    alone = _gradient(0, False)
    for name, gradient in alone.items():
        for one in both:
            torch.testing.assert_close(one[name], gradient, rtol=1e-8, atol=1e-11, msg=name)


# -- bad input


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("targets: pixels", "targets=pixels: expected no teachers"),
        ("teachers: []", "targets=both: expected at least one teacher"),
        ("{targets: pixels, teachers: [], focus: top}", "focus=top: expected a teacher"),
        ("teachers: [{spec: oracle}]", "teacher oracle: expected data parts"),
        ("mask_ratio: 1.5", "mask_ratio"),
        ("mask_ratio: 0.999", "ratio=0.999 keeps 0 of 196 tokens"),
        ("image_size: 225", "image_size=225: expected a multiple of the patch of 16 pixels; the nearest are 224 and 240"),
        ("warmup: 1.0", "warmup=1.0"),
        ("maskratio: 0.5", "maskratio"),
        ("model: {size: giant}", "giant"),
    ],
)
def test_recipes_with_a_wrong_value_name_it(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text + "\n")
    with pytest.raises(ValueError, match=message):
        read(pretrain.Recipe, tmp_path / "r.yaml")


def test_a_loss_that_is_not_finite_stops_with_term_rate_and_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = MRMAE.forward

    def broken(self: MRMAE, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        return replace(out, mimic=out.mimic * float("nan"))

    monkeypatch.setattr(MRMAE, "forward", broken)
    with pytest.raises(NonFiniteLoss, match=r"step 0: term 'mimic' is nan.*learning rate was .*training.precision=bf16"):
        pretrain.main(tiny(tmp_path))


def test_starts_that_do_not_fit_are_named(tmp_path: Path) -> None:
    recipe = finetune.Recipe(data="parts", image_size=64, start=str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="no such run or file; pre-train it first"):
        finetune.build(recipe, 10)
    pretrain.main(tiny(tmp_path, training=Training(steps=1)))
    with pytest.raises(ValueError, match=r"begun with another recipe: .*mask_ratio"):
        pretrain.main(tiny(tmp_path, training=Training(steps=1), mask_ratio=0.5))
    model = load_model(MRMAE, tiny(tmp_path).folder)
    state = {name: value for name, value in reference_state(model).items() if not name.startswith("decoder")}
    torch.save(state, tmp_path / "encoder.pth")
    begun = tiny(tmp_path, name="begun", start=str(tmp_path / "encoder.pth"), training=Training(steps=1, log_every=1), base_lr=1e-9)
    with pytest.warns(UserWarning, match=r"an encoder alone; decoder \(mask token too\) keep their initial values"):
        found = pretrain.main(begun)
    torch.testing.assert_close(found.encoder.patch_embed1.proj.weight, model.encoder.patch_embed1.proj.weight, atol=1e-6, rtol=0)
