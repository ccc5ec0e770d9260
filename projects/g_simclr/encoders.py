"""Encoders: the paper's ResNet for 32 x 32 images, Keras' ResNet-50, timm's ResNets with either stem, and a small one for digits.

Each maps images (B, C, H, W) to a feature map (B, dim, h, w) and has its width as `dim`. Layers are registered in the order in which the
reference creates them (a block's shortcut first), which is how `weights.py` finds them in official checkpoints.
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KERAS_MOMENTUM = 0.01  # Keras' 0.99 keeps the old value's share, PyTorch's takes the new one's
Name = Literal["cifar-resnet", "keras-resnet50", "resnet18", "resnet50", "small"]


def he_normal(module: nn.Module) -> None:
    """Keras' He normal: truncated at two deviations, and scaled so that the deviation after truncation is sqrt(2 / fan_in); zero bias."""
    if isinstance(module, nn.Conv2d):
        deviation = (2 / module.weight[0].numel()) ** 0.5 / 0.87962566103423978
        nn.init.trunc_normal_(module.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
        nn.init.zeros_(module.bias)


def glorot_uniform(module: nn.Module) -> None:
    """Keras' default for convolutions and dense layers; zero bias."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class SameConv(nn.Conv2d):
    """3 x 3 convolution with TensorFlow's "same" padding: at stride 2 on an even side it pads right and bottom only."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__(before, after, 3, stride, padding=1 if stride == 1 else 0)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride[0] > 1:
            high, wide = (
                max((-(-side // stride) - 1) * stride + 3 - side, 0) for side, stride in zip(x.shape[2:], self.stride, strict=True)
            )
            x = F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
        return super().forward(x)


class CifarBlock(nn.Module):
    """Bottleneck of the paper's CIFAR network; the shortcut has no batch norm, the stride sits in the 3 x 3 convolution."""

    def __init__(self, before: int, width: int, expansion: int, stride: int, project: bool, eps: float, momentum: float) -> None:
        super().__init__()
        after = width * expansion
        self.shortcut = nn.Conv2d(before, after, 1, stride) if project else nn.Identity()
        self.body = nn.Sequential(
            nn.Conv2d(before, width, 1),
            nn.BatchNorm2d(width, eps, momentum),
            nn.ReLU(inplace=True),
            SameConv(width, width, stride),
            nn.BatchNorm2d(width, eps, momentum),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, after, 1),
            nn.BatchNorm2d(after, eps, momentum),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).add_(self.shortcut(x)).relu_()


class CifarResNet(nn.Module):
    """Bottleneck ResNet v1 of depth 9n + 2 for 32 x 32 images: (B, C, 32, 32) -> (B, 256, 8, 8).

    Args:
        blocks: n, blocks in each of the three groups (pre-training 4, the supervised baseline 2).
    """

    dim = 256

    def __init__(self, blocks: int = 4, channels: int = 3, eps: float = 1e-3, momentum: float = KERAS_MOMENTUM) -> None:
        super().__init__()
        self.blocks = blocks
        self.stem = nn.Sequential(SameConv(channels, 16), nn.BatchNorm2d(16, eps, momentum), nn.ReLU(inplace=True))
        stack: list[nn.Module] = []
        before = 16
        for width, expansion, stride in ((16, 4, 1), (64, 2, 2), (128, 2, 2)):
            for number in range(blocks):
                stack.append(CifarBlock(before, width, expansion, stride if number == 0 else 1, number == 0, eps, momentum))
                before = width * expansion
        self.stack = nn.Sequential(*stack)
        self.apply(he_normal)

    def forward(self, images: Tensor) -> Tensor:
        return self.stack(self.stem(images))


class KerasBlock(nn.Module):
    """Bottleneck of Keras' ResNet-50 v1: the stride sits in the first 1 x 1 convolution, the shortcut has a batch norm."""

    def __init__(self, before: int, width: int, stride: int, project: bool, eps: float, momentum: float) -> None:
        super().__init__()
        after = 4 * width
        self.shortcut: nn.Module = nn.Identity()
        if project:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride), nn.BatchNorm2d(after, eps, momentum))
        self.body = nn.Sequential(
            nn.Conv2d(before, width, 1, stride),
            nn.BatchNorm2d(width, eps, momentum),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width, eps, momentum),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, after, 1),
            nn.BatchNorm2d(after, eps, momentum),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).add_(self.shortcut(x)).relu_()


