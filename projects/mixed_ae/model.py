"""MixedAE (Chen et al., CVPR 2023): a masked auto-encoder on mixed images whose attention has to recognise which patches belong together.

Top to bottom: what `forward` returns, the model (mixing, homologous attention, homologous contrast, reconstruction of every image of a group),
the two homologous parts, the classifier that is fine-tuned. `mixing.py` has mixing itself. Parameters carry MAE's names.
The paper's detection and segmentation heads are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from common.blocks import xavier_init
from common.contrastive import projection_head, unit
from common.kernels.patch_loss import patch_loss
from common.kernels.topk_attention import topk_attention
from common.masking import Mask, append_mask_tokens, from_noise, gather
from common.patch import PatchEmbed, patchify, sincos_2d
from projects.mixed_ae.mixing import check, draw, full, group_size, mix, ownership, unmix

Mixing = Literal["compose", "full", "none"]


@dataclass
class Output:
    """One pre-training step. Q mixed sequences (compose: B / K, full: B), each decoded into its K images; mixing "none" is MAE: Q = B, K = 1."""

    loss: Tensor
    """0-d, reconstruction + weight x contrast."""
    reconstruction: Tensor
    """0-d, mean squared error over patches that an image does not own."""
    contrast: Tensor
    """0-d; log(L - 1) when features say nothing; 0 where it is switched off."""
    largest_logit: Tensor
    """0-d, of the contrastive loss."""
    accuracy: Tensor
    """(depth,) homologous accuracy of each block, chance = ratio; NaN where attention is full."""
    latent: Tensor
    """(Q, 1 + tokens, D) encoder output after the final norm, class token first."""
    decoded: Tensor
    """(Q K, 1 + L, Dd) input of the last decoder block, class token first, then `mask.order`."""
    prediction: Tensor
    """(Q K, L - L / K, P) of the patches `mask.masked`."""
    mask: Mask
    """Rows (Q K): hidden = not the image's own."""
    assignment: Tensor | None
    """(groups, R, L) owners; None for MAE."""


