"""Frozen teachers: patch features, and where they look, of whole unmasked images; through timm, open_clip, or a TorchScript file.

DINO: `timm:vit_base_patch16_224.dino`; CLIP: `open_clip:ViT-B-16` (or timm's `vit_base_patch16_clip_224.openai`). Weights come from a local file or
folder, or from the library's own cache where it has them. Features are those of the last block after the final norm, class token dropped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data import require
from common.weights import load_into, read_state_dict
from projects.mr_mae.mimic import attention_score

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation by channel, pixels in 0..1


class Features(NamedTuple):
    tokens: Tensor  # (B, N, Dt), raster order
    score: Tensor | None  # (B, N) attention of the class token in the last block, mean over heads, summing to 1; None = no class token


def renormalise(images: Tensor, student: Statistics, teacher: Statistics) -> Tensor:
    """Images (B, C, H, W) normalised by the student's mean and deviation -> by the teacher's: (x s_s + m_s - m_t) / s_t."""
    (mean_s, std_s), (mean_t, std_t) = ([torch.as_tensor(part).to(images)[:, None, None] for part in pair] for pair in (student, teacher))
    return images if student == teacher else images * (std_s / std_t) + (mean_s - mean_t) / std_t


class Teacher(nn.Module):
    """A frozen network that gives patch features of the student's images.

    Args:
        body: (B, C, S, S) normalised by `statistics` -> `Features`.
        patch, dim: pixels of its patch a side; channels of its tokens.
        statistics, student: its normalisation, and that of the images given.
        name, settings: what it is, for records and cached features.
    """

    def __init__(
        self,
        net: nn.Module,
        body: Callable[[nn.Module, Tensor], Features],
        patch: int,
        dim: int,
        statistics: Statistics,
        student: Statistics,
        name: str,
        settings: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.net, self.body = net.eval(), body
        for parameter in net.parameters():
            parameter.requires_grad_(False)
        self.patch, self.dim, self.statistics, self.student = patch, dim, statistics, student
        self.name, self.settings = name, settings or {}

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode, whatever its owner does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor, grid: int) -> Features:
        """Features on a grid x grid of patches; images are resized (bicubic) to grid x the teacher's patch where they differ.

        Raises:
            ValueError: the teacher gives another grid.
        """
        side = grid * self.patch
        if images.shape[-1] != side:
            images = F.interpolate(images, size=(side, side), mode="bicubic", align_corners=False, antialias=True)
        found = self.body(self.net, renormalise(images, self.student, self.statistics))
        if found.tokens.shape[1] != grid**2:
            has = round(found.tokens.shape[1] ** 0.5)
            raise ValueError(
                f"teacher {self.name}: expected a {grid}x{grid} grid as the student's, found {has}x{has}; build it for input size {side}"
            )
        return found

    def fingerprint(self) -> str:
        """SHA-256 of the name, settings, normalisation and every weight: features of two teachers never mix."""
        about = [self.name, self.settings, self.patch, self.statistics, self.student]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
        for name, value in sorted(self.net.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
        return digest.hexdigest()


def load(
    spec: str,
    *,
    grid: int,
    weights: str | None = None,
    student: Statistics = IMAGENET,
    projected: bool = False,
    settings: dict[str, Any] | None = None,
) -> Teacher:
    """The teacher that `spec` names, for students with a grid x grid of patches.

    Args:
        spec: `timm:<model>`, `open_clip:<model>`, or `file:<path of a TorchScript module>` (images by ImageNet's statistics -> tokens (B, N, Dt), or
            (tokens, score); such a file runs its own code, so load those you trust).
        weights: local file, or run folder with model.safetensors; None = timm's or open_clip's own, by the model's tag. OpenAI's CLIP from a file is
            `open_clip:ViT-B-16-quickgelu`: a file does not say which GELU it was trained with.
        student: normalisation of the images that it will be given.
        projected: CLIP's tokens after the projection to the shared space instead of before.
        settings: further arguments of timm.create_model.
    """
    kind, _, name = spec.partition(":")
    if kind == "timm" and name:
        return _timm(name, grid, weights, student, settings or {})
    if kind == "open_clip" and name:
        return _open_clip(name, grid, weights, student, projected)
    if kind == "file" and name:
        return _file(name, grid, student)
    raise ValueError(f"teacher {spec!r}: expected timm:<model>, open_clip:<model> or file:<path>")


def class_attention(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """Attention (B, heads, T) of token 0 to all tokens of x (B, T, D), already normalised, by a joint query-key-value map (3D, D)."""
    dim = x.shape[-1]
    query_bias, key_bias = (None, None) if bias is None else (bias[:dim], bias[dim : 2 * dim])
    query = F.linear(x[:, :1], weight[:dim], query_bias).unflatten(-1, (heads, -1)).transpose(1, 2)
    key = F.linear(x, weight[dim : 2 * dim], key_bias).unflatten(-1, (heads, -1)).transpose(1, 2)
    return (query * (dim // heads) ** -0.5 @ key.transpose(-2, -1)).softmax(-1).squeeze(2)


def seen_by(module: nn.Module, run: Callable[[], Any]) -> tuple[Any, Tensor]:
    """What `run` returns, and the first input that `module` got meanwhile."""
    inputs: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    try:
        return run(), inputs[-1]
    finally:
        handle.remove()


def _timm_body(net: nn.Module, images: Tensor) -> Features:
    attention = net.blocks[-1].attn
    tokens, x = seen_by(attention, lambda: net.forward_features(images))
    prefix = net.num_prefix_tokens
    score = None
    if getattr(net, "has_class_token", False):
        row = class_attention(x, attention.qkv.weight, attention.qkv.bias, attention.num_heads)
        score = attention_score(torch.cat([row[..., :1], row[..., prefix:]], -1))
    return Features(tokens[:, prefix:], score)


def _map_body(net: nn.Module, images: Tensor) -> Features:
    return Features(net.forward_features(images).flatten(2).transpose(1, 2), None)


def _timm(name: str, grid: int, weights: str | None, student: Statistics, settings: dict[str, Any]) -> Teacher:
    """A vision transformer, or a convolutional network whose last map (B, C, H, W) serves as tokens (it has no class token to focus by)."""
    import timm
    from timm.models.convnext import ConvNeXt
    from timm.models.resnet import ResNet
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    net = timm.create_model(name, pretrained=False, num_classes=0, **settings)
    transformer = isinstance(net, VisionTransformer)
    if not isinstance(net, VisionTransformer | ResNet | ConvNeXt):
        raise ValueError(f"teacher timm:{name}: expected a VisionTransformer, a ResNet or a ConvNeXt, found {type(net).__name__}")
    patch = net.patch_embed.patch_size[0] if transformer else net.feature_info[-1]["reduction"]
    settings = settings | ({"img_size": grid * patch} if transformer else {})
    if weights is None:
        try:
            net = timm.create_model(name, pretrained=True, num_classes=0, **settings)
        except Exception as err:
            raise FileNotFoundError(
                f"teacher timm:{name}: expected its weights in the local cache, found none and could not fetch them ({type(err).__name__}); name a file in weights"
            ) from err
    else:
        net = timm.create_model(name, pretrained=False, num_classes=0, **settings)
        state = _network(weights)
        if transformer:
            state = checkpoint_filter_fn(state, net)  # names of DINO, MAE and CLIP files; positions resized to the grid
        load_into(net, {key: value for key, value in state.items() if not key.startswith(("head.", "fc."))}, origin=weights)
    mean, std = net.pretrained_cfg.get("mean", IMAGENET[0]), net.pretrained_cfg.get("std", IMAGENET[1])
    body = _timm_body if transformer else _map_body
    return Teacher(net, body, patch, net.num_features, (tuple(mean), tuple(std)), student, f"timm:{name}", settings)


def _network(weights: str) -> dict[str, Tensor]:
    """Tensors of a file, or of a run folder, without a wrapper's prefix and the heads beside it."""
    path = Path(weights)
    if path.is_dir():
        path = require(
            path / "model.safetensors",
            "teacher weights",
            "train the teacher first (projects.mr_mae.pretrain_teacher), or name another file",
        )
    state = read_state_dict(path)
    for prefix in ("net.", "module.", "backbone."):
        if any(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return state


def _open_clip_body(projected: bool) -> Callable[[nn.Module, Tensor], Features]:
    def body(net: nn.Module, images: Tensor) -> Features:
        last = net.transformer.resblocks[-1]
        (_, tokens), x = seen_by(last, lambda: net(images))
        x = x if getattr(net.transformer, "batch_first", True) else x.transpose(0, 1)
        row = class_attention(last.ln_1(x), last.attn.in_proj_weight, last.attn.in_proj_bias, last.attn.num_heads)
        return Features(tokens @ net.proj if projected else tokens, attention_score(row))

    return body


def _open_clip(name: str, grid: int, weights: str | None, student: Statistics, projected: bool) -> Teacher:
    try:
        import open_clip
    except ImportError as err:
        raise ImportError(
            "teacher open_clip: needs open_clip: pip install open_clip_torch, or use timm's vit_base_patch16_clip_224.openai"
        ) from err
    patch = ((open_clip.get_model_config(name) or {}).get("vision_cfg") or {}).get("patch_size")
    if patch is None:
        raise ValueError(
            f"teacher open_clip:{name}: expected a model of open_clip.list_models() whose image tower is a vision transformer, as ViT-B-16; "
            "for others try timm:<model>"
        )
    try:
        net = open_clip.create_model(name, pretrained=weights or "openai", force_image_size=grid * patch).visual
    except (OSError, RuntimeError) as err:
        raise FileNotFoundError(
            f"teacher open_clip:{name}: expected its weights in {weights or 'the local cache'}, could not read or fetch them ({type(err).__name__}); name a file in weights"
        ) from err
    net.output_tokens = True  # (pooled, tokens): the tokens are those after ln_post, before the projection
    dim = net.proj.shape[1] if projected else net.ln_post.normalized_shape[0]
    return Teacher(net, _open_clip_body(projected), patch, dim, CLIP, student, f"open_clip:{name}{' projected' if projected else ''}")


def _file_body(net: nn.Module, images: Tensor) -> Features:
    found = net(images)
    return Features(*found) if isinstance(found, tuple) else Features(found, None)


def _file(path: str, grid: int, student: Statistics) -> Teacher:
    if not Path(path).is_file():
        raise FileNotFoundError(f"teacher file {path}: no such file; expected a module saved by torch.jit.save")
    net = torch.jit.load(path, map_location="cpu")
    patch = int(getattr(net, "patch", 16))
    with torch.no_grad():
        dim = _file_body(net.eval(), torch.zeros(1, 3, grid * patch, grid * patch)).tokens.shape[-1]
    return Teacher(net, _file_body, patch, dim, IMAGENET, student, f"file:{Path(path).name}")
