"""Downstream classifier of Point-MAE and Point-CMAE, what each protocol trains, and voting (Sec. 3.9 and 7 of the release)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from projects.point_cmae.augment import choose, scale_translate
from projects.point_cmae.cpu_linear import with_fast_linears
from projects.point_cmae.model import Ops, PointEncoder, check_ops, group, sample_points

Protocol = Literal["full", "mlp3", "linear", "frozen_mlp3", "frozen_linear"]
VOTES = 10
PRE_SAMPLED = {1024: 1200, 2048: 2400, 4096: 4800, 8192: 8192}
"""Points sampled first -> of which that many are chosen at random; the reference has no entry for 2048 in voting, ours uses training's."""


class Scores(NamedTuple):
    """Cross entropy and accuracy of a batch."""

    loss: Tensor
    correct: Tensor  # 0-d count


class PointClassifier(nn.Module, PyTorchModelHubMixin):
    """Groups -> encoder -> [class token; maximum over tokens] -> head.

    Args:
        classes: of the data set.
        head: "mlp" (three linear layers with batch norm and dropout; protocols full and mlp3) or "linear".
        dim ... ops: as in `PointCMAE`; 128 groups for 2048 points, 512 for 8192.
    """

    def __init__(
        self,
        classes: int,
        head: Literal["mlp", "linear"] = "mlp",
        dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        num_group: int = 64,
        group_size: int = 32,
        widths: Sequence[int] = (128, 256, 512),
        drop_path: float = 0.1,
        dropout: float = 0.5,
        ops: Ops = "auto",
    ) -> None:
        super().__init__()
        self.num_group, self.group_size, self.ops, self.classes = num_group, group_size, check_ops(ops), classes
        self.encoder = PointEncoder(dim, depth, num_heads, widths, drop_path)
        self.class_token, self.class_position = (nn.Parameter(torch.empty(1, 1, dim)) for _ in range(2))
        for parameter in (self.class_token, self.class_position):
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.encoder.modules():  # the reference never calls its initialiser here: torch's defaults
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        self.head = _head(2 * dim, classes, head, dropout)
        with_fast_linears(self)

    def forward(self, points: Tensor) -> Tensor:
        """Logits (B, classes) of points (B, N, 3)."""
        return self.head(self.features(points))

    def features(self, points: Tensor) -> Tensor:
        """(B, 2C): class token beside the maximum over the groups' tokens."""
        centres, groups = group(points, self.num_group, self.group_size, ops=self.ops)
        tokens, class_token = self.encoder.all_tokens(groups, centres, self.class_token, self.class_position)
        if class_token is None:
            raise RuntimeError("the classifier always has a class token")
        return torch.cat([class_token, tokens.amax(1)], 1)

    def loss(self, points: Tensor, labels: Tensor) -> Scores:
        """Mean cross entropy of points (B, N, 3) and labels (B,), and how many are right."""
        logits = self(points)
        return Scores(F.cross_entropy(logits, labels), (logits.argmax(1) == labels).sum())


def _head(width: int, classes: int, kind: str, dropout: float) -> nn.Sequential:
    if kind == "linear":
        return nn.Sequential(nn.Linear(width, classes))
    if kind != "mlp":
        raise ValueError(f"head={kind!r}: expected mlp or linear")
    hidden = [[nn.Linear(before, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(dropout)] for before in (width, 256)]
    return nn.Sequential(*hidden[0], *hidden[1], nn.Linear(256, classes))


def head_of(protocol: Protocol) -> Literal["mlp", "linear"]:
    return "linear" if protocol.endswith("linear") else "mlp"


def apply_protocol(model: PointClassifier, protocol: Protocol) -> PointClassifier:
    """Freeze what the protocol does not train (Sec. 3.9).

    "full": nothing. "mlp3", "linear": as the reference, everything but head, class token and class position; the encoder stays in train mode,
    its batch statistics keep moving and drop path is active. "frozen_mlp3", "frozen_linear": the head alone, encoder in eval mode.
    """
    if protocol == "full":
        return model
    for name, parameter in model.named_parameters():
        reference_trains = name.startswith(("head.", "class_"))
        parameter.requires_grad_(reference_trains if not protocol.startswith("frozen") else name.startswith("head."))
    if protocol.startswith("frozen"):
        encoder = model.encoder
        encoder.eval()
        encoder.train = lambda mode=True: encoder  # type: ignore[method-assign, assignment]  # stays in eval mode
    return model


def pre_sampled(count: int, available: int) -> int:
    """P, the points sampled before `count` of them are chosen at random, at most those available.

    Raises:
        ValueError: fewer points available than wanted.
    """
    if available < count:
        raise ValueError(f"points: {available} a cloud, {count} wanted; lower points or use fuller clouds")
    return min(PRE_SAMPLED.get(count, count * 6 // 5), available)


@torch.no_grad()
def vote(model: PointClassifier, points: Tensor, count: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Mean logits (B, classes) over ten random views of points (B, N, 3): farthest points once, then `count` of them, scaled and shifted."""
    sampled = sample_points(points, pre_sampled(count, points.shape[1]), ops=model.ops)
    views = [scale_translate(choose(sampled, count, generator=generator), generator=generator) for _ in range(VOTES)]
    return torch.stack([model(view) for view in views]).mean(0)
