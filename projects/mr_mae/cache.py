"""Teacher features on disk: safetensors shards with a manifest, found by what made them and checked by hash.

A store's folder is named after a hash of everything that its features depend on (teacher's weights, pictures, views, grid), so another teacher or
another data set never reads it. 196 tokens of 768 channels are 301 kB a view in half precision: fixed views only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.checkpoint import write_text, written_aside
from common.data import checksum
from projects.mr_mae.teachers import Features

SHARD = 1024  # views a file


class FeatureStore:
    """Features by view number, read from memory-mapped shards."""

    def __init__(self, folder: Path) -> None:
        """Open a complete store.

        Raises:
            FileNotFoundError: no store there. ValueError: a shard whose bytes are not those that were written, or an unfinished store.
        """
        path = folder / "manifest.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"teacher features {folder}: expected manifest.json, found none; they are made by the pre-training command"
            )
        self.folder, self.manifest = folder, json.loads(path.read_text())
        if len(self.manifest["shards"]) != -(-self.manifest["count"] // SHARD):
            raise ValueError(
                f"teacher features {folder}: expected {-(-self.manifest['count'] // SHARD)} shards, found {len(self.manifest['shards'])}; run again to go on"
            )
        self.tokens: list[Tensor] = []
        self.scores: list[Tensor | None] = []
        for number, digest in enumerate(self.manifest["shards"]):
            file = _shard(folder, number)
            if not file.is_file() or checksum(file) != digest:
                raise ValueError(
                    f"teacher features {file}: expected the bytes that were written (SHA-256 {digest[:12]}...), found others; remove {folder} to make them anew"
                )
            try:
                with safe_open(file, "pt") as content:
                    self.tokens.append(content.get_tensor("tokens"))
                    self.scores.append(content.get_tensor("score") if "score" in content.keys() else None)  # noqa: SIM118
            except SafetensorError as err:
                raise ValueError(f"teacher features {file}: expected a safetensors file, found a damaged one ({err})") from err

    def __len__(self) -> int:
        return self.manifest["count"]

    def __getitem__(self, index: int) -> Features:
        """Tokens (N, Dt) and score (N,) of a view, float32."""
        shard, row = divmod(index, SHARD)
        score = self.scores[shard]
        return Features(self.tokens[shard][row].float(), None if score is None else score[row].float())


def stored(
    root: str | Path, about: Mapping[str, Any], count: int, compute: Callable[[range], Features], *, say: Callable[[str], None] = print
) -> FeatureStore:
    """The store of `count` views under `root`, made (or finished, a shard at a time) where it is not there yet.

    Args:
        about: everything that the features depend on; plain values.
        compute: view numbers -> their features (m, N, Dt) and (m, N).
    """
    text = json.dumps(dict(about), sort_keys=True)
    folder = Path(root) / hashlib.sha256(text.encode()).hexdigest()[:16]
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) if path.is_file() else {"about": dict(about), "count": count, "shards": []}
    total = -(-count // SHARD)
    for number in range(len(manifest["shards"]), total):
        found = compute(range(number * SHARD, min((number + 1) * SHARD, count)))
        tensors = {"tokens": found.tokens.half().contiguous().cpu()}
        if found.score is not None:
            tensors["score"] = found.score.float().contiguous().cpu()
        with written_aside(_shard(folder, number)) as aside:
            save_file(tensors, aside)
        manifest["shards"].append(checksum(_shard(folder, number)))
        write_text(path, json.dumps(manifest, indent=1))  # after its shard: a run that is killed goes on behind the last whole one
        say(f"teacher features {folder.name}: shard {number + 1} of {total}")
    return FeatureStore(folder)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"features-{number:05d}.safetensors"