class MixedAE(nn.Module, PyTorchModelHubMixin):
    """The method and, by switching parts off, its ablations down to MAE.

    Args:
        image_size, patch_size: pixels; the patch divides the image.
        embed_dim, depth, num_heads, mlp_ratio: encoder. decoder_dim, decoder_depth, decoder_heads: decoder.
        mixing: "compose" = one mixed sequence a group; "full" = K complementary ones, each decoded; "none" = MAE with mask ratio 1 - ratio.
        ratio: share r of a mixed sequence that each image gives; K = 1 / r images a group.
        segments: add a learned vector for the image's place in its group to every token.
        homologous: attention of patches is restricted to the `count` best keys, in the blocks `layers` (None = all).
        count: keys that a patch keeps; None = r L, as many as its image owns.
        weight, temperature: of the homologous contrastive loss; weight 0 leaves it out.
        projector: put a two-layer MLP between the features and the contrastive loss.
        permute: draw anew in each step which segment vector each image of a group gets.
        norm_pix: standardise each target patch.
    Raises:
        ValueError: sizes, ratio, count, temperature or weight outside their range, or parts that need mixing without it.
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        mixing: Mixing = "compose",
        ratio: float = 0.25,
        segments: bool = True,
        homologous: bool = True,
        layers: Sequence[int] | None = None,
        count: int | None = None,
        weight: float = 0.1,
        temperature: float = 0.25,
        projector: bool = False,
        permute: bool = False,
        norm_pix: bool = True,
    ) -> None:
        super().__init__()
        self.mixing, self.group = mixing, group_size(ratio)
        self.side, self.patch_size = image_size // patch_size, (patch_size, patch_size)
        self.image_shape = (3, image_size, image_size)
        _check_settings(image_size, patch_size, self.group, mixing, segments, homologous, weight, temperature)
        tokens = self.side**2
        self.count = tokens // self.group if count is None else count
        if not 1 <= self.count <= tokens:
            raise ValueError(f"count={self.count}: expected 1 to {tokens}, the number of patches")
        chosen = range(depth) if layers is None else layers
        if not set(chosen) <= set(range(depth)):
            raise ValueError(f"layers={list(chosen)}: expected block numbers 0 to {depth - 1}")
        self.homologous = frozenset(chosen) if homologous else frozenset()
        self.weight, self.temperature, self.permute, self.norm_pix = weight, temperature, permute, norm_pix

        self.patch_embed = PatchEmbed(3, embed_dim, self.patch_size)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        self.segment_embed = nn.Parameter(0.02 * torch.randn(self.group, embed_dim)) if segments else None
        self.blocks = _blocks(depth, embed_dim, num_heads, mlp_ratio)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.projector = projection_head([embed_dim] * 3) if projector else None
        self.decoder_embed = nn.Linear(embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, decoder_dim))
        self.decoder_blocks = _blocks(decoder_depth, decoder_dim, decoder_heads, mlp_ratio)
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, 3 * patch_size**2)
        # fixed tables, in the state dict because MAE's tools expect them there
        grid = (self.side, self.side)
        self.register_buffer("pos_embed", sincos_2d(grid, embed_dim, prefix=1)[None])
        self.register_buffer("decoder_pos_embed", sincos_2d(grid, decoder_dim, prefix=1)[None])
        self.apply(xavier_init)

    def forward(
        self,
        images: Tensor,
        *,
        assignment: Tensor | None = None,
        noise: Tensor | None = None,
        slots: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Output:
        """Mix, encode, recognise, take apart, reconstruct every image.

        Args:
            images: (B, 3, side, side), B a multiple of K; group j is images jK to jK + K - 1.
            assignment: (B / K, R, L) owners of the positions, or (B / K, L) for R = 1; else made from
            noise: (B / K, L), MAE: (B, L) where the smallest r L stay; else drawn from `generator` (default: the global one).
            slots: (B / K, K) which segment vector each image of a group gets; default: its place, or drawn if `permute`.
        Raises:
            ValueError: images or assignment of another shape or share; a model in eval mode that was given neither assignment nor noise.
        """
        self._check_images(images)
        if assignment is not None and noise is not None:
            raise ValueError("expected an assignment or noise, got both")
        if assignment is None and noise is None and not self.training:
            raise ValueError(
                "images would be mixed in eval mode: expected features(images) for evaluation, or an assignment or noise to look at; call train() to train"
            )
        groups, tokens = len(images) // (1 if self.mixing == "none" else self.group), self.side**2
        if assignment is None:
            noise = torch.rand(groups, tokens, generator=generator, device=images.device) if noise is None else noise
            if noise.shape != (groups, tokens):
                raise ValueError(f"noise: expected {(groups, tokens)}, got {tuple(noise.shape)}")
        if self.mixing == "none":
            if noise is None:
                raise ValueError('mixing="none" (MAE): expected noise, got an assignment')
            return self._mae(images, noise)
        if noise is not None:
            owners = draw(noise, self.group)
            assignment = full(owners, self.group) if self.mixing == "full" else owners[:, None]
        elif assignment is not None:
            assignment = assignment[:, None] if assignment.ndim == 2 else assignment
            check(assignment, self.group, groups, tokens)
        return self._mixed(images, assignment, slots, generator)

    def _mixed(self, images: Tensor, assignment: Tensor, slots: Tensor | None, generator: torch.Generator | None) -> Output:
        groups, sequences, _ = assignment.shape
        owner = assignment.flatten(0, 1)
        mixed = mix(patchify(images, self.patch_size, "first"), assignment).flatten(0, 1)  # pixels: only mixed sequences are embedded
        x = F.linear(mixed, self.patch_embed.proj.weight.flatten(1), self.patch_embed.proj.bias) + self.pos_embed[:, 1:]
        if self.segment_embed is not None:
            if slots is None and self.permute:
                slots = torch.rand(groups, self.group, generator=generator, device=images.device).argsort(1)
            place = assignment if slots is None else slots.gather(1, assignment.flatten(1)).view_as(assignment)
            x = x + self.segment_embed[place].flatten(0, 1)
        latent, accuracy = self._encode(x, owner)
        contrast = largest = latent.new_zeros((), dtype=torch.float32)
        if self.weight > 0:
            features = latent[:, 1:] if self.projector is None else self.projector(latent[:, 1:])
            per_anchor, largest = homologous_contrast(features, owner, self.group, self.temperature)
            contrast = per_anchor.mean()
        mask, inner = ownership(assignment, self.group), self.decoder_embed(latent)
        decoded = self._decode(inner[:, :1].repeat_interleave(self.group, 0), unmix(inner[:, 1:], mask, self.group), mask)
        if sequences > 1:  # every sequence shows its group anew
            images = images.unflatten(0, (groups, 1, self.group)).expand(-1, sequences, -1, -1, -1, -1).flatten(0, 2)
        prediction, reconstruction = self._compare(decoded, images, mask)
        loss = reconstruction + self.weight * contrast
        return Output(loss, reconstruction, contrast, largest, accuracy, latent, decoded, prediction, mask, assignment)

    def _mae(self, images: Tensor, noise: Tensor) -> Output:
        """Each image on its own: r L of its patches are seen, at the same encoder and decoder cost."""
        mask = from_noise(noise, self.side**2 // self.group)
        latent, accuracy = self._encode(self.patch_embed(images, mask.keep) + gather(self.pos_embed[:, 1:], mask.keep), None)
        inner = self.decoder_embed(latent)
        decoded = self._decode(inner[:, :1], inner[:, 1:], mask)
        prediction, loss = self._compare(decoded, images, mask)
        zero = loss.new_zeros(())
        return Output(loss, loss, zero, zero, accuracy, latent, decoded, prediction, mask, None)

    def _encode(self, x: Tensor, owner: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens with positions (Q, N, D) -> normed (Q, 1 + N, D), and the homologous accuracy of each block; no owner = ordinary attention."""
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
        accuracy = []
        for number, block in enumerate(self.blocks):
            if owner is None or number not in self.homologous:
                x = block(x)
                accuracy.append(torch.full((), float("nan"), device=x.device))
            else:
                attended, recognised = homologous_attention(block.attn, block.norm1(x), self.count, owner)
                x = x + attended
                x = x + block.mlp(block.norm2(x))
                accuracy.append(recognised)
        return self.norm(x), torch.stack(accuracy)

    def _decode(self, front: Tensor, own: Tensor, mask: Mask) -> Tensor:
        """Input of the last decoder block, (n, 1 + L, Dd): class token, then patches in the order of `mask.order` (blocks see a set)."""
        x = append_mask_tokens(own, mask, self.mask_token, self.decoder_pos_embed[0, 1:])
        x = torch.cat([front + self.decoder_pos_embed[:, :1], x], 1)
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        return x

    def _predict(self, decoded: Tensor, first: int) -> Tensor:
        """Predictions of the rows from `first` on: the last block asks with them alone, its other rows would not be looked at."""
        return self.decoder_pred(self.decoder_norm(rows_from(self.decoder_blocks[-1], decoded, first)))

    def _compare(self, decoded: Tensor, images: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        """Predictions of the hidden patches, and their mean squared error against standardised (`norm_pix` off: raw) pixels."""
        prediction = self._predict(decoded, 1 + mask.kept)
        normalise: Any = "patch" if self.norm_pix else "none"
        return prediction, patch_loss(prediction, images, mask.masked, self.patch_size, normalise=normalise).mean()

    def every_patch(self, output: Output) -> Tensor:
        """Predictions (Q K, L, P) of all patches in raster order, those that an image owns among them (the loss does not look at these)."""
        return gather(self._predict(output.decoded, 1), output.mask.restore)

    def features(self, images: Tensor, *, segments: bool = False) -> Tensor:
        """Tokens (B, 1 + L, D) for evaluation: nothing mixed, ordinary attention; `segments` adds the mean segment vector to every patch."""
        self._check_shape(images)
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        if segments:
            if self.segment_embed is None:
                raise ValueError("segments=True: this model has no segment vectors")
            x = x + self.segment_embed.mean(0)
        return self._encode(x, None)[0]

    def _check_shape(self, images: Tensor) -> None:
        if images.shape[1:] != self.image_shape:
            raise ValueError(f"images: expected (B, {', '.join(map(str, self.image_shape))}), found {tuple(images.shape)}")

    def _check_images(self, images: Tensor) -> None:
        self._check_shape(images)
        if self.mixing != "none":
            check_batch(len(images), self.group)


def rows_from(block: Block, x: Tensor, first: int) -> Tensor:
    """Output of a block for the tokens (B, N, D) from `first` on, every token being a key."""
    q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    attended = F.scaled_dot_product_attention(q[:, :, first:], k, v)
    x = x[:, first:] + block.attn.proj(attended.transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x))


