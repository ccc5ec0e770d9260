"""MR-MAE's backbone against its reference, and the mimic part against its closed forms: one runner a kind of case."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.optim.lars import Lars
from torch import Tensor, nn

from common.blocks import Encoded
from common.masking import from_keep, random_mask
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

CALL = re.compile(r"(?:(?P<scale>[\d.]+) \* )?fill\.(?P<rule>\w+)\('(?P<key>[^']+)', \((?P<shape>[\d, ]+)\)\)(?: \+ (?P<shift>[\d.]+))?")


def made(text: str, **numbers: int) -> list[Tensor]:
    """The values of every call `[a *] fill.rule('name', (shape)) [+ b]` in a text; {i} in names is filled in."""
    found = []
    for call in CALL.finditer(text):
        shape = tuple(int(n) for n in call["shape"].rstrip(", ").split(","))
        value = torch.from_numpy(getattr(fill, call["rule"])(call["key"].format(**numbers), shape).copy())
        found.append(
            value
            if call["scale"] is None and call["shift"] is None
            else float(call["scale"] or 1) * value.double() + float(call["shift"] or 0)
        )
    return found


def told(case: Case, name: str, **numbers: int) -> Tensor:
    """An input that the case describes by the call that makes it, or by pointing to the mimic cases."""
    return (made(str(case.raw["inputs"].get(name, "")), **numbers) or made(of_the_mimic_cases(case, name)))[0]


def of_the_mimic_cases(case: Case, name: str) -> str:
    (batch, kept), count = case.files["ids_keep"].shape, case.config.get("grid", 4) ** 2
    student, teacher = case.config.get("student_dim", 12), case.config.get("teacher_dim", 10)
    return {
        "student": f"fill.normal('mr_mae.mimic.student', ({batch}, {kept}, {student}))",
        "teacher": f"1.5 * fill.normal('mr_mae.mimic.teacher', ({batch}, {count}, {teacher})) + 0.3",
        "head_weight": f"fill.parameter('mr_mae.mimic.head.weight', ({teacher}, {student}))",
        "head_bias": f"fill.parameter('mr_mae.mimic.head.bias', ({teacher},))",
    }[name]


def settings(config: dict[str, Any], eps: str = "transformer_blocks") -> dict[str, Any]:
    """Backbone arguments from a case's config."""
    out = {name: config[name] for name in ("stage_patch", "stage_dims", "stage_depths", "mlp_ratio", "image_size") if name in config}
    norm_eps = config.get("norm_eps", {})
    out |= {
        ours: norm_eps[theirs]
        for ours, theirs in (("embed_eps", "patch_embed"), ("conv_eps", "conv_blocks"), ("eps", eps))
        if theirs in norm_eps
    }
    return out | {"num_heads": config["heads"], "channels": config.get("in_channels", 3), "class_token": config.get("class_token", False)}


def pretrain(case: Case) -> dict[str, Tensor]:
    config = case.config
    decoder = {
        name: config[name]
        for name in ("decoder_dim", "decoder_depth", "decoder_heads", "decoder_mlp_ratio", "mask_ratio")
        if name in config
    }
    images, noise = told(case, "images"), told(case, "noise")

    def build(norm_pix: bool = True) -> MRMAE:
        model = MRMAE(targets="pixels", norm_pix=norm_pix, **settings(config), **decoder)
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
        if blocks := getattr(encoder, name):
            keep_output(name, blocks[-1])
    with torch.no_grad():
        dense = encoder(images, mask, path="dense").tokens
    for handle in handles:
        handle.remove()
    grid = side // model.patch
    out["inter.patch_embed3"] = out["inter.patch_embed3"].reshape(len(images), -1, grid, grid)
    latent = encoder(images, mask).tokens
    torch.testing.assert_close(latent, dense, rtol=1e-5, atol=1e-5)
    out |= {"latent": latent, "pred": model.decoder(latent, mask, rows="all")}

    raw = build(norm_pix=False)(images, mask=mask).pixel
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

    if (steps := case.raw.get("steps")) is None:
        return out
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
        classes = case.raw.get("finetune_layout", {}).get("head.weight", [1000])[0]
        tuned = Classifier(classes, **settings(case.config))
    state = reference_state(model)
    shapes = {name: value.shape for name, value in state.items()} | {
        f"finetune.{name}": value.shape for name, value in tuned.state_dict().items()
    }
    out = {name: torch.tensor(shape, dtype=torch.float64) for name, shape in shapes.items()}
    out |= {"parameters.all": torch.tensor(sum(value.numel() for value in state.values()), dtype=torch.float64)}
    out |= {
        name: torch.tensor(sum(p.numel() for p in net.parameters() if p.requires_grad), dtype=torch.float64)
        for name, net in (("parameters.trainable", model), ("finetune_parameters", tuned))
    }
    assert set(case.raw["layout"]) == state.keys()
    return out


