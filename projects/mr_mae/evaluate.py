"""Obtain a row: pre-train the seeds that are missing, probe the frozen encoder, save the records, print them.

`python -m projects.mr_mae.evaluate --config projects/mr_mae/recipes/demo.yaml`; full fine-tuning and the paper's linear probe: `projects.mr_mae.finetune`.
Probes: logistic regression to its optimum and k-NN on the mean of all tokens of the whole image, the third stage's without multi-scale sum and final norm,
as the reference's probe has it, or the encoder's output.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor

from common.checkpoint import load_model, write_text
from common.engine import check_recipe, seed_everything
from common.kernels.patch_loss import patch_loss
from common.masking import random_mask
from common.probes import accuracy, knn_classify, linear_probe_lbfgs, summarise
from common.recipe import parse, to_yaml
from common.results import Record, picture_path, save_record
from projects.mr_mae import pictures, pretrain
from projects.mr_mae.classifier import Classifier
from projects.mr_mae.data import Pictures, centre, load, normalised
from projects.mr_mae.model import MRMAE, PlainEncoder
from projects.mr_mae.weights import load_reference, reference_state, shape_of

Embed = Callable[[Tensor], Tensor]
Variant = Literal["random", "teacher", "pixels", "mimic", "entangled", "focused", "focused-top"]
VARIANTS: dict[str, dict[str, Any]] = {
    "pixels": {"targets": "pixels", "teachers": []},
    "mimic": {"targets": "mimic"},
    "entangled": {"targets": "entangled"},
    "focused": {"focus": "sample"},
    "focused-top": {"focus": "top"},
}
LINEAR, KNN, PIXEL = "linear probe (%)", "k-NN (%)", "pixel error"


@dataclass(frozen=True)
class Recipe:
    """A row: MR-MAE over its seeds, and what is measured beside it at the same budget."""

    name: str = "demo"
    """Of the recipe's file; records of `demo` go to the report, those of all others to the project's results."""
    pretrain: pretrain.Recipe = field(default_factory=pretrain.Recipe)
    """Of each seed's training; its name and seed are set here."""
    seeds: list[NonNegativeInt] = field(default_factory=lambda: [0, 1, 2])
    """Runs to average."""
    compare: list[Variant] = field(default_factory=list)
    """Untrained encoder; the teacher itself; pixels alone (ConvMAE); mimic alone; both targets on hidden tokens; visible tokens chosen by the teacher's attention."""
    features: Literal["tokens", "fused"] = "tokens"
    """What is probed: the third stage's tokens, or the encoder's output with the multi-scale sum and norm."""
    probe_limit: PositiveInt | None = None
    """Training pictures of the probe; not given: all of the data set's (parts: those of pre-training)."""
    test_limit: PositiveInt | None = None
    """Test pictures; not given: all."""
    neighbours: PositiveInt = 20
    """k."""
    data_root: str | None = None
    """Folder of the data sets; default: the environment variable CONTRAMASK_DATA."""
    out: str = "runs/mr_mae"
    """Where run folders go."""


def classifier_of(model: MRMAE, classes: int = 0, **settings: Any) -> Classifier:
    """A classifier with the encoder of a pre-trained model (ConvMAE backbone)."""
    state = reference_state(model)
    net = Classifier(classes, **shape_of(state) | {"num_heads": model.encoder.num_heads} | settings)
    load_reference(net, state)
    return net


def encoder_of(model: MRMAE, recipe: Recipe) -> Embed:
    """Images -> features (B, D) of a pre-trained model, as the recipe asks for them."""
    device = pretrain.processes().device
    if recipe.features == "tokens" and not isinstance(model.encoder, PlainEncoder):
        return classifier_of(model).eval().to(device)
    encoder = model.eval().encoder.to(device)

    def run(images: Tensor) -> Tensor:
        tokens = encoder(images).tokens.mean(1)
        return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)

    return run


def teacher_of(recipe: pretrain.Recipe) -> Embed:
    """Images -> mean of the first teacher's tokens (B, Dt)."""
    if recipe.teachers[0].spec == "oracle":
        raise ValueError("compare teacher: expected a network, found the oracle, which sees no pixels")
    teacher = pretrain.teacher_of(recipe, recipe.teachers[0])
    return lambda images: teacher(images, pretrain.grid_of(recipe)).tokens.mean(1)


@torch.inference_mode()
def embed(run: Embed, data: Pictures, recipe: Recipe) -> Tensor:
    """(n, D) features of whole pictures in their evaluation view."""
    device, rows = pretrain.processes().device, []
    for numbers in torch.arange(len(data)).split(128):
        images = torch.stack([centre(data.images[int(i)], recipe.pretrain.image_size) for i in numbers])
        rows.append(run(normalised(images, recipe.pretrain.statistics).to(device)).cpu())
    return torch.cat(rows)


@torch.inference_mode()
def pixel_error(model: MRMAE, data: Pictures, recipe: Recipe, count: int = 512) -> float:
    """Mean pixel loss on hidden patches of the first `count` pictures; random masks from seed 0, the same for every model."""
    generator, device = torch.Generator().manual_seed(0), pretrain.processes().device
    model = model.eval().to(device)
    errors = []
    for numbers in torch.arange(min(count, len(data))).split(64):
        images = torch.stack([centre(data.images[int(i)], recipe.pretrain.image_size) for i in numbers])
        images = normalised(images, recipe.pretrain.statistics).to(device)
        mask = random_mask(len(images), model.count, model.mask_ratio, generator=generator, device=device)
        guess = model.decoder(model.encoder(images, mask).tokens, mask)[..., : model.pixels].contiguous()
        errors.append(patch_loss(guess, images, mask.masked, model.patch, normalise="patch" if model.norm_pix else "none").mean((1, 2)))
    return float(torch.cat(errors).mean())


