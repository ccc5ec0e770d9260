"""MR-MAE (Gao et al. 2023): visible tokens mimic a frozen teacher, hidden patches are rebuilt as pixels, on the ConvMAE backbone or a plain ViT.

Top to bottom: what forward returns, the model, the two encoders, the published sizes. `layers.py` has the convolution blocks, `mimic.py` the mimic head
and its losses, `classifier.py` and `dense.py` what is fine-tuned. Tokens are in raster order, or in the order of `mask.keep`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Literal

import torch
from huggingface_hub import PyTorchModelHubMixin
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from common.blocks import Blocks, Decoder, Encoded, MaskedEncoder, xavier_init
from common.kernels.patch_loss import patch_loss
from common.masking import Mask, enlarge, gather, kept_count, random_mask
from common.patch import PatchEmbed, sincos_2d, take_patches
from projects.mr_mae.layers import ConvBlock, PatchMap, StageEmbed, VisibleBlocks
from projects.mr_mae.mimic import Distance, Focus, MimicHead, TargetNorm, focused_mask, mimic_loss

Targets = Literal["both", "pixels", "mimic", "entangled"]
Path = Literal["visible", "dense"]


@dataclass
class Output:
    """0-d `loss` = `pixel` + `mimic` (weighted sum over teachers; None where a target is off); `prediction` (B, N - K, P) in the order of `mask.masked`."""

    loss: Tensor
    pixel: Tensor | None
    mimic: Tensor | None
    prediction: Tensor | None
    mask: Mask


class MRMAE(nn.Module, PyTorchModelHubMixin):
    """Masked encoder, pixel decoder for hidden patches, mimic heads on visible tokens: L = L_pixel + sum of weight x L_mimic.

    Args:
        image_size: pixels a side, a multiple of the patch (product of `stage_patch`).
        backbone: "convmae" (two masked convolution stages, multi-scale sum; three entries in each stage list) or "vit" (plain, with a class token; one).
        mask_ratio: share of patches hidden; int(N (1 - ratio)) stay.
        norm_pix: standardise the pixels of each patch (unbiased variance, eps 1e-6 inside the root).
        targets: "both"; "pixels" (ConvMAE); "mimic" (no decoder); "entangled" = pixels and teacher features both on the hidden patches, predicted by the
            decoder: the conflict that the paper avoids.
        teacher_dims: channels of each teacher; one mimic head each. mimic_weights: lambda of each; one number serves all.
        mimic_layers: see `MimicHead`. target_norm, distance: see `mimic_loss`.
        focus: choose the visible patches by the first teacher's attention, where forward is given one.
        decoder_mlp_ratio: None = that of the first stage, as in the reference.
        encoder: further arguments of `Encoder` (class_token, kernel, eps ...).
    Raises:
        ValueError: sizes that do not divide each other, a ratio that hides no patch or all, targets without teacher_dims.
    """

    def __init__(
        self,
        image_size: int = 224,
        channels: int = 3,
        backbone: Literal["convmae", "vit"] = "convmae",
        stage_patch: Sequence[int] = (4, 2, 2),
        stage_dims: Sequence[int] = (256, 384, 768),
        stage_depths: Sequence[int] = (2, 2, 11),
        num_heads: int = 12,
        mlp_ratio: Sequence[float] = (4, 4, 4),
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        decoder_mlp_ratio: float | None = None,
        mask_ratio: float = 0.75,
        norm_pix: bool = True,
        targets: Targets = "both",
        teacher_dims: Sequence[int] = (),
        mimic_weights: Sequence[float] = (1.0,),
        mimic_layers: Sequence[int] = (),
        target_norm: TargetNorm = "layernorm",
        distance: Distance = "mse",
        focus: Focus = "none",
        **encoder: Any,
    ) -> None:
        super().__init__()
        if (targets != "pixels") != bool(teacher_dims):
            raise ValueError(
                f"targets={targets!r} with teacher_dims={list(teacher_dims)}: expected the width of each teacher, and none for pixels alone"
            )
        if len(mimic_weights) not in (1, len(teacher_dims) or 1):
            raise ValueError(f"mimic_weights={list(mimic_weights)}: expected one, or one for each of {len(teacher_dims)} teachers")
        if not set(mimic_layers) <= set(range(1, stage_depths[-1] + 1)):
            raise ValueError(f"mimic_layers={list(mimic_layers)}: expected block numbers 1 to {stage_depths[-1]}")
        kind = Encoder if backbone == "convmae" else PlainEncoder
        self.encoder = kind(image_size, channels, stage_patch, stage_dims, stage_depths, num_heads, mlp_ratio, **encoder)
        self.patch, self.grid, self.count = self.encoder.patch, self.encoder.grid, self.encoder.grid**2
        kept_count(self.count, mask_ratio)
        self.mask_ratio, self.norm_pix, self.targets, self.focus = mask_ratio, norm_pix, targets, focus
        self.target_norm, self.distance, self.mimic_layers = target_norm, distance, tuple(mimic_layers)
        self.teacher_dims = tuple(teacher_dims)
        self.mimic_weights = tuple(mimic_weights) * (len(teacher_dims) if len(mimic_weights) == 1 else 1)
        dim, pixels = stage_dims[-1], channels * self.patch**2
        self.pixels = pixels
        in_decoder = targets == "entangled"
        self.decoder: Decoder | None = None
        if targets != "mimic":
            ratio = mlp_ratio[0] if decoder_mlp_ratio is None else decoder_mlp_ratio
            stack = Blocks(decoder_dim, decoder_depth, decoder_heads, mlp_ratio=ratio, final_norm=False)
            width = pixels + (sum(teacher_dims) if in_decoder else 0)
            self.decoder = Decoder(dim, width, stack, positions=sincos_2d((self.grid, self.grid), decoder_dim))
        self.mimics = nn.ModuleList() if in_decoder else nn.ModuleList(MimicHead(dim, width, mimic_layers) for width in teacher_dims)
        self.apply(xavier_init)
        if isinstance(self.encoder, Encoder):
            self.encoder.init_maps()

    def draw_mask(self, images: Tensor, score: Tensor | None = None, generator: torch.Generator | None = None) -> Mask:
        """Random mask, or one focused by score (B, N) where the model has `focus`."""
        if self.focus != "none" and score is not None:
            return focused_mask(score, kept_count(self.count, self.mask_ratio), self.focus, generator=generator)
        return random_mask(len(images), self.count, self.mask_ratio, generator=generator, device=images.device)

    def forward(
        self,
        images: Tensor,
        teachers: Sequence[Tensor] = (),
        mask: Mask | None = None,
        *,
        score: Tensor | None = None,
        generator: torch.Generator | None = None,
        path: Path = "visible",
    ) -> Output:
        """Both losses of images (B, C, S, S), normalised as the student's recipe says.

        Args:
            teachers: one (B, N, Dt) each, features of the whole unmasked images, raster order, without class token.
            mask: see `common.masking`; None = drawn from `generator`, focused by score (B, N) if the model has `focus`.
            path: "visible" computes at visible positions alone; "dense" at all, as the reference does. The numbers agree.
        Raises:
            ValueError: another number of teachers, or a teacher on another grid (its message says which input would fit).
        """
        self._check(teachers)
        mask = self.draw_mask(images, score, generator) if mask is None else mask
        encoded = self.encoder(images, mask, taps=self.mimic_layers, path=path)
        pixel = prediction = mimic = None
        guesses: Sequence[Tensor] = [head(encoded.tokens, encoded.taps) for head in self.mimics]
        index = mask.keep
        if self.decoder is not None:
            prediction, *features = self.decoder(encoded.tokens, mask).split([self.pixels, *self._in_decoder], dim=-1)
            pixel = patch_loss(
                prediction.contiguous(), images, mask.masked, self.patch, normalise="patch" if self.norm_pix else "none"
            ).mean()
            if self.targets == "entangled":
                guesses, index = features, mask.masked
        if guesses:
            losses = [
                weight * mimic_loss(guess, teacher, index, target_norm=self.target_norm, distance=self.distance).mean()
                for guess, teacher, weight in zip(guesses, teachers, self.mimic_weights, strict=True)
            ]
            mimic = torch.stack(losses).sum()
        loss = sum(term for term in (pixel, mimic) if term is not None)
        return Output(loss, pixel, mimic, prediction, mask)

    @property
    def _in_decoder(self) -> tuple[int, ...]:
        return self.teacher_dims if self.targets == "entangled" else ()

    def _check(self, teachers: Sequence[Tensor]) -> None:
        if len(teachers) != len(self.teacher_dims):
            raise ValueError(f"teachers: expected features of {len(self.teacher_dims)} teachers, found {len(teachers)}")
        for number, (features, width) in enumerate(zip(teachers, self.teacher_dims, strict=True)):
            if features.ndim != 3 or features.shape[1] != self.count:
                side = round(features.shape[-2] ** 0.5)
                raise ValueError(
                    f"teacher {number}: expected a {self.grid}x{self.grid} grid as the student's, found {side}x{side}; "
                    f"give the teacher an input of {self.grid} times its patch"
                )
            if features.shape[2] != width:
                raise ValueError(f"teacher {number}: expected {width} channels (teacher_dims), found {features.shape[2]}")


class Backbone(nn.Module):
    """The ConvMAE backbone up to the third stage: two convolution stages and a transformer on their patches; names as in the reference.

    Args:
        stage_patch, stage_dims, stage_depths, mlp_ratio: one entry a stage.
        drop_path: rate of the last block, rising linearly from 0 over all blocks of the three stages.
        trained_positions: the sine-cosine table is the start of a parameter (fine-tuning) rather than fixed.
        kernel: of the depthwise convolutions. embed_eps, conv_eps, eps: of the LayerNorms of stage entries, convolution blocks, transformer blocks.
    """

    def __init__(
        self,
        image_size: int = 224,
        channels: int = 3,
        stage_patch: Sequence[int] = (4, 2, 2),
        stage_dims: Sequence[int] = (256, 384, 768),
        stage_depths: Sequence[int] = (2, 2, 11),
        num_heads: int = 12,
        mlp_ratio: Sequence[float] = (4, 4, 4),
        *,
        class_token: bool = False,
        drop_path: float = 0.0,
        trained_positions: bool = False,
        kernel: int = 5,
        embed_eps: float = 1e-5,
        conv_eps: float = 1e-5,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.patch = _check_sizes(3, image_size, stage_patch, stage_dims, stage_depths, num_heads, mlp_ratio)
        self.image_shape, self.grid = (channels, image_size, image_size), image_size // self.patch
        self.sides = (stage_patch[1] * stage_patch[2], stage_patch[2])  # positions of stages 1 and 2 along a final patch
        self.num_heads, self.reach = num_heads, kernel // 2
        first, second, dim = stage_dims
        depths = [int(depth) for depth in stage_depths]
        rates = iter([drop_path * number / max(sum(depths) - 1, 1) for number in range(sum(depths))])
        norm: Any = partial(nn.LayerNorm, eps=eps)
        self.pos_embed = nn.Parameter(sincos_2d((self.grid, self.grid), dim)[None], requires_grad=trained_positions)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim)) if class_token else None
        self.patch_embed1 = StageEmbed(channels, first, stage_patch[0], embed_eps)
        self.patch_embed2 = StageEmbed(first, second, stage_patch[1], embed_eps)
        self.patch_embed3 = StageEmbed(second, dim, stage_patch[2], embed_eps)
        self.patch_embed4 = nn.Linear(dim, dim)
        conv: dict[str, Any] = {"kernel": kernel, "eps": conv_eps}
        self.blocks1 = nn.ModuleList(ConvBlock(first, mlp_ratio[0], drop_path=next(rates), **conv) for _ in range(depths[0]))
        self.blocks2 = nn.ModuleList(ConvBlock(second, mlp_ratio[1], drop_path=next(rates), **conv) for _ in range(depths[1]))
        self.blocks3 = nn.ModuleList(
            Block(dim, num_heads, mlp_ratio=mlp_ratio[2], qkv_bias=True, drop_path=next(rates), norm_layer=norm) for _ in range(depths[2])
        )

    def init_maps(self) -> None:
        """E3's map as a Xavier-uniform matrix; the other convolutions keep torch's default, linear layers get theirs by `xavier_init`."""
        nn.init.xavier_uniform_(self.patch_embed3.proj.weight.data.flatten(1))

    def stages(self, x: Tensor, visible: Sequence[VisibleBlocks | Tensor | None] = (None, None)) -> tuple[Tensor, Tensor, Tensor]:
        """Convolution stages of channels-last pixels (..., rows, columns, channels), whole images or visible patches.

        Returns:
            maps of stage 1 and stage 2, (..., rows, columns, C) each, and the tokens of stage 3 before positions, (B, N or K, D).
        """
        first = self.patch_embed1(x)
        for block in self.blocks1:
            first = block(first, visible[0])
        second = self.patch_embed2(first)
        for block in self.blocks2:
            second = block(second, visible[1])
        third = self.patch_embed3(second).flatten(1, -2)
        return first, second, self.patch_embed4(third)

    def whole(self, images: Tensor) -> Tensor:
        """Checked images (B, C, S, S) as channels-last pixels."""
        if images.shape[1:] != self.image_shape:
            raise ValueError(
                f"images: expected (B, {', '.join(map(str, self.image_shape))}), found {tuple(images.shape)}; resize them, or set image_size"
            )
        return images.permute(0, 2, 3, 1)


class Encoder(Backbone):
    """The backbone under a mask: stage 3 on visible tokens alone, then the multi-scale sum with stages 1 and 2, then the final norm."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        first, second, dim = self.patch_embed1.proj.out_channels, self.patch_embed2.proj.out_channels, self.patch_embed4.in_features
        self.stage1_output_decode = PatchMap(first, dim, self.sides[0])
        self.stage2_output_decode = PatchMap(second, dim, self.sides[1])
        self.norm = nn.LayerNorm(dim, eps=settings.get("eps", 1e-6))

    def forward(self, images: Tensor, mask: Mask | None = None, *, taps: Collection[int] = (), path: Path = "visible") -> Encoded:
        """Encode images (B, C, S, S).

        Args:
            mask: None = all patches, (B, N, D) in raster order; else (B, K, D) in the order of `mask.keep`.
            taps: transformer blocks, from 1, whose outputs (before sum and norm, class token dropped) are wanted.
            path: "visible" computes at visible positions alone, "dense" everywhere with the mask before each depthwise convolution.
        """
        x = self.whole(images)
        if mask is not None and mask.hidden.shape != (len(images), self.grid**2):
            raise ValueError(f"mask: expected ({len(images)}, {self.grid**2}), one entry a patch, got {tuple(mask.hidden.shape)}")
        if mask is None:
            first, second, tokens = self.stages(x)
        elif path == "dense":
            grid = (self.grid, self.grid)
            first, second, tokens = self.stages(x, [~enlarge(mask.hidden, grid, side)[..., None] for side in self.sides])
        else:
            x = take_patches(images, (self.patch, self.patch), mask.keep).unflatten(-1, (self.patch, self.patch, -1))
            first, second, tokens = self.stages(x, [VisibleBlocks.of(mask.keep, self.grid, side, self.reach) for side in self.sides])
        scales = [
            decode(stage).flatten(1, -2) for decode, stage in ((self.stage1_output_decode, first), (self.stage2_output_decode, second))
        ]
        positions = self.pos_embed
        if mask is not None:
            positions = gather(positions, mask.keep)
            if path == "dense":
                tokens, *scales = (gather(part, mask.keep) for part in (tokens, *scales))
        x = tokens + positions
        prefix = 0 if self.cls_token is None else 1
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        kept: dict[int, Tensor] = {}
        for number, block in enumerate(self.blocks3, start=1):
            x = block(x)
            if number in taps:
                kept[number] = x[:, prefix:]
        return Encoded(self.norm(x[:, prefix:] + scales[0] + scales[1]), kept)


