"""CROMA against its reference: one runner a kind of case."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from common.kernels.patch_loss import targets
from common.masking import Mask, from_keep, kept_count, random_mask
from common.patch import sincos_2d
from common.probes import accuracy, cluster_accuracy, knn_classify, mean_average_precision, micro_f1
from projects.croma.alibi import bias_between, places, slopes, table
from projects.croma.bands import normalise as scaled
from projects.croma.bands import to_bytes
from projects.croma.layers import CrossAttention, FeedForward, GapHead, SelfAttention
from projects.croma.metrics import confusion, iou, mean_iou, pixel_accuracy, purity
from projects.croma.model import CROMA, Encoders, Encodings
from projects.croma.weights import is_pretraining, load_encoders, load_pretraining, our_pretraining_name, released_name
from tests.parity import Case, cases, check
from tests.processes import Pair
from tests.projects.croma.ranks import contrast_by_rule, contrast_of_rank

PAIR: list[Pair] = []

OUTPUTS = {
    "SAR_encodings": "radar",
    "SAR_GAP": "radar_gap",
    "optical_encodings": "optical",
    "optical_GAP": "optical_gap",
    "joint_encodings": "joint",
    "joint_GAP": "joint_gap",
}


def alibi_tables(case: Case) -> dict[str, Tensor]:
    out = {f"slopes.h{h}": torch.tensor(slopes(h)) for h in case.config["slopes_for_heads"]}
    for heads, grid in case.config["pairs_heads_grid"]:
        at = places((grid, grid))
        out[f"bias.h{heads}.g{grid}"] = bias_between(at, at, heads)
    return out


def sincos(case: Case) -> dict[str, Tensor]:
    return {f"table.d{dim}.g{grid}": sincos_2d((grid, grid), dim) for dim, grid in case.config["pairs_dim_grid"]}


def masking(case: Case) -> dict[str, Tensor]:
    out = {}
    for combo in case.config["combos"]:
        count, ratio, batch = combo["patches"], combo["mask_ratio"], combo["batch"]
        tag = f"n{count}.r{ratio}"
        mask = random_mask(batch, count, ratio, noise=case.inputs[f"noise.{tag}"])
        out |= {f"ids_keep.{tag}": mask.keep, f"ids_restore.{tag}": mask.restore, f"mask.{tag}": mask.hidden.float()}
        out[f"len_keep.{tag}"] = torch.tensor(kept_count(count, ratio))
    return out


def masked_bias(case: Case) -> dict[str, Tensor]:
    grid, kept = case.config["grid"], case.config["kept"]
    slope = torch.tensor(slopes(case.config["heads"]))
    drawn = {name: case.inputs[f"noise_{name}"].argsort(1)[:, :kept] for name in ("radar", "optical")}
    for name, ids in drawn.items():
        assert torch.equal(ids, case.inputs[f"ids_{name}"])
    radar, optical = (places((grid, grid), drawn[name]) for name in ("radar", "optical"))
    return {"bias_radar_self": table(radar, radar, slope), "bias_cross": table(radar, optical, slope)}


def modules(case: Case) -> dict[str, Tensor]:
    dim, heads = case.config["dim"], case.config["heads"]
    ratio = len(case.state["ffn.net.0.weight"]) / dim
    ours = {"attn": SelfAttention(dim, heads), "cross": CrossAttention(dim, heads), "ffn": FeedForward(dim, ratio), "gap": GapHead(dim)}
    renamed = {
        "create_qkv": "qkv", "create_q": "q", "create_k": "k", "create_v": "v", "out": "proj", "to_out": "proj", "input_norm": "norm",
        "net.0": "mlp.fc1", "net.2": "mlp.fc2",
    }  # fmt: skip
    for name, module in ours.items():
        part = {key.removeprefix(f"{name}."): value for key, value in case.state.items() if key.startswith(f"{name}.")}
        module.load_state_dict(
            {f"{renamed.get(k.rpartition('.')[0], k.rpartition('.')[0])}.{k.rpartition('.')[2]}": v for k, v in part.items()}
        )
    x, context = case.inputs["x"], case.inputs["context"]
    own, across = (-case.inputs[name] for name in ("bias_self", "bias_cross"))
    return {
        "attn": ours["attn"](x, own),
        "attn_nobias": ours["attn"](x),
        "cross": ours["cross"](x, context, across),
        "ffn": ours["ffn"](x),
        "gap": ours["gap"](x),
    }


def _named(found: Encodings, tag: str = "") -> dict[str, Tensor]:
    return {f"{theirs}{tag}": value for theirs, ours in OUTPUTS.items() if (value := getattr(found, ours)) is not None}


@torch.no_grad()
def encode(case: Case) -> dict[str, Tensor]:
    c = case.config
    sizes = {"patch_size": c["patch"], "radar_channels": c["radar_channels"], "optical_channels": c["optical_channels"]}
    model = load_encoders(case.state, num_heads=c["heads"], **sizes).eval()
    depths = [len(stack.layers) for stack in (model.optical_encoder.stack, model.radar_encoder.stack, model.joint_encoder)]
    assert depths == [c["encoder_depth"], c["radar_depth"], c["joint_depth"]]
    out = {}
    for size in c["image_sizes"]:
        given = {name: case.inputs[key] for name in ("radar", "optical") if (key := f"{name}.{size}") in case.inputs}
        found = model(**given)
        out |= _named(found, f".{size}")
        if c["encoder_dim"] <= 64:
            for name, images in given.items():
                assert torch.equal(getattr(model(**{name: images}), f"{name}_gap"), getattr(found, f"{name}_gap"))
    return out


@torch.no_grad()
def convert(case: Case) -> dict[str, Tensor]:
    assert is_pretraining(case.state)
    for theirs, released in case.raw["mapping"].items():
        assert released_name(theirs) == released
    model = load_encoders(case.state, num_heads=case.config["heads"])
    return _named(model(case.inputs["radar"], case.inputs["optical"]))


def with_scale(case: Case) -> dict[str, Tensor]:
    """The state and, where the case gives it in words ("... = 2.659..."), the logarithm of the scale."""
    name = "global_contrast_loss.logit_scale"
    told = case.raw.get("not_filled", {}).get(name)
    return case.state if told is None else {**case.state, name: torch.tensor(float(told.rpartition("=")[2]))}


def pretraining_model(case: Case) -> CROMA:
    c = case.config
    channels = {
        f"{name}_channels": case.state[f"{name}_encoder.linear_input.weight"].shape[1] // c["patch"] ** 2 for name in ("radar", "optical")
    }
    encoders = {
        "embed_dim": c["encoder_dim"], "depth": c["optical_depth"], "radar_depth": c["radar_depth"], "joint_depth": c["joint_depth"],
        "num_heads": c["encoder_heads"], "patch_size": c["patch"], **channels,
    }  # fmt: skip
    decoder = {name: c[name] for name in ("decoder_dim", "decoder_depth", "decoder_heads", "mask_ratio", "shared_mask")}
    model = CROMA(encoders, **decoder)
    assert load_pretraining(model, with_scale(case), resume=True) == []
    return model


def gradients_of(case: Case, model: CROMA, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients and their norms that the case asks for: `grad[_norm]<term>.<parameter>`, each term from its loss."""
    ours, out = dict(model.named_parameters()), {}
    asked = {key.removesuffix(".slice").removesuffix(".norm") for key in case.expected}
    for term, loss in terms.items():
        wanted = sorted({key.partition(".")[2] for key in asked if key.partition(".")[0] in (f"grad{term}", f"grad_norm{term}")})
        if wanted:
            parameters = [ours[our_pretraining_name(name)] for name in wanted]
            found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
            for name, grad in zip(wanted, found, strict=True):
                out |= {f"grad{term}.{name}": grad, f"grad_norm{term}.{name}": grad.norm()}
    return out


