"""Every parity case of HiCMAE, by kind."""

from __future__ import annotations

import random
import re
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from common.masking import kept_count, random_mask, tube
from common.patch import sincos_1d
from projects.hicmae import EmotionModel, HiCMAE, audio, augment, clips, metrics, optim
from projects.hicmae.emotion import ccc_loss, pcc_loss, soft_cross_entropy
from projects.hicmae.layers import CrossSelfBlock
from projects.hicmae.model import similarity
from projects.hicmae.weights import load_reference, our_name, reference_name
from tests.parity import Case, _values, cases, check

SHARED = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "frames": "frames",
    "tubelet": "tubelet",
    "audio_size": "audio_size",
    "audio_patch_size": "audio_patch_size",
    "encoder_dim": "embed_dim",
    "encoder_heads": "num_heads",
    "encoder_depth": "depth",
    "audio_encoder_dim": "audio_embed_dim",
    "audio_encoder_heads": "audio_heads",
    "audio_encoder_depth": "audio_depth",
    "fusion_depth": "fusion_depth",
    "fusion_order": "fusion_order",
    "mlp_ratio": "mlp_ratio",
}
PRETRAIN = SHARED | {
    "decoder_dim": "decoder_dim",
    "decoder_heads": "decoder_heads",
    "decoder_depth": "decoder_depth",
    "audio_decoder_dim": "audio_decoder_dim",
    "audio_decoder_heads": "audio_decoder_heads",
    "temperature": "temperature",
    "contrastive_weight": "contrastive_weight",
    "mask_ratio_video": "mask_ratio",
    "mask_ratio_audio": "audio_mask_ratio",
}


def options(case: Case, names: dict[str, str]) -> dict:
    return {ours: case.config[theirs] for theirs, ours in names.items() if theirs in case.config}


def pretraining_model(case: Case, **more: object) -> HiCMAE:
    levels = [n + 1 for n in case.config["skip_layers_zero_based"]]
    model = HiCMAE(**options(case, PRETRAIN), levels=levels, **more)
    if case.state:
        load_reference(model, case.state)
    return model


def gradients(model: torch.nn.Module, loss: Tensor, suffix: str = "") -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    norms = {name: p.grad.double().norm() for name, p in model.named_parameters() if p.grad is not None}
    return {f"grad_norm{suffix}.{reference_name(name)}": norm for name, norm in norms.items()} | {
        f"grad_norm_all{suffix}": torch.stack(list(norms.values())).norm()
    }


def pretrain(case: Case) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    video, sound = case.inputs["video"], case.inputs["audio"]
    hidden = [case.inputs[name].bool() for name in ("mask_video", "mask_audio")]
    named = {name.removeprefix("loss.") for name in case.raw["values"] if name.startswith("loss.")}
    for name in sorted(named):
        kind, _, weight = name.partition("_weighted_")
        model = pretraining_model(case, target=kind, difference_weight=float(weight) if weight else None)
        found = model(video, sound, *hidden)
        levels = found.contrastive_per_level
        levels = model.contrast(found.video_levels, found.audio_levels) if levels is None else levels  # with lambda 0 nothing needs it
        terms = {"video": found.video_loss, "audio": found.audio_loss, "contrastive_per_layer": levels}
        terms |= {"contrastive": levels.sum(), "total": found.loss}
        out |= {f"loss.{name}.{term}": value for term, value in terms.items()}
        out |= {f"target_video.{name}": model.video_target(video, found.video_mask)}
        out |= gradients(model, found.loss, f".{name}")
        if kind != "raw_pixels":
            out["target_audio"] = model.audio_target(sound, found.audio_mask)
    depth = max(found.video_levels)
    fused = model.fuse(found.video_levels, found.audio_levels)
    out |= {"encoder_video": found.video_levels[depth], "encoder_audio": found.audio_levels[max(found.audio_levels)]}
    out |= {"fusion_video": fused[0], "fusion_audio": fused[1]}
    out |= {"reconstruction_video": found.video_prediction, "reconstruction_audio": found.audio_prediction}
    for i, level in enumerate(model.levels):
        pair = found.video_levels[level], found.audio_levels[level]
        out |= {f"skip_video.{i}": pair[0], f"skip_audio.{i}": pair[1], f"logits_video_to_audio.{i}": similarity(*pair, model.temperature)}
    return out


