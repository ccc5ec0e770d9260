"""Training that ends when a validation loss no longer falls, from `common.engine.fit` called epoch by epoch (Keras' EarlyStopping)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from common.checkpoint import written_aside
from common.engine import Training, fit


def processes() -> PartialState:
    """The processes that run, on the device that `fit` will use."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def fit_until_flat(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Any],
    loader: DataLoader[Any],
    optimizer: Optimizer,
    training: Training,
    folder: Path,
    validation: Callable[[nn.Module], Mapping[str, float]],
    *,
    patience: int,
    recipe: object,
    seed: int = 0,
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train at most `training.epochs`, stop after `patience` epochs without a lower validation loss, restore the best weights.

    A stopped run goes on where it was: each epoch's figures stand in metrics.jsonl, its state in state/, the best weights in best.pt.

    Args:
        validation: unwrapped model in eval mode -> figures, `validation_loss` among them; called after each epoch.
    Returns:
        the model with its best weights, and the figures of each epoch.
    Raises:
        ValueError: a training given in steps.
    """
    if training.epochs is None:
        raise ValueError("training: expected epochs where training stops early, found steps")
    best = folder / "best.pt"
    scores: list[dict[str, float]] = []
    for epoch in range(1, training.epochs + 1):
        if epoch <= len(scores):
            continue
        fitted = fit(
            model,
            loss,
            loader,
            optimizer,
            replace(training, epochs=epoch, checkpoint_every=None),
            folder,
            recipe=recipe,
            seed=seed,
            evaluate=lambda net, _epoch: validation(net),
            evaluate_every=1,
        )
        scores = [line for line in fitted.history if "validation_loss" in line]
        losses = [line["validation_loss"] for line in scores]
        lowest = losses.index(min(losses))
        if lowest == len(losses) - 1 and processes().is_main_process:
            with written_aside(best) as aside:
                torch.save(fitted.model.state_dict(), aside)
        if len(losses) - 1 - lowest >= patience:
            break
    processes().wait_for_everyone()
    model.load_state_dict(torch.load(best, map_location="cpu", weights_only=True))
    return model, scores
