"""MR-MAE's backbone against its reference, and the mimic part against its closed forms: one runner a kind of case."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.optim.lars import Lars
from torch import Tensor, nn

from common.kernels.patch_loss import patch_loss
from common.masking import Mask, from_keep, random_mask
from common.patch import sincos_2d
from common.schedule import cosine
from projects.mr_mae.classifier import Classifier, decayed, layer_of, pretraining_groups
from projects.mr_mae.dense import DetectionBackbone, SegmentationBackbone
from projects.mr_mae.layers import ConvBlock
from projects.mr_mae.mimic import MimicHead, attention_score, focused_mask, mimic_loss
from projects.mr_mae.model import MRMAE
from projects.mr_mae.teachers import renormalise
from projects.mr_mae.weights import load_reference, reference_state, their_name
from tests.parity import Case, Runner, cases, check, fill


def made(rule: str, name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(getattr(fill, rule)(name, shape).copy())


def told(case: Case, name: str) -> Tensor:
    """An input that the case describes by the call that makes it."""
    text = case.raw["inputs"][name]
    rule, _, rest = text.removeprefix("fill.").partition("(")
    key, _, shape = rest.split(")")[0].partition(", (")
    return made(rule, key.strip("'"), tuple(int(n) for n in shape.rstrip(",").split(",")))


def settings(config: dict[str, Any], eps: str = "transformer_blocks") -> dict[str, Any]:
    """Backbone arguments from a case's config."""
    out = {name: config[name] for name in ("stage_patch", "stage_dims", "stage_depths", "mlp_ratio", "image_size") if name in config}
    norm_eps = config.get("norm_eps", {})
    out |= {
        ours: norm_eps[theirs]
        for ours, theirs in (("embed_eps", "patch_embed"), ("conv_eps", "conv_blocks"), ("eps", eps))
        if theirs in norm_eps
    }
    return out | {"num_heads": config["heads"], "channels": config.get("in_channels", 3)}


def pretrain(case: Case) -> dict[str, Tensor]:
    config = case.config
    decoder = {
        name: config[name]
        for name in ("decoder_dim", "decoder_depth", "decoder_heads", "decoder_mlp_ratio", "mask_ratio")
        if name in config
    }
    images, noise = told(case, "images"), told(case, "noise")

    def build() -> MRMAE:
        model = MRMAE(targets="pixels", **settings(config), **decoder)
        assert load_reference(model, case.state) == ["encoder.pos_embed"]
        return model

    model = build()
    mask = random_mask(*noise.shape, config["mask_ratio"], noise=noise)
    side = images.shape[-1]
    out: dict[str, Tensor] = {"mask": mask.hidden.to(torch.uint8), "ids_restore": mask.restore.int()}
    handles = []

    def keep_output(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, __: Any, value: Tensor) -> None:
            out[f"inter.{name}"] = value.permute(0, 3, 1, 2) if value.ndim == 4 else value

        handles.append(module.register_forward_hook(hook))

    encoder = model.encoder
    for name in ("patch_embed1", "patch_embed2", "patch_embed3", "patch_embed4", "stage1_output_decode", "stage2_output_decode"):
        keep_output(name, getattr(encoder, name))
    for name in ("blocks1", "blocks2", "blocks3"):
        keep_output(name, getattr(encoder, name)[-1])
    with torch.no_grad():
        dense = encoder(images, mask, path="dense").tokens
    for handle in handles:
        handle.remove()
    grid = side // model.patch
    out["inter.patch_embed3"] = out["inter.patch_embed3"].reshape(len(images), -1, grid, grid)
    latent = encoder(images, mask).tokens
    torch.testing.assert_close(latent, dense, rtol=1e-5, atol=1e-5)
    out |= {"latent": latent, "pred": model.decoder(latent, mask, rows="all")}

    raw = patch_loss(model.decoder(latent, mask), images, mask.masked, model.patch, normalise="none").mean()
    result = model(images, mask=mask)
    result.loss.backward()
    out |= {"loss.raw": raw, "loss.norm_pix": result.pixel}
    twin = build()
    twin(images, mask=mask, path="dense").loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for name, p in twin.named_parameters():
        if p.requires_grad:
            assert (p.grad - gradients[name]).norm() <= 2e-5 * p.grad.norm(), name
    out |= {f"grad.{their_name(name)}": gradient.norm() for name, gradient in gradients.items()}
    out["grad.total"] = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()

    steps = case.raw["steps"]
    update = torch.optim.AdamW(
        pretraining_groups(model, steps["weight_decay"]), lr=steps["lr"], betas=tuple(steps["betas"]), eps=steps["eps"]
    )
    losses = []
    for _ in range(len(case.expected["train.losses"])):
        update.zero_grad()
        loss = model(images, mask=mask).loss
        loss.backward()
        update.step()
        losses.append(loss.detach())
    return out | {"train.losses": torch.stack(losses)}


