"""The data root, missing files and checksums."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from common.data import VARIABLE, checksum, require, root


def test_root_is_the_argument_else_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "gone"))
    assert root(str(tmp_path)) == tmp_path
    with pytest.raises(FileNotFoundError, match="gone: no such folder"):
        root()
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(FileNotFoundError, match=r"expected --data-root FOLDER or CONTRAMASK_DATA=FOLDER, found neither"):
        root()


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "here").touch()
    assert require(tmp_path / "here", "X", "fetch it") == tmp_path / "here"
    with pytest.raises(FileNotFoundError, match=r"Cora, Planetoid format: expected .*ind\.cora\.x, found nothing there; fetch it"):
        require(tmp_path / "ind.cora.x", "Cora, Planetoid format", "fetch it")


def test_checksum_is_over_bytes_in_order(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "b").write_bytes(b"two")
    (tmp_path / "d" / "a").write_bytes(b"one")
    assert checksum(tmp_path / "d") == hashlib.sha256(b"onetwo").hexdigest()
    assert checksum([tmp_path / "d" / "b", tmp_path / "d" / "a"]) == hashlib.sha256(b"twoone").hexdigest()
