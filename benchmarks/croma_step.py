"""A CROMA pre-training step (masks, forward, both losses, backward, AdamW) at a small size: ours beside the plain form of the same step.

`python -m benchmarks.croma_step` prints a JSON line each; `python -m benchmarks.croma_step --size base` takes one real step of a published size. Optical depth 6, radar 3, joint 3, width 192, 16 heads, decoder 128, patch 8, image 120, independent
masks of 0.75, batch 8, float32, one thread. The plain forms project all patches and drop the hidden ones, repeat the table of distances for each
sample and gather it, concatenate and un-shuffle mask tokens, write targets out, and split the sensors in image layout; one multiplies its scores out,
the other uses scaled_dot_product_attention. All are built first and timed in turn, round after round; compare processor seconds.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import Built, Forms, interleaved, parameters
from common.patch import patchify, sincos_2d, unpatchify
from projects.croma.alibi import bias_between, places
from projects.croma.layers import Layer, Stack
from projects.croma.model import CROMA, SIZES

BATCH, SIDE = 8, 120


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None, fused: bool) -> Tensor:
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Plain:
    """The same step on the parameters of a `CROMA`, written as the formulas stand."""

    def __init__(self, model: CROMA, fused: bool) -> None:
        self.model, self.fused = model, fused
        side = SIDE // model.encoders.patch_size[0]
        at = places((side, side))
        self.table = bias_between(at, at, model.encoders.num_heads)
        self.positions = sincos_2d((side, side), model.decoder.embed.out_features)[None]
        self.grid = (side, side)

    def layer(self, layer: Layer, x: Tensor, bias: Tensor | None, context: Tensor | None, cross_bias: Tensor | None) -> Tensor:
        attn = layer.attn
        x = x + attn.proj(attention(*attn.qkv(attn.norm(x)).chunk(3, -1), attn.num_heads, bias, self.fused))
        if layer.cross is not None:
            cross = layer.cross
            z, c = cross.norm(x), cross.norm(context)
            x = x + cross.proj(attention(cross.q(z), cross.k(c), cross.v(c), cross.num_heads, cross_bias, self.fused))
        return x + layer.ffn(x)

    def stack(
        self, stack: Stack, x: Tensor, bias: Tensor | None = None, context: Tensor | None = None, cross: Tensor | None = None
    ) -> Tensor:
        for layer in stack.layers:
            x = self.layer(layer, x, bias, context, cross)
        return stack.norm(x)

    def mask(self, batch: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Kept positions, their places in the shuffle, 1 where removed."""
        shuffle = torch.rand(batch, count).argsort(1)
        restore = shuffle.argsort(1)
        kept = int(count * (1 - self.model.mask_ratio))
        hidden = torch.ones(batch, count)
        hidden[:, :kept] = 0
        return shuffle[:, :kept], restore, hidden.gather(1, restore)

    def bias(self, query: Tensor, key: Tensor) -> Tensor:
        heads, count = self.table.shape[1], self.table.shape[-1]
        whole = self.table.repeat(len(query), 1, 1, 1)
        rows = whole.gather(2, query[:, None, :, None].repeat(1, heads, 1, count))
        return rows.gather(3, key[:, None, None, :].repeat(1, heads, query.shape[1], 1))

    def encode(self, encoder: nn.Module, images: Tensor, keep: Tensor, bias: Tensor) -> Tensor:
        tokens = encoder.embed(patchify(images, self.model.encoders.patch_size, "first"))
        return self.stack(encoder.stack, tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[-1])), bias)

    def __call__(self, images: Tensor) -> Tensor:
        model, size = self.model, self.model.encoders.patch_size
        optical, radar = images[:, :12], images[:, 12:]
        count = self.grid[0] * self.grid[1]
        keep_r, restore_r, hidden_r = self.mask(len(images), count)
        keep_o, _, hidden_o = self.mask(len(images), count)
        own_r, own_o, cross = self.bias(keep_r, keep_r), self.bias(keep_o, keep_o), self.bias(keep_r, keep_o)
        r = self.encode(model.encoders.radar_encoder, radar, keep_r, own_r)
        o = self.encode(model.encoders.optical_encoder, optical, keep_o, own_o)
        gap_r, gap_o = (
            F.normalize(head, dim=-1)
            for head in (model.radar_proj(model.encoders.radar_head(r)), model.optical_proj(model.encoders.optical_head(o)))
        )
        scale, own = model.logit_scale.exp(), torch.arange(len(images))
        contrastive = (F.cross_entropy(scale * gap_o @ gap_r.detach().T, own) + F.cross_entropy(scale * gap_r @ gap_o.detach().T, own)) / 2
        joint = self.stack(model.encoders.joint_encoder, r, cross, o, cross)
        decoder = model.decoder
        x = decoder.embed(joint)
        x = torch.cat([x, decoder.mask_token.expand(len(x), count - x.shape[1], -1)], 1)
        x = x.gather(1, restore_r[..., None].expand(-1, -1, x.shape[-1])) + self.positions
        prediction = decoder.head(self.stack(decoder.stack, x))
        target = patchify(images, size, "first")
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        total = contrastive
        whole, wanted = unpatchify(prediction, self.grid, size, "first"), unpatchify(target, self.grid, size, "first")
        for bands, hidden in ((slice(0, 12), hidden_o), (slice(12, 14), hidden_r)):
            error = (patchify(whole[:, bands], size, "first") - patchify(wanted[:, bands], size, "first")).square().mean(-1)
            total = total + (error * hidden).sum() / hidden.sum()
        return total