# ---------------------------------------------------------------- the two homologous parts


def homologous_attention(attention: Attention, x: Tensor, count: int, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Self-attention of x (Q, 1 + L, D) in which each patch keeps its `count` best patch keys, and the homologous accuracy (0-d).

    The parameters are those of ordinary attention, which is what remains when `count` = L. The accuracy is the share of kept patch keys that the
    query's own image owns, averaged over sequences, heads and patches; a random choice gives 1 / K.

    Args:
        owner: (Q, L), for the accuracy alone: the choice is made by scores.
    """
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    out, hits = topk_attention(q, k, v, count, prefix=1, owner=owner)
    return attention.proj(out.transpose(1, 2).flatten(2)), hits[..., 1:].float().mean() / count


def homologous_contrast(features: Tensor, owner: Tensor, group: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Supervised contrast inside each mixed sequence: tokens of one image attract, all other tokens of the sequence are the denominator.

    Args:
        features: (Q, L, D) of patches, as they stand; normalised here.
        owner: (Q, L); every image owns L / K tokens.
    Returns:
        (Q, L): mean over the other tokens of the anchor's image of log sum_{q != l} exp(u_l . u_q / tau) - u_l . u_m / tau; the largest logit (0-d).
    """
    with torch.autocast(features.device.type, enabled=False):
        u = unit(features)
        logits = u @ u.mT / temperature
        tokens = logits.shape[-1]
        members = F.one_hot(owner, group).to(logits.dtype)
        own = (logits @ members).gather(-1, owner[..., None])[..., 0] - logits.diagonal(dim1=-2, dim2=-1)
        itself = torch.full((tokens,), float("-inf"), dtype=logits.dtype, device=logits.device).diag()
        others = logits + itself
        return others.logsumexp(-1) - own / (tokens // group - 1), others.detach().amax()


# ---------------------------------------------------------------- fine-tuning


class Classifier(VisionTransformer, PyTorchModelHubMixin):
    """timm's vision transformer as MAE fine-tunes it: ordinary attention, mean of the patch tokens, LayerNorm `fc_norm`, linear `head`.

    Args:
        classes: outputs of the head.
        drop_path: rate of the last block, rising linearly from 0.
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        classes: int = 1000,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(
            image_size,
            patch_size,
            num_classes=classes,
            global_pool="avg",
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )


# ---------------------------------------------------------------- checks and sizes


def check_batch(count: int, group: int, what: str = "batch") -> None:
    """Refuse a number of images that does not make whole groups, naming the nearest one that does."""
    if count % group or count < group:
        nearest = max(group, round(count / group) * group)
        raise ValueError(f"{what} of {count} images: expected whole groups of {group}; the nearest valid size is {nearest}")


def _check_settings(
    image_size: int,
    patch_size: int,
    group: int,
    mixing: str,
    segments: bool,
    homologous: bool,
    weight: float,
    temperature: float,
) -> None:
    if image_size % patch_size:
        raise ValueError(f"image_size={image_size}: expected a multiple of patch_size={patch_size}")
    tokens = (image_size // patch_size) ** 2
    if tokens % group:
        fitting = [k for k in range(2, 17) if tokens % k == 0]
        raise ValueError(
            f"image of {image_size} in patches of {patch_size} gives {tokens} patches, which groups of {group} do not divide; "
            f"groups that do: {fitting or 'none up to 16'} (ratio = 1 / group)"
        )
    if mixing not in ("compose", "full", "none"):
        raise ValueError(f"mixing: expected compose, full or none, got {mixing!r}")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: expected more than 0")
    if weight < 0:
        raise ValueError(f"weight={weight}: expected at least 0")
    if mixing == "none" and (segments or homologous or weight > 0):
        raise ValueError(
            f'mixing="none" (MAE) has no groups: expected segments=False, homologous=False, weight=0, got {segments}, {homologous}, {weight}'
        )
    if weight > 0 and tokens == group:
        raise ValueError(
            f"group of {group} on {tokens} patches: one patch an image has no positive to attract; use a smaller group or weight=0"
        )


def _blocks(depth: int, dim: int, num_heads: int, mlp_ratio: float) -> nn.ModuleList:
    norm: Any = partial(nn.LayerNorm, eps=1e-6)
    return nn.ModuleList(Block(dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm) for _ in range(depth))


SIZES: dict[str, dict[str, int]] = {
    "tiny": {
        "image_size": 64,
        "patch_size": 8,
        "embed_dim": 96,
        "depth": 4,
        "num_heads": 4,
        "decoder_dim": 64,
        "decoder_depth": 2,
        "decoder_heads": 4,
    },
    "base": {},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}
"""Named sizes, as changes of the defaults (the paper's ViT-B at 224)."""