def pretrain(case: Case) -> dict[str, Tensor]:
    model = pretraining_model(case)
    count = case.config["patches"]
    given: dict[str, Mask] = {}
    for name in ("radar", "optical"):
        given[name] = from_keep(case.inputs[f"ids_keep_{name}"], count)
        assert torch.equal(given[name].hidden.float(), case.inputs[f"mask_{name}"])
        assert torch.equal(given[name].restore.gather(1, given[name].keep), case.inputs[f"ids_restore_{name}"].gather(1, given[name].keep))
    images = case.inputs["images"]
    found = model(images, given["radar"], given["optical"])
    patch, every = case.config["patch"], torch.arange(count).expand(len(images), -1)
    target = targets(images[:, :, None], every, (1, patch, patch), "c p q", "patch", 1e-6, True, None, None, False, torch.float32)
    out = {
        "loss_contrastive": found.contrastive,
        "loss_mae": found.reconstruction,
        "loss_optical": found.optical,
        "loss_radar": found.radar,
        "radar_encodings": found.encodings.radar,
        "optical_encodings": found.encodings.optical,
        "joint_encodings": found.encodings.joint,
        "radar_GAP": found.encodings.radar_gap,
        "optical_GAP": found.encodings.optical_gap,
        "prediction": found.prediction,
        "target": target.flatten(2),
    }
    terms = {"": found.loss, "_contrastive": found.contrastive, "_mae": found.reconstruction}
    return out | gradients_of(case, model, terms)