def finetune(case: Case) -> dict[str, Tensor]:
    model = EmotionModel(case.config["outputs"], **options(case, SHARED), activation=case.config.get("head_activation"), drop_path=0.0)
    load_reference(model, case.state)
    found = model.eval()(case.inputs["video"], case.inputs["audio"])
    out = {name: getattr(found, name) for name in ("video_layers", "audio_layers", "video_feature", "audio_feature", "feature", "output")}
    if case.config["task"] == "classification":
        loss = soft_cross_entropy(found.output, case.inputs["soft_target_logits"].softmax(-1))
        out["loss.soft_target"] = loss
        for name in case.raw["values"]:
            if name.startswith(prefix := "loss.label_smoothing_"):
                labels = augment.smooth_labels(case.inputs["label"], case.config["outputs"], float(name.removeprefix(prefix)))
                out[name] = soft_cross_entropy(found.output, labels)
    else:
        target = case.inputs["target"]
        loss = torch.nn.functional.mse_loss(found.output, target)
        out |= {"loss.mse": loss, "loss.ccc": ccc_loss(found.output, target), "loss.pcc": pcc_loss(found.output, target)}
    return out | gradients(model, loss)


def cross_self_block(case: Case) -> dict[str, Tensor]:
    config = case.config
    block = CrossSelfBlock(config["dim"], config["context_dim"], config["heads"], mlp_ratio=config["mlp_ratio"])
    for norm in (part for part in block.modules() if isinstance(part, torch.nn.LayerNorm)):
        norm.eps = config["norm_eps"]
    block.load_state_dict({our_name("." + name)[1:]: value for name, value in case.state.items()})
    x, context = (case.inputs[name].clone().requires_grad_() for name in ("x", "context"))
    output = block(x, context)
    (output * case.inputs["cotangent"]).sum().backward()
    norms = {f"grad_norm.{reference_name('.' + name)[1:]}": p.grad.norm() for name, p in block.named_parameters()}
    return {"output": output, "grad_x": x.grad, "grad_context": context.grad} | norms


def sincos(case: Case) -> dict[str, Tensor]:
    return {f"table.{n}x{dim}": sincos_1d(n, dim, interleaved=True) for n, dim in case.config["tables"]}


def optimizer_groups(case: Case) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    config = options(case, PRETRAIN)
    deepest = min(config["depth"], config.get("audio_depth") or config["depth"])
    decoder_depth = config.get("decoder_depth", min(4, deepest + 1))  # the case may not say: its names are those of any depth
    levels = range(deepest - decoder_depth + 2, deepest + 1)
    pair = {
        "finetune": (EmotionModel(7, **options(case, SHARED)), case.config["layer_decay"]),
        "pretrain": (HiCMAE(**(config | {"decoder_depth": decoder_depth}), levels=levels), 1.0),
    }
    for stage, (model, decay) in pair.items():
        for group in optim.groups(model, case.config["weight_decay"], decay):
            numbers = torch.tensor([group["lr_scale"], group["weight_decay"]], dtype=torch.float64)
            out |= {f"{stage}.{reference_name(name)}": numbers for name in group["names"]}
    return out


def schedule(case: Case) -> dict[str, Tensor]:
    out = {}
    for i, about in enumerate(case.config["schedules"]):
        total, warmup = (about[name] * about["steps_per_epoch"] for name in ("epochs", "warmup_epochs"))
        rates = [optim.lr_at(step, total=total, warmup=warmup, peak=about["base"], final=about["final"]) for step in range(total)]
        out[f"lr.{i}"] = torch.tensor(rates, dtype=torch.float64)
    return out


def fbank(case: Case) -> dict[str, Tensor]:
    out, config = {}, case.config
    noisy, loud, hertz, offset = (
        float(found)
        for found in re.match(
            r"([\d.]+) \* normal \+ ([\d.]+) \* sin\(2 pi ([\d.]+) t\) \* exp\(-t\) \+ ([\d.]+), t = n / 16000", config["waveform"]
        ).groups()
    )
    for name, noise in case.inputs.items():
        samples = int(name.partition(".")[2])
        t = torch.arange(samples, dtype=torch.float64) / config["sample_rate"]
        wave = (noisy * noise.double() + loud * torch.sin(2 * torch.pi * hertz * t) * torch.exp(-t) + offset).float()
        gain = config["magnitude"] or 1.0
        raw = audio.filter_bank((wave - wave.mean()) * gain, config["mel_bins"])
        out |= {
            f"frames.{samples}": torch.tensor(len(raw)),
            f"logmel.{samples}": audio.fit_frames(raw, config["target_frames"]),
            f"normalised.{samples}": audio.model_input(wave, config["target_frames"], config["mel_bins"], gain=gain)[0],
        }
    return out


def clip_sampling(case: Case) -> dict[str, Tensor]:
    frames, stride = case.config["frames"], case.config["sampling_rate"]
    fine, before = [], []
    for row in case.raw["values"]["finetune"]:
        count = row["video_frames"]
        train = clips.training_clip(count, frames, stride, row["random_end"])
        test = clips.test_clips(count, frames, stride, case.config["test_segments"])
        fine.append(
            {
                "video_frames": count,
                "random_end": row["random_end"],
                "train_frames": train.frames,
                "train_audio_frames": [train.first, train.last],
                "train_audio_relative": list(train.share(count)),
                "test": [{"frames": c.frames, "audio_frames": [c.first, c.last], "audio_relative": list(c.share(count))} for c in test],
            }
        )
    for row in case.raw["values"]["pretrain"]:
        found = clips.pretraining_clip(row["video_frames"], frames, stride, row["draw"])
        before.append({**row, "frames": found.frames, "audio_start_frame": found.first, "audio_end_frame": found.last})
    return _values({"finetune": fine, "pretrain": before})