def conv_block(case: Case) -> dict[str, Tensor]:
    config = case.config
    block = ConvBlock(config["dim"], config["mlp_ratio"], kernel=config["kernel"], eps=config["norm_eps"])
    block.load_state_dict(case.state)
    x = told(case, "x").permute(0, 2, 3, 1)
    keep = case.files["keep"].permute(0, 2, 3, 1).to(x.dtype)
    return {name: block(x, visible).permute(0, 3, 1, 2) for name, visible in (("out.masked", keep), ("out.plain", None))}


def classifier(case: Case) -> dict[str, Tensor]:
    model = Classifier(case.config["classes"], case.config["pool"], **settings(case.config))
    assert load_reference(model, case.state) == []
    images = told(case, "images")
    features = model.features(images)
    logits = model.head(features)
    out = {"features": features, "logits": logits}
    if "labels" in case.files:
        out["cross_entropy"] = F.cross_entropy(logits, case.files["labels"])
        out["cross_entropy"].backward()
        out |= {f"grad.{name}": p.grad.norm() for name, p in model.named_parameters()}
    return out


def detection_backbone(case: Case) -> dict[str, Tensor]:
    model = DetectionBackbone(window=case.config["window"], global_blocks=case.config["global_blocks"], **settings(case.config))
    assert load_reference(model.eval(), case.state) == []
    return model(told(case, "images"))


def segmentation_backbone(case: Case) -> dict[str, Tensor]:
    model = SegmentationBackbone(layer_scale=case.config["layer_scale_init"], **settings(case.config))
    assert set(load_reference(model.eval(), case.state)) <= {"fpn.1.num_batches_tracked"}
    return {f"feature{i}": value for i, value in enumerate(model(told(case, "images")))}


def state_dict_layout(case: Case) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = MRMAE(
            targets="pixels",
            **settings(case.config),
            **{name: case.config[name] for name in ("decoder_dim", "decoder_depth", "decoder_heads")},
        )
    stated(case)
    return {name: torch.tensor(value.shape, dtype=torch.float64) for name, value in reference_state(model).items()}


def layer_decay(case: Case) -> dict[str, Tensor]:
    config, out = case.config, {}
    blocks = config["transformer_blocks"]
    depths = [1 + max((int(n.split(".")[1]) for n in case.raw["groups"] if n.startswith(f"blocks{s}.")), default=-1) for s in (1, 2)]
    model = Classifier(10, image_size=32, stage_dims=(8, 12, 16), stage_depths=(*depths, blocks), num_heads=2)
    for name, p in model.named_parameters():
        scale = config["layer_decay"] ** (blocks + 1 - layer_of(name, blocks))
        out[name] = torch.tensor([scale, config["weight_decay"] if decayed(name, p) else 0.0], dtype=torch.float64)
    stated(case)
    assert out.keys() == case.expected.keys()
    return out


