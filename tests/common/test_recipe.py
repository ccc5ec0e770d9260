"""Recipes: layering, refusals that name the key, and the round trip."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from jsonargparse.typing import NonNegativeFloat, OpenUnitInterval

from common.recipe import changes, parse, process_changes, read, to_yaml


@dataclass(frozen=True)
class Mask:
    """What is hidden."""

    ratio: OpenUnitInterval = 0.75
    """Share of patches hidden."""
    kind: Literal["random", "block"] = "random"
    """Sampling scheme."""


@dataclass(frozen=True)
class Small:
    """A recipe for tests."""

    lr: float = 1e-3
    """Learning rate."""
    depth: int = 2
    """Blocks."""
    mask: Mask = field(default_factory=Mask)
    """Masking."""
    drop_rate: NonNegativeFloat = 0.0
    """Of the last block."""
    note: str | None = None
    """Words."""

    def __post_init__(self) -> None:
        if self.depth > 4 and self.lr > 0.1:
            raise ValueError(f"depth={self.depth} with lr={self.lr}: expected lr <= 0.1 for more than 4 blocks")


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_files_are_layered_and_options_win(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "lr: 2e-4\nmask: {ratio: 0.5}\n")
    second = write(tmp_path / "b.yaml", "depth: 3\n")
    recipe = parse(Small, ["--config", first, "--config", second, "--mask.kind", "block", "--drop-rate=0.5"])
    assert recipe == Small(lr=2e-4, depth=3, mask=Mask(0.5, "block"), drop_rate=0.5)
    assert read(Small, first, second, depth=1) == Small(lr=2e-4, depth=1, mask=Mask(0.5))


def test_yaml_round_trip(tmp_path: Path) -> None:
    recipe = Small(lr=3e-5, mask=Mask(kind="block"), note="a: b")
    assert read(Small, write(tmp_path / "r.yaml", to_yaml(recipe))) == recipe


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("lrr: 1", "lrr"),
        ("depth: deep", "depth"),
        ("mask: {ratio: 1.5}", "ratio"),
        ("mask: {kind: tube}", "kind"),
        ("lr: 0.5\ndepth: 6", "expected lr <= 0.1"),
        ("mask: {rate: 0.5}", "rate"),
    ],
)
def test_typos_and_wrong_types_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, named: str) -> None:
    path = write(tmp_path / "bad.yaml", text)
    with pytest.raises(ValueError, match=named):
        read(Small, path)
    with pytest.raises(SystemExit) as stopped:
        parse(Small, ["--config", path])
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


def test_help_shows_what_each_field_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(Small, ["--help"])
    assert "Share of patches hidden." in capsys.readouterr().out


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        read(Small, tmp_path / "nowhere.yaml")


def test_options_that_change_the_recipe_are_told_from_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = [
        "--config",
        "a.yaml",
        "--seeds",
        "[0, 1]",
        "--data-root=/d",
        "--mask.ratio",
        "0.5",
        "--drop-rate=0.5",
        "--config",
        "b.yaml",
    ]
    assert changes(arguments) == {"mask.ratio": "0.5", "drop_rate": "0.5", "config": "b.yaml"}
    monkeypatch.setattr("common.recipe._process_changes", {})
    monkeypatch.setattr("sys.argv", ["script", "--config", write(tmp_path / "a.yaml", "lr: 1e-4\n"), "--depth=3"])
    assert parse(Small) == Small(lr=1e-4, depth=3)
    assert process_changes() == {"depth": "3"}
    parse(Small, ["--depth=1"])  # not the process's own line
    assert process_changes() == {"depth": "3"}
