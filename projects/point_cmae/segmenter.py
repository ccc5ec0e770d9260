"""Part segmentation: features of three depths carried from group centres to points (Sec. 3.10 of the release), and part IoU (Sec. 7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from common.masking import gather
from projects.point_cmae.cpu_linear import linear, with_fast_linears
from projects.point_cmae.model import Ops, PointEncoder, check_ops, group

PARTS = {
    "Airplane": range(4),
    "Bag": range(4, 6),
    "Cap": range(6, 8),
    "Car": range(8, 12),
    "Chair": range(12, 16),
    "Earphone": range(16, 19),
    "Guitar": range(19, 22),
    "Knife": range(22, 24),
    "Lamp": range(24, 28),
    "Laptop": range(28, 30),
    "Motorbike": range(30, 36),
    "Mug": range(36, 38),
    "Pistol": range(38, 41),
    "Rocket": range(41, 44),
    "Skateboard": range(44, 47),
    "Table": range(47, 50),
}
"""ShapeNetPart: part ids of each category, in the order of the category ids."""


class PartSegmenter(nn.Module, PyTorchModelHubMixin):
    """Log-probabilities of the part of every point, given the object's category.

    Args:
        parts, categories: of the data set (ShapeNetPart: 50 and 16).
        taps: blocks whose outputs are used, from 1, each through the same final norm; None = thirds of the depth (4, 8, 12).
        dim ... ops: as in `PointCMAE`; 128 groups for 2048 points.
    """

    def __init__(
        self,
        parts: int = 50,
        categories: int = 16,
        dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        num_group: int = 128,
        group_size: int = 32,
        widths: Sequence[int] = (128, 256, 512),
        taps: Sequence[int] | None = None,
        drop_path: float = 0.1,
        dropout: float = 0.5,
        ops: Ops = "auto",
    ) -> None:
        super().__init__()
        self.num_group, self.group_size, self.ops, self.categories = num_group, group_size, check_ops(ops), categories
        self.taps = tuple(taps) if taps is not None else tuple(round(depth * third / 3) for third in (1, 2, 3))
        self.encoder = PointEncoder(dim, depth, num_heads, widths, drop_path)
        for module in self.encoder.modules():  # torch's defaults, as in the classifier
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        width = len(self.taps) * dim
        self.category = nn.Sequential(nn.Linear(categories, 64, bias=False), nn.BatchNorm1d(64), nn.LeakyReLU(0.2))
        self.propagate = nn.Sequential(*_layer(3 + width, 1536), *_layer(1536, 1024))
        self.head = nn.Sequential(*_layer(1024 + 2 * width + 64, 512), nn.Dropout(dropout), *_layer(512, 256), nn.Linear(256, parts))
        with_fast_linears(self)

    def forward(self, points: Tensor, category: Tensor) -> Tensor:
        """Log-probabilities (B, N, parts) of points (B, N, 3) of objects of the categories (B,), 0 <= category < categories.

        Raises:
            ValueError: a category out of range; see `check_points`.
        """
        if not points.is_cuda and (int(category.min()) < 0 or int(category.max()) >= self.categories):
            raise ValueError(f"category: expected 0 to {self.categories - 1}, found {int(category.min())} to {int(category.max())}")
        centres, groups = group(points, self.num_group, self.group_size, ops=self.ops)
        stack = self.encoder.stack
        taps = stack(self.encoder.embed(groups), positions=self.encoder.positions(centres), taps=self.taps).taps
        features = torch.cat([stack.norm(taps[number]) for number in self.taps], 2)
        label = self.category(F.one_hot(category, self.categories).to(features.dtype))
        whole = torch.cat([features.amax(1), features.mean(1), label], 1)
        local = self.propagate(interpolate(points, centres, features).flatten(0, 1))
        # what is equal for all points of an object is mapped once, not repeated N times
        first, rest = self.head[0], self.head[1:]
        of_points, of_object = first.weight.split([local.shape[1], whole.shape[1]], 1)
        x = linear(local, of_points).view(*points.shape[:2], -1) + linear(whole, of_object, first.bias)[:, None]
        return rest(x.flatten(0, 1)).view(*points.shape[:2], -1).float().log_softmax(-1)


def _layer(before: int, after: int) -> list[nn.Module]:
    return [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]


def interpolate(points: Tensor, centres: Tensor, features: Tensor) -> Tensor:
    """Features (B, G, C) of centres (B, G, 3) at points (B, N, 3): (B, N, 3 + C), the point's own coordinates first.

    The mean of the three nearest centres' features, weighted by 1 / (d^2 + 1e-8).
    """
    squared = (points[:, :, None] - centres[:, None]).square().sum(-1)
    near, index = squared.topk(min(3, centres.shape[1]), dim=2, largest=False)
    weight = 1 / (near + 1e-8)
    weight = (weight / weight.sum(2, keepdim=True)).to(features.dtype)
    batch, count, neighbours = index.shape
    rows = gather(features, index.view(batch, -1)).view(batch, count, neighbours, -1)
    return torch.cat([points.to(features.dtype), (weight[:, :, None] @ rows)[:, :, 0]], 2)


# -- part IoU --------------------------------------------------------------------------------------------------------------------


class PartScores(NamedTuple):
    """Shares, 0 to 1."""

    instance_miou: float
    class_miou: float
    accuracy: float
    per_category: dict[str, float]


def _category(label: Tensor, parts: dict[str, range]) -> str:
    """Category of a shape by its labels (N,): that of the true part of point 0."""
    name = next((name for name, ids in parts.items() if int(label[0]) in ids), None)
    if name is None or not all(int(part) in parts[name] for part in label.unique()):
        raise ValueError(f"labels: expected parts of one category a shape, found {label.unique().tolist()} (point 0: {name})")
    return name


def own_parts(scores: Tensor, labels: Tensor, parts: dict[str, range] = PARTS) -> Tensor:
    """Prediction (S, N) from scores (S, N, parts), logits or log-probabilities: the likeliest of the shape's own category's parts.

    Args:
        labels: (S, N) true part ids; the category is that of point 0's.
        parts: part ids of each category.
    Raises:
        ValueError: a label that no category has, or that belongs to another category than point 0's.
    """
    own = [parts[_category(label, parts)] for label in labels]
    return torch.stack([score[:, ids.start : ids.stop].argmax(1) + ids.start for score, ids in zip(scores, own, strict=True)])


def part_scores(prediction: Tensor, labels: Tensor, parts: dict[str, range] = PARTS) -> PartScores:
    """Part IoU of shapes: prediction of `own_parts` and labels, (S, N) part ids each.

    Returns:
        IoU of a part that neither prediction nor labels have is 1; of a shape: the mean over its category's parts; `instance_miou`: mean over
        shapes; `class_miou`: mean over the categories present of the mean over their shapes.
    Raises:
        ValueError: a label that no category has, or that belongs to another category than point 0's.
    """
    by_category: dict[str, list[float]] = {}
    for found, label in zip(prediction, labels, strict=True):
        name, shares = _category(label, parts), []
        for part in parts[name]:
            one, other = found == part, label == part
            union = int((one | other).sum())
            shares.append(int((one & other).sum()) / union if union else 1.0)
        by_category.setdefault(name, []).append(sum(shares) / len(shares))
    every = [value for values in by_category.values() for value in values]
    means = {name: sum(values) / len(values) for name, values in sorted(by_category.items())}
    correct = float((prediction == labels).double().mean())
    return PartScores(sum(every) / len(every), sum(means.values()) / len(means), correct, means)