def lr_schedule(case: Case) -> dict[str, Tensor]:
    stated(case)
    out = {}
    for name, plan in case.raw["schedule"].items():
        rates = [cosine(e, total=plan["epochs"], peak=plan["lr"], final=plan["min_lr"], warmup=plan["warmup"]) for e, *_ in plan["points"]]
        out[name] = torch.tensor(
            [[point[0], rate, rate * 0.5] for point, rate in zip(plan["points"], rates, strict=True)], dtype=torch.float64
        )
    return out


def position_table(case: Case) -> dict[str, Tensor]:
    names = [name for name in case.expected if name.startswith("table_")]
    sizes = {name: [int(part) for part in name.split("_")[1:3]] for name in names}
    return {name: sincos_2d((grid, grid), dim) for name, (dim, grid) in sizes.items()}


def lars_steps(case: Case) -> dict[str, Tensor]:
    stated(case)
    config = case.config
    weight, bias = (nn.Parameter(told(case, name)) for name in ("weight", "bias"))
    groups = [{"params": [weight], "weight_decay": config["weight_decay"], "always_adapt": True}, {"params": [bias], "weight_decay": 0.0}]
    update = Lars(groups, lr=config["lr"], momentum=config["momentum"], trust_coeff=config["trust_coefficient"])
    for step in range(3):
        weight.grad = made("normal", f"mr_mae.lars.gw{step}", tuple(weight.shape))
        bias.grad = made("normal", f"mr_mae.lars.gb{step}", tuple(bias.shape))
        update.step()
    return {"weight": weight, "bias": bias}


def mimic_inputs(case: Case, student_dim: int, teacher_dim: int, grid: int = 4) -> tuple[MimicHead, Tensor]:
    head = MimicHead(student_dim, teacher_dim, range(case.config.get("layers", 0))).double()
    prefix = "mr_mae.mimic"
    with torch.no_grad():
        for name, p in head.named_parameters():
            p.copy_(made("parameter", f"{prefix}.{name}", tuple(p.shape)))
    batch = len(case.files["ids_keep"])
    return head, 1.5 * made("normal", f"{prefix}.teacher", (batch, grid * grid, teacher_dim)).double() + 0.3


def mimic_losses(case: Case) -> dict[str, Tensor]:
    config, keep, out = case.config, case.files["ids_keep"], {}
    head, teacher = mimic_inputs(case, config["student_dim"], config["teacher_dim"], config["grid"])
    teacher.requires_grad_()
    student = made("normal", "mr_mae.mimic.student", (config["batch"], config["visible"], config["student_dim"])).double()
    for norm in ("layernorm", "l2", "none"):
        for distance in ("mse", "smooth_l1", "cosine"):
            prediction = head(student, {})
            prediction.retain_grad()
            each = mimic_loss(prediction, teacher, keep, target_norm=norm, distance=distance)
            head.zero_grad()
            each.mean().backward()
            assert teacher.grad is None
            kind = f"{norm}.{distance}"
            out |= {f"loss.{kind}": each.mean(), f"per_token.{kind}": each, f"grad_prediction.{kind}": prediction.grad}
            out[f"grad_head_weight.{kind}"] = head.head.weight.grad.clone()
    return out


def mimic_fused_layers(case: Case) -> dict[str, Tensor]:
    config = case.config
    head, teacher = mimic_inputs(case, config["student_dim"], config["teacher_dim"])
    shape = (*case.files["ids_keep"].shape, config["student_dim"])
    taps = {i: made("normal", f"mr_mae.mimic.layer{i}", shape).double() for i in range(config["layers"])}
    prediction = head(torch.empty(0), taps)
    loss = mimic_loss(prediction, teacher, case.files["ids_keep"]).mean()
    return {"ids_keep": case.files["ids_keep"], "fused": head.fused(list(taps.values())), "prediction": prediction, "loss": loss}


