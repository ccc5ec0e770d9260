"""MAE plus a standard contrastive loss on the class token: MoCo, BYOL or SimSiam style (the paper's claim 1: it lowers transfer).

Query: class token of the masked view. Key: class token of an unmasked pass, from a momentum copy of the encoder (MoCo, BYOL) or the encoder itself
(SimSiam), without gradient. No projector; recipes as in the repository's history.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from common.contrastive import Queue, gather_rows, queue_info_nce, unit
from common.masking import Mask, gather
from projects.point_cmae.cpu_linear import with_fast_linears
from projects.point_cmae.model import PointCMAE, group

Style = Literal["moco", "byol", "simsiam"]


@dataclass
class Output:
    """`loss` = reconstruction_weight * `reconstruction` + contrast_weight * `contrast`, the weights of the student (1000 and 1)."""

    loss: Tensor
    reconstruction: Tensor
    contrast: Tensor


class ClassContrast(nn.Module):
    """One-branch auto-encoder with a class token, and a contrastive loss on that token.

    Args:
        student: PointCMAE with one branch and a class token; its weights are what transfer uses.
        style: "moco" (InfoNCE against a queue, temperature 0.07, normalised), "byol" (one linear predictor, cross entropy between
            softmax(key / 0.1) and log-softmax(prediction / 0.1), key from the momentum copy), "simsiam" (the same, key from the encoder).
        momentum: of the copy, moved by `move_teacher` after each step.
        queue: keys that MoCo keeps.
    """

    def __init__(
        self, student: PointCMAE, style: Style, *, momentum: float = 0.999, queue: int = 16384, temperature: float | None = None
    ) -> None:
        super().__init__()
        if len(student.class_tokens) != 1:
            raise ValueError(
                f"student: expected one branch with a class token, got {len(student.decoders)} and {len(student.class_tokens)}"
            )
        if style not in ("moco", "byol", "simsiam"):
            raise ValueError(f"style={style!r}: expected moco, byol or simsiam")
        self.student, self.style, self.momentum = student, style, momentum
        self.temperature = (0.07 if style == "moco" else 0.1) if temperature is None else temperature
        dim = student.class_tokens[0].shape[-1]
        self.predictor = nn.Linear(dim, dim) if style != "moco" else None
        self.queue = Queue(queue, dim) if style == "moco" else None
        self.teacher = copy.deepcopy(nn.ModuleList([student.encoder, student.class_tokens, student.class_positions]))
        self.teacher.requires_grad_(False)
        with_fast_linears(self)

    @torch.no_grad()
    def move_teacher(self, _step: int = 0) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student; batch statistics are copied."""
        student = nn.ModuleList([self.student.encoder, self.student.class_tokens, self.student.class_positions])
        for theirs, ours in zip(self.teacher.parameters(), student.parameters(), strict=True):
            theirs.lerp_(ours, 1 - self.momentum)
        for theirs, ours in zip(self.teacher.buffers(), student.buffers(), strict=True):
            theirs.copy_(ours)

    def forward(self, points: Tensor, mask: Mask | None = None) -> Output:
        """Loss of points (B, N, 3) under `mask` (drawn if not given)."""
        student = self.student
        centres, groups = group(points, student.num_group, student.group_size, ops=student.ops)
        mask = student.draw_masks(centres)[0] if mask is None else mask
        tokens, positions = student.encoder.embed(groups), student.encoder.positions(centres)
        x = torch.cat([student.class_tokens[0].expand(len(points), -1, -1), gather(tokens, mask.keep)], 1)
        at = torch.cat([student.class_positions[0].expand(len(points), -1, -1), gather(positions, mask.keep)], 1)
        encoded = student.encoder.stack(x, positions=at).tokens
        branch = student.decoders[0](encoded[:, 1:], mask, centres, groups)
        contrast = self.compare(encoded[:, 0], self.key(groups, centres))
        loss = student.reconstruction_weight * branch.reconstruction + student.contrast_weight * contrast
        return Output(loss, branch.reconstruction, contrast)

    @torch.no_grad()
    def key(self, groups: Tensor, centres: Tensor) -> Tensor:
        """(B, C) class token of the unmasked pass."""
        own = [self.student.encoder, self.student.class_tokens, self.student.class_positions]
        encoder, tokens, places = own if self.style == "simsiam" else self.teacher
        return encoder.all_tokens(groups, centres, tokens[0], places[0])[1]

    def compare(self, query: Tensor, key: Tensor) -> Tensor:
        """The contrastive loss of (B, C) queries and keys, 0-d."""
        if self.queue is not None:
            query, key = unit(query), unit(key)
            loss = queue_info_nce(query, key, self.queue.keys(), 1 / self.temperature)
            if self.training:
                self.queue.push(gather_rows(key, "none"), gather=False)
            return loss
        if self.predictor is None:
            raise RuntimeError("byol and simsiam have a predictor")
        target = (key.detach().float() / self.temperature).softmax(1)
        return -(target * (self.predictor(query).float() / self.temperature).log_softmax(1)).sum(1).mean()
