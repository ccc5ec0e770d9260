"""HiCMAE's pre-training model (Sun et al. 2024, Sec. 3): two masked autoencoders, joined by fusion, with guidance at three depths of the encoders.

Top to bottom: what forward returns, the model, its decoder, the target settings, the published sizes. Fine-tuning is in `emotion.py`, blocks in
`layers.py`. Video (B, 3, T, H, W) is ImageNet-normalised; audio (B, 1, time, mel) is the normalised log-mel spectrogram of `audio.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from huggingface_hub import PyTorchModelHubMixin
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from common.blocks import Blocks, MaskedEncoder, xavier_init
from common.contrastive import Gather, symmetric_info_nce, unit
from common.kernels.patch_loss import patch_loss, targets
from common.masking import Mask, from_hidden, gather, kept_count, random_mask, tube
from common.patch import PatchEmbed, sincos_1d
from projects.hicmae.layers import CrossSelfBlock, FusionEncoder, FusionOrder, last_rows, norm_layer, self_block

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, of the video; undone for the pixel targets."""

Target = Literal["difference", "pixels", "raw_pixels"]
Modality = Literal["av", "a", "v"]
Levels = dict[int, Tensor]  # number of an encoder block, from 1 -> its output (B, visible, D) after the encoder's final norm


@dataclass
class Output:
    """Loss terms (0-d; of one modality, the other's are left out), and what a picture needs."""

    loss: Tensor
    video_loss: Tensor | None = None
    audio_loss: Tensor | None = None
    contrastive_loss: Tensor | None = None  # sum over the levels, not yet weighted
    contrastive_per_level: Tensor | None = None  # (levels,)
    video_prediction: Tensor | None = None  # (B, hidden, tubelet * patch * patch * 3), in token order
    audio_prediction: Tensor | None = None  # (B, hidden, patch * patch)
    video_mask: Mask | None = None
    audio_mask: Mask | None = None
    video_levels: Levels = field(default_factory=dict)
    audio_levels: Levels = field(default_factory=dict)


