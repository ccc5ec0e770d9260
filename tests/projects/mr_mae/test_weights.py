"""Released checkpoints: what they hold, what they lack, what is said of it."""

from __future__ import annotations

import argparse
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.checkpoint import save_model
from projects.mr_mae.classifier import Classifier
from projects.mr_mae.dense import DetectionBackbone, SegmentationBackbone
from projects.mr_mae.model import MRMAE
from projects.mr_mae.weights import begin_from, load_reference, our_name, read, reference_state, shape_of, their_name
from tests.projects.mr_mae.test_model import BACKBONE, PLAIN, batch, built

DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
DENSE = BACKBONE | {"stage_depths": (1, 1, 3)}


def released(model: MRMAE, *, keep: str = "encoder") -> dict[str, Tensor]:
    """A file as published: encoder alone, or v2 with a class token and unused parts."""
    state = reference_state(model)
    lacks = ("decoder", "mask_token", "stage1_output", "stage2_output") if keep == "encoder" else ("decoder",)
    return {name: value for name, value in state.items() if not name.startswith(lacks)}


def test_names_go_there_and_back() -> None:
    model = built(teacher_dims=[5])
    for name in model.state_dict():
        theirs = their_name(name)
        assert (theirs is None) == name.startswith("mimics.")
        assert theirs is None or our_name(theirs) == name


def test_shapes_are_read_off_a_file() -> None:
    model = built(targets="pixels", mlp_ratio=(2, 4, 3), stage_patch=(2, 2, 2), class_token=True)
    assert shape_of(reference_state(model)) == {
        "image_size": 64,
        "channels": 3,
        "stage_patch": [2, 2, 2],
        "stage_dims": [8, 12, 16],
        "stage_depths": [1, 1, 3],
        "mlp_ratio": [2.0, 4.0, 3.0],
        "class_token": True,
    }
    with pytest.raises(ValueError, match=r"expected a ConvMAE backbone, found no entry 'patch_embed1"):
        shape_of({"blocks.0.attn.qkv.weight": torch.zeros(1)})


def test_an_encoder_file_fills_the_encoder_and_names_what_stays_new(tmp_path: Path) -> None:
    source, model = built(targets="pixels"), MRMAE(**BACKBONE, decoder_dim=16, decoder_depth=1, decoder_heads=2, teacher_dims=[5])
    torch.save({"model": released(source)}, tmp_path / "convmae.pth")
    with pytest.warns(
        UserWarning, match=r"decoder \(mask token too\), stage1_output_decode, stage2_output_decode keep their initial values"
    ):
        missing = load_reference(model, tmp_path / "convmae.pth")
    assert torch.equal(model.encoder.blocks3[2].attn.qkv.weight, source.encoder.blocks3[2].attn.qkv.weight)
    assert "decoder.mask_token" in missing
    assert "encoder.norm.weight" not in missing


@pytest.mark.parametrize("config", [{}, PLAIN], ids=["convmae", "vit"])
def test_a_run_to_begin_from_gives_its_decoder_and_mimic_heads_too(config: dict[str, Any], tmp_path: Path) -> None:
    source = built(teacher_dims=[5], **config)
    save_model(source, tmp_path / "run")
    with torch.random.fork_rng():
        model = MRMAE(**config | {"image_size": 96} if config else BACKBONE | DECODER | {"image_size": 96}, teacher_dims=[5])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begin_from(model, tmp_path / "run")
    for name, p in source.named_parameters():
        assert name == "encoder.pos_embed" or torch.equal(p, dict(model.named_parameters())[name]), name
    with pytest.raises(ValueError, match=r"mimics.0.head.bias is \(5,\) there, \(6,\) for the teachers of this recipe; set teachers"):
        begin_from(built(teacher_dims=[6], **config), tmp_path / "run")
    save_model(built(targets="pixels", **config), tmp_path / "pixels")
    with pytest.warns(UserWarning, match=r"pixels; mimic heads keep their initial values"):
        begin_from(built(teacher_dims=[5], **config), tmp_path / "pixels")


def test_a_plain_vit_is_no_convmae() -> None:
    with pytest.raises(ValueError, match=r"expected a model with the ConvMAE backbone, found a plain ViT"):
        load_reference(built(targets="pixels", **PLAIN), {})