def layer_decay(case: Case) -> dict[str, Tensor]:
    config, out = case.config, {}
    blocks = config["transformer_blocks"]
    depths = [1 + max((int(n.split(".")[1]) for n in case.raw["groups"] if n.startswith(f"blocks{s}.")), default=-1) for s in (1, 2)]
    model = Classifier(10, image_size=32, stage_dims=(8, 12, 16), stage_depths=(*depths, blocks), num_heads=2)
    for name, p in model.named_parameters():
        scale = config["layer_decay"] ** (blocks + 1 - layer_of(name, blocks))
        out[name] = torch.tensor([scale, config["weight_decay"] if decayed(name, p) else 0.0], dtype=torch.float64)
    assert out.keys() == case.expected.keys()
    return out


def lr_schedule(case: Case) -> dict[str, Tensor]:
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
    config, grads = case.config, case.raw["inputs"]["grads"]
    weight, bias = (nn.Parameter(told(case, name)) for name in ("weight", "bias"))
    update = Lars(
        [{"params": [weight], "always_adapt": True}, {"params": [bias]}],
        lr=config["lr"],
        momentum=config["momentum"],
        trust_coeff=config["trust_coefficient"],
    )
    first, last = (int(n) for n in re.findall(r"step s in (\d+)\.\.(\d+)", grads)[0])
    for step in range(first, last + 1):
        decay = (
            config["weight_decay"] * weight.detach()
        )  # the reference's trust ratio counts the decay as part of the gradient, timm's does not
        weight.grad, bias.grad = made(grads, s=step)
        weight.grad += decay
        update.step()
    return {"weight": weight, "bias": bias}


def mimic_head(case: Case) -> MimicHead:
    weight, bias = told(case, "head_weight"), told(case, "head_bias")
    layers = case.config.get("layers", 0)
    head = MimicHead(weight.shape[1], weight.shape[0], range(layers)).double()
    fuse = [made(case.raw["inputs"]["fuse"], i=i) for i in range(layers)]
    with torch.no_grad():
        for p, value in zip(head.parameters(), [value for pair in fuse for value in pair] + [weight, bias], strict=True):
            p.copy_(value)
    return head


def mimic_losses(case: Case) -> dict[str, Tensor]:
    keep, out = case.files["ids_keep"], {}
    head, teacher, student = mimic_head(case), told(case, "teacher").requires_grad_(), told(case, "student").double()
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
    head = mimic_head(case)
    taps = {i: told(case, "layers", i=i).double() for i in head.layers}
    prediction = head(torch.empty(0), taps)
    loss = mimic_loss(prediction, told(case, "teacher"), case.files["ids_keep"]).mean()
    return {"ids_keep": case.files["ids_keep"], "fused": head.fused(list(taps.values())), "prediction": prediction, "loss": loss}


def focused(case: Case) -> dict[str, Tensor]:
    kept = case.config["visible"]
    score = attention_score(told(case, "attention").double().softmax(-1))
    sampled, top = focused_mask(score, kept, uniforms=told(case, "uniforms")), focused_mask(score, kept, "top")
    return {"score": score, "ids_keep.top": top.keep, "ids_keep.sample": sampled.keep, "mask.sample": sampled.hidden.to(torch.uint8)}