class HiCMAE(nn.Module, PyTorchModelHubMixin):
    """Encode visible tokens of both modalities, contrast them at several levels, fuse, decode with skips, compare on hidden tokens.

    Args:
        image_size, frames, patch_size, tubelet: a video token is `tubelet` frames of `patch_size` x `patch_size` pixels.
        audio_size, audio_patch_size: spectrogram (time, mel) and its square patches.
        embed_dim, num_heads, depth: encoders (Sec. 3.4); audio_* None = as the video's.
        fusion_depth, fusion_order: fusion encoder (Sec. 3.6).
        decoder_dim, decoder_heads, decoder_depth: decoders (Sec. 3.7); audio_* None = as the video's.
        levels: encoder blocks, from 1, whose outputs the decoders read, the deepest first; `decoder_depth - 1` of them.
        skip: False = decoders of self blocks alone (Table 13's ablation; the exact form is a choice).
        contrastive_levels: levels of the contrastive loss; None = `levels`.
        temperature: fixed, not learned. contrastive_weight: lambda; 0 = no contrastive loss.
        gather: negatives of other processes: None = own process only, as the reference; "full" = all, with gradient.
        mask_ratio, audio_mask_ratio: share hidden, rounded down; tubes for video.
        target: "difference" = normalised pixels, frames after a cube's first with the first subtracted (the released recipe); "pixels" =
            without the subtraction; "raw_pixels" = neither video nor audio normalised.
        difference_weight: w of (1 - w) MSE(first frames) + w MSE(differences); None = plain mean over all entries.
        modality: "av"; "a" or "v" = one masked autoencoder with skips, no fusion, no contrast (not in the paper).
    Raises:
        ValueError: sizes that do not divide each other, levels that do not fit the depths, unequal widths with a contrastive loss.
    """

    def __init__(
        self,
        *,
        image_size: int = 160,
        frames: int = 16,
        patch_size: int = 16,
        tubelet: int = 2,
        audio_size: Sequence[int] = (256, 128),
        audio_patch_size: int = 16,
        embed_dim: int = 512,
        num_heads: int = 8,
        depth: int = 10,
        audio_embed_dim: int | None = None,
        audio_heads: int | None = None,
        audio_depth: int | None = None,
        fusion_depth: int = 2,
        fusion_order: FusionOrder = "both",
        decoder_dim: int = 384,
        decoder_heads: int = 6,
        decoder_depth: int = 4,
        audio_decoder_dim: int | None = None,
        audio_decoder_heads: int | None = None,
        mlp_ratio: float = 4.0,
        levels: Sequence[int] = (4, 7, 10),
        skip: bool = True,
        contrastive_levels: Sequence[int] | None = None,
        temperature: float = 0.07,
        contrastive_weight: float = 0.0025,
        gather: Gather | None = None,
        mask_ratio: float = 0.9,
        audio_mask_ratio: float = 0.8,
        target: Target = "difference",
        difference_weight: float | None = None,
        modality: Modality = "av",
    ) -> None:
        super().__init__()
        audio_embed_dim, audio_heads = audio_embed_dim or embed_dim, audio_heads or num_heads
        audio_depth = audio_depth or depth
        contrastive_levels = levels if contrastive_levels is None else contrastive_levels
        _check_levels(levels, contrastive_levels, depth, audio_depth, decoder_depth, skip)
        if modality not in ("av", "a", "v"):
            raise ValueError(f"modality: expected av, a or v, found {modality!r}")
        if modality == "av" and contrastive_weight > 0 and embed_dim != audio_embed_dim:
            raise ValueError(
                f"embed_dim={embed_dim} and audio_embed_dim={audio_embed_dim}: the contrastive loss multiplies features of both, give them one width or contrastive_weight 0"
            )
        if difference_weight is not None and target != "difference":
            raise ValueError(f"difference_weight={difference_weight}: expected target difference, found {target}")
        self.grid = patch_grid("video", (frames, image_size, image_size), (tubelet, patch_size, patch_size))
        self.audio_grid = patch_grid("audio", tuple(audio_size), (audio_patch_size, audio_patch_size))
        self.video_shape, self.audio_shape = (3, frames, image_size, image_size), (1, *audio_size)
        self.patch, self.audio_patch = (tubelet, patch_size, patch_size), (audio_patch_size, audio_patch_size)
        self.mask_ratio, self.audio_mask_ratio = mask_ratio, audio_mask_ratio
        self.levels, self.contrastive_levels = tuple(levels), tuple(contrastive_levels)
        self.temperature, self.contrastive_weight, self.gather = temperature, contrastive_weight, gather
        self.target, self.difference_weight, self.modality = target, difference_weight, modality

        if "v" in modality:
            kept_count(self.grid[1] * self.grid[2], mask_ratio, "hide")
            count = self.grid[0] * self.grid[1] * self.grid[2]
            self.encoder = masked_encoder(3, self.patch, count, embed_dim, depth, num_heads, mlp_ratio=mlp_ratio)
            self.decoder = SkipDecoder(
                embed_dim, decoder_dim, decoder_depth, decoder_heads, count, 3 * tubelet * patch_size**2, mlp_ratio=mlp_ratio, skip=skip
            )
        if "a" in modality:
            count = self.audio_grid[0] * self.audio_grid[1]
            kept_count(count, audio_mask_ratio, "hide")
            self.encoder_audio = masked_encoder(1, self.audio_patch, count, audio_embed_dim, audio_depth, audio_heads, mlp_ratio=mlp_ratio)
            self.decoder_audio = SkipDecoder(
                audio_embed_dim,
                audio_decoder_dim or decoder_dim,
                decoder_depth,
                audio_decoder_heads or decoder_heads,
                count,
                audio_patch_size**2,
                mlp_ratio=mlp_ratio,
                skip=skip,
            )
        if modality == "av":
            self.encoder_fusion = FusionEncoder(
                embed_dim, audio_embed_dim, fusion_depth, num_heads, audio_heads, mlp_ratio=mlp_ratio, order=fusion_order
            )
            self.encoder_fusion.apply(xavier_init)

    def forward(
        self,
        video: Tensor | None,
        audio: Tensor | None,
        video_mask: Mask | Tensor | None = None,
        audio_mask: Mask | Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Output:
        """Loss of video (B, 3, T, H, W) and audio (B, 1, time, mel); a modality that the model lacks is None (or not looked at).

        Args:
            video_mask, audio_mask: (B, tokens) bool, True = hidden, or `Mask`; None = drawn from `generator` (None = the global one).
        Raises:
            ValueError: inputs or masks of other shapes, or a batch of one with a contrastive loss.
        """
        out = Output(torch.zeros(()))
        if "v" in self.modality:
            check_shape("video", video, self.video_shape)
            out.video_mask = self.draw_video_mask(len(video), generator, video.device) if video_mask is None else _as_mask(video_mask)
            out.video_levels = self.encode(self.encoder, video, out.video_mask)
        if "a" in self.modality:
            check_shape("audio", audio, self.audio_shape)
            out.audio_mask = self.draw_audio_mask(len(audio), generator, audio.device) if audio_mask is None else _as_mask(audio_mask)
            out.audio_levels = self.encode(self.encoder_audio, audio, out.audio_mask)
        fused_video, fused_audio = self.fuse(out.video_levels, out.audio_levels)

        terms = []
        if fused_video is not None:
            out.video_prediction = self.decoder(fused_video, [out.video_levels[n] for n in self.levels], out.video_mask)
            out.video_loss = self.video_loss(out.video_prediction, video, out.video_mask)
            terms.append(out.video_loss)
        if fused_audio is not None:
            out.audio_prediction = self.decoder_audio(fused_audio, [out.audio_levels[n] for n in self.levels], out.audio_mask)
            out.audio_loss = self.audio_loss(out.audio_prediction, audio, out.audio_mask)
            terms.append(out.audio_loss)
        if self.modality == "av" and self.contrastive_weight > 0:
            out.contrastive_per_level = self.contrast(out.video_levels, out.audio_levels)
            out.contrastive_loss = out.contrastive_per_level.sum()
            terms.append(self.contrastive_weight * out.contrastive_loss)
        out.loss = torch.stack(terms).sum()
        return out

    # -- parts of forward, in order

    def draw_video_mask(self, batch: int, generator: torch.Generator | None = None, device: torch.device | None = None) -> Mask:
        """Tube mask: int(ratio * places) places hidden in every time slice, drawn for each sample (Sec. 3.2)."""
        return tube(
            random_mask(batch, self.grid[1] * self.grid[2], self.mask_ratio, rounding="hide", generator=generator, device=device),
            self.grid[0],
        )

    def draw_audio_mask(self, batch: int, generator: torch.Generator | None = None, device: torch.device | None = None) -> Mask:
        """int(ratio * tokens) tokens hidden, visible ones in token order (Sec. 3.2)."""
        count = self.audio_grid[0] * self.audio_grid[1]
        return tube(random_mask(batch, count, self.audio_mask_ratio, rounding="hide", generator=generator, device=device), 1)

    def encode(self, encoder: MaskedEncoder, inputs: Tensor, mask: Mask) -> Levels:
        """Levels that skips and contrast need, and the last; one final norm serves all (Sec. 3.4)."""
        return level_features(encoder, inputs, mask, {*self.levels, *self.contrastive_levels})

    def fuse(self, video_levels: Levels, audio_levels: Levels) -> tuple[Tensor | None, Tensor | None]:
        """Fused video and audio tokens; with one modality its own last level."""
        if self.modality == "av":
            return self.encoder_fusion(video_levels[max(video_levels)], audio_levels[max(audio_levels)])
        return (
            video_levels[max(video_levels)] if video_levels else None,
            audio_levels[max(audio_levels)] if audio_levels else None,
        )

    def contrast(self, video_levels: Levels, audio_levels: Levels) -> Tensor:
        """Symmetric InfoNCE between the clips' mean visible tokens at each contrastive level (Sec. 3.5): (levels,)."""
        together = self.gather is not None and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        first = video_levels[self.contrastive_levels[0]]
        if len(first) == 1 and not together:
            raise ValueError(
                "batch of 1 with contrastive_weight > 0: the loss is constant without negatives; raise the batch, or gather over processes"
            )
        with torch.autocast(first.device.type, enabled=False):  # the reference multiplies in float16
            return torch.stack(
                [
                    symmetric_info_nce(
                        clip_feature(video_levels[n]), clip_feature(audio_levels[n]), 1 / self.temperature, gather=self.gather
                    )
                    for n in self.contrastive_levels
                ]
            )

    def video_loss(self, prediction: Tensor, video: Tensor, mask: Mask) -> Tensor:
        """Mean squared error of predicted cubes (B, hidden, P), Sec. 3.8 and 3.9; the targets are made on the fly."""
        split = None if self.difference_weight is None else self.patch[1] * self.patch[2] * 3
        error = patch_loss(prediction, video, mask.masked, self.patch, **self._video_target(), split=split).mean((0, 1))
        if self.difference_weight is None:
            return error[0]
        return (1 - self.difference_weight) * error[0] + self.difference_weight * error[1]

    def audio_loss(self, prediction: Tensor, audio: Tensor, mask: Mask) -> Tensor:
        """Mean squared error of predicted patches (B, hidden, P), Sec. 3.8 and 3.9."""
        return patch_loss(prediction, audio, mask.masked, self.audio_patch, normalise=self._audio_normalise(), eps_inside=False).mean()

    @torch.no_grad()
    def video_target(self, video: Tensor, mask: Mask) -> Tensor:
        """What `video_loss` compares with: (B, hidden, P), entries in the order frame, row, column, colour."""
        about = self._video_target()
        mean, std = (None if about[name] is None else torch.tensor(about[name], device=video.device) for name in ("mean", "std"))
        kind = torch.promote_types(video.dtype, torch.float32)
        found = targets(video, mask.masked, self.patch, "p q c", about["normalise"], 1e-6, False, mean, std, about["difference"], kind)
        return found.flatten(-2)

    @torch.no_grad()
    def audio_target(self, audio: Tensor, mask: Mask) -> Tensor:
        """What `audio_loss` compares with: (B, hidden, P), entries in the order time, mel."""
        kind = torch.promote_types(audio.dtype, torch.float32)
        found = targets(
            audio[:, :, None], mask.masked, (1, *self.audio_patch), "p q c", self._audio_normalise(), 1e-6, False, None, None, False, kind
        )
        return found.flatten(-2)

    def _video_target(self) -> dict[str, Any]:
        """Options of the patch loss: ImageNet's normalisation undone, then each colour of a cube over its values, std outside the root."""
        return {
            "normalise": "none" if self.target == "raw_pixels" else "channel",
            "eps_inside": False,
            "mean": MEAN,
            "std": STD,
            "difference": self.target == "difference",
        }

    def _audio_normalise(self) -> Literal["none", "patch"]:
        return "none" if self.target == "raw_pixels" else "patch"


class SkipDecoder(nn.Module):
    """Decoder whose blocks after the first read encoder levels, the deepest first (Sec. 3.7).

    The sequence is the visible tokens, then one mask token a hidden place, each in token order; it is never brought back to token order.

    Args:
        dim: of the encoder; width: of the decoder. count: tokens of an input. out_dim: values of a token's target.
        skip: False = every block is a self block.
    """

    positions: Tensor

    def __init__(
        self, dim: int, width: int, depth: int, num_heads: int, count: int, out_dim: int, *, mlp_ratio: float = 4.0, skip: bool = True
    ) -> None:
        super().__init__()
        _check_heads("decoder", width, num_heads)
        self.embed = nn.Linear(dim, width, bias=False)  # framework's default initialisation, as in the reference
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.zeros(1, 1, width), std=0.02, a=-0.02, b=0.02))
        later = (CrossSelfBlock(width, width, num_heads, mlp_ratio=mlp_ratio) for _ in range(depth - 1))
        plain = (self_block(width, num_heads, mlp_ratio=mlp_ratio) for _ in range(depth - 1))
        self.blocks = nn.ModuleList([self_block(width, num_heads, mlp_ratio=mlp_ratio), *(later if skip else plain)])
        self.norm = norm_layer(width)
        self.head = nn.Linear(width, out_dim)
        self.skip = skip
        for part in (self.blocks, self.norm, self.head):
            part.apply(xavier_init)
        self.register_buffer("positions", sincos_1d(count, width, interleaved=True), persistent=False)

    def forward(self, visible: Tensor, levels: Sequence[Tensor], mask: Mask) -> Tensor:
        """Predictions (B, hidden, out_dim) in the order of `mask.masked`.

        Args:
            visible: (B, K, dim), fused. levels: shallow to deep, (B, K, dim) each, before fusion.
        """
        places = gather(self.positions[None], mask.order)
        seen, unseen = places[:, : mask.kept], places[:, mask.kept :]
        x = torch.cat([self.embed(visible) + seen, self.mask_token + unseen], 1)
        for number, block in enumerate(self.blocks):
            if self.skip and number > 0:
                x = block.read(x, self.embed(levels[-number]) + seen)
            if number < len(self.blocks) - 1:
                x = Block.forward(block, x)
        return self.head(self.norm(last_rows(self.blocks[-1], x, mask.kept)))


