"""Fine-tune with a share of the labels, or train the fully supervised baseline: test accuracy over seeds, recorded.

`python -m projects.g_simclr.finetune --config projects/g_simclr/recipes/cifar10-finetune.yaml --data-root D` pre-trains what is missing.
Two stages: the classifier alone on frozen features, then everything with batch norms keeping their moving statistics. No augmentation.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeInt, OpenUnitInterval, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from common.checkpoint import write_text
from common.engine import Training, check_recipe, mean_over_processes, seed_everything
from common.probes import accuracy, summarise
from common.recipe import parse, read, to_yaml
from common.results import Record, save_record
from projects.g_simclr import pretrain
from projects.g_simclr.classifier import Classifier
from projects.g_simclr.data import Images, Splits, load
from projects.g_simclr.encoders import Name, build
from projects.g_simclr.evaluate import METRICS, is_main, label, linear_probe
from projects.g_simclr.pretrain import Arm
from projects.g_simclr.stopping import fit_until_flat

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """Fine-tuning of a pre-trained encoder, or supervised training from scratch; defaults are CIFAR-10's."""

    name: str = "cifar10-finetune"
    """Name of the recipe: its file's, and the run folder's."""
    start: str = "cifar10"
    """Pre-training recipe (its file's name), or `none`: the baseline with all labels."""
    arms: list[Arm] = field(default_factory=lambda: ["balanced", "random"])
    """Compositions of batches whose encoders are fine-tuned."""
    share: OpenUnitInterval = 0.1
    """Of the labels; not of the baseline."""
    replacement: bool = False
    """Draw them with replacement, as published for the ImageNet subset."""
    head_epochs: PositiveInt = 35
    """At most, of the classifier alone."""
    head_lr: PositiveFloat = 1e-3
    """Adam's, of the classifier alone."""
    training: Training = field(default_factory=lambda: Training(epochs=35))
    """At most, of all layers."""
    lr: PositiveFloat = 1e-5
    """Adam's, of all layers (baseline: 1e-3)."""
    batch_size: PositiveInt = 64
    """Images of a process and step."""
    patience: PositiveInt = 2
    """Epochs without a lower loss on held-out images before a stage ends and its best weights return."""
    data: str = "cifar10"
    """Of the baseline, as are the next five; a start brings its own."""
    image_size: PositiveInt | None = None
    """Resize images to this side."""
    encoder: Name = "cifar-resnet"
    """Of the baseline."""
    blocks: PositiveInt = 2
    """Of cifar-resnet."""
    last_norm: bool = False
    """A batch norm and a ReLU before the mean (CIFAR-10's baseline)."""
    width: PositiveInt = 64
    """Of resnet18 and resnet50."""
    protocol: Literal["validation", "reference"] = "validation"
    """validation or reference, as in pre-training; a start brings its own."""
    seeds: list[NonNegativeInt] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of a row."""
    seed: NonNegativeInt = 0
    """Of one run."""
    data_root: str | None = None
    """Folder of the data sets; default: the environment variable CONTRAMASK_DATA."""
    cache: str | None = None
    """Folder for decoded copies; default: the user's cache folder."""
    out: str = "runs/g_simclr"
    """Where run folders go."""


class Labelled(Dataset[tuple[Tensor, Tensor]]):
    """Images with their labels."""

    def __init__(self, images: Images) -> None:
        self.images, self.labels = images, images.known()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


def subset(images: Images, share: float, seed: int, replacement: bool = False) -> Images:
    """A random share of the images, not stratified, as published; warns where a class is missed."""
    count, generator = max(1, round(share * len(images))), torch.Generator().manual_seed(seed)
    if replacement:
        numbers = torch.randint(len(images), (count,), generator=generator)
    else:
        numbers = torch.randperm(len(images), generator=generator)[:count]
    part = images.part(numbers)
    if absent := sorted(set(range(len(images.classes))) - set(part.known().tolist())):
        warnings.warn(f"{images.name}: {count} labelled images hold none of {', '.join(images.classes[c] for c in absent)}", stacklevel=2)
    return part


