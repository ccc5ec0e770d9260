"""Optimiser groups and learning rate of both stages (Sec. 5 of the training recipes)."""

from __future__ import annotations

import re
from typing import Any

import torch

from common.schedule import cosine
from projects.hicmae.emotion import EmotionModel
from projects.hicmae.model import HiCMAE

KEPT_FROM_DECAY = ("decoder.mask_token",)
"""The reference spares `mask_token` by name and forgets `mask_token_audio`, which decays."""


def layer_of(name: str, depth: int) -> int:
    """Position of a fine-tuning parameter: 0 patch embedding, block + 1, depth + block + 1 in the fusion encoder; -1 = above all layers."""
    if re.match(r"encoder(_audio)?\.embed\.", name):
        return 0
    if found := re.match(r"encoder(?:_audio)?\.stack\.blocks\.(\d+)\.", name):
        return int(found[1]) + 1
    if found := re.match(r"encoder_fusion\.blocks(?:_audio)?\.(\d+)\.", name):
        return depth + int(found[1]) + 1
    return -1


def groups(model: HiCMAE | EmotionModel, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Parameter groups with `weight_decay`, `lr_scale` and the `names` of their parameters.

    1-D tensors, biases and the video's mask token do not decay. Layer decay (fine-tuning): scale layer_decay^(L + 1 - i) with L = deeper encoder + fusion
    layers; final norms, level weights and head have scale 1.
    """
    stacks = [len(getattr(model, part).stack.blocks) for part in ("encoder", "encoder_audio") if hasattr(model, part)]
    depth = max(stacks)
    layers = depth + (len(model.encoder_fusion.blocks) if hasattr(model, "encoder_fusion") else 0)
    found: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        spared = parameter.ndim <= 1 or name.endswith("bias") or name in KEPT_FROM_DECAY
        layer = layer_of(name, depth)
        scale = 1.0 if layer < 0 or layer_decay == 1 else layer_decay ** (layers + 1 - layer)
        key = (scale, 0.0 if spared else float(weight_decay))
        group = found.setdefault(key, {"params": [], "names": [], "lr_scale": key[0], "weight_decay": key[1]})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(found.values())


def adamw(
    model: HiCMAE | EmotionModel, lr: float, weight_decay: float, *, layer_decay: float = 1.0, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.AdamW:
    """AdamW over `groups`."""
    made = [{k: v for k, v in group.items() if k != "names"} for group in groups(model, weight_decay, layer_decay)]
    return torch.optim.AdamW(made, lr=float(lr), betas=betas, eps=1e-8, fused=True)


def lr_at(step: int, *, total: int, warmup: int, peak: float, final: float) -> float:
    """From 0 at step 0 to `peak` at step warmup - 1, then half a cosine from `peak` towards `final`, which step `total` would reach."""
    if step < warmup:
        return peak * step / (warmup - 1) if warmup > 1 else 0.0
    return cosine(step - warmup, total=total - warmup, peak=peak, final=final)