def masked_encoder(
    channels: int, patch: Sequence[int], count: int, dim: int, depth: int, num_heads: int, *, mlp_ratio: float = 4.0, drop_path: float = 0.0
) -> MaskedEncoder:
    """Patch embedding, positions over the flat token index, self blocks, one final norm (Sec. 3.1 and 3.4)."""
    _check_heads("encoder", dim, num_heads)
    stack = Blocks(dim, depth, num_heads, mlp_ratio=mlp_ratio, qkv_bias="no_key", drop_path=drop_path)
    stack.apply(xavier_init)  # the patch convolution keeps the framework's default
    return MaskedEncoder(PatchEmbed(channels, dim, patch), stack, positions=sincos_1d(count, dim, interleaved=True))


def level_features(encoder: MaskedEncoder, inputs: Tensor, mask: Mask | None, levels: Collection[int]) -> Levels:
    """Outputs (B, K, D) of the named blocks, and of the last, each after the encoder's one final norm."""
    depth = len(encoder.stack.blocks)
    found = encoder(inputs, mask, taps={n for n in levels if n != depth})
    return {n: encoder.stack.norm(x) for n, x in found.taps.items()} | {depth: found.tokens}


def clip_feature(tokens: Tensor) -> Tensor:
    """Mean of tokens (B, K, D) as unit rows (B, D), in float32 or better."""
    return unit(tokens.mean(1))


