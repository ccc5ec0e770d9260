"""G-SimCLR against its reference: one runner a kind of case."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.contrastive import nt_xent, unit
from common.schedule import cosine
from projects.g_simclr import augment, batches
from projects.g_simclr.autoencoder import DEEP, SHALLOW, DenoisingAutoencoder
from projects.g_simclr.classifier import Classifier
from projects.g_simclr.encoders import build
from projects.g_simclr.model import GSimCLR
from projects.g_simclr.schedules import warm_restarts
from projects.g_simclr.weights import load_reference, names
from tests.parity import Case, Runner, cases, check, fill


def inputs(case: Case) -> dict[str, Tensor]:
    """Inputs, those given as text too: `[other +] [scale*]uniform|normal("name", [shape] | shape)`, clipped where the text says so."""
    out: dict[str, Tensor] = {}
    for name, rule in case.inputs.items():
        if isinstance(rule, Tensor):
            out[name] = rule
            continue
        made = re.search(r'(?:(\w+) \+ )?(?:([\d.e-]+) ?\* ?)?(uniform|normal)\("([^"]+)", (\[[\d, ]+\]|shape)\)', str(rule))
        if made is None:  # words: labels, say
            continue
        other, scale, kind, key, shape = made.groups()
        size = next(iter(out.values())).shape if shape == "shape" else tuple(map(int, shape[1:-1].split(",")))
        value = torch.from_numpy(np.array(getattr(fill, kind)(key, tuple(size)))) * float(scale or 1)
        value = value if other is None else out[other] + value
        out[name] = value.clamp(0, 1) if rule.startswith("clip") else value
    return out


def with_momentum(model: nn.Module, case: Case) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = case.config.get("bn_eps", module.eps)
            module.momentum = 1 - case.config.get("bn_momentum_keras", 0.99)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """All gradients under canonical names, and their L2 norms."""
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    out = {f"grad.{layer}.{part}": found[f"{ours}.{part}"] for layer, ours in names(model).items() for part in ("weight", "bias")}
    return out | {name.replace("grad.", "gradnorm."): value.norm().view(1) for name, value in out.items()}


def channels_of(case: Case) -> int:
    return next(value for value in case.state.values() if value.ndim == 4).shape[1]


def autoencoder_of(case: Case) -> DenoisingAutoencoder:
    kernels = [value.shape for name, value in case.state.items() if name.startswith("conv.") and value.ndim == 4]
    shape = {"widths": [kernel[0] for kernel in kernels[: len(kernels) // 2]], "kernel": kernels[0][-1]}
    known = {"shallow": SHALLOW, "deep": DEEP}.get(case.config["autoencoder"].split()[0])
    assert known is None or known == {"widths": tuple(shape["widths"]), "kernel": shape["kernel"]}
    model = DenoisingAutoencoder(channels_of(case), **shape, noise=case.config.get("noise_stddev", 0.01))
    load_reference(model, case.state)
    return with_momentum(model, case)


def autoencoder(case: Case) -> dict[str, Tensor]:
    model, x = autoencoder_of(case).eval(), inputs(case)["x"]
    with torch.no_grad():
        out = model(x)
        return {"latent": out.latent, "embedding": model.embed(x), "reconstruction": out.images, "mse": out.loss.view(1)}


def autoencoder_loss(case: Case) -> dict[str, Tensor]:
    model, given = autoencoder_of(case).train(), inputs(case)
    out = model(given["x"], noise=given["noise"])
    out.loss.backward()
    return {"loss": out.loss.view(1)} | gradients(model)


def is_keras(case: Case) -> bool:
    return any(name.startswith("conv1_conv") for name in case.state)


def blocks_of(case: Case) -> int:
    return case.config.get("n") or case.config.get("blocks_per_group") or 4


def network_of(case: Case, channels_last: bool = True) -> GSimCLR:
    name = "keras-resnet50" if is_keras(case) else "cifar-resnet"
    head, temperature = case.config["head"], case.config.get("temperature", 0.1)
    model = GSimCLR(name, channels_of(case), blocks_of(case), head=head, temperature=temperature, channels_last=channels_last)
    load_reference(model, case.state)
    return with_momentum(model, case)


def encoder(case: Case) -> dict[str, Tensor]:
    model, x = network_of(case).eval(), inputs(case)["x"]
    with torch.no_grad():
        features = {name.lower(): value for name, value in model.probes(x).items()}
        return {"feature_map": model.encoder(x), "z": model.project(x), **features}


def pretrain_step(case: Case) -> dict[str, Tensor]:
    if told := re.search(r"gradnorm\.\*: ([\d.e-]+)", case.raw.get("tolerance_note", "")):  # stated in words in the case
        case.raw["tolerances"] = {key: float(told[1]) for key in case.expected if key.startswith("grad")}
    # channels-last kernels sum batch statistics less exactly, see test_model.py
    model, given = network_of(case, channels_last=False).train(), inputs(case)
    out = model(given["xi"], given["xj"])
    out.loss.backward()
    found = gradients(model)
    lr = re.search(r"lr ([\d.e-]+)", case.config.get("optimiser", ""))
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=float(lr[1]) if lr else 0.1).step()
    state = model.state_dict()
    after = {
        f"{layer}.{part}.after": state[f"{ours}.{part}"]
        for layer, ours in names(model).items()
        for part in ("weight", "bias", "running_mean", "running_var")
        if f"{ours}.{part}" in state
    }
    return {"loss": out.loss.view(1)} | found | after


def classifier_of(case: Case, *, last_norm: bool, frozen: bool) -> Classifier:
    network = build("keras-resnet50" if is_keras(case) else "cifar-resnet", channels=channels_of(case), blocks=blocks_of(case))
    model = Classifier(network, case.config["classes"], last_norm=last_norm and not is_keras(case), frozen=frozen)
    load_reference(model, case.state)
    return with_momentum(model, case)


def finetune_step(case: Case) -> dict[str, Tensor]:
    model, x = classifier_of(case, last_norm=False, frozen=True).train(), inputs(case)["x"]
    before = {name: value.clone() for name, value in model.named_buffers()}
    out = model(x, torch.arange(len(x)) % case.config["classes"])
    out.loss.backward()
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())
    return {"probabilities": out.logits.softmax(1), "loss": out.loss.view(1)} | gradients(model)


def supervised(case: Case) -> dict[str, Tensor]:
    model = classifier_of(case, last_norm=True, frozen=False).eval()
    with torch.no_grad():
        return {"probabilities": model.logits(inputs(case)["x"]).softmax(1)}


def nt_xent_runner(case: Case) -> dict[str, Tensor]:
    given = inputs(case)
    a, b = (given[name].detach().requires_grad_() for name in ("zi", "zj"))
    loss = nt_xent(unit(a), unit(b), 1 / case.config["temperature"])
    loss.backward()
    return {"loss": loss.view(1), "grad_zi": a.grad, "grad_zj": b.grad}


def lr_schedules(case: Case) -> dict[str, Tensor]:
    config, steps = case.config, case.files["steps"].tolist()
    peak, floor = config["initial_lr"], config["alpha"]
    restarts = [
        warm_restarts(step, first=config["first_decay_steps"], peak=peak, growth=config["t_mul"], decay=config["m_mul"], floor=floor)
        for step in steps
    ]
    once = [cosine(step, total=config["decay_steps"], peak=peak, final=floor * peak) for step in steps]
    return {"restarts": torch.tensor(restarts), "cosine": torch.tensor(once)}


def augment_runner(case: Case) -> dict[str, Tensor]:
    config, x = case.config, inputs(case)["x"]
    out = {"brightness": augment.adjust_brightness(x, config["brightness"])}
    out["contrast"] = augment.adjust_contrast(out["brightness"], config["contrast"])
    out["saturation"] = augment.adjust_saturation(out["contrast"], config["saturation"])
    out["hue"] = augment.adjust_hue(out["saturation"], config["hue"])
    out["jitter"] = augment.colour_jitter(x, *(config[name] for name in ("brightness", "contrast", "saturation", "hue")))
    return out | {"gray": augment.drop_colour(out["jitter"]), "flip": x.flip(3)}


def batches_runner(case: Case) -> dict[str, Tensor]:
    labels, size = case.files["labels"].long(), case.config["batch"]
    made = batches.compose(labels, size, "reference")
    sizes = labels.bincount(minlength=case.config["clusters"])
    order = batches.reference_order(labels)
    return {
        "rank": batches.ranks(labels),
        "order": order,
        "batches": made,
        "same_cluster_pairs": batches.same_label_pairs(made, labels),
        "max_strict_batches": torch.tensor([batches.max_strict_batches(sizes, size)]),
        "fewest_pairs_all_images": torch.tensor([batches.fewest_pairs(sizes, len(labels) // size)]),
    }


RUNNERS: dict[str, Runner] = {
    "autoencoder": autoencoder,
    "autoencoder_loss": autoencoder_loss,
    "encoder": encoder,
    "pretrain_step": pretrain_step,
    "finetune_step": finetune_step,
    "supervised": supervised,
    "nt_xent": nt_xent_runner,
    "lr_schedules": lr_schedules,
    "augment": augment_runner,
    "batches": batches_runner,
}


@pytest.mark.parametrize("case", cases("g_simclr"), ids=str)
def test_equals_the_reference(case: Case) -> None:
    check(case, RUNNERS)


@pytest.mark.parametrize(
    ("model", "everything"),
    [
        (GSimCLR(), 1_226_482),
        (DenoisingAutoencoder(), 335_747),
        (Classifier(build("cifar-resnet", blocks=2), 10, last_norm=True), 575_114),
    ],
)
def test_sizes_are_the_papers(model: nn.Module, everything: int) -> None:
    assert sum(value.numel() for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")) == everything
