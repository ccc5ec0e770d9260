"""Where data lies, whether it is the data that was meant, and what to say when it is missing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

VARIABLE = "CONTRAMASK_DATA"


def root(data_root: str | Path | None = None) -> Path:
    """Folder that holds the data sets, one sub-folder each: the argument, else the environment variable CONTRAMASK_DATA.

    Raises:
        FileNotFoundError: neither is given, or the folder does not exist; the message says how to set it.
    """
    given = data_root or os.environ.get(VARIABLE)
    if not given:
        raise FileNotFoundError(
            f"no data root: expected --data-root FOLDER or {VARIABLE}=FOLDER, found neither; the project's README says what goes there"
        )
    path = Path(given).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"data root {path}: no such folder; create it and put the data there as the project's README says")
    return path


def require(path: str | Path, what: str, how: str) -> Path:
    """`path` if it exists.

    Args:
        what: the data set, in words ("Cora, Planetoid format").
        how: where to get it and where to put it ("download ind.cora.* from ... into <data root>/planetoid/Cora/raw").
    Raises:
        FileNotFoundError: naming the path, the data set and what to do.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{what}: expected {path}, found nothing there; {how}")
    return path


def checksum(paths: str | Path | Iterable[str | Path]) -> str:
    """SHA-256 (hex) over the bytes of the files in the order given; a record says with it on which data it was obtained.

    A folder stands for its files, sorted by their path inside it.
    """
    digest = hashlib.sha256()
    for path in [paths] if isinstance(paths, str | Path) else list(paths):
        path = Path(path)
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()