def test_fine_tuning_expects_a_new_head_and_norm_alone(tmp_path: Path) -> None:
    source = built(targets="pixels")
    save_model(source, tmp_path / "run")
    for state in (released(source), reference_state(source), read(tmp_path / "run")):
        model = Classifier(7, **BACKBONE)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            missing = load_reference(model, state)
        assert set(missing) == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    tuned = Classifier(3, **BACKBONE)  # a fine-tuned file into another number of classes keeps fc_norm, not the head
    torch.nn.init.constant_(tuned.fc_norm.weight, 2.0)
    assert set(load_reference(model, tuned.state_dict())) == {"head.weight", "head.bias"}
    assert model.fc_norm.weight.mean() == 2
    with pytest.raises(ValueError, match=r"missing 1 \(blocks2.0.conv1.weight\)"):
        load_reference(model, {k: v for k, v in released(source).items() if k != "blocks2.0.conv1.weight"})


def test_v2_files_need_the_class_token_and_their_table_may_have_a_row_more() -> None:
    source = built(targets="pixels", class_token=True)
    state = released(source, keep="v2")
    with pytest.raises(ValueError, match=r"it holds a class token \(ConvMAE-v2 files do\); build the model with class_token=True"):
        load_reference(Classifier(3, **BACKBONE), state)
    with pytest.raises(ValueError, match=r"it holds no class token .*class_token=False"):
        load_reference(Classifier(3, **BACKBONE, class_token=True), released(built(targets="pixels")))
    state["pos_embed"] = torch.cat([torch.full((1, 1, 16), 9.0), state["pos_embed"]], 1)
    assert shape_of(state)["image_size"] == 64
    model = Classifier(3, **BACKBONE, class_token=True)
    load_reference(model, state)
    assert torch.equal(model.pos_embed, source.encoder.pos_embed)
    assert torch.equal(model.cls_token, source.encoder.cls_token)
    images = batch()
    assert not torch.equal(model.features(images)[0], model.features(images)[1])


@pytest.mark.parametrize("kind", [Classifier, DetectionBackbone, SegmentationBackbone])
def test_positions_are_resized_to_the_models_grid(kind: Any) -> None:
    source = built(targets="pixels")
    settings = DENSE | {"image_size": 96} | ({"window": 3} if kind is DetectionBackbone else {"classes": 2} if kind is Classifier else {})
    model = kind(**settings).eval()
    new = [name for name in load_reference(model, released(source)) if not name.startswith(("head.", "fc_norm.", "fpn."))]
    assert model.pos_embed.shape == (1, 36, 16)
    assert all("rel_pos" in name or "relative" in name or "gamma" in name for name in new)
    corner = (model.pos_embed - source.encoder.pos_embed[:, [0]]).abs().sum(-1).argmin()
    assert corner == 0
    model(batch(96))


def test_another_size_is_named_with_both_shapes() -> None:
    state = released(built(targets="pixels"))
    with pytest.raises(ValueError, match=r"patch_embed1.norm.bias: \(8,\) in the file, \(10,\) in the model|in the file.*in the model"):
        load_reference(Classifier(3, **BACKBONE | {"stage_dims": (10, 12, 16)}), state)


def test_a_fine_tuned_file_is_read_beside_its_arguments_and_other_objects_are_refused(tmp_path: Path) -> None:
    tuned = Classifier(3, **BACKBONE)
    content = {
        "model": tuned.state_dict(),
        "args": argparse.Namespace(lr=1, output="x"),
        "optimizer": {"state": {}},
        "epoch": 99,
        "scaler": {},
    }
    torch.save(content, tmp_path / "tuned.pth")
    again = Classifier(3, **BACKBONE)
    assert load_reference(again, tmp_path / "tuned.pth") == []
    assert torch.equal(again.head.weight, tuned.head.weight)
    torch.save(content | {"args": Fraction(1, 2)}, tmp_path / "tuned.pth")
    with pytest.raises(ValueError, match="convert it to safetensors where you trust it"):
        read(tmp_path / "tuned.pth")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent.pth")
