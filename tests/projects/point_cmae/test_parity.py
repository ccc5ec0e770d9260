"""Point-CMAE against its reference: one runner a kind of case."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from fnmatch import fnmatch

import pytest
import torch
from torch import Tensor, nn

from common.kernels.points import chamfer, farthest_points, knn_group, nearest_pairs
from common.masking import Mask, from_hidden
from common.weights import load_into
from projects.point_cmae.augment import normalise, rotate_y, scale_translate
from projects.point_cmae.classifier import PointClassifier, apply_protocol, head_of
from projects.point_cmae.model import GroupEmbed, PointCMAE, contrast_term, group
from projects.point_cmae.optim import decays, rate_in_epoch
from projects.point_cmae.segmenter import PARTS, PartSegmenter, interpolate, own_parts, part_scores
from projects.point_cmae.weights import TABLES, UNUSED, fitted, load_complete, load_pretraining, official_names, our_name, transfer
from tests.parity import Case, cases, check


def gradients(model: nn.Module, kind: str, of: Iterable[str]) -> Tensor:
    """Norms of the gradients of the official names, 0 where none flows (the projector that is left out here among them)."""
    parameters = dict(model.named_parameters())
    kept = [None if any(fnmatch(name, part) for part in UNUSED) else parameters[our_name(name, TABLES[kind])].grad for name in of]
    return torch.stack([torch.zeros(()) if grad is None else grad.norm() for grad in kept])


def mask_of(case: Case, name: str) -> Mask:
    return from_hidden(case.inputs[name].bool())


def cmae(case: Case, **changes: object) -> PointCMAE:
    config = case.config
    sizes = {"dim": config["dim"], "depth": config["depth"], "num_heads": config["heads"]}
    sizes |= {"decoder_depth": config["decoder_depth"], "decoder_heads": config["decoder_heads"]}
    sizes |= {"num_group": config["num_group"], "group_size": config["group_size"], "mask_ratio": config["mask_ratio"]}
    chamfer = str(config.get("loss", "cdl2")).removeprefix("cd")
    model = PointCMAE(**sizes, drop_path=0.0, chamfer=chamfer, **changes)
    load_pretraining(model, case.state)
    return model.train(not str(case.raw["mode"]).startswith("eval"))


def pretrain(case: Case) -> dict[str, Tensor]:
    model = cmae(case)
    out = model(case.inputs["points"], [mask_of(case, "mask1"), mask_of(case, "mask2")])
    first, second = out.branches
    found = {"recon": out.reconstruction, "contrast": out.contrast, "total": out.loss}
    for number, branch in enumerate(out.branches, start=1):
        found |= {f"recon{number}": branch.reconstruction, f"rebuilt{number}": branch.prediction.flatten(0, 1)}
        found |= {f"target{number}": branch.target.flatten(0, 1), f"decoded{number}": branch.decoded, f"features{number}": branch.features}
    for name, kind in (("paired_cosine", "paired"), ("mse", "mse"), ("squared_l2", "l2")):
        total, count = contrast_term(kind, first, second)
        found[f"alt.{name}"] = total / count
    found = {name: value.detach() for name, value in found.items()}
    out.contrast.backward(retain_graph=True)
    found["contrast_grad_norms"] = gradients(model, "two_branches", case.raw["grad_norm_names"])
    model.zero_grad()
    out.loss.backward()
    found["grad_norms"] = gradients(model, "two_branches", case.raw["grad_norm_names"])
    parameters = dict(model.named_parameters())
    for name in case.raw.get("grad_slice_names", ()):
        found[f"grad.{name}"] = parameters[our_name(name, TABLES["two_branches"])].grad
    return found


def one_branch(case: Case) -> dict[str, Tensor]:
    model = cmae(case, branches=1, class_token=case.config.get("class_token", False), contrast="none", reconstruction_weight=1.0)
    out = model(case.inputs["points"], [mask_of(case, "mask")])
    out.loss.backward()
    branch = out.branches[0]
    return {
        "recon": out.loss,
        "rebuilt": branch.prediction.flatten(0, 1),
        "target": branch.target.flatten(0, 1),
        "decoded": branch.decoded,
        "features": branch.features,
        "visible": branch.visible,
        "grad_norms": gradients(model, "one_branch", case.raw["grad_norm_names"]),
    }


def encoder(case: Case) -> dict[str, Tensor]:
    model = cmae(case)
    for number in (1, 2):  # a projector that the reference computes and throws away: left out here
        case.expected.pop(f"proj_cls{number}", None)
    centres, groups = group(case.inputs["points"], model.num_group, model.group_size)
    tokens = model.encoder.embed(groups)
    first, second = model.encode(tokens, centres, [mask_of(case, "mask1"), mask_of(case, "mask2")])
    return {"tokens": tokens, "pos": model.encoder.positions(centres), "visible1": first, "visible2": second}


def token_embed(case: Case) -> dict[str, Tensor]:
    embed = GroupEmbed(case.config["dim"])
    table = {
        theirs.removeprefix("encoder."): ours.removeprefix("encoder.embed.")
        for theirs, ours in TABLES["classifier"].items()
        if "conv" in theirs
    }
    renamed = {our_name(name, table) or name: value for name, value in case.state.items()}
    load_into(embed, fitted(renamed, embed), absent=("*.num_batches_tracked",))
    groups = case.inputs["neighborhood"]
    out = {"tokens_eval": embed.eval()(groups), "tokens_train": embed.train()(groups)}
    for number, norm in enumerate((embed.first_norm, embed.third_norm), start=1):
        out |= {f"running_mean_{number}": norm.running_mean, f"running_var_{number}": norm.running_var}
    return out


def classifier(case: Case) -> dict[str, Tensor]:
    config = case.config
    sizes = {"dim": config["dim"], "depth": config["depth"], "num_heads": config["heads"]}
    sizes |= {"num_group": config["num_group"], "group_size": config["group_size"]}
    model = PointClassifier(config["classes"], head_of(config["type"]), **sizes, drop_path=0.0, dropout=0.0)
    load_complete(model, case.state, "classifier")
    apply_protocol(model, config["type"])
    with torch.no_grad():
        out = {"logits_eval": model.eval()(case.inputs["points"])}
    if not config.get("train_part"):
        return out
    names = official_names(model, "classifier")
    assert {names[name] for name, p in model.named_parameters() if p.requires_grad} == set(case.raw["trainable"])
    labels = case.inputs["labels"]
    model.train()
    logits: list[Tensor] = []
    model.head.register_forward_hook(lambda _module, _inputs, output: logits.append(output.detach()))
    scores = model.loss(case.inputs["points"], labels)
    scores.loss.backward()
    return out | {
        "logits_train": logits[0],
        "loss": scores.loss,
        "accuracy_percent": 100 * scores.correct / len(labels),
        "bn_running_mean_after": model.encoder.embed.first_norm.running_mean,
        "grad_norms": gradients(model, "classifier", case.raw["grad_norm_names"]),
    }


SIZES = {"heads": "num_heads", "num_group": "num_group", "group_size": "group_size"}
"""Sizes of the segmenter that a state does not show; the reference has one."""


def partseg(case: Case) -> dict[str, Tensor]:
    depth = 1 + max(int(name.split(".")[2]) for name in case.state if name.startswith("blocks.blocks."))
    dim, categories = len(case.state["norm.weight"]), case.state["label_conv.0.weight"].shape[1]
    given = {ours: case.config[name] for name, ours in SIZES.items() if name in case.config}
    model = PartSegmenter(case.config["parts"], categories, dim, depth, **given, drop_path=0.0, dropout=0.0)
    load_complete(model, case.state, "segmenter")
    points, category, labels = (case.inputs[name] for name in ("points", "category", "labels"))
    with torch.no_grad():
        out = {"log_prob_eval": model.eval()(points, category)}
    if not case.config.get("train_part"):
        return out
    scores = model.train()(points, category)
    loss = nn.functional.nll_loss(scores.flatten(0, 1), labels.flatten())
    loss.backward()
    return out | {
        "log_prob_train": scores,
        "loss": loss,
        "grad_norms": gradients(model, "segmenter", case.raw["grad_norm_names"]),
    }


def three_nn(case: Case) -> dict[str, Tensor]:
    return {"interpolated": interpolate(*(case.inputs[name] for name in ("points", "centers", "features")))}


def iou(case: Case) -> dict[str, Tensor]:
    prediction = own_parts(case.inputs["scores"], case.inputs["labels"])
    found = part_scores(prediction, case.inputs["labels"])
    assert [next(name for name, ids in PARTS.items() if int(row[0]) in ids) for row in case.inputs["labels"]] == case.config["categories"]
    out = {name: torch.tensor(getattr(found, name), dtype=torch.float64) for name in ("instance_miou", "class_miou", "accuracy")}
    each = [found.per_category[name] for name in case.raw["categories_present"]]
    return out | {"prediction": prediction, "per_category": torch.tensor(each, dtype=torch.float64)}


def augment(case: Case) -> dict[str, Tensor]:
    points = case.inputs["points"]
    return {
        "scaled_translated": scale_translate(points, scale=case.inputs["scale"], shift=case.inputs["shift"]),
        "rotated_y": rotate_y(points, angle=case.inputs["angle"]),
        "normalised": normalise(points),
    }


def schedule(case: Case) -> dict[str, Tensor]:
    ends = {"start": case.config["warmup_start"], "final": case.config["lr_min"]}
    return {
        run["output"]: torch.tensor(
            [
                rate_in_epoch(epoch, peak=run["lr"], epochs=run["epochs"], warmup=run["warmup"], **ends)
                for epoch in range(len(case.expected[run["output"]]))
            ],
            dtype=torch.float64,
        )
        for run in case.config["runs"]
    }


def fps_knn(case: Case) -> dict[str, Tensor]:
    points, config = case.inputs["points"], case.config
    picked = farthest_points(points, config["num_group"])
    centres, groups = group(points, config["num_group"], config["group_size"])
    near = knn_group(points, centres, config["group_size"])
    return {"fps_idx": picked, "center": centres, "knn_idx": near.index, "knn_dist": near.distance, "neighborhood": groups}


def fps_edge(case: Case) -> dict[str, Tensor]:
    return {f"{name}.fps_idx": farthest_points(case.inputs[name], case.config["num_samples"]) for name in case.config["clouds"]}


def fps_only(case: Case) -> dict[str, Tensor]:
    return {run["output"]: farthest_points(case.inputs[run["input"]], run["num_samples"]) for run in case.config["runs"]}


def chamfer_runner(case: Case) -> dict[str, Tensor]:
    one, two = (case.inputs[name].clone().requires_grad_() for name in ("x", "y"))
    out: dict[str, Tensor] = dict(zip(("dist1", "dist2", "idx1", "idx2"), nearest_pairs(one, two), strict=True))
    for kind in ("l2", "l1"):
        distance = chamfer(one, two, kind)
        grads = torch.autograd.grad(distance, (one, two))
        out |= {kind: distance, f"{kind}.grad_x": grads[0], f"{kind}.grad_y": grads[1]}
    return out


def _number(names: Iterable[str]) -> Tensor:
    return torch.tensor([len(set(names)), zlib.crc32("\n".join(sorted(names)).encode())], dtype=torch.float64)


def expect_names(case: Case) -> None:
    """Lists of names as numbers to compare (length, checksum), without the projector that is left out here."""
    for key, value in case.raw["names"].items():
        if key == "parameter_counts":
            unused = sum(a * b + b for a, b in ((case.config["dim"], 256), (256, 256))) + 2 * 256
            case.expected |= {f"count.{name}": torch.tensor(float(n - unused * (name == "pretrain"))) for name, n in value.items()}
        else:
            keep = [name for name in value if "unexpected" in key or ".proj_cls." not in name]
            case.expected[key] = _number(keep)


def names(case: Case) -> dict[str, Tensor]:
    expect_names(case)
    dim, depth, classes = case.config["dim"], case.config["depth"], case.config["classes"]
    heads = case.config.get("heads", 6)
    decoder = {"decoder_depth": case.config.get("decoder_depth", 4), "decoder_heads": case.config.get("decoder_heads", heads)}
    with torch.device("meta"):
        models: dict[str, tuple[nn.Module, str]] = {
            "pretrain": (PointCMAE(dim, depth, heads, **decoder), "two_branches"),
            "partseg": (PartSegmenter(case.config.get("parts", 50), 16, dim, depth, heads), "segmenter"),
        }
        for protocol in ("full", "mlp3", "linear"):
            model = apply_protocol(PointClassifier(classes, head_of(protocol), dim, depth, heads), protocol)
            models[f"classifier_{protocol}"] = (model, "classifier")
    whole = models["pretrain"][0]
    checkpoint = {official: whole.state_dict()[name] for name, official in official_names(whole, "two_branches").items()}
    projector = {
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
        "3.weight",
        "3.bias",
    }
    checkpoint |= {f"MAE_encoder.proj_cls.{name}": torch.empty(1) for name in projector}
    out: dict[str, Tensor] = {}
    for name, (model, kind) in models.items():
        official = official_names(model, kind)
        every = {official[own]: decays(own, p) for own, p in model.named_parameters()}
        out[f"{name}_decay"] = _number([own for own, yes in every.items() if yes])
        out[f"{name}_no_decay"] = _number([own for own, yes in every.items() if not yes])
        out[f"{name}_trainable"] = _number([official[own] for own, p in model.named_parameters() if p.requires_grad])
        count = float(sum(p.numel() for p in model.parameters()))
        out |= {f"count.{name}": torch.tensor(count), f"count.{name}_{classes}": torch.tensor(count)}
        if name != "pretrain":
            report = transfer(model, checkpoint, kind)
            out |= {f"{name}_missing": _number(report.missing), f"{name}_unexpected": _number(report.unexpected)}
    return out


def as_stored(runner):
    """The files hold 0-d outputs with one dimension."""
    return lambda case: {
        name: value.reshape(1) if tuple(getattr(case.expected.get(name), "shape", ())) == (1,) else value
        for name, value in runner(case).items()
    }


ALL = (
    pretrain,
    one_branch,
    encoder,
    token_embed,
    classifier,
    partseg,
    three_nn,
    iou,
    augment,
    schedule,
    fps_knn,
    fps_edge,
    fps_only,
    names,
)
RUNNERS = {runner.__name__: as_stored(runner) for runner in ALL} | {"chamfer": as_stored(chamfer_runner)}


@pytest.mark.parametrize("case", cases("point_cmae"), ids=str)
def test_case(case: Case) -> None:
    if case.kind == "names":
        expect_names(case)
    check(case, RUNNERS)
