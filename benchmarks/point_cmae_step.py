"""A Point-CMAE pre-training step at the published size (forward, loss, backward, AdamW): ours, and as the release goes about it.

`python -m benchmarks.point_cmae_step` prints a JSON line each. The plain form has the same parameters and loss: convolutions on channels-first
groups with the group's maximum copied beside every point, the two masked views encoded one after the other, attention by explicit softmax, the
contrastive term over all pairs of tokens, chamfer from all differences, and AdamW as torch has it by default.
"""

from __future__ import annotations

import json
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.timing import Built, Feed, Forms, interleaved, parameters
from common.masking import Mask, gather
from projects.point_cmae.data import Sizes, Unlabelled, load
from projects.point_cmae.model import PointCMAE, group
from projects.point_cmae.optim import adamw

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


def build(form: str, batch: int = BATCH) -> Built:
    """ "ours", or "plain": the release's way on torch's own layers."""
    points = 2 * torch.rand(batch, POINTS, 3, generator=torch.Generator().manual_seed(0)) - 1
    torch.manual_seed(0)
    model = PointCMAE().train()
    if form == "plain":
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.__class__ = nn.Linear
    optimizer, masks = adamw(model, 1e-3, 0.05), torch.Generator().manual_seed(1)
    if form == "plain":
        optimizer = torch.optim.AdamW([{name: g[name] for name in ("params", "weight_decay")} for g in optimizer.param_groups], lr=1e-3)

    def step() -> Tensor:
        drawn = model.draw_masks(points[:, : model.num_group], generator=masks)
        loss = model(points, drawn).loss if form == "ours" else plain_loss(model, points, drawn)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Built(step, parameters(model))


KERNELS = ("4 clouds of 1024 points, 64 x 32 groups",)


def configurations() -> dict[str, Forms]:
    """The spec's reference step: ours, and the plain form."""
    return {KERNELS[0]: {form: partial(build, form) for form in ("ours", "plain")}}


def loaders() -> dict[str, Feed]:
    """Batches of 32 generated clouds, 1024 of 2048 points drawn and normalised."""
    clouds = Unlabelled(load("solids", "pretrain", sizes=Sizes(96, 1, 1)), POINTS)
    return {"batches of 32 of 96 solids": Feed(DataLoader(clouds, batch_size=32, shuffle=True), 32)}


if __name__ == "__main__":
    for line in interleaved(configurations()):
        print(json.dumps(line))