class PlainEncoder(nn.Module):
    """A plain ViT with a class token (MR-MAE without convolution stages); the class token stays inside."""

    def __init__(
        self,
        image_size: int,
        channels: int,
        stage_patch: Sequence[int],
        stage_dims: Sequence[int],
        stage_depths: Sequence[int],
        num_heads: int,
        mlp_ratio: Sequence[float],
        *,
        class_token: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.patch = _check_sizes(1, image_size, stage_patch, stage_dims, stage_depths, num_heads, mlp_ratio)
        self.grid, dim = image_size // self.patch, stage_dims[-1]
        self.prefix = int(class_token)
        stack = Blocks(dim, stage_depths[-1], num_heads, mlp_ratio=mlp_ratio[-1], eps=eps)
        positions = sincos_2d((self.grid, self.grid), dim, prefix=self.prefix)
        self.vit = MaskedEncoder(PatchEmbed(channels, dim, (self.patch, self.patch)), stack, positions=positions, class_token=class_token)

    def forward(self, images: Tensor, mask: Mask | None = None, *, taps: Collection[int] = (), path: Path = "visible") -> Encoded:
        """As `Encoder`; both paths are one here, as nothing but attention reads a neighbour."""
        encoded = self.vit(images, mask, taps=taps)
        return Encoded(encoded.tokens[:, self.prefix :], {number: x[:, self.prefix :] for number, x in encoded.taps.items()})


def _check_sizes(
    stages: int,
    image_size: int,
    stage_patch: Sequence[int],
    stage_dims: Sequence[int],
    stage_depths: Sequence[int],
    num_heads: int,
    mlp_ratio: Sequence[float],
) -> int:
    """Pixels of a final patch along a side."""
    lists = {"stage_patch": stage_patch, "stage_dims": stage_dims, "stage_depths": stage_depths, "mlp_ratio": mlp_ratio}
    for name, entries in lists.items():
        if len(entries) != stages:
            raise ValueError(f"{name}={list(entries)}: expected {stages} entries, one a stage of this backbone")
    if stage_dims[-1] % num_heads:
        raise ValueError(f"num_heads={num_heads}: expected a divisor of the last stage's {stage_dims[-1]} channels")
    return patch_side(image_size, stage_patch)


def patch_side(image_size: int, stage_patch: Sequence[int]) -> int:
    """Pixels of a final patch along a side.

    Raises:
        ValueError: the image's side is not a multiple of it.
    """
    patch = prod(stage_patch)
    if image_size % patch or image_size < patch:
        below = max(image_size // patch, 1) * patch
        raise ValueError(
            f"image_size={image_size}: expected a multiple of the patch of {patch} pixels; the nearest are {below} and {below + patch}"
        )
    return patch


_DECODER = {"decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16}
SIZES: dict[str, dict[str, Any]] = {
    # parameters of the encoder in millions: 21.9, 84.6, 322.0, 679.5, 85.8
    "small": {"stage_dims": (128, 256, 384), "stage_depths": (2, 2, 11), "num_heads": 6, "mlp_ratio": (4, 4, 4), **_DECODER},
    "base": {"stage_dims": (256, 384, 768), "stage_depths": (2, 2, 11), "num_heads": 12, "mlp_ratio": (4, 4, 4), **_DECODER},
    "large": {"stage_dims": (384, 768, 1024), "stage_depths": (2, 2, 23), "num_heads": 16, "mlp_ratio": (8, 8, 4), **_DECODER},
    "huge": {"stage_dims": (768, 1024, 1280), "stage_depths": (2, 2, 31), "num_heads": 16, "mlp_ratio": (8, 8, 4), **_DECODER},
    "vit_base": {
        "backbone": "vit",
        "stage_patch": (16,),
        "stage_dims": (768,),
        "stage_depths": (12,),
        "num_heads": 12,
        "mlp_ratio": (4,),
        **_DECODER,
    },
}
