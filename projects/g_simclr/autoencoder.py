"""The denoising autoencoder whose latent vectors are clustered (the paper's first stage).

Layers are registered in the reference's order of creation; see `weights.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from projects.g_simclr.encoders import KERAS_MOMENTUM, glorot_uniform

SHALLOW = {"widths": (32, 64, 128), "kernel": 3}  # CIFAR-10, and the paper's second choice for 224 x 224
DEEP = {"widths": (64, 128, 256, 512, 1024), "kernel": 5}  # ImageNet subset


@dataclass
class Reconstruction:
    """`loss`: 0-d mean squared error over all elements. `images`: (B, C, H, W) in 0..1. `latent`: (B, D, h, w)."""

    loss: Tensor
    images: Tensor
    latent: Tensor


class DenoisingAutoencoder(nn.Module, PyTorchModelHubMixin):
    """Convolution, batch norm, ReLU and pooling at each level, and back by nearest-neighbour up-sampling; sigmoid at the end.

    Args:
        channels: of the images.
        widths: channels of the levels; the side of the images must be a multiple of 2 ** len(widths).
        kernel: odd side of every convolution.
        noise: standard deviation of what is added to the input in training (not clipped afterwards).
        flat: cluster the flattened latent; else its mean over space, as the paper does.
    """

    def __init__(
        self,
        channels: int = 3,
        widths: Sequence[int] = (32, 64, 128),
        kernel: int = 3,
        noise: float = 0.01,
        flat: bool = False,
        eps: float = 1e-3,
        momentum: float = KERAS_MOMENTUM,
    ) -> None:
        super().__init__()
        self.noise, self.flat, self.multiple = noise, flat, 2 ** len(widths)

        def level(before: int, after: int) -> list[nn.Module]:
            return [nn.Conv2d(before, after, kernel, padding=kernel // 2), nn.BatchNorm2d(after, eps, momentum), nn.ReLU(inplace=True)]

        down = [[*level(before, after), nn.MaxPool2d(2)] for before, after in zip([channels, *widths], widths, strict=False)]
        back = list(widths)[::-1]
        up = [[nn.Upsample(scale_factor=2), *level(before, after)] for before, after in zip([back[0], *back], back, strict=False)]
        self.encoder = nn.Sequential(*(layer for part in down for layer in part))
        self.decoder = nn.Sequential(*(layer for part in up for layer in part), nn.Conv2d(widths[0], channels, kernel, padding=kernel // 2))
        self.apply(glorot_uniform)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Reconstruction:
        """Rebuild images (B, C, H, W) in 0..1 from noisy copies; in eval mode, or with `noise` zero, from themselves.

        Args:
            noise: what is added, of the images' shape; default: drawn in training, none in eval mode.
        """
        self.check(images)
        if noise is None and self.training:
            noise = self.noise * torch.randn_like(images)
        seen = images if noise is None else images + noise
        latent = self.encoder(seen.contiguous(memory_format=torch.channels_last))
        rebuilt = self.decoder(latent).sigmoid()
        return Reconstruction(F.mse_loss(rebuilt, images), rebuilt, latent)

    def embed(self, images: Tensor) -> Tensor:
        """What k-means sees: (B, C, H, W) -> (B, D), or (B, D h w) if `flat`. Call in eval mode."""
        self.check(images)
        latent = self.encoder(images.contiguous(memory_format=torch.channels_last))
        return latent.flatten(1) if self.flat else latent.mean(dim=(2, 3))

    def check(self, images: Tensor) -> None:
        """Raises ValueError where the sides cannot be halved at every level."""
        if images.ndim != 4 or any(side % self.multiple or side == 0 for side in images.shape[2:]):
            raise ValueError(
                f"images {tuple(images.shape)}: expected (B, C, H, W) with sides that are multiples of {self.multiple}; resize them (image_size)"
            )
