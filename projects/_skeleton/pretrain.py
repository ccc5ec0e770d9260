"""Train one seed: `python -m projects._skeleton.pretrain --config projects/_skeleton/recipes/demo.yaml`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from jsonargparse.typing import OpenUnitInterval, PositiveFloat, PositiveInt
from torch.utils.data import DataLoader, TensorDataset

from common.checkpoint import save_model
from common.engine import Training, budget, fit, seed_everything
from common.recipe import parse, to_yaml
from common.schedule import cosine
from projects._skeleton.data import digits
from projects._skeleton.model import MaskedAutoencoder


@dataclass(frozen=True)
class Recipe:
    """Pre-training on digits."""

    name: str = "demo"
    """Of the run folder."""
    seed: int = 0
    """Of weights, masks and shuffles."""
    mask_ratio: OpenUnitInterval = 0.5
    """Share of patches hidden."""
    batch_size: PositiveInt = 128
    """Samples a process."""
    lr: PositiveFloat = 5e-3
    """Peak learning rate."""
    training: Training = field(default_factory=lambda: Training(epochs=60))
    """Budget and arithmetic."""
    out: str = "runs/_skeleton"
    """Folder of the runs."""

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.name / f"seed-{self.seed}"


def main(recipe: Recipe) -> MaskedAutoencoder:
    """Train, or go on, or return the finished model; leaves config.json and model.safetensors in the run folder."""
    seed_everything(recipe.seed)
    model = MaskedAutoencoder(mask_ratio=recipe.mask_ratio)
    loader = DataLoader(TensorDataset(digits().train[0]), batch_size=recipe.batch_size, shuffle=True, drop_last=True)
    plan = budget(loader, recipe.training)
    fitted = fit(
        model,
        lambda net, batch: {"loss": net(batch[0]).loss},
        loader,
        torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.05),
        recipe.training,
        recipe.folder,
        recipe=recipe,
        seed=recipe.seed,
        lr_at=lambda step: cosine(step, total=plan.total, peak=recipe.lr, warmup=plan.total // 10),
    )
    save_model(fitted.model, recipe.folder, recipe=to_yaml(recipe))
    return model


if __name__ == "__main__":
    main(parse(Recipe))
