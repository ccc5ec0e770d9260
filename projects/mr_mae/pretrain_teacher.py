"""A teacher trained here, where no DINO or CLIP weights are at hand: a timm network by SimCLR on the same pictures, without labels.

`python -m projects.mr_mae.pretrain_teacher --config projects/mr_mae/recipes/cifar10-teacher.yaml --data-root D`; its run folder is then the `weights`
of a teacher `timm:<model>` with the same settings. It is a weak stand-in, and stands in tables under its own name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from common.checkpoint import save_model
from common.contrastive import nt_xent, projection_head, unit
from common.engine import Training, budget, fit, seed_everything
from common.recipe import parse, to_yaml
from common.schedule import cosine
from projects.mr_mae.data import HALF, Name, Pictures, load, normalised, view
from projects.mr_mae.pretrain import is_main
from projects.mr_mae.teachers import IMAGENET, Statistics


@dataclass(frozen=True)
class Recipe:
    """SimCLR of a small network."""

    name: str = "cifar10-teacher"
    """Of the run folder."""
    data: Name = "cifar10"
    """Data set."""
    image_size: PositiveInt = 32
    """Pixels a side."""
    limit: PositiveInt | None = None
    """Training pictures; not given: all."""
    model: str = "resnet10t"
    """timm's name."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm.create_model."""
    width: PositiveInt = 64
    """Outputs of the projection head."""
    temperature: PositiveFloat = 0.2
    """Of NT-Xent."""
    batch_size: PositiveInt = 256
    """Pictures a process."""
    lr: PositiveFloat = 2e-3
    """AdamW's peak."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW's."""
    training: Training = field(default_factory=lambda: Training(epochs=20))
    """Length and arithmetic."""
    seed: NonNegativeInt = 0
    """Of weights, crops and shuffles."""
    workers: NonNegativeInt = 0
    """Processes that read pictures."""
    data_root: str | None = None
    """Folder of the data sets; default: the environment variable CONTRAMASK_DATA."""
    out: str = "runs/mr_mae"
    """Where run folders go."""

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.name / f"seed-{self.seed}"


class Contrastive(nn.Module, PyTorchModelHubMixin):
    """A timm network and a projection head."""

    def __init__(self, model: str, settings: dict[str, Any] | None = None, width: int = 64) -> None:
        super().__init__()
        import timm

        self.net = timm.create_model(model, num_classes=0, **(settings or {}))
        dim = self.net.num_features
        self.head = projection_head((dim, dim, width), batch_norm=True)

    def forward(self, images: Tensor) -> Tensor:
        """Unit rows (B, width)."""
        return unit(self.head(self.net(images)))


class TwoViews(Dataset[Tensor]):
    """Two distorted views (2, 3, S, S) of each picture: crop, mirror, colour jitter, grey."""

    def __init__(self, pictures: Pictures, size: int, statistics: Statistics) -> None:
        from torchvision.transforms import v2

        self.pictures, self.size, self.statistics = pictures, size, statistics
        self.distort = v2.Compose([v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8), v2.RandomGrayscale(0.2)])

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        image = self.pictures.images[index]
        return torch.stack([normalised(self.distort(view(image, self.size, "crop")), self.statistics) for _ in range(2)])


def main(recipe: Recipe) -> Contrastive:
    """Train, or go on, or return the finished network; leaves config.json and model.safetensors in the run folder."""
    pictures = load(recipe.data, "train", data_root=recipe.data_root, limit=recipe.limit, seed=recipe.seed)
    statistics = HALF if recipe.data == "parts" else IMAGENET
    seed_everything(recipe.seed)
    model = Contrastive(recipe.model, recipe.settings, int(recipe.width))
    loader = DataLoader(
        TwoViews(pictures, recipe.image_size, statistics), recipe.batch_size, shuffle=True, drop_last=True, num_workers=recipe.workers
    )
    plan = budget(loader, recipe.training)

    def loss(net: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        first, second = net(batch.transpose(0, 1).flatten(0, 1)).chunk(2)
        return {"loss": nt_xent(first, second, 1 / recipe.temperature, gather="full")}

    fitted = fit(
        model,
        loss,
        loader,
        torch.optim.AdamW(model.parameters(), lr=float(recipe.lr), weight_decay=float(recipe.weight_decay)),
        recipe.training,
        recipe.folder,
        recipe=recipe,
        seed=recipe.seed,
        lr_at=lambda step: cosine(step, total=plan.total, peak=float(recipe.lr), warmup=plan.total / 10),
    )
    if is_main():
        save_model(fitted.model, recipe.folder, recipe=to_yaml(recipe))
    return fitted.model


if __name__ == "__main__":
    main(parse(Recipe))
