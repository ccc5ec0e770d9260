"""A ConvMAE pre-training step (forward, loss, backward, AdamW) at the notes' reference size: visible blocks alone, and everything at every position.

`python -m benchmarks.steps mr_mae` times them in turn. The plain form computes as the reference does: convolutions on whole maps with the mask
multiplied in, attention by explicit products, predictions and loss over all patches. Both start from one state and draw the same masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.timing import Built, Feed, Forms, parameters
from common.masking import Mask, random_mask
from common.patch import patchify
from projects.mr_mae.classifier import pretraining_groups
from projects.mr_mae.data import Pictures, Views
from projects.mr_mae.model import MRMAE
from projects.mr_mae.weights import reference_state

SETTINGS: dict[str, Any] = {
    "stage_dims": (64, 96, 192),
    "stage_depths": (2, 2, 4),
    "num_heads": 6,
    "decoder_dim": 128,
    "decoder_depth": 2,
    "decoder_heads": 4,
}


class MapNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MapEmbed(nn.Module):
    def __init__(self, in_dim: int, dim: int, side: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(in_dim, dim, side, stride=side), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(self.proj(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class MapMlp(nn.Module):
    def __init__(self, dim: int, conv: bool) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, 4 * dim, 1) if conv else nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Conv2d(4 * dim, dim, 1) if conv else nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class MapBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = MapNorm(dim), MapNorm(dim)
        self.conv1, self.conv2 = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        self.attn = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.mlp = MapMlp(dim, conv=True)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = x + self.conv2(self.attn(keep * self.conv1(self.norm1(x))))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ value).transpose(1, 2).flatten(2))


class TokenBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, heads), MapMlp(dim, conv=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Plain(nn.Module):
    """ConvMAE pre-training on whole maps, under the reference's parameter names."""

    def __init__(
        self, dims: tuple[int, int, int], depths: tuple[int, int, int], heads: int, width: int, depth: int, decoder_heads: int
    ) -> None:
        super().__init__()
        first, second, dim = dims
        self.patch_embed1, self.patch_embed2, self.patch_embed3 = (
            MapEmbed(3, first, 4),
            MapEmbed(first, second, 2),
            MapEmbed(second, dim, 2),
        )
        self.patch_embed4 = nn.Linear(dim, dim)
        self.stage1_output_decode, self.stage2_output_decode = nn.Conv2d(first, dim, 4, stride=4), nn.Conv2d(second, dim, 2, stride=2)
        self.blocks1 = nn.ModuleList(MapBlock(first) for _ in range(depths[0]))
        self.blocks2 = nn.ModuleList(MapBlock(second) for _ in range(depths[1]))
        self.blocks3 = nn.ModuleList(TokenBlock(dim, heads) for _ in range(depths[2]))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_embed, self.mask_token = nn.Linear(dim, width), nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_blocks = nn.ModuleList(TokenBlock(width, decoder_heads) for _ in range(depth))
        self.decoder_norm, self.decoder_pred = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, 768)
        self.pos_embed = nn.Parameter(torch.zeros(1, 196, dim), requires_grad=False)
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 196, width), requires_grad=False)

    def forward(self, images: Tensor, mask: Mask) -> Tensor:
        keep = (~mask.hidden).float().view(-1, 1, 14, 14)
        x = self.patch_embed1(images)
        for block in self.blocks1:
            x = block(x, keep.repeat_interleave(4, 2).repeat_interleave(4, 3))
        first = self.stage1_output_decode(x).flatten(2).transpose(1, 2)
        x = self.patch_embed2(x)
        for block in self.blocks2:
            x = block(x, keep.repeat_interleave(2, 2).repeat_interleave(2, 3))
        second = self.stage2_output_decode(x).flatten(2).transpose(1, 2)
        x = self.patch_embed4(self.patch_embed3(x).flatten(2).transpose(1, 2)) + self.pos_embed
        x, first, second = (part.gather(1, mask.keep[..., None].expand(-1, -1, part.shape[-1])) for part in (x, first, second))
        for block in self.blocks3:
            x = block(x)
        x = self.decoder_embed(self.norm(x + first + second))
        tokens = self.mask_token.expand(len(x), mask.hidden.shape[1] - mask.kept, -1)
        x = torch.cat([x, tokens], 1).gather(1, mask.restore[..., None].expand(-1, -1, x.shape[-1])) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        prediction = self.decoder_pred(self.decoder_norm(x))
        target = patchify(images, (16, 16))
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        loss = (prediction - target).square().mean(-1)
        return (loss * mask.hidden).sum() / mask.hidden.sum()


def _built(model: nn.Module, loss: Callable[[Tensor, Mask], Tensor]) -> Built:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 224, 224, generator=generator)
    update = torch.optim.AdamW(pretraining_groups(model, 0.05), lr=1e-4, betas=(0.9, 0.95))

    def step() -> Tensor:
        mask = random_mask(8, 196, 0.75, generator=generator)
        update.zero_grad()
        found = loss(images, mask)
        found.backward()
        update.step()
        return found.detach()

    return Built(step, parameters(model))


def _model() -> MRMAE:
    torch.manual_seed(0)
    return MRMAE(targets="pixels", **SETTINGS)


def visible() -> Built:
    """Ours: nothing is computed at hidden positions before the decoder."""
    model = _model()
    return _built(model, lambda images, mask: model(images, mask=mask).loss)


def plain() -> Built:
    """As the reference computes."""
    model = Plain(SETTINGS["stage_dims"], SETTINGS["stage_depths"], 6, 128, 2, 4)
    model.load_state_dict(reference_state(_model()))
    return _built(model, model)


KERNELS = ("224 pixels, batch 8, 64/96/192",)


def configurations() -> dict[str, Forms]:
    """The notes' step: visible blocks alone, and whole maps."""
    return {KERNELS[0]: {"visible blocks": visible, "whole maps, plain attention": plain}}


def loaders() -> dict[str, Feed]:
    """Pre-training crops of pictures in memory; reading and decoding files comes on top."""
    images = torch.randint(256, (64, 3, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pictures = Pictures(images, torch.zeros(64, dtype=torch.int64), ["one"], {})
    return {"bicubic crops of 224 of 256 x 256 pictures in memory": Feed(DataLoader(Views(pictures, 224, "crop"), 16, shuffle=True), 16)}
