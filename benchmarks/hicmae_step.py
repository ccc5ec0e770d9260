"""A HiCMAE-S pre-training step (forward, loss, backward, AdamW) at the published input sizes: ours beside the plain form of the same step.

`python -m benchmarks.hicmae_step` prints a JSON line each. Batch 4, float32, one thread, random inputs. The plain forms project all cubes and drop the
hidden ones, norm every level, run the last decoder block on all rows, and write the targets out; one multiplies its scores out, the other uses
scaled_dot_product_attention. All are built first and timed in turn, round after round; compare processor seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.timing import Built, Feed, Forms, interleaved, parameters
from common.masking import Mask
from common.patch import patchify
from projects.hicmae import SIZES, HiCMAE
from projects.hicmae.layers import CrossAttention, CrossSelfBlock
from projects.hicmae.model import MEAN, STD
from projects.hicmae.optim import adamw, groups
from projects.hicmae.talkers import SyntheticTalkers

BATCH = 4


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, fused: bool) -> Tensor:
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    if fused:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Plain:
    """The same step on the parameters of a `HiCMAE`, written as the formulas stand."""

    def __init__(self, model: HiCMAE, fused: bool) -> None:
        self.model, self.fused = model, fused

    def self_block(self, block: nn.Module, x: Tensor) -> Tensor:
        query, key, value = block.attn.qkv(block.norm1(x)).chunk(3, -1)
        x = x + block.attn.proj(attention(query, key, value, block.attn.num_heads, self.fused))
        return x + block.mlp(block.norm2(x))

    def cross_self(self, block: CrossSelfBlock, x: Tensor, context: Tensor) -> Tensor:
        cross: CrossAttention = block.cross_attn
        key, value = cross.kv(block.cross_norm2(context)).chunk(2, -1)
        x = x + cross.proj(attention(cross.q(block.cross_norm1(x)), key, value, cross.num_heads, self.fused))
        return self.self_block(block, x)

    def encode(self, encoder: nn.Module, inputs: Tensor, hidden: Tensor) -> list[Tensor]:
        convolution = F.conv3d if inputs.ndim == 5 else F.conv2d
        proj = encoder.embed.proj
        x = convolution(inputs, proj.weight, proj.bias, stride=proj.stride).flatten(2).transpose(1, 2) + encoder.positions
        x = x[~hidden].reshape(len(x), -1, x.shape[-1])
        levels = []
        for block in encoder.stack.blocks:
            x = self.self_block(block, x)
            levels.append(encoder.stack.norm(x))
        return [*levels, encoder.stack.norm(x)]

    def decode(self, decoder: nn.Module, fused: Tensor, levels: list[Tensor], hidden: Tensor) -> Tensor:
        places = decoder.positions.expand(len(fused), -1, -1)
        seen, unseen = (places[part].reshape(len(fused), -1, places.shape[-1]) for part in (~hidden, hidden))
        x = self.self_block(decoder.blocks[0], torch.cat([decoder.embed(fused) + seen, decoder.mask_token + unseen], 1))
        for block, level in zip(decoder.blocks[1:], reversed(levels), strict=True):
            x = self.cross_self(block, x, decoder.embed(level) + seen)
        return decoder.head(decoder.norm(x[:, -unseen.shape[1] :]))

    @torch.no_grad()
    def video_target(self, video: Tensor, hidden: Tensor) -> Tensor:
        mean, std = (torch.tensor(part).view(1, 3, 1, 1, 1) for part in (MEAN, STD))
        cubes = patchify(video * std + mean, self.model.patch).unflatten(-1, (-1, 3))
        cubes = (cubes - cubes.mean(-2, keepdim=True)) / (cubes.var(-2, unbiased=True, keepdim=True).sqrt() + 1e-6)
        first, second = cubes.unflatten(2, (2, -1)).unbind(2)
        return torch.stack([first, second - first], 2).flatten(2)[hidden].reshape(len(video), -1, 2 * first[0, 0].numel())

    @torch.no_grad()
    def audio_target(self, audio: Tensor, hidden: Tensor) -> Tensor:
        patches = patchify(audio, self.model.audio_patch)
        patches = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, unbiased=True, keepdim=True).sqrt() + 1e-6)
        return patches[hidden].reshape(len(audio), -1, patches.shape[-1])

    def __call__(self, video: Tensor, audio: Tensor, video_mask: Mask, audio_mask: Mask) -> Tensor:
        model = self.model
        seen, heard = self.encode(model.encoder, video, video_mask.hidden), self.encode(model.encoder_audio, audio, audio_mask.hidden)
        fusion, v, a = model.encoder_fusion, seen[-1], heard[-1]
        for block, block_audio in zip(fusion.blocks, fusion.blocks_audio, strict=True):
            v, a = self.cross_self(block, v, a), self.cross_self(block_audio, a, v)
        levels = [n - 1 for n in model.levels]
        loss = F.mse_loss(
            self.decode(model.decoder, fusion.norm(v), [seen[n] for n in levels], video_mask.hidden),
            self.video_target(video, video_mask.hidden),
        )
        loss = loss + F.mse_loss(
            self.decode(model.decoder_audio, fusion.norm_audio(a), [heard[n] for n in levels], audio_mask.hidden),
            self.audio_target(audio, audio_mask.hidden),
        )
        rows = torch.arange(len(video))
        for n in levels:
            logits = F.normalize(seen[n].mean(1), dim=1) @ F.normalize(heard[n].mean(1), dim=1).T / model.temperature
            loss = loss + model.contrastive_weight * (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2
        return loss


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, 3, 16, 160, 160, generator=generator), torch.randn(BATCH, 1, 256, 128, generator=generator)


def build(form: str, size: str = "small") -> Built:
    """ "ours", "plain" or "plain, fused attention"."""
    torch.manual_seed(0)
    model, (video, audio) = HiCMAE(**SIZES[size]), inputs()
    loss_of: Callable[..., Tensor]
    if form == "ours":
        update = adamw(model, 1e-4, 0.05, betas=(0.9, 0.95))

        def loss_of(*batch: Any) -> Tensor:
            return model(*batch).loss
    else:
        made = [{k: v for k, v in group.items() if k != "names"} for group in groups(model, 0.05)]
        update = torch.optim.AdamW(made, lr=1e-4, betas=(0.9, 0.95))
        loss_of = Plain(model, fused=form != "plain")
    masks = torch.Generator().manual_seed(1)

    def step() -> Tensor:
        update.zero_grad()
        loss = loss_of(video, audio, model.draw_video_mask(BATCH, masks), model.draw_audio_mask(BATCH, masks))
        loss.backward()
        update.step()
        return loss.detach()

    return Built(step, parameters(model))


KERNELS = ("HiCMAE-S, batch 4",)


def configurations() -> dict[str, Forms]:
    """The spec's reference step: ours, and the plain form with and without fused attention."""
    return {KERNELS[0]: {form: partial(build, form) for form in ("ours", "plain", "plain, fused attention")}}


def loaders() -> dict[str, Feed]:
    """Batches of 32 talkers, gain drawn and filter bank run on the fly."""
    clips = SyntheticTalkers(0, 128, gain=True)
    return {"batches of 32 of 128 talkers": Feed(DataLoader(clips, batch_size=32), 32)}


if __name__ == "__main__":
    for line in interleaved(configurations(), rounds=5):
        print(json.dumps(line))
