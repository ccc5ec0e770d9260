"""Fine-tuning: whole clips, hierarchical feature fusion, a linear head (Sec. 3.10), and the losses of both tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from common.blocks import MaskedEncoder, xavier_init
from projects.hicmae.layers import FusionEncoder, FusionOrder, norm_layer
from projects.hicmae.model import Modality, check_shape, masked_encoder, patch_grid

Activation = Literal["sigmoid", "relu", "tanh"]


@dataclass
class Prediction:
    """`output` (B, outputs): logits, or values of a dimensional task. `feature`: what the head reads."""

    output: Tensor
    feature: Tensor  # (B, 4D), (B, D) for one modality, after its LayerNorm
    video_feature: Tensor | None = None  # (B, D), levels fused
    audio_feature: Tensor | None = None
    video_layers: Tensor | None = None  # (B, depth, D), mean token of each level
    audio_layers: Tensor | None = None


class EmotionModel(nn.Module, PyTorchModelHubMixin):
    """Encoders and fusion on all tokens; the levels of an encoder are weighted by a learned softmax.

    Args:
        outputs: classes, or values of a dimensional task.
        drop_path: stochastic depth of the last block of each stack, rising from 0.
        modality: "av"; "a" or "v" = that encoder alone with its own feature (the authors' answer for the unimodal rows).
        feature_fusion: "weighted" = softmax(a) over all levels; "last" = the last level alone (ablation).
        activation: after the head, for dimensional tasks; None in all released runs.
        Others as in `HiCMAE`.
    """

    def __init__(
        self,
        outputs: int,
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
        mlp_ratio: float = 4.0,
        drop_path: float = 0.1,
        modality: Modality = "av",
        feature_fusion: Literal["weighted", "last"] = "weighted",
        activation: Activation | None = None,
    ) -> None:
        super().__init__()
        if modality not in ("av", "a", "v") or feature_fusion not in ("weighted", "last") or outputs < 1:
            raise ValueError(
                f"expected modality av, a or v, feature_fusion weighted or last, outputs >= 1, found {modality!r}, {feature_fusion!r}, {outputs}"
            )
        audio_embed_dim, audio_heads, audio_depth = audio_embed_dim or embed_dim, audio_heads or num_heads, audio_depth or depth
        patch, audio_patch = (tubelet, patch_size, patch_size), (audio_patch_size, audio_patch_size)
        grid = patch_grid("video", (frames, image_size, image_size), patch)
        audio_grid = patch_grid("audio", tuple(audio_size), audio_patch)
        self.video_shape, self.audio_shape = (3, frames, image_size, image_size), (1, *audio_size)
        self.modality, self.feature_fusion, self.activation = modality, feature_fusion, activation
        width = 0
        if "v" in modality:
            count = grid[0] * grid[1] * grid[2]
            self.encoder = masked_encoder(3, patch, count, embed_dim, depth, num_heads, mlp_ratio=mlp_ratio, drop_path=drop_path)
            width += embed_dim
            if feature_fusion == "weighted":
                self.video_layer_weights = nn.Parameter(torch.full((depth,), 1 / depth))
        if "a" in modality:
            count = audio_grid[0] * audio_grid[1]
            self.encoder_audio = masked_encoder(
                1, audio_patch, count, audio_embed_dim, audio_depth, audio_heads, mlp_ratio=mlp_ratio, drop_path=drop_path
            )
            width += audio_embed_dim
            if feature_fusion == "weighted":
                self.audio_layer_weights = nn.Parameter(torch.full((audio_depth,), 1 / audio_depth))
        for module in self.modules():  # the encoders' linear layers; their patch maps keep the framework's default
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
        if modality == "av":
            self.encoder_fusion = FusionEncoder(
                embed_dim,
                audio_embed_dim,
                fusion_depth,
                num_heads,
                audio_heads,
                mlp_ratio=mlp_ratio,
                drop_path=drop_path,
                order=fusion_order,
            )
            self.encoder_fusion.apply(xavier_init)
            width *= 2
        self.fc_norm = norm_layer(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, video: Tensor | None, audio: Tensor | None) -> Prediction:
        """Outputs of video (B, 3, T, H, W) and audio (B, 1, time, mel); a modality that the model lacks is None (or not looked at)."""
        parts: list[Tensor] = []
        found = Prediction(torch.empty(0), torch.empty(0))
        last_video = last_audio = None
        if "v" in self.modality:
            check_shape("video", video, self.video_shape)
            last_video, found.video_layers = layer_means(self.encoder, video)
            found.video_feature = self._fuse_levels(found.video_layers, "video_layer_weights")
            parts.append(found.video_feature)
        if "a" in self.modality:
            check_shape("audio", audio, self.audio_shape)
            last_audio, found.audio_layers = layer_means(self.encoder_audio, audio)
            found.audio_feature = self._fuse_levels(found.audio_layers, "audio_layer_weights")
            parts.append(found.audio_feature)
        if self.modality == "av":
            parts += [stream.mean(1) for stream in self.encoder_fusion(last_video, last_audio)]
        found.feature = self.fc_norm(torch.cat(parts, 1))
        output = self.head(found.feature)
        found.output = output if self.activation is None else getattr(torch, self.activation)(output)
        return found

    def _fuse_levels(self, layers: Tensor, weights: str) -> Tensor:
        """(B, D) from (B, depth, D)."""
        if self.feature_fusion == "last":
            return layers[:, -1]
        return torch.einsum("l,bld->bd", getattr(self, weights).softmax(0).to(layers.dtype), layers)


def layer_means(encoder: MaskedEncoder, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Last level (B, N, D), and the mean token of every level (B, depth, D); a level's normed tokens are freed before the next is normed."""
    found = encoder(inputs, taps=range(1, len(encoder.stack.blocks)))
    means = [encoder.stack.norm(tokens).mean(1) for _, tokens in sorted(found.taps.items())]
    return found.tokens, torch.stack([*means, found.tokens.mean(1)], 1)


# -- losses


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the batch of -sum_k targets_k log softmax_k, in float32; targets (B, K) sum to 1 a row."""
    return -(targets * logits.float().log_softmax(-1)).sum(-1).mean()


def _moments(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means' difference, both variances and the covariance over the batch, biased, (D,) each."""
    p, t = prediction.float(), target.float()
    difference = p.mean(0) - t.mean(0)
    p, t = p - p.mean(0), t - t.mean(0)
    return difference, p.square().mean(0), t.square().mean(0), (p * t).mean(0)


def ccc_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - mean over dimensions of the concordance correlation, moments over the batch (B, D), biased."""
    difference, var_p, var_t, covariance = _moments(prediction, target)
    return 1 - (2 * covariance / (var_p + var_t + difference.square())).mean()


def pcc_loss(prediction: Tensor, target: Tensor, eps: float = 1e-6) -> Tensor:
    """1 - mean over dimensions of Pearson's correlation, moments over the batch (B, D), biased."""
    _, var_p, var_t, covariance = _moments(prediction, target)
    return 1 - (covariance / (var_p.sqrt() * var_t.sqrt() + eps)).mean()
