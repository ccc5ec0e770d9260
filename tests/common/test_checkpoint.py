"""States and models on disk: whole or not at all, and never by running pickled code."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt
from safetensors.torch import load_file, save_file
from torch import nn

from common import checkpoint
from common.checkpoint import latest, load_model, read_state, rng_state, save_model, set_rng_state, write_state, write_text, written_aside
from common.weights import load_into, read_state_dict


class Net(nn.Module, PyTorchModelHubMixin):
    """Two layers."""

    def __init__(self, width: int = 3, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(2, width, bias=bias)
        self.last = nn.Linear(width, 1)


class Other(nn.Module, PyTorchModelHubMixin):
    """Another model."""

    def __init__(self, depth: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(depth))


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


def test_random_generators_are_restored(tmp_path: Path) -> None:
    np.random.standard_normal()  # leaves a cached second value behind
    state = rng_state()
    torch.save(state, tmp_path / "rng.pt")
    drawn = [random.random(), float(np.random.standard_normal()), float(torch.rand(()))]
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert [random.random(), float(np.random.standard_normal()), float(torch.rand(()))] == drawn


def test_only_the_newest_state_stays_and_half_written_ones_are_ignored(tmp_path: Path) -> None:
    write_state(tmp_path, 3, {"step": 3})
    write_state(tmp_path, 12, {"step": 12, "model": {"w": torch.ones(2)}})
    (tmp_path / ".step-00000020.tmp").mkdir()
    assert latest(tmp_path) == tmp_path / "step-00000012"
    assert read_state(tmp_path / "step-00000012")["step"] == 12
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000012"]


def test_numbers_of_checked_types_are_stored_as_plain_ones(tmp_path: Path) -> None:
    groups = [{"lr": PositiveFloat(0.5), "weight_decay": NonNegativeFloat(0.0), "betas": (0.9, 0.999), "foreach": True}]
    path = write_state(tmp_path, 1, {"step": PositiveInt(1), "optimizer": {"param_groups": groups}})
    read = read_state(path)
    assert read["optimizer"]["param_groups"] == groups
    assert {type(v) for v in read["optimizer"]["param_groups"][0].values()} == {float, tuple, bool}


def test_a_full_disk_leaves_the_last_state_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_state(tmp_path, 1, {"step": 1})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(OSError, match=r"could not write .*MiB are free there; nothing was changed"):
        write_state(tmp_path, 2, {"step": 2})
    monkeypatch.undo()
    assert read_state(latest(tmp_path))["step"] == 1  # type: ignore[arg-type]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".") and any(p.iterdir())] == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device_is_reported_in_one_sentence(tmp_path: Path) -> None:
    target = tmp_path / "weights.pt"
    target.write_text("old")

    def save() -> None:
        with written_aside(target) as aside:
            aside.symlink_to("/dev/full")
            torch.save({"w": torch.zeros(100_000)}, aside)

    with pytest.raises(OSError, match=r"could not write .*weights\.pt"):
        save()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_text_write_changes_nothing(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "one")
    with pytest.raises(TypeError):
        write_text(tmp_path / "a.txt", 3)  # type: ignore[arg-type]
    assert (tmp_path / "a.txt").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_damaged_and_foreign_states_are_refused(tmp_path: Path) -> None:
    path = write_state(tmp_path, 1, {"step": 1})
    (path / "state.pt").write_bytes((path / "state.pt").read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged or foreign"):
        read_state(path)
    path = write_state(tmp_path, 2, {"step": 2})
    torch.save({"format": 99}, path / "state.pt")
    with pytest.raises(ValueError, match="expected format 1, found 99"):
        read_state(path)


def test_a_saved_model_is_read_by_from_pretrained_and_by_us(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net(width=5)
    save_model(model, tmp_path, recipe="width: 5\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors", "recipe.yaml"]
    for read in (Net.from_pretrained(tmp_path), load_model(Net, tmp_path)):
        assert all(torch.equal(a, b) for a, b in zip(read.state_dict().values(), model.state_dict().values(), strict=True))


def test_the_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    save_model(Net(), tmp_path)
    with pytest.raises(ValueError, match="does not fit Other"):
        load_model(Other, tmp_path)
    with pytest.raises(ValueError, match=r"first\.weight: \(3, 2\) in the file, \(4, 2\) in the model"):
        load_model(Net, tmp_path, width=4)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_model(Net, tmp_path / "empty")
    with pytest.raises(TypeError, match="PyTorchModelHubMixin"):
        save_model(nn.Linear(1, 1), tmp_path)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    made = tmp_path / "made"
    torch.save({"model": Payload(str(made))}, tmp_path / "a.pt")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Payload(str(made))))
    for name in ("a.pt", "b.pth"):
        with pytest.raises(ValueError, match=r"expected tensors only|corrupt"):
            read_state_dict(tmp_path / name)
    assert not made.exists()


def test_state_dicts_are_read_from_all_kinds_of_files(tmp_path: Path) -> None:
    weights = {"w": torch.arange(3.0)}
    torch.save({"model": weights, "epoch": 3}, tmp_path / "a.pth")
    save_file(weights, tmp_path / "b.safetensors")
    assert torch.equal(read_state_dict(tmp_path / "a.pth", key="model")["w"], weights["w"])
    assert torch.equal(read_state_dict(tmp_path / "b.safetensors")["w"], weights["w"])
    with pytest.raises(ValueError, match=r"expected an entry 'state_dict', found \['epoch', 'model'\]"):
        read_state_dict(tmp_path / "a.pth", key="state_dict")
    with pytest.raises(ValueError, match="name the entry that holds it with key="):
        read_state_dict(tmp_path / "a.pth")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_state_dict(tmp_path / "c.pth")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_cut_short_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)({"w": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match="corrupt"):
        read_state_dict(path)


def test_load_into_renames_declares_and_refuses() -> None:
    model = Net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    official = {"module." + k: v + 1 for k, v in before.items()} | {"module.extra": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"unexpected 1 \(module\.extra\)"):
        load_into(model, official, rename=lambda name: name.removeprefix("module."))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    load_into(model, official, rename=lambda name: name.removeprefix("module."), unused=("*.extra",))
    assert all(torch.equal(v, before[k] + 1) for k, v in model.state_dict().items())
    partly = {k: v for k, v in before.items() if k.startswith("first")}
    with pytest.raises(ValueError, match=r"missing 2 \(last\.weight; last\.bias\)"):
        load_into(model, partly)
    load_into(model, partly, absent=("last.*",))
    assert torch.equal(model.first.weight, before["first.weight"])
    assert torch.equal(model.last.weight, before["last.weight"] + 1)


def test_saved_weights_hold_every_entry(tmp_path: Path) -> None:
    save_model(Net(bias=False), tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == {"first.weight", "last.weight", "last.bias"}