@torch.no_grad()
def _over(images: Images, function: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
    return torch.cat([function(part.to(device)) for part in images.batches()])


def train_head(model: Classifier, train: Images, held_out: Images, recipe: Recipe) -> None:
    """Stage 1: the classifier on frozen features, which are computed once."""
    device = next(model.parameters()).device
    model.eval()
    given = [(_over(part, model.features, device), part.known().to(device)) for part in (train, held_out)]
    found = linear_probe(
        *given,
        given[1],
        classes=len(train.classes),
        epochs=recipe.head_epochs,
        lr=recipe.head_lr,
        batch_size=recipe.batch_size,
        patience=recipe.patience,
        seed=recipe.seed,
    )
    model.linear.load_state_dict(found.head.state_dict())


def train_all(model: Classifier, train: Images, held_out: Images, recipe: Recipe, folder: Path) -> Classifier:
    """Stage 2, or the baseline: every weight, until the held-out loss no longer falls."""
    # a last batch of one image has no batch statistics where the feature map is 1 x 1
    loader = DataLoader(
        Labelled(train), batch_size=recipe.batch_size, shuffle=True, drop_last=len(train) % recipe.batch_size == 1 < len(train)
    )
    truth = held_out.known()

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        out = net(train.floats(batch[0]), batch[1])
        return {"loss": mean_over_processes(out.loss * len(batch[1]), len(batch[1])), "accuracy": out.accuracy}

    def validation(net: Classifier) -> dict[str, float]:
        logits = _over(held_out, net.logits, next(net.parameters()).device).cpu()
        return {
            "validation_loss": float(nn.functional.cross_entropy(logits, truth)),
            "validation_accuracy": accuracy(truth, logits.argmax(1)),
        }

    optimizer = torch.optim.Adam(model.parameters(), lr=float(recipe.lr), eps=1e-7)
    return fit_until_flat(
        model, loss, loader, optimizer, recipe.training, folder, validation, patience=recipe.patience, recipe=recipe, seed=recipe.seed
    )[0]


def started(recipe: Recipe) -> pretrain.Recipe | None:
    """The pre-training that the recipe starts from, for its seed and first arm; None for the baseline."""
    if recipe.start == "none":
        return None
    path = RECIPES / f"{recipe.start}.yaml"
    base = read(pretrain.Recipe, path, data_root=recipe.data_root, cache=recipe.cache, out=recipe.out)
    return pretrain.one_run(base, recipe.seed, recipe.arms[0])


def score(recipe: Recipe, splits: Splits, protocol: str) -> dict[str, Any]:
    """Train one seed of one arm, or read what an earlier call found: test accuracy in per cent, seconds without pre-training."""
    recipe = replace(recipe, seeds=[recipe.seed])
    arm = recipe.arms[0] if recipe.start != "none" else "supervised"
    folder = Path(recipe.out) / recipe.name / arm / f"seed-{recipe.seed}"
    check_recipe(folder, to_yaml(recipe))
    if (kept := folder / "score.json").is_file():
        return json.loads(kept.read_text())
    train, held_out = (splits.train, splits.test) if protocol == "reference" else splits.held_out()
    source = started(recipe)
    pretrained = None if source is None else pretrain.main(source, splits).encoder
    began = time.monotonic()
    if pretrained is None:
        seed_everything(recipe.seed)
        encoder = build(recipe.encoder, channels=train.pixels.shape[1], blocks=recipe.blocks, width=recipe.width)
        model = Classifier(encoder, len(train.classes), last_norm=recipe.last_norm)
    else:
        train = subset(train, recipe.share, recipe.seed, recipe.replacement)
        model = Classifier(pretrained, len(train.classes), frozen=True).to(next(pretrained.parameters()).device)
        train_head(model, train, held_out, recipe)
    model = train_all(model, train, held_out, recipe, folder).eval()
    logits = _over(splits.test, model.logits, next(model.parameters()).device).cpu()
    found = {"value": 100 * accuracy(splits.test.known(), logits.argmax(1)), "seconds": round(time.monotonic() - began, 1)}
    if is_main():
        write_text(kept, json.dumps(found))
    return found


def main(recipe: Recipe) -> Path | None:
    """Every seed and arm; gives the records' file (None on processes other than the first)."""
    base = started(recipe)
    data, size, protocol = (base.data, base.image_size, base.protocol) if base else (recipe.data, recipe.image_size, recipe.protocol)
    splits = load(data, data_root=recipe.data_root, image_size=size, cache=recipe.cache)
    path = None
    for arm in recipe.arms if base else recipe.arms[:1]:
        row = f"{label(arm)} fine-tune" if base else "supervised"
        scores = {seed: score(replace(recipe, seed=seed, arms=[arm]), splits, protocol) for seed in recipe.seeds}
        values = [s["value"] for s in scores.values()]
        print(f"{recipe.name}, {row}: {summarise(values)} {METRICS['linear']}", flush=True)
        if not is_main():
            continue
        record = Record(
            recipe=f"recipes/{recipe.name}.yaml",
            metric=METRICS["linear"],
            values=values,
            seeds=recipe.seeds,
            weights="trained here",
            data={"name": data, "split": "test", "sha256": f"train {splits.train.sha256}, test {splits.test.sha256}"},
            hours=sum(s["seconds"] for s in scores.values()) / 3600,
            extra={
                "row": row,
                "labels": recipe.share if base else 1.0,
                "protocol": f"stopped on {'test' if protocol == 'reference' else 'held-out training'} images",
            },
        )
        path = save_record("g_simclr", record)
    return path


if __name__ == "__main__":
    main(parse(Recipe))
