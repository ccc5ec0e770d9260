"""A Point-CMAE pre-training step at the published size (forward, loss, backward, AdamW): ours, and as the release goes about it.

`python -m benchmarks.point_cmae_step` prints a JSON line each: configuration, median processor and wall seconds a step, parameters. The plain form
has the same parameters and loss: convolutions on channels-first groups with the group's maximum copied beside every point, the two masked
views encoded one after the other, attention by explicit softmax, the contrastive term over all pairs of tokens, and chamfer from all differences.
Both are built first and timed in turn, round after round, so that a busy machine disturbs them alike; compare processor seconds.
"""

from __future__ import annotations

import json
import time
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.masking import Mask, gather
from projects.point_cmae.model import PointCMAE, group
from projects.point_cmae.optim import decays

BATCH, POINTS = 4, 1024


def plain_embed(model: PointCMAE, groups: Tensor) -> Tensor:
    """Mini-PointNet on (B G, channels, k) with the concatenation."""
    embed, (batch, count, size, _) = model.encoder.embed, groups.shape
    x = groups.flatten(0, 1).transpose(1, 2)
    x = F.relu(embed.first_norm(F.conv1d(x, embed.first.weight[..., None], embed.first.bias)))
    x = F.conv1d(x, embed.second.weight[..., None], embed.second.bias)
    x = torch.cat([x.max(2, keepdim=True)[0].expand(-1, -1, size), x], 1)
    x = F.relu(embed.third_norm(F.conv1d(x, embed.third.weight[..., None], embed.third.bias)))
    return F.conv1d(x, embed.last.weight[..., None], embed.last.bias).max(2)[0].view(batch, count, -1)


def plain_block(block: nn.Module, x: Tensor) -> Tensor:
    """timm's block with attention written out."""
    attn, (batch, count, dim) = block.attn, x.shape
    q, k, v = attn.qkv(block.norm1(x)).view(batch, count, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-2, -1) * attn.head_dim**-0.5).softmax(-1)
    x = x + block.drop_path1(attn.proj((scores @ v).transpose(1, 2).reshape(batch, count, dim)))
    return x + block.drop_path2(block.mlp(block.norm2(x)))


def plain_chamfer(a: Tensor, b: Tensor) -> Tensor:
    squared = (a[:, :, None] - b[:, None]).square().sum(-1)
    return squared.min(2)[0].mean() + squared.min(1)[0].mean()


def plain_loss(model: PointCMAE, points: Tensor, masks: list[Mask]) -> Tensor:
    """The release's forward and loss."""
    centres, groups = group(points, model.num_group, model.group_size)
    tokens, total, features = plain_embed(model, groups), points.new_zeros(()), []
    for number, (mask, decoder) in enumerate(zip(masks, model.decoders, strict=True)):
        batch = len(tokens)
        x = torch.cat([model.class_tokens[number].expand(batch, -1, -1), gather(tokens, mask.keep)], 1)
        at = torch.cat([model.class_positions[number].expand(batch, -1, -1), model.encoder.positions(gather(centres, mask.keep))], 1)
        for block in model.encoder.stack.blocks:
            x = plain_block(block, x + at)
        x = torch.cat([model.encoder.stack.norm(x)[:, 1:], decoder.mask_token.expand(batch, mask.masked.shape[1], -1)], 1)
        at = torch.cat([decoder.positions(gather(centres, part)) for part in (mask.keep, mask.masked)], 1)
        for block in decoder.stack.blocks:
            x = plain_block(block, x + at)
        prediction = F.conv1d(decoder.norm(x[:, mask.kept :]).transpose(1, 2), decoder.head.weight[..., None], decoder.head.bias)
        target = gather(groups, mask.masked).flatten(0, 1)
        total = total + plain_chamfer(prediction.transpose(1, 2).reshape(target.shape), target)
        features.append(F.normalize(gather(x, mask.restore), dim=-1))
    both = masks[0].hidden & masks[1].hidden
    pairs = 1 - features[0] @ features[1].transpose(1, 2) + 1e-8
    return 1000 * total + (pairs * both[:, :, None]).sum() / (both.sum() * both.shape[1])


def configurations() -> dict[str, tuple[PointCMAE, Any]]:
    """By name: the model and what makes one training step with it."""
    points = 2 * torch.rand(BATCH, POINTS, 3, generator=torch.Generator().manual_seed(0)) - 1

    def build(name: str) -> tuple[PointCMAE, Any]:
        torch.manual_seed(0)
        model = PointCMAE().train()
        if name != "ours":
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.__class__ = nn.Linear
        groups = [
            {"params": [p for n, p in model.named_parameters() if decays(n, p) is wanted], "weight_decay": 0.05 * wanted}
            for wanted in (True, False)
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=name == "ours" or None)

        def step() -> Tensor:
            masks = model.draw_masks(points[:, : model.num_group])
            loss = model(points, masks).loss if name == "ours" else plain_loss(model, points, masks)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return model, step

    return {name: build(name) for name in ("ours", "plain")}


def measure(rounds: int = 7, warm_up: int = 2) -> list[dict[str, Any]]:
    """Median seconds a step of both forms, one thread."""
    torch.set_num_threads(1)
    built = configurations()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in built}
    for number in range(warm_up + rounds):
        for name, (_, step) in built.items():
            cpu, wall = time.process_time(), time.perf_counter()
            step().item()
            if number >= warm_up:
                times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return [
        {
            "configuration": f"{name}, 4 clouds of 1024 points, 64 x 32 groups",
            "processor_seconds_per_step": round(median(cpu for cpu, _ in spent), 4),
            "wall_seconds_per_step": round(median(wall for _, wall in spent), 4),
            "parameters": sum(p.numel() for p in built[name][0].parameters()),
        }
        for name, spent in times.items()
    ]


if __name__ == "__main__":
    for line in measure():
        print(json.dumps(line))