class Given(nn.Module):
    """Stands for encoder and decoder of MRMAE in the closed-form case, which gives what they return."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.value


def joint_loss(case: Case) -> dict[str, Tensor]:
    config, keep, head = case.config, case.files["ids_keep"], mimic_head(case)
    images, pred = told(case, "images").double(), told(case, "pred").double()
    teacher, student = told(case, "teacher"), told(case, "student").double()
    count, kept = config["grid"] ** 2, keep.shape[1]
    mask, found = from_keep(keep, count), {}
    for name, weight in (("plain", 1.0), ("weighted", config["mimic_weight"])):
        model = MRMAE(
            images.shape[-1], stage_patch=(config["patch"], 1, 1), stage_dims=(4, 8, 12), stage_depths=(0, 0, 0), num_heads=2, decoder_dim=8,
            decoder_depth=0, decoder_heads=2, mask_ratio=1 - (kept + 0.5) / count, norm_pix=config.get("norm_pix", True),
            teacher_dims=[teacher.shape[-1]], mimic_weights=[weight],
        )  # fmt: skip
        model.encoder, model.mimics[0] = Given(Encoded(student, {})), head
        model.decoder = Given(pred.gather(1, mask.masked[..., None].expand(-1, -1, pred.shape[-1])))
        found[name] = model(images, [teacher], mask)
    return {"pixel": found["plain"].pixel, "mimic": found["plain"].mimic, "total": found["weighted"].loss}


def teacher_renormalise(case: Case) -> dict[str, Tensor]:
    config = case.config
    student, teacher = ((tuple(config[f"{who}_mean"]), tuple(config[f"{who}_std"])) for who in ("student", "teacher"))
    return {"out": renormalise(told(case, "x").double(), student, teacher)}


def stated(case: Case) -> None:
    """Expected outputs that the shared reader does not see: figures under other keys of the JSON file, and outputs named as inputs are."""
    raw = case.raw
    points = {name: plan["points"] for name, plan in raw.get("schedule", {}).items()}
    tuned = {f"finetune.{name}": shape for name, shape in raw.get("finetune_layout", {}).items()}
    counts = {f"parameters.{name}": count for name, count in raw.get("parameters", {}).items()}
    counts |= {"finetune_parameters": raw["finetune_parameters"]} if "finetune_parameters" in raw else {}
    figures = raw.get("groups", {}) | raw.get("layout", {}) | points | tuned | counts
    case.expected.update({name: torch.tensor(value, dtype=torch.float64) for name, value in figures.items()})
    case.expected.update({name: case.files[name] for name in raw.get("outputs", {}) if name in case.files})


def whole(runner: Runner) -> Runner:
    """The runner beside `stated`; the files hold 0-d outputs with one dimension."""

    def run(case: Case) -> dict[str, Tensor]:
        stated(case)
        return {
            name: value.reshape(1) if tuple(getattr(case.expected.get(name), "shape", ())) == (1,) and value.numel() == 1 else value
            for name, value in runner(case).items()
        }

    return run


RUNNERS = {
    kind: whole(runner)
    for kind, runner in {
        "pretrain": pretrain,
        "conv_block": conv_block,
        "finetune_logits": classifier,
        "token0_features": classifier,
        "detection_backbone": detection_backbone,
        "segmentation_backbone": segmentation_backbone,
        "state_dict_layout": state_dict_layout,
        "layer_decay": layer_decay,
        "lr_schedule": lr_schedule,
        "position_table": position_table,
        "lars_steps": lars_steps,
        "mimic_loss": mimic_losses,
        "mimic_fused_layers": mimic_fused_layers,
        "focused_mask": focused,
        "joint_loss": joint_loss,
        "teacher_renormalise": teacher_renormalise,
    }.items()
}


@pytest.mark.parametrize("case", cases("mr_mae"), ids=str)
def test_case(case: Case) -> None:
    stated(case)
    check(case, RUNNERS)
