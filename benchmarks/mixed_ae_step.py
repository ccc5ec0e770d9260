"""A MixedAE training step (forward, loss, backward, AdamW): ours, MAE at the same share of visible patches, and the method in its plain form.

`python -m benchmarks.mixed_ae_step` prints a JSON line each. No reference code exists; the plain form stands for it: it embeds every patch of every image
and mixes the tokens, selects keys with topk and a scattered mask over all scores, fills K masked copies for the decoder and predicts every patch,
with fused attention in the decoder and without.
MAE and naive mixing show what recognition costs. All are built first and timed in turn, round after round, one thread; compare processor seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Built, Feed, Forms, interleaved, parameters
from common.patch import patchify
from projects.mixed_ae.data import Samples, batches, textured
from projects.mixed_ae.mixing import draw
from projects.mixed_ae.model import SIZES, MixedAE
from projects.mixed_ae.pretrain import VARIANTS, adamw

BATCH = 32


def plain_loss(model: MixedAE, images: Tensor) -> Tensor:
    """The same loss by the equations, a tensor for each."""
    batch, group, tokens = len(images), model.group, model.side**2
    owner = draw(torch.rand(batch // group, tokens), group)
    own = F.one_hot(owner, group).mT.reshape(batch, tokens, 1).to(images.dtype)  # (B, L, 1): 1 where an image is seen
    x = F.conv2d(images, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=model.patch_size).flatten(2).mT
    x = (x * own).unflatten(0, (-1, group)).sum(1) + model.pos_embed[:, 1:] + model.segment_embed[owner]
    x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
    for block in model.blocks:
        attention = block.attn
        q, k, v = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        best = scores[..., 1:, 1:].topk(model.count, -1).indices
        keep = torch.ones_like(scores, dtype=torch.bool)
        keep[..., 1:, 1:] = torch.zeros_like(keep[..., 1:, 1:]).scatter_(-1, best, True)
        out = scores.masked_fill(~keep, float("-inf")).softmax(-1) @ v
        x = x + attention.proj(out.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    latent = model.norm(x)
    u = F.normalize(latent[:, 1:], dim=-1)
    logits = u @ u.mT / model.temperature
    itself = torch.eye(tokens, dtype=torch.bool)
    same = (owner[:, :, None] == owner[:, None]) & ~itself
    log_share = logits - logits.masked_fill(itself, float("-inf")).logsumexp(-1, keepdim=True)
    contrast = -((log_share * same).sum(-1) / same.sum(-1)).mean()
    y = model.decoder_embed(latent).repeat_interleave(group, 0)
    y = torch.cat([y[:, :1], torch.where(own.bool(), y[:, 1:], model.mask_token)], 1) + model.decoder_pos_embed
    for block in model.decoder_blocks:
        y = block(y)
    prediction = model.decoder_pred(model.decoder_norm(y))[:, 1:]
    target = patchify(images, model.patch_size)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    hidden = 1 - own[..., 0]
    return ((prediction - target).square().mean(-1) * hidden).sum() / hidden.sum() + model.weight * contrast


def _form(loss: Callable[[MixedAE, Tensor], Tensor], fused: bool = True, **changes: Any) -> Built:
    torch.manual_seed(0)
    model = MixedAE(**SIZES["tiny"], **changes)
    for block in model.decoder_blocks:
        block.attn.fused_attn = fused  # off: scores are multiplied out
    update = adamw(model, 1e-3, 0.05)
    images = torch.randn(BATCH, *model.image_shape)

    def step() -> Tensor:
        value = loss(model, images)
        value.backward()
        update.step()
        update.zero_grad()
        return value.detach()

    return Built(step, parameters(model))


def ours(model: MixedAE, images: Tensor) -> Tensor:
    return model(images).loss


KERNELS = (f"MixedAE tiny, batch {BATCH}",)


def configurations() -> dict[str, Forms]:
    """The spec's tracking step."""
    forms: Forms = {
        "ours": lambda: _form(ours),
        "plain": lambda: _form(plain_loss, fused=False),
        "plain, fused attention": lambda: _form(plain_loss),
        "MAE, three quarters hidden": lambda: _form(ours, **VARIANTS["mae"]),
        "naive mixing": lambda: _form(ours, **VARIANTS["naive"]),
    }
    return {KERNELS[0]: forms}


def loaders() -> dict[str, Feed]:
    """Batches of 64 images of 32 pixels, cropped and flipped on the fly."""
    split = textured(256, 0, size=32, patch=4)
    return {"batches of 64 of 256 images of 32": Feed(batches(Samples(split, 32, "crop"), 64, 4), 64)}


if __name__ == "__main__":
    for line in interleaved(configurations(), rounds=11):
        print(json.dumps(line))
