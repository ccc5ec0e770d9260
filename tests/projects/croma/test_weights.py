"""Official checkpoints in every layout, and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.checkpoint import save_model
from projects.croma.finetune import Segmenter
from projects.croma.model import CROMA, Encoders
from projects.croma.weights import convert, load_encoders, load_pretraining, read_checkpoint, released_state, sizes_of

SIZES = {"embed_dim": 16, "depth": 4, "num_heads": 16}


@pytest.fixture(scope="module")
def model() -> CROMA:
    torch.manual_seed(0)
    return CROMA(SIZES, decoder_dim=8, decoder_heads=2)


def same(first: torch.nn.Module, second: torch.nn.Module) -> None:
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_release_flat_and_run_folder_load_alike(model: CROMA, tmp_path: Path) -> None:
    nested = released_state(model.encoders)
    assert {group: len(entries) for group, entries in nested.items()} == {
        "s1_encoder": 26, "s2_encoder": 48, "joint_encoder": 38, "s1_GAP_FFN": 6, "s2_GAP_FFN": 6,
    }  # fmt: skip
    assert nested["s1_encoder"]["transformer.layers.1.1.net.3.weight"].shape == (16, 64)
    assert nested["joint_encoder"]["layers.0.1.to_q.weight"].shape == (16, 16)
    torch.save(nested, tmp_path / "CROMA_small.pt")
    flat = {f"{group}.{name}": value for group, entries in nested.items() for name, value in entries.items()}
    torch.save(flat, tmp_path / "flat.pt")
    save_model(model, tmp_path / "run")
    save_model(model.encoders, tmp_path / "encoders")
    for source in ("CROMA_small.pt", "flat.pt", "run", "encoders"):
        same(load_encoders(tmp_path / source), model.encoders)
    tuned = Segmenter(SIZES, classes=3)
    tuned.encoders.load_state_dict(model.encoders.state_dict())
    save_model(tuned, tmp_path / "tuned")
    same(load_encoders(tmp_path / "tuned"), model.encoders)
    same(load_encoders(convert(tmp_path / "run", tmp_path / "again.pt")), model.encoders)
    assert sizes_of(flat) == {
        "embed_dim": 16, "depth": 4, "radar_depth": 2, "joint_depth": 2, "patch_size": 8, "radar_channels": 2, "optical_channels": 12,
    }  # fmt: skip
    assert load_encoders(tmp_path / "run", positions="alibi_self").positions == "alibi_self"


def test_a_checkpoint_of_another_size_says_what_it_holds(model: CROMA, tmp_path: Path) -> None:
    torch.save(released_state(model.encoders), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"width 16, optical depth 4.*other shape .*\(16, 128\) in the file, \(32, 128\) in the model"):
        load_encoders(tmp_path / "w.pt", embed_dim=32)
    with pytest.raises(ValueError, match=r"missing .*layers.4"):
        load_encoders(tmp_path / "w.pt", depth=6)
    with pytest.raises(ValueError, match=r"expected the groups .* found \['model'\]"):
        load_encoders({"model.weight": torch.zeros(2)})
    with pytest.raises(FileNotFoundError):
        load_encoders(tmp_path / "nowhere.pt")


def test_a_release_cannot_resume_pre_training_but_can_begin_one(model: CROMA, tmp_path: Path) -> None:
    torch.save(released_state(model.encoders), tmp_path / "w.pt")
    fresh = CROMA(SIZES, decoder_dim=8, decoder_heads=2)
    with pytest.raises(ValueError, match=r"encoders only; .* pass --init"):
        load_pretraining(fresh, tmp_path / "w.pt", resume=True)
    started = load_pretraining(fresh, tmp_path / "w.pt")
    same(fresh.encoders, model.encoders)
    assert "decoder.mask_token" in started
    assert "radar_proj.weight" in started
    save_model(model, tmp_path / "run")
    again = CROMA(SIZES, decoder_dim=12, decoder_heads=2)
    assert load_pretraining(again, tmp_path / "run") == started
    same(again.encoders, model.encoders)
    other = CROMA({**SIZES, "embed_dim": 32}, decoder_dim=8, decoder_heads=2)
    with pytest.raises(ValueError, match="width 16"):
        load_pretraining(other, tmp_path / "w.pt")


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    torch.save({"s1_encoder": Encoders}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="would run code"):
        read_checkpoint(tmp_path / "w.pt")


def test_a_missing_entry_is_named(model: CROMA) -> None:
    nested = released_state(model.encoders)
    flat: dict[str, Tensor] = {f"{group}.{name}": value for group, entries in nested.items() for name, value in entries.items()}
    flat.pop("s2_GAP_FFN.0.weight")
    with pytest.raises(ValueError, match=r"missing 1 .*optical_head.0.weight"):
        load_encoders(flat)
