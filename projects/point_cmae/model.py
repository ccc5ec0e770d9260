"""Point-CMAE (Ren et al., ACCV 2024, arXiv 2407.05862): the pre-training model, and Point-MAE as its one-branch baseline.

Top to bottom: what forward returns · the model · the contrastive term · its parts: grouping, group embedding, encoder, decoder.
A cloud (N points) is cut into G overlapping groups of k points; each group becomes a token. Two random masks hide M tokens each, one encoder
sees both visible sets, and a decoder a branch rebuilds the points of its hidden groups. The features of tokens that both masks hide must agree.
Classifier and part segmenter: `classifier.py`, `segmenter.py`. Standard contrastive losses on the class token (claim 1): `class_contrast.py`.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from common.blocks import Blocks, xavier_init
from common.contrastive import unit
from common.kernels.points import Path, chamfer, farthest_points, knn_group
from common.masking import Mask, append_mask_tokens, block_mask, gather, kept_count, random_mask, scatter
from projects.point_cmae.cpu_linear import linear, on_plain_cpu, with_fast_linears

Contrast = Literal["dense", "paired", "mse", "l2", "none"]
CONTRASTS = ("dense", "paired", "mse", "l2", "none")
Chamfer = Literal["l2", "l1"]
Ops = Literal["auto", "torch", "triton", "pointnet2_ops"]
_PATHS: dict[str, Path] = {"auto": "auto", "torch": "tiled", "triton": "triton", "pointnet2_ops": "auto"}
LARGEST_NORM = 10.0
"""Coordinates beyond this are no normalised cloud."""


class Branch(NamedTuple):
    """One masked view of the batch; M hidden tokens, V visible."""

    mask: Mask
    visible: Tensor  # (B, V, C) encoder output, class token dropped, in the order of mask.keep
    features: Tensor  # (B, G, C) decoder output before its norm, in the order of mask.order
    decoded: Tensor  # (B, M, C) the hidden ones after the norm, in the order of mask.masked
    prediction: Tensor  # (B, M, k, 3) relative to the group's centre
    target: Tensor  # (B, M, k, 3)
    reconstruction: Tensor  # 0-d chamfer distance, not weighted


@dataclass
class Output:
    """`loss` = reconstruction_weight * `reconstruction` + contrast_weight * `contrast`; `cosine` and `spread` are for the log, without gradient."""

    loss: Tensor
    reconstruction: Tensor
    """Sum over the branches of the chamfer distance."""
    contrast: Tensor
    cosine: Tensor
    """Mean cosine of the two features of a token that both masks hide; 0 where there is none. A collapse shows as cosine 1 and spread 0."""
    spread: Tensor
    """1 - |mean of the unit features of branch 1| over the batch: 0 = all features point one way."""
    centres: Tensor
    """(B, G, 3)."""
    branches: list[Branch]


class PointCMAE(nn.Module, PyTorchModelHubMixin):
    """Masked auto-encoder of point clouds with two masks, one encoder and two decoders.

    Args:
        dim, depth, num_heads: encoder (the paper's one size: 384, 12, 6).
        decoder_depth, decoder_heads: each decoder, of the same width.
        num_group, group_size: G groups of k points.
        widths: of the group embedding (`GroupEmbed`).
        mask_ratio: r, int(r * G) tokens are hidden in each branch.
        mask: "random", or "block": the tokens nearest to a random one, drawn for each branch.
        branches: 2, or 1 = Point-MAE (then `contrast` is none, and `class_token` False to be the reference's baseline).
        chamfer: reconstruction loss: "l2" = sums of mean squared distances (cdl2, the release's), "l1" = half of those of distances (cdl1).
        contrast: "dense" is the released code, "paired" what the abstract says; see `contrast_term`.
        reconstruction_weight, contrast_weight: factors of the two terms in the loss (Point-MAE's loop has none on the reconstruction: 1).
        drop_path: rate of the last block of encoder and decoders, rising linearly from 0.
        ops: who samples the centres; "pointnet2_ops" calls that extension (CUDA alone), "auto" is Triton on CUDA and torch elsewhere.
    Raises:
        ValueError: sizes that do not divide each other, a ratio that hides no token or all, an unknown name.
    """

    def __init__(
        self,
        dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        decoder_depth: int = 4,
        decoder_heads: int = 6,
        num_group: int = 64,
        group_size: int = 32,
        widths: Sequence[int] = (128, 256, 512),
        mask_ratio: float = 0.6,
        mask: Literal["random", "block"] = "random",
        branches: Literal[1, 2] = 2,
        class_token: bool = True,
        chamfer: Chamfer = "l2",
        contrast: Contrast = "dense",
        reconstruction_weight: float = 1000.0,
        contrast_weight: float = 1.0,
        drop_path: float = 0.1,
        ops: Ops = "auto",
    ) -> None:
        super().__init__()
        if contrast not in CONTRASTS or mask not in ("random", "block") or branches not in (1, 2):
            raise ValueError(
                f"contrast={contrast!r}, mask={mask!r}, branches={branches}: expected one of {', '.join(CONTRASTS)}; random or block; 1 or 2"
            )
        if chamfer not in ("l2", "l1"):
            raise ValueError(f"chamfer={chamfer!r}: expected l2 (squared distances, the release's) or l1")
        if branches == 1 and contrast != "none":
            raise ValueError(f"contrast={contrast!r} with one branch: expected none, there is no second view to agree with")
        kept_count(num_group, mask_ratio, "hide")
        self.num_group, self.group_size, self.ops = num_group, group_size, check_ops(ops)
        self.mask_ratio, self.mask, self.contrast = mask_ratio, mask, contrast
        self.reconstruction_weight, self.contrast_weight = reconstruction_weight, contrast_weight
        self.encoder = PointEncoder(dim, depth, num_heads, widths, drop_path)
        self.class_tokens = nn.ParameterList(nn.Parameter(torch.empty(1, 1, dim)) for _ in range(branches * class_token))
        self.class_positions = nn.ParameterList(nn.Parameter(torch.empty(1, 1, dim)) for _ in range(branches * class_token))
        for parameter in (*self.class_tokens, *self.class_positions):
            nn.init.trunc_normal_(parameter, std=0.02)
        self.decoders = nn.ModuleList(
            PatchDecoder(dim, decoder_depth, decoder_heads, group_size, drop_path, chamfer) for _ in range(branches)
        )
        with_fast_linears(self)

    def draw_masks(self, centres: Tensor, *, generator: torch.Generator | None = None) -> list[Mask]:
        """A mask a branch, independent of each other, M = int(mask_ratio * G) tokens hidden in every cloud exactly (Sec. 3.4 of the release)."""
        if self.mask == "block":
            return [block_mask(centres, self.mask_ratio, rounding="hide", generator=generator) for _ in self.decoders]
        batch, count, _ = centres.shape
        return [
            random_mask(batch, count, self.mask_ratio, rounding="hide", generator=generator, device=centres.device) for _ in self.decoders
        ]

    def forward(self, points: Tensor, masks: Sequence[Mask] | None = None, *, generator: torch.Generator | None = None) -> Output:
        """Loss of points (B, N, 3) under `masks`, one a branch; drawn from `generator` (default: the global one) if not given.

        Raises:
            ValueError: see `check_points`; a wrong number of masks.
        """
        centres, groups = group(points, self.num_group, self.group_size, ops=self.ops)
        masks = self.draw_masks(centres, generator=generator) if masks is None else list(masks)
        if len(masks) != len(self.decoders) or any(mask.hidden.shape != centres.shape[:2] for mask in masks):
            shapes = [tuple(mask.hidden.shape) for mask in masks]
            raise ValueError(f"masks: expected {len(self.decoders)} of shape {tuple(centres.shape[:2])}, got {shapes}")
        seen = self.encode(self.encoder.embed(groups), centres, masks)
        branches = [decoder(visible, mask, centres, groups) for decoder, visible, mask in zip(self.decoders, seen, masks, strict=True)]
        reconstruction = sum((branch.reconstruction for branch in branches), start=centres.new_zeros(()))
        contrast, cosine, spread = self.compare(branches)
        loss = self.reconstruction_weight * reconstruction + self.contrast_weight * contrast
        return Output(loss, reconstruction, contrast, cosine, spread, centres, branches)

    def encode(self, tokens: Tensor, centres: Tensor, masks: Sequence[Mask]) -> list[Tensor]:
        """Visible tokens of every branch through the shared encoder as one batch: (B, V, C) each, class token dropped (Sec. 3.5).

        Args:
            tokens: (B, G, C) of all groups; centres: (B, G, 3).
        """
        positions = self.encoder.positions(centres)
        x = torch.cat([gather(tokens, mask.keep) for mask in masks])
        at = torch.cat([gather(positions, mask.keep) for mask in masks])
        if len(self.class_tokens):
            batch = len(tokens)
            x = torch.cat([torch.cat([token.expand(batch, -1, -1) for token in self.class_tokens]), x], 1)
            at = torch.cat([torch.cat([place.expand(batch, -1, -1) for place in self.class_positions]), at], 1)
        encoded = self.encoder.stack(x, positions=at).tokens[:, 1 if len(self.class_tokens) else 0 :]
        return list(encoded.chunk(len(masks)))

    def compare(self, branches: Sequence[Branch]) -> tuple[Tensor, Tensor, Tensor]:
        """Contrastive term over the batch of all processes, and the two figures that show a collapse."""
        zero = branches[0].reconstruction.new_zeros(())
        if len(branches) == 1:
            return zero, zero, _spread(branches[0].features)
        first, second = branches
        hidden = first.mask.hidden.shape[1] - first.mask.kept
        if 2 * hidden <= first.mask.hidden.shape[1] and not (first.mask.hidden & second.mask.hidden).any():
            warnings.warn("no token is hidden by both masks in this batch: its contrastive term counts as 0", stacklevel=2)
        with torch.no_grad():
            disagreement, count = contrast_term("paired", first, second)
            cosine = torch.where(count > 0, 1 - disagreement / count.clamp(min=1), 0.0)
        if self.contrast == "none":
            return zero, cosine, _spread(first.features)
        total, count = contrast_term(self.contrast, first, second)
        return _mean(total, count), cosine, _spread(first.features)

    @torch.no_grad()
    def tokens(self, points: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encoder output of all G groups, nothing masked: tokens (B, G, C), and the class token (B, C) of branch 1 if there is one."""
        centres, groups = group(points, self.num_group, self.group_size, ops=self.ops)
        token, place = (parts[0] if len(parts) else None for parts in (self.class_tokens, self.class_positions))
        return self.encoder.all_tokens(groups, centres, token, place)

    def features(self, points: Tensor, pool: Literal["class_max", "mean_max"] = "class_max") -> Tensor:
        """(B, 2C) for a linear probe: [class token; maximum over the groups' tokens], or [mean; maximum].

        Raises:
            ValueError: "class_max" of a model without class token.
        """
        tokens, class_token = self.tokens(points)
        if pool == "class_max" and class_token is None:
            raise ValueError('pool="class_max": this model has no class token; use "mean_max"')
        first = class_token if pool == "class_max" and class_token is not None else tokens.mean(1)
        return torch.cat([first, tokens.amax(1)], 1)


# -- the contrastive term ----------------------------------------------------------------------------------------------------------


def contrast_term(kind: Contrast, first: Branch, second: Branch) -> tuple[Tensor, Tensor]:
    """Sum over the tokens i that both masks hide, and how many those are (0-d each); the term is their quotient (Sec. 3.7 of the release).

    "dense" (released code): mean over ALL tokens j of branch 2 of 1 - cos(f1_i, f2_j) + 1e-8. As sum_j n1_i . n2_j = n1_i . sum_j n2_j, no
        G x G matrix is made. Not symmetric in the branches.
    "paired" (abstract): 1 - cos(f1_i, f2_i).
    "mse", "l2" (ablations of the repository's history): mean, or sum, over channels of (f1_i - f2_i)^2, features not normalised.
    """
    both = (first.mask.hidden & second.mask.hidden).float()
    count = both.sum()
    if kind == "dense":
        one, two = unit(first.features), unit(second.features)
        weight = both.gather(1, first.mask.order)[:, None]  # in the order of branch 1's features; branch 2's order does not matter
        with torch.autocast(one.device.type, enabled=False):  # the product would be rounded
            shared = (weight @ one)[:, 0]
        return (1 + 1e-8) * count - (shared * two.mean(1)).sum(), count
    one, two = (_token_order(branch) for branch in (first, second))
    if kind == "paired":
        each = 1 - (unit(one) * unit(two)).sum(-1)
    elif kind in ("mse", "l2"):
        squared = (one.float() - two.float()).square()
        each = squared.mean(-1) if kind == "mse" else squared.sum(-1)
    else:
        raise ValueError(f"contrast={kind!r}: expected dense, paired, mse or l2")
    return (each * both).sum(), count


def _token_order(branch: Branch) -> Tensor:
    return scatter(torch.empty_like(branch.features), branch.mask.order, branch.features)


def _mean(total: Tensor, count: Tensor) -> Tensor:
    """total / count over the terms of all processes (whose gradients are averaged); 0 where there is no term."""
    count, processes = count.clone(), 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
        processes = torch.distributed.get_world_size()
    return total * processes / count.clamp(min=1)


def _spread(features: Tensor) -> Tensor:
    return 1 - unit(features.detach()).flatten(0, 1).mean(0).norm()


# -- parts ---------------------------------------------------------------------------------------------------------------------------


def check_ops(ops: Ops) -> Ops:
    """The backend's name, if there is one of that name."""
    if ops not in _PATHS:
        raise ValueError(f"ops={ops!r}: expected one of {', '.join(_PATHS)}")
    return ops


def check_points(points: Tensor, num_group: int, group_size: int) -> None:
    """Refuse what cannot be grouped: cheap checks always, values on a CPU alone (a look at a GPU's values would stall it).

    Raises:
        ValueError: not floating point (B, N, 3); NaN or infinite; fewer points than a group has or groups are; a cloud that is one point,
            not normalised (largest norm over 10), or all within 0.0316 of the origin, where sampling would return one point only.
    """
    if points.ndim != 3 or points.shape[-1] != 3 or not points.is_floating_point():
        raise ValueError(f"points: expected floating point (B, N, 3), got {points.dtype} {tuple(points.shape)}")
    count = points.shape[1]
    if count < group_size or count < num_group:
        raise ValueError(
            f"points: {count} a cloud for num_group={num_group} of group_size={group_size}; expected at least as many: lower these or give more points"
        )
    if points.is_cuda or torch.compiler.is_compiling():
        return
    if not points.isfinite().all():
        bad = (~points.isfinite()).flatten(1).sum(1)
        sample = int(bad.argmax())
        raise ValueError(
            f"points: {int(bad.sum())} values are NaN or infinite, {int(bad[sample])} of them in sample {sample}; check the reader"
        )
    norm = points.detach().norm(dim=-1).amax(1)
    extent = (points.amax(1) - points.amin(1)).amax(-1)
    for wrong, why in (
        (norm > LARGEST_NORM, f"expected a cloud inside radius {LARGEST_NORM:g}; subtract the mean and divide by the largest norm"),
        (extent == 0, "all its points are equal; drop it"),
        (norm**2 <= 1e-3, "all its points lie within 0.0316 of the origin, which sampling skips; check units or normalise"),
    ):
        if wrong.any():
            sample = int(wrong.int().argmax())
            raise ValueError(f"points: sample {sample} has largest norm {float(norm[sample]):.4g}: {why}")


def _pointnet2_centres(points: Tensor, count: int) -> Tensor:
    """Farthest points by the CUDA extension that the reference uses."""
    try:
        extension = importlib.import_module("pointnet2_ops.pointnet2_utils")
    except ImportError as err:
        raise ImportError(
            'ops="pointnet2_ops": that extension is not installed, and not on PyPI (github.com/erikwijmans/Pointnet2_PyTorch); '
            'ops="auto" gives the same indices without it'
        ) from err
    index = extension.furthest_point_sample(points, count)
    return extension.gather_operation(points.transpose(1, 2).contiguous(), index).transpose(1, 2).contiguous()


def sample_points(points: Tensor, count: int, *, ops: Ops = "auto") -> Tensor:
    """(B, count, 3): farthest points of points (B, N, 3) from its first on (rules: `common.kernels.points.farthest_points`)."""
    if ops == "pointnet2_ops":
        if not points.is_cuda:
            raise ValueError(f'ops="pointnet2_ops" expects CUDA tensors, got one on {points.device}; use ops="auto"')
        return _pointnet2_centres(points.detach().float().contiguous(), count)
    return gather(points.detach().float(), farthest_points(points, count, path=_PATHS[check_ops(ops)]))


def group(points: Tensor, num_group: int, group_size: int, *, ops: Ops = "auto") -> tuple[Tensor, Tensor]:
    """Cut clouds (B, N, 3) into groups (Sec. 3.1 of the release): farthest points as centres, their nearest points minus the centre.

    Returns:
        centres (B, G, 3), groups (B, G, k, 3); float32 whatever the input, without gradient. Groups overlap.
    Raises:
        ValueError: see `check_points`.
    """
    check_points(points, num_group, group_size)
    centres = sample_points(points, num_group, ops=ops)
    return centres, knn_group(points, centres, group_size, path=_PATHS[ops]).neighbourhood


class GroupEmbed(nn.Module):
    """Mini-PointNet: the points of each group (B, G, k, 3) to one token (B, G, dim).

    Two point-wise layers, the group's maximum put beside every point, two more layers, maximum. Batch norms run over all B * G * k points,
    so hidden groups are embedded too.

    Args:
        widths: (w1, w2, w3) of the point-wise layers 3 -> w1 -> w2, [w2 of the group | w2] -> w3 -> dim.
    """

    def __init__(self, dim: int, widths: Sequence[int] = (128, 256, 512)) -> None:
        super().__init__()
        first, second, third = widths
        self.first = nn.Linear(3, first)
        self.first_norm = nn.BatchNorm1d(first)
        self.second = nn.Linear(first, second)
        self.third = nn.Linear(2 * second, third)  # the columns of the group's maximum come first
        self.third_norm = nn.BatchNorm1d(third)
        self.last = nn.Linear(third, dim)

    def forward(self, groups: Tensor) -> Tensor:
        batch, count, size, _ = groups.shape
        x = F.relu(self.first_norm(self.first(groups.reshape(-1, 3))), inplace=True)
        whole = max_of_linear(x, self.second.weight, self.second.bias, size)
        # Nothing stands between `second` and `third`: for the points they are one narrower layer, and the group's part is mapped once a group.
        # So neither the concatenation nor the wide output of `second` is ever made.
        of_group, of_point = self.third.weight.split(whole.shape[1], 1)
        shared = linear(whole, of_group, self.third.bias + of_point @ self.second.bias)
        x = linear(x, of_point @ self.second.weight).view(batch * count, size, -1) + shared[:, None]
        x = F.relu(self.third_norm(x.flatten(0, 1)), inplace=True)
        return max_of_linear(x, self.last.weight, self.last.bias, size).view(batch, count, -1)


class _MaxOfLinear(torch.autograd.Function):
    """The gradient of a maximum over k points reaches one in k of the layer's outputs: two sparse sums replace two dense products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, size: int) -> Tensor:
        value, index = linear(x, weight, bias).view(-1, size, len(weight)).max(1)
        rows = index + size * torch.arange(len(index), device=x.device)[:, None]
        ctx.save_for_backward(x, weight, rows)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, rows = ctx.saved_tensors
        of_weight = F.embedding_bag(rows.t().contiguous(), x, mode="sum", per_sample_weights=grad.t().contiguous())
        sorted_rows, order = rows.flatten().sort()
        starts = torch.searchsorted(sorted_rows, torch.arange(len(x), device=x.device))
        of_x = F.embedding_bag(order % len(weight), weight, starts, mode="sum", per_sample_weights=grad.flatten()[order])
        return of_x, of_weight, grad.sum(0), None


def max_of_linear(x: Tensor, weight: Tensor, bias: Tensor, size: int) -> Tensor:
    """Maximum over each `size` rows of x (G * size, D) mapped by weight (C, D) and bias (C,): (G, C)."""
    if not on_plain_cpu(x):  # elsewhere dense products are the faster ones
        return F.linear(x, weight, bias).view(-1, size, len(weight)).amax(1)
    return _MaxOfLinear.apply(x, weight, bias, size)


def position_mlp(dim: int) -> nn.Sequential:
    """Coordinates (B, G, 3) of centres to (B, G, dim), added to the input of every block."""
    return nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, dim))


class PointEncoder(nn.Module):
    """Group embedding, positions and the transformer, as pre-training, classifier and segmenter share them."""

    def __init__(self, dim: int, depth: int, num_heads: int, widths: Sequence[int], drop_path: float) -> None:
        super().__init__()
        self.embed = GroupEmbed(dim, widths)
        self.positions = position_mlp(dim)
        self.stack = Blocks(dim, depth, num_heads, qkv_bias=False, drop_path=drop_path, eps=1e-5)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def all_tokens(self, groups: Tensor, centres: Tensor, token: Tensor | None, place: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Nothing masked: groups (B, G, k, 3) to tokens (B, G, C) and the class token (B, C), if `token`, `place` (1, 1, C) are given."""
        x, at = self.embed(groups), self.positions(centres)
        if token is None or place is None:
            return self.stack(x, positions=at).tokens, None
        x = torch.cat([token.expand(len(x), -1, -1), x], 1)
        at = torch.cat([place.expand(len(x), -1, -1), at], 1)
        out = self.stack(x, positions=at).tokens
        return out[:, 1:], out[:, 0]


class PatchDecoder(nn.Module):
    """Mask tokens behind the visible ones, blocks, norm and head on the hidden ones: the points of their groups (Sec. 3.6 of the release)."""

    def __init__(self, dim: int, depth: int, num_heads: int, group_size: int, drop_path: float, chamfer: Chamfer = "l2") -> None:
        super().__init__()
        self.chamfer = chamfer
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.positions = position_mlp(dim)
        self.stack = Blocks(dim, depth, num_heads, qkv_bias=False, drop_path=drop_path, eps=1e-5, final_norm=False)
        self.stack.apply(xavier_init)
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.head = nn.Linear(dim, 3 * group_size)

    def forward(self, visible: Tensor, mask: Mask, centres: Tensor, groups: Tensor) -> Branch:
        """Branch of visible (B, V, C); centres (B, G, 3) and groups (B, G, k, 3) are those of all groups."""
        x = append_mask_tokens(visible, mask, self.mask_token)
        features = self.stack(x, positions=gather(self.positions(centres), mask.order)).tokens
        decoded = self.norm(features[:, mask.kept :])
        target = gather(groups, mask.masked)
        prediction = self.head(decoded).float().view(target.shape)
        distance = chamfer(prediction.flatten(0, 1), target.flatten(0, 1), self.chamfer)
        return Branch(mask, visible, features, decoded, prediction, target, distance)
