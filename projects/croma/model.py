"""CROMA: contrastive radar-optical masked autoencoders (Fuller, Millard and Green, NeurIPS 2023).

Sec. 3: two sensors are encoded apart from a quarter of their patches, a cross-modal InfoNCE aligns their global vectors, a third encoder
fuses the tokens, a light decoder reconstructs the hidden patches of both. The distance biases are in `alibi.py`, the blocks in `layers.py`.
Top to bottom: what comes out, the three encoders (what is released), the pre-training model, the decoder, published sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from common.contrastive import Gather, symmetric_info_nce, unit
from common.kernels.patch_loss import patch_loss
from common.masking import Mask, gather, kept_count, random_mask, restore_tokens
from common.patch import grid_of, interpolate_positions, patchify, sincos_2d, take_patches
from projects.croma.alibi import Bias, bias_between, places
from projects.croma.bands import check_normalised
from projects.croma.layers import GapHead, SensorEncoder, Stack

Grid = tuple[int, int]
Sensors = Literal["radar", "optical", "joint"]
Scheme = Literal["alibi", "alibi_self", "sincos", "sincos_interpolated"]


@dataclass
class Encodings:
    """Tokens (B, n, D) of each encoder, and one vector (B, D) an image; None where a sensor was not given.

    The vector of radar and optical is the GAP head's output; the joint encoder has no head, its vector is the mean of its tokens.
    """

    radar: Tensor | None = None
    radar_gap: Tensor | None = None
    optical: Tensor | None = None
    optical_gap: Tensor | None = None
    joint: Tensor | None = None
    joint_gap: Tensor | None = None

    def tokens(self, sensors: Sensors) -> Tensor:
        """(B, n, D) of one encoder.

        Raises:
            ValueError: a sensor that it needs was not given; the message lists what there is.
        """
        return self._get(sensors)

    def vector(self, sensors: Sensors, pool: Literal["gap", "mean", "concat"] = "gap") -> Tensor:
        """One vector an image: the head's output, the mean of the tokens, or for the joint encoder all three heads side by side (B, 3D)."""
        if pool == "concat" and sensors == "joint":
            return torch.cat([self._get(f"{name}_gap") for name in ("joint", "radar", "optical")], 1)
        return self._get(sensors).mean(1) if pool == "mean" else self._get(f"{sensors}_gap")

    def _get(self, name: str) -> Tensor:
        value = getattr(self, name)
        if value is None:
            there = [other for other, found in vars(self).items() if found is not None]
            raise ValueError(
                f"{name} was asked for, but the sensors given provide only {there}; give radar and optical for the joint outputs"
            )
        return value


@dataclass
class Output:
    """0-d losses by name; what a picture needs."""

    loss: Tensor
    """Weighted sum of the two below."""
    contrastive: Tensor
    """Eq. 1: mean of both directions."""
    reconstruction: Tensor
    """optical + radar."""
    optical: Tensor
    """Mean squared error of removed optical patches."""
    radar: Tensor
    """Mean squared error of removed radar patches."""
    encodings: Encodings
    prediction: Tensor | None
    """(B, N, (C_o + C_r) P P) normalised pixels in the order channel, row, column, optical first."""
    radar_mask: Mask
    optical_mask: Mask