def similarity(video: Tensor, audio: Tensor, temperature: float = 0.07) -> Tensor:
    """Contrastive logits (B, B) of one level's tokens, rows = video, columns = audio; for retrieval, the loss never holds them."""
    return clip_feature(video) @ clip_feature(audio).T / temperature


SIZES: dict[str, dict[str, int]] = {
    # the reference publishes no decoder for T: width 128 with 2 heads is a choice
    "tiny": {"embed_dim": 256, "num_heads": 4, "decoder_dim": 128, "decoder_heads": 2},
    "small": {"embed_dim": 384, "num_heads": 6, "decoder_dim": 192, "decoder_heads": 3},
    "base": {"embed_dim": 512, "num_heads": 8, "decoder_dim": 384, "decoder_heads": 6},
}
"""Published sizes; everything else is the default of `HiCMAE`."""


def _as_mask(mask: Mask | Tensor) -> Mask:
    return mask if isinstance(mask, Mask) else from_hidden(mask)


def patch_grid(what: str, size: tuple[int, ...], patch: tuple[int, ...]) -> tuple[int, ...]:
    """Patches along each side (ValueError where a side is no multiple of its patch)."""
    if any(side < 1 or side % p for side, p in zip(size, patch, strict=True)):
        raise ValueError(f"{what} size {size}: expected multiples of its patch {patch}")
    return tuple(side // p for side, p in zip(size, patch, strict=True))


def _check_heads(what: str, dim: int, num_heads: int) -> None:
    if dim % num_heads or dim % 2:
        raise ValueError(f"{what}: expected an even width that the heads divide, found width {dim} and {num_heads} heads")


def _check_levels(levels: Sequence[int], contrastive: Sequence[int], depth: int, audio_depth: int, decoder_depth: int, skip: bool) -> None:
    if skip and len(levels) != decoder_depth - 1:
        raise ValueError(
            f"levels {tuple(levels)} and decoder_depth={decoder_depth}: expected decoder_depth - 1 = {decoder_depth - 1} levels"
        )
    shallow = min(depth, audio_depth)
    for name, given in (("levels", levels), ("contrastive_levels", contrastive)):
        if list(given) != sorted(set(given)) or not given or not 1 <= given[0] <= given[-1] <= shallow:
            raise ValueError(f"{name} {tuple(given)}: expected rising block numbers between 1 and the encoder's depth {shallow}")


def check_shape(what: str, value: Tensor | None, shape: tuple[int, ...]) -> None:
    """`value` is a batch (B, *shape) (ValueError)."""
    if value is None or tuple(value.shape[1:]) != shape:
        found = "nothing" if value is None else tuple(value.shape)
        raise ValueError(f"{what}: expected (B, {', '.join(map(str, shape))}), found {found}; the model is built for one input size")