def model() -> CROMA:
    torch.manual_seed(0)
    return CROMA({"embed_dim": 192, "depth": 6, "num_heads": 16}, decoder_dim=128)


def built(make: Callable[[CROMA], Callable[[Tensor], Tensor]], **optimiser: Any) -> Built:
    """A training step on random images."""
    net = model()
    loss_of = make(net)
    images = torch.rand(BATCH, 14, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    update = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01, **optimiser)

    def step() -> Tensor:
        update.zero_grad()
        loss = loss_of(images)
        loss.backward()
        update.step()
        return loss.detach()

    return Built(step, parameters(net))


FORMS: Forms = {
    "ours": partial(built, lambda net: lambda images: net(images).loss, fused=True),
    "plain, fused attention": partial(built, lambda net: Plain(net, fused=True)),
    "plain": partial(built, lambda net: Plain(net, fused=False)),
}


KERNELS = ("width 192, 120 x 120, batch 8",)


def configurations() -> dict[str, Forms]:
    """The spec of the step by name, and its forms, ours first."""
    return {KERNELS[0]: FORMS}


def measure(rounds: int = 7) -> list[dict[str, Any]]:
    """Medians of every form; see `benchmarks.timing.interleaved`."""
    return interleaved(configurations(), KERNELS, rounds=rounds)


def published(size: str, batch: int = 2, optimiser: str = "adamw") -> dict[str, Any]:
    """One real training step of a published size on random pairs, with its time and memory.

    Args:
        optimiser: "adamw" needs 16 bytes a parameter (base 3.2 GB, large 10.9 GB), "sgd" 8.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    net = CROMA(SIZES[size]).to(device)
    update: torch.optim.Optimizer
    if optimiser == "adamw":
        update = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    else:
        update = torch.optim.SGD(net.parameters(), lr=1e-3)
    images = torch.rand(batch, 14, SIDE, SIDE, device=device)
    cpu, wall = time.process_time(), time.perf_counter()
    loss = net(images).loss
    loss.backward()
    update.step()
    loss = float(loss.detach())
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    with torch.no_grad():
        after = float(net(images).loss)
    gpu = torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    return {
        "configuration": f"{size}, batch {batch}, {optimiser}, {device}",
        "processor_seconds_per_step": round(cpu, 2),
        "wall_seconds_per_step": round(wall, 2),
        "peak_memory_mib": round(gpu / 2**20),
        "parameters": parameters(net),
        "loss": round(loss, 4),
        "loss_after": round(after, 4),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=sorted(SIZES), help="one real step of a published size")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--optimiser", choices=("adamw", "sgd"), default="adamw")
    given = parser.parse_args()
    for line in [published(given.size, given.batch, given.optimiser)] if given.size else measure():
        print(json.dumps(line))
