"""A masked auto-encoder for small images (MAE, He et al. 2021, Sec. 3), to be replaced by the paper's method.

Top to bottom: what forward returns, the model. Left out of MAE: class token, crops, its published sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from common.blocks import Blocks, Decoder, MaskedEncoder, xavier_init
from common.masking import Mask, gather, random_mask
from common.patch import PatchEmbed, patchify, sincos_2d


@dataclass
class Output:
    """`loss`: 0-d. `prediction`: (B, N - K, P), in the order of `mask.masked`. `mask`: what was hidden."""

    loss: Tensor
    prediction: Tensor
    mask: Mask


class MaskedAutoencoder(nn.Module, PyTorchModelHubMixin):
    """Encode the visible patches, decode all, compare on the hidden ones.

    Args:
        image_size, patch_size: pixels; the patch divides the image.
        channels: of the images.
        embed_dim, depth, num_heads: encoder.
        decoder_dim, decoder_depth, decoder_heads: decoder.
        mask_ratio: share of patches hidden (Sec. 4.1: 0.75).
    Raises:
        ValueError: sizes that do not divide each other, or a ratio that hides no patch or all.
    """

    def __init__(
        self,
        image_size: int = 8,
        patch_size: int = 2,
        channels: int = 1,
        embed_dim: int = 64,
        depth: int = 3,
        num_heads: int = 4,
        decoder_dim: int = 32,
        decoder_depth: int = 1,
        decoder_heads: int = 4,
        mask_ratio: float = 0.75,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size={image_size}: expected a multiple of patch_size={patch_size}")
        side = image_size // patch_size
        self.image_shape = (channels, image_size, image_size)
        self.patch_size, self.mask_ratio, self.count = (patch_size, patch_size), mask_ratio, side * side
        embed = PatchEmbed(channels, embed_dim, self.patch_size)
        self.encoder = MaskedEncoder(embed, Blocks(embed_dim, depth, num_heads), positions=sincos_2d((side, side), embed_dim))
        stack = Blocks(decoder_dim, decoder_depth, decoder_heads, final_norm=False)
        self.decoder = Decoder(embed_dim, channels * patch_size**2, stack, positions=sincos_2d((side, side), decoder_dim))
        self.apply(xavier_init)

    def forward(self, images: Tensor, mask: Mask | None = None, *, generator: torch.Generator | None = None) -> Output:
        """Loss of images (B, C, H, W) under `mask`, drawn from `generator` (default: the global one) if not given.

        Raises:
            ValueError: images of another shape.
        """
        if images.shape[1:] != self.image_shape:
            raise ValueError(f"images: expected (B, {', '.join(map(str, self.image_shape))}), found {tuple(images.shape)}; see data.py")
        if mask is None:
            mask = random_mask(len(images), self.count, self.mask_ratio, generator=generator, device=images.device)
        prediction = self.decoder(self.encoder(images, mask).tokens, mask)
        target = gather(patchify(images, self.patch_size), mask.masked)
        return Output((prediction - target).square().mean(), prediction, mask)

    def features(self, images: Tensor) -> Tensor:
        """Mean of the encoder's tokens without mask: images (B, C, H, W) -> (B, embed_dim)."""
        return self.encoder(images).tokens.mean(1)