def probe(run: Embed, recipe: Recipe, train: Pictures, test: Pictures) -> dict[str, float]:
    """Test accuracies in per cent of a logistic regression and of k nearest neighbours on frozen features."""
    seen, unseen = (embed(run, part, recipe).clone() for part in (train, test))
    classes = len(train.classes)
    neighbours = knn_classify(seen, train.labels, unseen, k=recipe.neighbours, classes=classes).argmax(1)
    # one ridge for all: that of scikit-learn's C = 1 is too weak for some of these features to converge
    linear = linear_probe_lbfgs((seen, train.labels), (unseen, test.labels), classes=classes, l2=1e-3, max_iter=300, tolerance=1e-5)[1]
    return {LINEAR: 100 * linear, KNN: 100 * accuracy(test.labels, neighbours)}


def run_of(recipe: Recipe, variant: str, seed: int) -> pretrain.Recipe:
    """The pre-training recipe of one run."""
    suffix = {"both": "", "teacher": "-probed-teacher"}  # <name>-teacher is where pretrain_teacher trained it
    name = recipe.name + suffix.get(variant, f"-{variant}")
    return replace(recipe.pretrain, name=name, seed=seed, data_root=recipe.data_root, out=recipe.out, **VARIANTS.get(variant, {}))


def score_seed(recipe: Recipe, variant: str, seed: int) -> dict[str, Any]:
    """Train and probe one run, or read what an earlier call found; kept in the run folder as score.json."""
    run = run_of(recipe, variant, seed)
    kept = run.folder / "score.json"
    settings = {
        "features": recipe.features,
        "probe_limit": recipe.probe_limit,
        "test_limit": recipe.test_limit,
        "neighbours": int(recipe.neighbours),
    }
    check_recipe(run.folder, to_yaml(run))
    if kept.is_file() and (found := json.loads(kept.read_text()))["settings"] == settings:
        return found
    spent, model = 0.0, None
    if variant == "random":
        seed_everything(seed)
        model = pretrain.build(replace(run, targets="pixels", teachers=[], focus="none"), [])
    elif variant != "teacher":
        model = pretrain.main(run)
        spent = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    began = time.monotonic()
    limits = {"train": run.limit if run.data == "parts" else recipe.probe_limit, "test": recipe.test_limit}
    train, test = (load(run.data, split, data_root=run.data_root, limit=limits[split], seed=seed) for split in ("train", "test"))
    scores = probe(teacher_of(run) if model is None else encoder_of(model, recipe), recipe, train, test)
    if model is not None and model.decoder is not None and variant != "random":  # the pixels of an untrained decoder say nothing
        scores[PIXEL] = pixel_error(model, test, recipe)
    found = {"settings": settings, "scores": scores, "data": test.about}
    found["seconds"] = round(spent + time.monotonic() - began, 1)
    if pretrain.is_main():
        write_text(kept, json.dumps(found))
    return found


def record(recipe: Recipe, variant: str, metric: str, found: dict[int, dict[str, Any]]) -> Record:
    """One metric of one variant over the seeds."""
    first = next(iter(found.values()))
    about = dict(first["data"])
    if recipe.pretrain.data == "parts":
        about["sha256"] = "drawn from the seeds"
    return Record(
        recipe=f"recipes/{recipe.name}.yaml",
        metric=metric,
        values=[one["scores"][metric] for one in found.values()],
        seeds=list(found),
        weights="untrained" if variant == "random" else "trained here",
        data=about,
        hours=sum(one["seconds"] for one in found.values()) / 3600,
        extra={"row": variant, "features": recipe.features, "teachers": [t.spec for t in run_of(recipe, variant, 0).teachers]},
    )


def main(recipe: Recipe) -> dict[str, dict[str, list[float]]]:
    """Every seed of every variant; figures by variant and metric, saved as records."""
    demo = recipe.name == "demo"
    out: dict[str, dict[str, list[float]]] = {}
    for variant in ("both", *recipe.compare):
        found = {seed: score_seed(recipe, variant, seed) for seed in recipe.seeds}
        metrics = list(next(iter(found.values()))["scores"])
        out[variant] = {metric: [one["scores"][metric] for one in found.values()] for metric in metrics}
        if not pretrain.is_main():
            continue
        for metric in metrics:
            save_record("mr_mae", record(recipe, variant, metric, found), demo=demo)
        print(
            f"{recipe.name}, {variant}: " + "; ".join(f"{metric} {summarise(values)}" for metric, values in out[variant].items()),
            flush=True,
        )
    if pretrain.is_main():
        seed = recipe.seeds[0]
        model = load_model(MRMAE, run_of(recipe, "both", seed).folder)
        test = load(recipe.pretrain.data, "test", data_root=recipe.data_root, limit=64, seed=seed)
        untracked = demo or recipe.pretrain.data != "parts"  # real images are not published
        for draw in (pictures.reconstructions, pictures.mimicked, pictures.attended):
            draw(picture_path("mr_mae", f"{recipe.name}-{draw.__name__}", demo=untracked), model, test, recipe.pretrain)
        pictures.orderings(picture_path("mr_mae", f"{recipe.name}-orderings", demo=demo), out)
    return out


if __name__ == "__main__":
    main(parse(Recipe))
