"""What is fine-tuned on classes: the backbone without masks and without the multi-scale sum, mean of all tokens, norm, linear head; or timm's ViT."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from huggingface_hub import PyTorchModelHubMixin
from timm.layers import trunc_normal_
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from common.blocks import xavier_init
from projects.mr_mae.model import Backbone

Group = dict[str, Any]


class Classifier(Backbone, PyTorchModelHubMixin):
    """Full-image classifier; names as the reference's fine-tuning model.

    Args:
        classes: outputs; 0 = none, `forward` gives the features.
        pool: "mean" of the tokens, then `fc_norm`; "token0" = final norm, then the first token: the top-left patch, or the class token if there
            is one (the reference without its mean-pool flag).
        backbone: arguments of `Backbone`.
    """

    def __init__(self, classes: int = 1000, pool: Literal["mean", "token0"] = "mean", **backbone: Any) -> None:
        super().__init__(**({"trained_positions": True} | backbone))
        dim, eps = self.patch_embed4.out_features, backbone.get("eps", 1e-6)
        self.pool, self.num_features = pool, dim
        if pool == "mean":
            self.fc_norm = nn.LayerNorm(dim, eps=eps)
        else:
            self.norm = nn.LayerNorm(dim, eps=eps)
        self.head: nn.Module = nn.Linear(dim, classes) if classes else nn.Identity()
        self.apply(xavier_init)
        self.init_maps()
        if classes:
            trunc_normal_(self.head.weight, std=2e-5)

    def features(self, images: Tensor) -> Tensor:
        """Pooled and normalised features (B, D) of images (B, C, S, S)."""
        tokens = self.stages(self.whole(images))[2] + self.pos_embed
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1)
        for block in self.blocks3:
            tokens = block(tokens)
        if self.pool == "token0":
            return self.norm(tokens[:, 0])
        return self.fc_norm(tokens[:, 0 if self.cls_token is None else 1 :].mean(1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self.head(self.features(images))


class PlainClassifier(VisionTransformer, PyTorchModelHubMixin):
    """timm's ViT for a plain encoder: mean of the patch tokens, `fc_norm`, linear head."""

    def __init__(
        self,
        classes: int = 1000,
        image_size: int = 224,
        patch: int = 16,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        class_token: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(
            img_size=image_size,
            patch_size=patch,
            embed_dim=dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            num_classes=classes,
            class_token=class_token,
            global_pool="avg",
            fc_norm=True,
            drop_path_rate=drop_path,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        if classes:
            trunc_normal_(self.head.weight, std=2e-5)

    def features(self, images: Tensor) -> Tensor:
        """Pooled and normalised features (B, D) of images (B, C, S, S)."""
        return self.forward_head(self.forward_features(images), pre_logits=True)


def layer_of(name: str, transformer_blocks: int) -> int:
    """Layer number for the rate's decay: 0 = patch embeddings, positions, stages 1 and 2; block i of stage 3 = i + 1; the rest after all."""
    if name.startswith(("patch_embed", "pos_embed", "cls_token", "blocks1.", "blocks2.")):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks3.") else transformer_blocks + 1


def decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies in fine-tuning: not to 1-D tensors, biases and position or class tokens."""
    return parameter.ndim > 1 and not name.endswith(".bias") and name not in ("pos_embed", "cls_token")


def fine_tuning_groups(model: Classifier | PlainClassifier, layer_decay: float, weight_decay: float) -> list[Group]:
    """Parameter groups for AdamW: `lr_scale` = layer_decay^(last layer - layer), weight decay where `decayed` says."""
    if isinstance(model, PlainClassifier):
        return param_groups_layer_decay(model, weight_decay, model.no_weight_decay(), layer_decay=layer_decay)
    blocks = len(model.blocks3)
    groups: dict[tuple[int, bool], Group] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer, decays = layer_of(name, blocks), decayed(name, parameter)
            group = {
                "params": [],
                "names": [],
                "lr_scale": layer_decay ** (blocks + 1 - layer),
                "weight_decay": weight_decay if decays else 0.0,
            }
            group = groups.setdefault((layer, decays), group)
            group["params"].append(parameter)
            group["names"].append(name)
    return list(groups.values())


def pretraining_groups(model: nn.Module, weight_decay: float) -> list[Group]:
    """Parameter groups for AdamW: decay on every trained tensor but 1-D ones and biases (the mask token is decayed)."""
    groups: dict[bool, Group] = {decays: {"params": [], "weight_decay": weight_decay if decays else 0.0} for decays in (False, True)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim > 1 and not name.endswith(".bias")]["params"].append(parameter)
    return list(groups.values())