def focused(case: Case) -> dict[str, Tensor]:
    config = case.config
    tokens = 1 + config["grid"] ** 2
    attention = made("normal", "mr_mae.focus.attn", (config["batch"], config["heads"], tokens, tokens)).double().softmax(-1)
    score = attention_score(attention)
    sampled = focused_mask(score, config["visible"], uniforms=made("uniform", "mr_mae.focus.u", tuple(score.shape)))
    top = focused_mask(score, config["visible"], "top")
    return {"score": score, "ids_keep.top": top.keep, "ids_keep.sample": sampled.keep, "mask.sample": sampled.hidden.to(torch.uint8)}


class GivenPredictions(nn.Module):
    """Stands for encoder and decoder of MRMAE in the closed-form case: the case gives the decoder's output, and the student's tokens."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.value


def joint_loss(case: Case) -> dict[str, Tensor]:
    from common.blocks import Encoded

    config, keep = case.config, case.files["ids_keep"]
    head, teacher = mimic_inputs(case, 12, 10, config["grid"])
    images, pred = told(case, "images").double(), told(case, "pred").double()
    tokens = made("normal", "mr_mae.mimic.student", (config["batch"], keep.shape[1], 12)).double()
    patch = config["patch"]
    weights = [config["mimic_weight"]]
    model = MRMAE(
        config["grid"] * patch, stage_patch=(patch // 4, 2, 2), stage_dims=(4, 8, 12), stage_depths=(0, 0, 0), num_heads=2, decoder_dim=8,
        decoder_depth=0, decoder_heads=2, mask_ratio=1 - keep.shape[1] / config["grid"] ** 2, teacher_dims=[10], mimic_weights=weights,
    )  # fmt: skip
    mask: Mask = from_keep(keep, config["grid"] ** 2)
    model.encoder, model.mimics[0] = GivenPredictions(Encoded(tokens, {})), head
    model.decoder = GivenPredictions(pred.gather(1, mask.masked[..., None].expand(-1, -1, pred.shape[-1])))
    out = model(images, [teacher], mask)
    return {"pixel": out.pixel, "mimic": out.mimic / config["mimic_weight"], "total": out.loss}


def teacher_renormalise(case: Case) -> dict[str, Tensor]:
    config = case.config
    student, teacher = ((tuple(config[f"{who}_mean"]), tuple(config[f"{who}_std"])) for who in ("student", "teacher"))
    return {"out": renormalise(told(case, "x").double(), student, teacher)}


def stated(case: Case) -> None:
    """Expected outputs that the shared reader does not see: figures under other keys of the JSON file, and outputs named as inputs are."""
    if not case.expected:
        points = {name: plan["points"] for name, plan in case.raw.get("schedule", {}).items()}
        figures = case.raw.get("groups", {}) | case.raw.get("layout", {}) | points
        case.expected.update({name: torch.tensor(value, dtype=torch.float64) for name, value in figures.items()})
        case.expected.update({name: case.files[name] for name in case.raw["outputs"] if name in case.files})


def as_stored(runner: Runner) -> Runner:
    """The files hold 0-d outputs with one dimension."""
    return lambda case: {
        name: value.reshape(1) if tuple(getattr(case.expected.get(name), "shape", ())) == (1,) and value.numel() == 1 else value
        for name, value in runner(case).items()
    }


RUNNERS = {
    "pretrain": as_stored(pretrain),
    "conv_block": conv_block,
    "finetune_logits": as_stored(classifier),
    "token0_features": classifier,
    "detection_backbone": detection_backbone,
    "segmentation_backbone": segmentation_backbone,
    "state_dict_layout": state_dict_layout,
    "layer_decay": layer_decay,
    "lr_schedule": lr_schedule,
    "position_table": position_table,
    "lars_steps": lars_steps,
    "mimic_loss": as_stored(mimic_losses),
    "mimic_fused_layers": as_stored(mimic_fused_layers),
    "focused_mask": focused,
    "joint_loss": as_stored(joint_loss),
    "teacher_renormalise": teacher_renormalise,
}


@pytest.mark.parametrize("case", cases("mr_mae"), ids=str)
def test_case(case: Case) -> None:
    stated(case)
    check(case, RUNNERS)
