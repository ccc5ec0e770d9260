"""The encoder under a linear classifier: fine-tuning, and the paper's fully supervised baselines."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projects.g_simclr.encoders import KERAS_MOMENTUM, frozen_statistics, glorot_uniform, pooled


@dataclass
class Classified:
    """`loss`: 0-d mean cross entropy. `accuracy`: 0-d share of images whose largest logit is their label's. `logits`: (B, classes)."""

    loss: Tensor
    accuracy: Tensor
    logits: Tensor


class Classifier(nn.Module):
    """Encoder, mean over space, one dense layer.

    Args:
        encoder: with `dim`, from `encoders.build`.
        classes: number of outputs.
        last_norm: a batch norm and a ReLU before the mean, as the supervised CIFAR baseline has.
        frozen: batch norms keep their moving statistics in training too (fine-tuning).
    """

    def __init__(self, encoder: nn.Module, classes: int, *, last_norm: bool = False, frozen: bool = False) -> None:
        super().__init__()
        self.encoder, self.frozen = encoder, frozen
        norm = [nn.BatchNorm2d(encoder.dim, 1e-3, KERAS_MOMENTUM), nn.ReLU(inplace=True)] if last_norm else []
        self.norm = nn.Sequential(*norm)
        self.linear = nn.Linear(encoder.dim, classes)
        glorot_uniform(self.linear)
        self.requires_grad_().to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        if self.frozen:
            frozen_statistics(self)
        return self

    def forward(self, images: Tensor, labels: Tensor) -> Classified:
        """Images (B, C, H, W) in 0..1, labels (B,)."""
        logits = self.logits(images)
        return Classified(F.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean(), logits)

    def features(self, images: Tensor) -> Tensor:
        """What the dense layer sees: (B, C, H, W) -> (B, dim)."""
        return pooled(self.norm(self.encoder(images.contiguous(memory_format=torch.channels_last))))

    def logits(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, classes); evaluation calls it, as mixed precision wraps `forward` alone."""
        return self.linear(self.features(images))
