"""MixedAE against the closed-form cases: one runner a kind."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.kernels.topk_attention import kept_pairs, topk_attention
from common.masking import restore_tokens
from common.patch import sincos_2d
from projects.mixed_ae.information import gaussian_information
from projects.mixed_ae.mixing import draw, full, mix, ownership, unmix
from projects.mixed_ae.model import Classifier, MixedAE, homologous_contrast
from projects.mixed_ae.weights import load_encoder, load_mae
from tests.parity import Case, cases, check, fill


def filled(case: Case, name: str) -> Tensor:
    return made(case.raw["inputs"][name])


def made(rule: str) -> Tensor:
    """An input written as a call of the fill rule, `fill.normal('name', (2, 3))`, whatever words follow."""
    kind, key, shape = re.match(r"fill\.(\w+)\('([^']+)', \(([\d, ]+)\)\)", rule).groups()
    return torch.from_numpy(np.array(getattr(fill, kind)(key, tuple(int(n) for n in shape.split(",") if n.strip()))))


def mix_unmix(case: Case) -> dict[str, Tensor]:
    group = case.config["group"]
    assignment = draw(filled(case, "noise"), group)[:, None]
    segment, latent, token = filled(case, "segment"), filled(case, "latent"), filled(case, "mask_token")
    mask = ownership(assignment, group)
    mixed = mix(filled(case, "tokens"), assignment) + segment[assignment]
    unmixed = restore_tokens(unmix(latent, mask, group), mask, token)
    return {"assignment": assignment[:, 0], "mixed": mixed[:, 0], "visible": ~mask.hidden, "unmixed": unmixed}


def full_mixing(case: Case) -> dict[str, Tensor]:
    group = case.config["group"]
    return {"assignment": full(draw(filled(case, "noise"), group), group)}


def homologous_attention(case: Case) -> dict[str, Tensor]:
    q, k, v = (filled(case, name).requires_grad_() for name in "qkv")
    owner, count = draw(filled(case, "noise"), case.config["group"]), case.config["k"]
    out, hits = topk_attention(q, k, v, count, owner=owner)
    keep = kept_pairs(q.detach(), k.detach(), count)
    grads = torch.autograd.grad(out, (q, k, v), filled(case, "grad_out"))
    bare = topk_attention(*(x[:, :, 1:] for x in (q, k, v)), count, prefix=0).out
    return {
        "out": out,
        "keep": keep,
        "accuracy": hits[..., 1:].double().mean((0, 2)) / count,
        "out.no_class_token": bare,
        **{f"grad_{name}": grad for name, grad in zip("qkv", grads, strict=True)},
    }


def homologous_contrastive(case: Case) -> dict[str, Tensor]:
    group = case.config["group"]
    owner = draw(filled(case, "noise"), group)
    features = filled(case, "features")
    if centred := re.search(r"\+ ([\d.]+) \* (fill\..+)", case.raw["inputs"]["features"]):
        centres = made(centred[2])
        features = features + float(centred[1]) * centres[torch.arange(len(centres))[:, None], owner]
    out: dict[str, Tensor] = {}
    for key in case.expected:
        if told := re.match(r"loss\.tau([\d.]+)$", key):
            leaf = features.clone().requires_grad_()
            per_anchor, _ = homologous_contrast(leaf, owner, group, float(told[1]))
            per_anchor.mean().backward()
            out |= {key: per_anchor.mean().view(1), f"per_anchor.tau{told[1]}": per_anchor, f"grad.tau{told[1]}": leaf.grad}
    equal = homologous_contrast(torch.ones_like(features), owner, group, 0.25)[0]
    return out | {"loss.chance": equal.mean().view(1)}


def sizes(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "image_size": config["image_size"],
        "patch_size": config["patch"],
        "embed_dim": config["dim"],
        "depth": config["depth"],
        "num_heads": config["heads"],
        "mlp_ratio": config["mlp_ratio"],
    }


def model_of(case: Case) -> MixedAE:
    config = case.config
    attention = str(config.get("homologous_attention"))  # "all encoder blocks", "none (full attention)", or the numbers of some
    model = MixedAE(
        **sizes(config),
        decoder_dim=config["decoder_dim"],
        decoder_depth=config["decoder_depth"],
        decoder_heads=config["decoder_heads"],
        ratio=1 / config["group"],
        segments=config["segment_embedding"],
        homologous=config["topk"] is not None,
        layers=[int(n) for n in re.findall(r"\d+", attention)] or None,
        count=config["topk"],
        weight=config["contrastive_weight"],
        temperature=config["temperature"],
        norm_pix=config["norm_pix"],
    )
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)):
        norm.eps = config.get("norm_eps", norm.eps)
    tables = {name: model.state_dict()[name] for name in ("pos_embed", "decoder_pos_embed")}
    load_mae(model, tables | case.state)
    return model.train(case.raw["mode"] == "train")


def pretrain(case: Case) -> dict[str, Tensor]:
    model, images, noise = model_of(case), filled(case, "images"), filled(case, "noise")
    output = model(images, noise=noise)
    output.loss.backward()
    contrast = output.contrast
    if model.weight == 0:  # the model leaves it out
        contrast = homologous_contrast(output.latent[:, 1:], output.assignment[:, 0], model.group, model.temperature)[0].mean()
    out = {
        "assignment": output.assignment[:, 0],
        "latent": output.latent,
        "pred": model.every_patch(output),
        "loss.contrastive": contrast.view(1),
        "loss.total": output.loss.view(1),
        "accuracy.layers": output.accuracy,
    }
    for norm_pix in (True, False):
        model.norm_pix = norm_pix
        out["loss.reconstruction" if norm_pix else "loss.reconstruction_raw"] = model(images, noise=noise).reconstruction.view(1)
    return out | {f"grad.{name}": p.grad.norm().view(1) for name, p in model.named_parameters() if p.grad is not None}


def finetune_logits(case: Case) -> dict[str, Tensor]:
    model = Classifier(**sizes(case.config), classes=case.config["classes"])
    side = case.config["image_size"] // case.config["patch"]
    load_encoder(model, {"pos_embed": sincos_2d((side, side), case.config["dim"], prefix=1)[None]} | case.state)
    model.train(case.raw["mode"] == "train")
    tokens = model.forward_features(filled(case, "images"))
    return {"features": model.forward_head(tokens, pre_logits=True), "logits": model.forward_head(tokens)}


def information(case: Case) -> dict[str, Tensor]:
    config = case.config
    rows = [
        (rho, *gaussian_information(config["patches"], config["length"], rho, config["visible"]))
        for rho in case.expected["table"][:, 0].tolist()
    ]
    return {"table": torch.tensor(rows, dtype=torch.float64)}


RUNNERS = {
    "mix_unmix": mix_unmix,
    "full_mixing": full_mixing,
    "homologous_attention": homologous_attention,
    "homologous_contrastive": homologous_contrastive,
    "pretrain": pretrain,
    "finetune_logits": finetune_logits,
    "gaussian_information": information,
}


@pytest.mark.parametrize("case", cases("mixed_ae"), ids=str)
def test_parity(case: Case) -> None:
    check(case, RUNNERS)