def multi_scale_crop(case: Case) -> dict[str, Tensor]:
    rows = []
    for width, height, output in case.config["cases"]:
        sizes = clips.crop_sizes(width, height, output)
        offsets = {f"{w}x{h}": [list(place) for place in clips.crop_offsets(width, height, w, h)] for w, h in sizes}
        rows.append({"width": width, "height": height, "output": output, "sizes": [list(s) for s in sizes], "offsets": offsets})
    return _values({"multi_scale_crop": rows})


def mask_counts(case: Case) -> dict[str, Tensor]:
    rows = []
    for row in case.raw["values"]["counts"]:
        (t, h, w), ratio = row["grid"], row["ratio"]
        mask = tube(random_mask(2, h * w, ratio, rounding="hide"), t)
        slices = mask.hidden.view(2, t, -1)
        counted = {
            "tube_masked": int(mask.hidden[0].sum()),
            "tube_visible": mask.kept,
            "plane_masked": h * w - kept_count(h * w, ratio, "hide"),
        }
        rows.append({**row, **counted, "same_in_every_frame": bool((slices == slices[:, :1]).all())})
    return _values({"counts": rows})


def augmentation(case: Case) -> dict[str, Tensor]:
    pixels = (case.inputs["image"] * 256).floor().to(torch.uint8).numpy()
    out = {}
    for name, magnitude in case.config["operations"]:
        with patch.object(random, "random", return_value=0.0):  # the positive sign
            apply = augment.operation(name, magnitude)
        out[f"op.{name}.{magnitude}"] = torch.from_numpy(np.asarray(apply(Image.fromarray(pixels))).copy())
    for i, box in enumerate(case.config["crop_boxes_top_left_height_width"]):
        size = [int(side) for side in re.search(r"resize to (\d+) x (\d+)", case.raw["outputs"][f"resized_crop.{i}"]).groups()]
        out[f"resized_crop.{i}"] = augment.resized_crop(case.inputs["clip"], tuple(box), size)
    return out


def mixup(case: Case) -> dict[str, Tensor]:
    config, out = case.config, {}
    top, bottom, left, right = config["box"]
    for name, box in (("mixup", None), ("cutmix", (top, bottom, left, right))):
        video, target = augment.mix(
            case.inputs["video"], case.inputs["label"], config["classes"], config["lam"], box, config["label_smoothing"]
        )
        out |= {f"{name}.video": video, f"{name}.target": target}
    return out


def classification_metrics(case: Case) -> dict[str, Tensor]:
    logits, label = case.inputs["logits"].clone(), case.inputs["label"]
    samples, views, classes = logits.shape
    logits[torch.arange(samples), :, label] += float(re.search(r"([\d.]+) is added", case.raw["inputs"]["logits"]["note"])[1])
    groups = torch.arange(samples).repeat_interleave(views)
    scores = metrics.average_views(logits.softmax(-1).view(-1, classes), groups)
    found = metrics.categorical(label, scores)
    out = {name: torch.tensor(getattr(found, name)) for name in ("uar", "war", "weighted_f1", "micro_f1", "macro_f1")}
    out |= {"prediction": scores.argmax(1), "top1": torch.tensor(100 * found.war), "top5": torch.tensor(100 * found.top5)}
    return out | _values({"confusion": found.confusion.tolist()})


def regression_metrics(case: Case) -> dict[str, Tensor]:
    prediction = case.inputs["prediction"]
    rule = r"([\d.]+) \* prediction \+ ([\d.]+) \* noise \+ ([\d.]+)"
    slope, spread, offset = (float(found) for found in re.search(rule, case.raw["inputs"]["noise"]["note"]).groups())
    label = slope * prediction + spread * case.inputs["noise"] + offset
    found = metrics.dimensional(label, prediction)
    out = {"ccc_loss": ccc_loss(prediction, label), "pcc_loss": pcc_loss(prediction, label)}
    for name, value in found._asdict().items():
        out |= {f"{name}.mean": torch.tensor(value.mean()), f"{name}.per_dimension": torch.from_numpy(value)}
    return out


RUNNERS = {
    runner.__name__: runner
    for runner in (
        pretrain,
        finetune,
        cross_self_block,
        sincos,
        optimizer_groups,
        schedule,
        fbank,
        clip_sampling,
        multi_scale_crop,
        mask_counts,
        augmentation,
        mixup,
        classification_metrics,
        regression_metrics,
    )
} | {"fbank_magnitude": fbank}


@pytest.mark.parametrize("case", cases("hicmae"), ids=str)
def test_case(case: Case) -> None:
    check(case, RUNNERS)