def _projections(case: Case) -> CROMA:
    dim, part = case.config["dim"], "global_contrast_loss."
    model = CROMA({"embed_dim": dim, "depth": 1, "num_heads": 1}, decoder_dim=8)
    state = {key.removeprefix(part): value for key, value in with_scale(case).items()}
    fit = model.load_state_dict(state, strict=False)
    assert not fit.unexpected_keys
    return model


def contrast_ranks(case: Case) -> dict[str, Tensor]:
    """Two real processes, those of the test run or two of its own; another number of ranks by the rule that the gather follows."""
    if case.config["world_size"] != 2:
        return contrast_by_rule(_projections(case), case.inputs["radar"], case.inputs["optical"], case.config["world_size"])
    own = None if PAIR else Pair()
    try:
        first, second = (own or PAIR[0])(contrast_of_rank, _projections(case), case.inputs["radar"], case.inputs["optical"])
    finally:
        if own is not None:
            own.close()
    return first | second


def normalise(case: Case) -> dict[str, Tensor]:
    out = {}
    for number in range(len(case.config["shapes"])):
        told, x = case.raw["inputs"][f"x{number}"].get("then", ""), case.inputs[f"x{number}"]
        if scale := re.search(r"times (-?[\d.e+-]+)", told):
            x = x * float(scale[1])
        if shift := re.search(r"plus (-?[\d.e+-]+)", told):
            x = x + float(shift[1])
        unit = scaled(x, None)
        ours, theirs = to_bytes(unit), case.expected[f"byte{number}"]
        apart = ours.int() - theirs.int()
        assert apart.abs().max() <= 1
        assert (apart != 0).float().mean() < 1e-3
        out |= {
            f"unit{number}": unit,
            f"byte{number}": theirs if bool((apart != 0).any()) else ours,
        }  # the case allows 1 in 0.1 % of the elements
    return out


def metrics(case: Case) -> dict[str, Tensor]:
    x, k, classes = (
        {name: v.double() if v.is_floating_point() else v for name, v in case.inputs.items()},
        case.config["knn_k"],
        case.config["classes"],
    )
    scores = knn_classify(x["knn_train_x"], x["knn_train_y"], x["knn_test_x"], k=k, temperature=0.07, classes=classes)
    votes = knn_classify(x["knn_train_x"], x["knn_train_y"], x["knn_test_x"], k=k, temperature=None, classes=classes)
    matrix = confusion(x["seg_target"], x["seg_pred"], classes)
    numbers = {
        "map_macro": mean_average_precision(x["multilabel_targets"], x["multilabel_scores"]),
        "map_micro": mean_average_precision(x["multilabel_targets"], x["multilabel_scores"], "micro"),
        "f1_micro": micro_f1(x["multilabel_targets"], x["multilabel_scores"] > 0.5),
        "miou": mean_iou(matrix),
        "pixel_accuracy": pixel_accuracy(matrix),
        "knn_top1": accuracy(x["knn_test_y"], scores.argmax(1)),
        "cluster_accuracy": cluster_accuracy(x["knn_test_y"], x["cluster_ids"]),
        "cluster_purity": purity(x["knn_test_y"], x["cluster_ids"]),
    }
    out = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    return out | {"iou": iou(matrix), "knn_votes": votes, "knn_weights": scores, "knn_pred": scores.argmax(1)}


RUNNERS = {
    runner.__name__: runner
    for runner in (alibi_tables, sincos, masking, masked_bias, modules, encode, convert, pretrain, contrast_ranks, normalise, metrics)
}


@pytest.mark.parametrize("case", cases("croma"), ids=str)
def test_case(case: Case, request: pytest.FixtureRequest) -> None:
    if case.kind == "contrast_ranks":
        PAIR[:] = [request.getfixturevalue("two_processes")]
    check(case, RUNNERS)


def test_the_encoders_of_a_case_run_alone() -> None:
    assert Encoders(16, 2, 2)(radar=torch.zeros(1, 2, 8, 8)).joint is None