class KerasResNet50(nn.Module):
    """Keras' ResNet-50 v1 without its top: (B, C, H, W) -> (B, 2048, H/32, W/32)."""

    dim = 2048
    depths = (3, 4, 6, 3)

    def __init__(self, channels: int = 3, eps: float = 1.001e-5, momentum: float = KERAS_MOMENTUM) -> None:
        super().__init__()
        # zeros around the pooling's input are what an unpadded maximum would see as well: nothing is below zero after a ReLU
        self.stem = nn.Sequential(
            nn.Conv2d(channels, 64, 7, 2, padding=3), nn.BatchNorm2d(64, eps, momentum), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        stack: list[nn.Module] = []
        before = 64
        for level, depth in enumerate(self.depths):
            for number in range(depth):
                stride = 2 if number == 0 and level > 0 else 1
                stack.append(KerasBlock(before, 64 * 2**level, stride, number == 0, eps, momentum))
                before = 256 * 2**level
        self.stack = nn.Sequential(*stack)
        self.apply(glorot_uniform)

    def forward(self, images: Tensor) -> Tensor:
        return self.stack(self.stem(images))


class TimmResNet(nn.Module):
    """timm's ResNet-18 or -50; with `cifar_stem` a 3 x 3 convolution of stride 1 and no pooling come first, as is usual for small images.

    Args:
        width: channels of the first stage; 64 is the standard network, the later stages double it.
    """

    def __init__(self, name: Literal["resnet18", "resnet50"], channels: int = 3, width: int = 64, cifar_stem: bool = True) -> None:
        super().__init__()
        from timm.models.resnet import BasicBlock, Bottleneck, ResNet

        block, depths = (BasicBlock, (2, 2, 2, 2)) if name == "resnet18" else (Bottleneck, (3, 4, 6, 3))
        self.net = ResNet(block, depths, num_classes=0, in_chans=channels, channels=tuple(width * 2**level for level in range(4)))
        if cifar_stem:
            self.net.conv1 = nn.Conv2d(channels, self.net.conv1.out_channels, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(self.net.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.net.maxpool = nn.Identity()
        self.dim = self.net.num_features

    def forward(self, images: Tensor) -> Tensor:
        return self.net.forward_features(images)


class Small(nn.Module):
    """Three convolutions for digits: (B, C, 8, 8) -> (B, 64, 2, 2)."""

    dim = 64

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in ((channels, 32, 1), (32, 64, 2), (64, 64, 2)):
            layers += [nn.Conv2d(before, after, 3, stride, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        self.net = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


def build(name: Name, *, channels: int = 3, blocks: int = 4, width: int = 64, cifar_stem: bool = True) -> nn.Module:
    """An encoder by name; `blocks` is of cifar-resnet, `width` and `cifar_stem` are of resnet18 and resnet50."""
    match name:
        case "cifar-resnet":
            return CifarResNet(blocks, channels)
        case "keras-resnet50":
            return KerasResNet50(channels)
        case "resnet18" | "resnet50":
            return TimmResNet(name, channels, width, cifar_stem)
        case "small":
            return Small(channels)
    raise ValueError(f"encoder={name!r}: expected cifar-resnet, keras-resnet50, resnet18, resnet50 or small")


def pooled(feature_map: Tensor) -> Tensor:
    """Mean over space: (B, dim, h, w) -> (B, dim)."""
    return feature_map.mean(dim=(2, 3))


def without_cancelled_biases(encoder: nn.Module) -> None:
    """Biases in front of a batch norm stop learning: batch statistics cancel them, their gradient is zero but for rounding, and costs time."""
    for module in encoder.modules():
        if isinstance(module, nn.Sequential):
            for layer, follower in itertools.pairwise(module):
                if isinstance(layer, nn.Conv2d) and layer.bias is not None and isinstance(follower, nn.BatchNorm2d):
                    layer.bias.requires_grad_(False)


def frozen_statistics(model: nn.Module) -> None:
    """Let batch norms use their moving statistics and leave them alone; gains and biases still learn."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | torch.nn.SyncBatchNorm):
            module.eval()