class Encoders(nn.Module, PyTorchModelHubMixin):
    """Radar, optical and joint encoder with the two GAP heads: what the official checkpoints hold.

    Args:
        embed_dim: D. depth: of the optical encoder; the radar and the joint one have half of it (at least one) unless given.
        num_heads: of all encoders (released: 16 whatever the width).
        patch_size: side P of a patch in pixels.
        optical_channels, radar_channels: bands of the two images.
        positions: "alibi" = 2D- and X-ALiBi; "alibi_self" = without the bias in cross-attention; "sincos" = fixed sine-cosine
            positions added to the tokens, for each grid its own; "sincos_interpolated" = those of `trained_grid`, resized.
        trained_grid: (rows, columns) of patches that "sincos_interpolated" resizes.
        joint_self_bias: "cross" = the joint encoder's self-attention takes the radar-to-optical distances, as the reference does;
            "self" = radar to radar. Without masks both are equal; they need "self" where the sensors keep different numbers of patches.
        checkpointing: trade time for memory in the backward pass.
    Raises:
        ValueError: heads that do not divide the width.
    """

    def __init__(
        self,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 16,
        *,
        radar_depth: int | None = None,
        joint_depth: int | None = None,
        patch_size: int = 8,
        optical_channels: int = 12,
        radar_channels: int = 2,
        positions: Scheme = "alibi",
        trained_grid: Grid = (15, 15),
        joint_self_bias: Literal["cross", "self"] = "cross",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        half = max(depth // 2, 1)
        self.embed_dim, self.num_heads, self.patch_size = embed_dim, num_heads, (patch_size, patch_size)
        self.channels = {"radar": radar_channels, "optical": optical_channels}
        self.positions, self.trained_grid, self.joint_self_bias = positions, tuple(trained_grid), joint_self_bias
        self.radar_encoder = SensorEncoder(
            radar_channels * patch_size**2, embed_dim, half if radar_depth is None else radar_depth, num_heads, checkpointing=checkpointing
        )
        self.optical_encoder = SensorEncoder(optical_channels * patch_size**2, embed_dim, depth, num_heads, checkpointing=checkpointing)
        self.joint_encoder = Stack(
            embed_dim, half if joint_depth is None else joint_depth, num_heads, cross=True, checkpointing=checkpointing
        )
        self.radar_head = GapHead(embed_dim)
        self.optical_head = GapHead(embed_dim)

    def forward(
        self,
        radar: Tensor | None = None,
        optical: Tensor | None = None,
        radar_mask: Mask | None = None,
        optical_mask: Mask | None = None,
        *,
        joint: bool = True,
    ) -> Encodings:
        """Encode radar (B, 2, H, W) and / or optical (B, 12, H, W), both in [0, 1] or uint8, H and W any multiples of the patch.

        Args:
            radar_mask, optical_mask: only the visible patches are projected and encoded, in the order of `mask.keep`.
            joint: False = leave the joint encoder out.
        Raises:
            ValueError: no image, wrong channels, values that were not normalised (in eval mode), sides that are no multiples of the patch or
                differ between sensors, masks of different sizes with joint_self_bias = "cross".
        """
        if radar is None and optical is None:
            raise ValueError("expected a radar or an optical image, or both, got neither")
        if radar is not None and optical is not None and (radar.shape[0], *radar.shape[2:]) != (optical.shape[0], *optical.shape[2:]):
            raise ValueError(
                f"radar {tuple(radar.shape)} and optical {tuple(optical.shape)}: expected pairs of one size; resample one to the other's grid"
            )
        out = Encodings()
        own: dict[str, Bias] = {}
        if radar is not None:
            out.radar, own["radar"] = self._encode("radar", radar, radar_mask)
            out.radar_gap = self.radar_head(out.radar)
        if optical is not None:
            out.optical, own["optical"] = self._encode("optical", optical, optical_mask)
            out.optical_gap = self.optical_head(out.optical)
        if joint and radar is not None and optical is not None:
            out.joint = self._fuse(out, own["radar"], grid_of(radar, self.patch_size), radar_mask, optical_mask)
            out.joint_gap = out.joint.mean(1)
        return out

    def _encode(self, sensor: Literal["radar", "optical"], images: Tensor, mask: Mask | None) -> tuple[Tensor, Bias]:
        """Tokens of one sensor and the bias of its self-attention."""
        if images.ndim != 4 or images.shape[1] != self.channels[sensor]:
            bands = "; expected 12 bands (B1..B12 without B10): pass band names or drop B10" if images.shape[1:2] == (13,) else ""
            raise ValueError(f"{sensor}: expected (B, {self.channels[sensor]}, H, W), got {tuple(images.shape)}{bands}")
        if not self.training:
            check_normalised(images)  # training checks its data sets instead: here a GPU would have to wait
        grid = grid_of(images, self.patch_size)
        if mask is None:
            patches = patchify(images, self.patch_size, "first")
        else:
            patches = take_patches(images, self.patch_size, mask.keep, "first")
        encoder = self.radar_encoder if sensor == "radar" else self.optical_encoder
        if not patches.is_floating_point():
            patches = patches.to(encoder.embed.weight.dtype) / 255
        keep = None if mask is None else mask.keep
        if self.positions in ("alibi", "alibi_self"):
            at = places(grid, keep, images.device)
            bias = bias_between(at, at, self.num_heads)
            return encoder(patches, bias), bias
        return encoder(patches, None, self._table(grid, keep, images.device)), None

    def _fuse(self, found: Encodings, radar_bias: Bias, grid: Grid, radar_mask: Mask | None, optical_mask: Mask | None) -> Tensor:
        """Joint encodings (B, n_radar, D): radar tokens attend to each other and to the optical tokens."""
        if self.positions != "alibi":
            return self.joint_encoder(found.radar, radar_bias, found.optical, None)
        if radar_mask is None and optical_mask is None:
            return self.joint_encoder(found.radar, radar_bias, found.optical, radar_bias)
        at = [places(grid, None if mask is None else mask.keep, found.radar.device) for mask in (radar_mask, optical_mask)]
        cross = bias_between(at[0], at[1], self.num_heads)
        if self.joint_self_bias == "self":
            return self.joint_encoder(found.radar, radar_bias, found.optical, cross)
        if at[0].shape[1] != at[1].shape[1]:
            raise ValueError(
                f"radar keeps {at[0].shape[1]} and optical {at[1].shape[1]} patches: joint_self_bias='cross' needs equal numbers; "
                "set joint_self_bias='self'"
            )
        return self.joint_encoder(found.radar, cross, found.optical, cross)

    def _table(self, grid: Grid, keep: Tensor | None, device: torch.device) -> Tensor:
        trained = self.trained_grid if self.positions == "sincos_interpolated" else grid
        rows = _sincos(grid, trained, self.embed_dim).to(device)[None]
        return rows if keep is None else gather(rows, keep)


class CROMA(nn.Module, PyTorchModelHubMixin):
    """The pre-training model: encoders, contrastive projections with a learned scale, decoder, both losses.

    Args:
        encoders: arguments of `Encoders`.
        decoder_dim, decoder_depth, decoder_heads: width (a multiple of 4 and of the heads), layers and heads of the decoder.
        mask_ratio: share of patches removed (Sec. 3: 0.75); optical_mask_ratio: of the optical image where it differs.
        shared_mask: both sensors lose the same patches (ablation).
        contrastive_weight, reconstruction_weight: of the two losses; a part that only a loss of weight 0 would train is frozen.
        targets: "both", or "optical": only optical patches are reconstructed (ablation).
        gather_gradient: what flows back through features gathered from all processes: "none" (the reference: not even to own rows),
            "local", "full".
    Raises:
        ValueError: sizes that do not divide each other, both weights 0, unequal ratios with a shared mask or joint_self_bias="cross".
    """

    def __init__(
        self,
        encoders: Mapping[str, Any] | None = None,
        *,
        decoder_dim: int = 512,
        decoder_depth: int = 1,
        decoder_heads: int = 8,
        mask_ratio: float = 0.75,
        optical_mask_ratio: float | None = None,
        shared_mask: bool = False,
        contrastive_weight: float = 1.0,
        reconstruction_weight: float = 1.0,
        targets: Literal["both", "optical"] = "both",
        gather_gradient: Gather = "none",
    ) -> None:
        super().__init__()
        self.encoders = Encoders(**(encoders or {}))
        unequal = optical_mask_ratio is not None and optical_mask_ratio != mask_ratio
        if unequal and (shared_mask or self.encoders.joint_self_bias == "cross"):
            raise ValueError(
                f"mask_ratio={mask_ratio} and optical_mask_ratio={optical_mask_ratio}: unequal ratios need shared_mask=False and "
                "joint_self_bias='self'"
            )
        if contrastive_weight < 0 or reconstruction_weight < 0 or contrastive_weight + reconstruction_weight == 0:
            raise ValueError(f"expected loss weights >= 0, not both 0, got {contrastive_weight} and {reconstruction_weight}")
        self.mask_ratio = mask_ratio
        self.optical_mask_ratio = mask_ratio if optical_mask_ratio is None else optical_mask_ratio
        self.shared_mask, self.targets, self.gather_gradient = shared_mask, targets, gather_gradient
        self.contrastive_weight, self.reconstruction_weight = contrastive_weight, reconstruction_weight
        dim, values = self.encoders.embed_dim, sum(self.encoders.channels.values()) * self.encoders.patch_size[0] ** 2
        self.radar_proj = nn.Linear(dim, dim)
        self.optical_proj = nn.Linear(dim, dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.decoder = Decoder(dim, values, decoder_dim, decoder_depth, decoder_heads)
        frozen: list[nn.Module | nn.Parameter] = []
        if reconstruction_weight == 0:
            frozen += [self.encoders.joint_encoder, self.decoder]
        if contrastive_weight == 0:
            frozen += [self.encoders.radar_head, self.encoders.optical_head, self.radar_proj, self.optical_proj, self.logit_scale]
        for part in frozen:
            part.requires_grad_(False)

    def forward(
        self,
        images: Tensor,
        radar_mask: Mask | None = None,
        optical_mask: Mask | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Output:
        """Losses of images (B, 12 + 2, H, W), optical bands first, in [0, 1] or uint8.

        Args:
            radar_mask, optical_mask: else drawn from `generator` (default: the global one), for each sample and sensor on its own.
        Raises:
            ValueError: other channels, sides that are no multiples of the patch, a ratio that leaves no patch or all,
                one sample in one process (its contrastive loss would be 0).
        """
        optical_bands = self.encoders.channels["optical"]
        if images.ndim != 4 or images.shape[1] != sum(self.encoders.channels.values()):
            raise ValueError(
                f"images: expected (B, {sum(self.encoders.channels.values())}, H, W), {optical_bands} optical bands then radar, got {tuple(images.shape)}"
            )
        optical, radar = images[:, :optical_bands], images[:, optical_bands:]
        grid = grid_of(images, self.encoders.patch_size)
        if radar_mask is None or optical_mask is None:
            drawn = self.draw_masks(len(images), math.prod(grid), generator=generator, device=images.device)
            radar_mask, optical_mask = radar_mask or drawn[0], optical_mask or drawn[1]
        found = self.encoders(radar, optical, radar_mask, optical_mask, joint=self.reconstruction_weight > 0)
        zero = images.new_zeros((), dtype=torch.float32)
        contrastive = self.contrast(found.radar_gap, found.optical_gap) if self.contrastive_weight else zero
        prediction, by_optical, by_radar = None, zero, zero
        if self.reconstruction_weight:
            prediction = self.decoder(found.joint, radar_mask, grid)
            by_optical, by_radar = self.reconstruct(prediction, images, radar_mask, optical_mask)
        total = by_optical + (by_radar if self.targets == "both" else 0)
        loss = self.contrastive_weight * contrastive + self.reconstruction_weight * total
        return Output(loss, contrastive, total, by_optical, by_radar, found, prediction, radar_mask, optical_mask)

    def draw_masks(
        self, batch: int, count: int, *, generator: torch.Generator | None = None, device: torch.device | None = None
    ) -> tuple[Mask, Mask]:
        """Radar and optical mask over `count` patches; kept patches stay in order of rising noise."""
        for name, ratio in (("mask_ratio", self.mask_ratio), ("optical_mask_ratio", self.optical_mask_ratio)):
            try:
                kept_count(count, ratio)
            except ValueError as err:
                raise ValueError(f"{name}: {err}") from err
        radar = random_mask(batch, count, self.mask_ratio, generator=generator, device=device)
        if self.shared_mask:
            return radar, radar
        return radar, random_mask(batch, count, self.optical_mask_ratio, generator=generator, device=device)

    def contrast(self, radar: Tensor, optical: Tensor) -> Tensor:
        """InfoNCE both ways between radar and optical vectors (B, D) and those of all processes, 0-d; in float32 throughout."""
        world = torch.distributed.get_world_size() if torch.distributed.is_available() and torch.distributed.is_initialized() else 1
        if len(radar) * world < 2:
            raise ValueError("contrastive loss: needs at least 2 samples over all processes, got 1; its loss would be 0")
        kind = self.radar_proj.weight.dtype
        with torch.autocast(radar.device.type, enabled=False):
            r = unit(self.radar_proj(radar.to(kind)))
            o = unit(self.optical_proj(optical.to(kind)))
            return symmetric_info_nce(o, r, self.logit_scale.exp(), gather=self.gather_gradient)

    def reconstruct(self, prediction: Tensor, images: Tensor, radar_mask: Mask, optical_mask: Mask) -> tuple[Tensor, Tensor]:
        """Mean squared error over removed optical and over removed radar patches, 0-d each.

        A patch's target has one mean and one unbiased variance over all bands of both sensors.
        """
        split = self.encoders.channels["optical"] * math.prod(self.encoders.patch_size)
        every = torch.arange(prediction.shape[1], device=images.device).expand(len(images), -1)
        error = patch_loss(prediction, images, every, self.encoders.patch_size, order="c p q", split=split)
        return tuple(
            (error[..., number] * mask.hidden).sum() / (len(images) * (mask.hidden.shape[1] - mask.kept))
            for number, mask in enumerate((optical_mask, radar_mask))
        )


class Decoder(nn.Module):
    """Joint tokens at the radar's visible places, mask tokens elsewhere, sine-cosine positions, self-attention without bias, linear map."""

    def __init__(self, dim: int, values: int, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        if width % 4 or width % num_heads:
            raise ValueError(f"decoder_dim={width}: expected a multiple of 4 and of decoder_heads={num_heads}")
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.stack = Stack(width, depth, num_heads)
        self.head = nn.Linear(width, values)

    def forward(self, joint: Tensor, mask: Mask, grid: Grid) -> Tensor:
        """(B, N, values) from joint (B, n, D) in the order of `mask.keep`."""
        x = self.embed(joint)
        x = restore_tokens(x, mask, self.mask_token, _sincos(grid, grid, x.shape[-1]).to(x.device))
        return self.head(self.stack(x))


@torch.compiler.assume_constant_result
@lru_cache(maxsize=32)
def _sincos(grid: Grid, trained: Grid, dim: int) -> Tensor:
    """Fixed table (rows * columns, dim), the first half of the width for the column; made for `trained` and resized to `grid`."""
    table = sincos_2d(trained, dim)
    return table if grid == trained else interpolate_positions(table, trained, grid)


SIZES: dict[str, dict[str, int]] = {
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 16},  # 194,365,440 parameters released, 199,552,385 in pre-training
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},  # 672,557,056 and 678,793,089
}
"""Published sizes, arguments of `Encoders`."""
