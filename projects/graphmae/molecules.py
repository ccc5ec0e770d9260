"""Molecules from SMILES files, their features, the scaffold split, and a set of drawn molecules that needs no RDKit.

Layout under the data root: moleculenet/<set>/raw/<file>.csv and zinc15/zinc_standard_agent.csv.gz (columns smiles, zinc_id).
Features are those of the reference: atom [atomic number - 1, chirality], bond [type, direction], each bond as two columns (i, j), (j, i).
"""

from __future__ import annotations

import csv
import gzip
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.checkpoint import written_aside
from common.data import checksum, require, root
from projects.graphmae.data import Union, cache_folder
from projects.graphmae.molecule import ATOM_TYPES, Bonds

CHIRALITY = ("CHI_UNSPECIFIED", "CHI_TETRAHEDRAL_CW", "CHI_TETRAHEDRAL_CCW")
BOND = ("SINGLE", "DOUBLE", "TRIPLE", "AROMATIC")
DIRECTION = ("NONE", "ENDUPRIGHT", "ENDDOWNRIGHT")
TOX21 = [
    "NR-AR",
    "NR-AR-LBD",
    "NR-AhR",
    "NR-Aromatase",
    "NR-ER",
    "NR-ER-LBD",
    "NR-PPAR-gamma",
    "SR-ARE",
    "SR-ATAD5",
    "SR-HSE",
    "SR-MMP",
    "SR-p53",
]


@dataclass(frozen=True)
class Table:
    """Where a set's SMILES and labels stand; tasks None: every column but `others`. canonical: the split sees RDKit's SMILES, not the file's."""

    file: str
    smiles: str
    tasks: tuple[str, ...] | None
    others: tuple[str, ...] = ()
    canonical: bool = False


SETS = {
    "bace": Table("bace.csv", "mol", ("Class",)),
    "bbbp": Table("BBBP.csv", "smiles", ("p_np",), canonical=True),
    "clintox": Table("clintox.csv", "smiles", ("FDA_APPROVED", "CT_TOX"), canonical=True),
    "sider": Table("sider.csv", "smiles", None),
    "tox21": Table("tox21.csv", "smiles", tuple(TOX21)),
    "toxcast": Table("toxcast_data.csv", "smiles", None, canonical=True),
    "muv": Table("muv.csv", "smiles", None, ("mol_id",)),
    "hiv": Table("HIV.csv", "smiles", ("HIV_active",)),
}
UNION = ("bbbp", "clintox", "sider", "tox21", "bace")  # the sets whose files are commonly at hand: pre-training in place of ZINC15


@dataclass
class MoleculeBatch:
    """Molecules side by side: x (N, 2), bonds, molecule_of (N,), labels (count, tasks) of 1, -1, 0 = missing."""

    x: Tensor
    bonds: Bonds
    molecule_of: Tensor
    labels: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MoleculeBatch:
        x, molecule_of, labels = (t.to(device, non_blocking=non_blocking) for t in (self.x, self.molecule_of, self.labels))
        return MoleculeBatch(x, self.bonds.to(device, non_blocking), molecule_of, labels)


class MoleculeSet:
    """Molecules joined once; a batch is cut out without sorting again.

    Args:
        x: (N, 2); edges: (2, E) bonds both ways, no self-loops; attributes: (E, 2); molecule_of: (N,) rising.
        labels: (molecules, tasks); smiles: what the scaffold split sees.
    """

    def __init__(
        self,
        name: str,
        x: Tensor,
        edges: Tensor,
        attributes: Tensor,
        molecule_of: Tensor,
        labels: Tensor,
        smiles: Sequence[str],
        sha256: str,
    ) -> None:
        self.name, self.x, self.labels, self.smiles, self.sha256 = name, x.long(), labels, list(smiles), sha256
        bonds = Bonds.of(edges, attributes, len(x))
        self.attributes, self.counts = bonds.attributes, bonds.counts
        self.union = Union(name, bonds.graph, molecule_of, len(labels))

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, molecules: Tensor) -> MoleculeBatch:
        atom, edge, graph, molecule_of = self.union.cut(molecules)
        return MoleculeBatch(self.x[atom], Bonds(graph, self.attributes[edge], self.counts[atom]), molecule_of, self.labels[molecules])


# -- SMILES ------------------------------------------------------------------------------------------------------------


def _rdkit() -> Any:
    try:
        from rdkit import Chem, RDLogger
        from rdkit.Chem.Scaffolds import MurckoScaffold
    except ImportError as err:
        raise ImportError("GraphMAE reads SMILES with RDKit: pip install -e '.[chem]'") from err
    RDLogger.DisableLog("rdApp.*")
    return Chem, MurckoScaffold


def features(smiles: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x (n, 2), edges (2, 2b), attributes (2b, 2) of one molecule.

    Raises:
        ValueError: RDKit cannot read it, or it holds an atom or bond that the tables do not know.
    """
    chem, _ = _rdkit()
    molecule = chem.MolFromSmiles(smiles)
    if molecule is None:
        raise ValueError(f"{smiles!r}: RDKit cannot read it")
    x = []
    for atom in molecule.GetAtoms():
        number, tag = atom.GetAtomicNum(), str(atom.GetChiralTag())
        if not 1 <= number <= ATOM_TYPES:
            raise ValueError(f"{smiles!r}: atom {atom.GetIdx()} has atomic number {number}; expected 1 to {ATOM_TYPES}")
        if tag not in CHIRALITY:
            raise ValueError(f"{smiles!r}: atom {atom.GetIdx()} has chirality {tag}; expected one of {CHIRALITY}")
        x.append((number - 1, CHIRALITY.index(tag)))
    edges, attributes = [], []
    for bond in molecule.GetBonds():
        kind, direction = str(bond.GetBondType()), str(bond.GetBondDir())
        if kind not in BOND or direction not in DIRECTION:
            raise ValueError(
                f"{smiles!r}: bond {bond.GetIdx()} is {kind}, {direction}; expected a type of {BOND} and a direction of {DIRECTION}"
            )
        i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        edges += [(i, j), (j, i)]
        attributes += [(BOND.index(kind), DIRECTION.index(direction))] * 2
    if not x:
        raise ValueError(f"{smiles!r}: no atoms")
    return np.array(x), np.array(edges, dtype=np.int64).reshape(-1, 2).T, np.array(attributes, dtype=np.int64).reshape(-1, 2)


def scaffold_split(smiles: Sequence[str], train: float = 0.8, valid: float = 0.1) -> dict[str, Tensor]:
    """Molecule numbers of train, val and test such that no Bemis-Murcko scaffold (with chirality) is in two of them; nothing is random.

    Groups by (size, first number) descending; a group goes where it still fits under train · n, then (train + valid) · n, else to test.
    """
    _chem, murcko = _rdkit()
    groups: dict[str, list[int]] = {}
    for number, text in enumerate(smiles):
        groups.setdefault(murcko.MurckoScaffoldSmiles(smiles=text, includeChirality=True), []).append(number)
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for group in sorted(groups.values(), key=lambda g: (len(g), g[0]), reverse=True):
        if len(parts["train"]) + len(group) <= train * len(smiles):
            parts["train"] += group
        elif len(parts["train"]) + len(parts["val"]) + len(group) <= (train + valid) * len(smiles):
            parts["val"] += group
        else:
            parts["test"] += group
    return {name: torch.tensor(numbers, dtype=torch.int64) for name, numbers in parts.items()}


def _rows(path: Path) -> tuple[list[str], list[list[str]]]:
    with gzip.open(path, "rt", newline="") if path.suffix == ".gz" else path.open(newline="") as stream:
        reader = csv.reader(stream)
        header = next(reader, [])
        return header, [row for row in reader if row]


def _label(text: str, path: Path, line: int) -> float:
    """1, -1 for 0, 0 for missing."""
    if text.strip() == "":
        return 0.0
    value = float(text)
    if value not in (0, 1):
        raise ValueError(f"{path}: line {line} has label {text!r}; expected 0, 1 or nothing")
    return 1.0 if value == 1 else -1.0


def _featurised(name: str, smiles: Sequence[str], unreadable: Literal["skip", "stop"], key: str, cache: str | None) -> dict[str, Tensor]:
    """Features of all molecules that can be read, joined; read once, then kept in the cache. `kept`: their numbers."""
    place = cache_folder(cache) / f"{name}-{key[:12]}.safetensors"
    if place.is_file():
        return load_file(place)
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    kept: list[int] = []
    failed: list[str] = []
    for number, text in enumerate(smiles):
        try:
            parts.append(features(text))
            kept.append(number)
        except ValueError as err:
            if unreadable == "stop":
                raise ValueError(f"{name}: row {number + 1}: {err}") from err
            failed.append(f"row {number + 1}: {err}")
    if not parts:
        raise ValueError(f"{name}: none of {len(smiles)} molecules can be read; first: {failed[:1]}")
    if failed:
        warnings.warn(f"{name}: {len(failed)} of {len(smiles)} molecules skipped ({'; '.join(failed[:3])})", stacklevel=2)
    sizes = np.array([len(x) for x, _, _ in parts])
    shifts = sizes.cumsum() - sizes
    out = {
        "x": torch.from_numpy(np.concatenate([x for x, _, _ in parts])).to(torch.uint8),
        "edges": torch.from_numpy(np.concatenate([e + s for (_, e, _), s in zip(parts, shifts, strict=True)], axis=1)).int(),
        "attributes": torch.from_numpy(np.concatenate([a for _, _, a in parts])).to(torch.uint8),
        "molecule_of": torch.from_numpy(np.arange(len(parts)).repeat(sizes)).int(),
        "kept": torch.tensor(kept),
    }
    out = {field: tensor.contiguous() for field, tensor in out.items()}
    with written_aside(place) as aside:
        save_file(out, aside)
    return out


def _set(
    name: str,
    smiles: Sequence[str],
    shown: Sequence[str],
    labels: Tensor,
    unreadable: Literal["skip", "stop"],
    sha256: str,
    cache: str | None,
) -> MoleculeSet:
    parts = _featurised(name, smiles, unreadable, sha256, cache)
    kept = parts["kept"]
    return MoleculeSet(
        name,
        parts["x"],
        parts["edges"].long(),
        parts["attributes"].long(),
        parts["molecule_of"].long(),
        labels[kept],
        [shown[i] for i in kept.tolist()],
        sha256,
    )


def moleculenet(
    name: str, data_root: str | None = None, cache: str | None = None, unreadable: Literal["skip", "stop"] = "skip"
) -> MoleculeSet:
    """A MoleculeNet set; molecules that RDKit or the tables cannot take are skipped with a count, or stop the reading."""
    table = SETS[name]
    folder = root(data_root) / "moleculenet" / name / "raw"
    path = require(folder / table.file, f"{name}, MoleculeNet", f"download {table.file} (moleculenet.org) and put it into {folder}")
    header, rows = _rows(path)
    if table.smiles not in header:
        raise ValueError(f"{path}: expected a column {table.smiles!r}, found {header[:8]}")
    tasks = list(table.tasks) if table.tasks is not None else [c for c in header if c not in (table.smiles, *table.others)]
    if absent := [task for task in tasks if task not in header]:
        raise ValueError(f"{path}: expected label columns {absent[:3]}, found {header[:8]}")
    columns = [header.index(task) for task in tasks]
    smiles = [row[header.index(table.smiles)] for row in rows]
    labels = torch.tensor([[_label(row[c], path, line) for c in columns] for line, row in enumerate(rows, start=2)])
    sha256 = checksum(path)
    shown = smiles
    if table.canonical:
        chem, _ = _rdkit()
        molecules = [chem.MolFromSmiles(text) for text in smiles]
        shown = [chem.MolToSmiles(m) if m is not None else text for m, text in zip(molecules, smiles, strict=True)]
    return _set(name, smiles, shown, labels, unreadable, sha256, cache)


def union(data_root: str | None = None, cache: str | None = None) -> MoleculeSet:
    """Every distinct molecule (by its SMILES as written) of five MoleculeNet sets, labels dropped: pre-training without ZINC15."""
    smiles: dict[str, None] = {}
    files = []
    for name in UNION:
        table = SETS[name]
        folder = root(data_root) / "moleculenet" / name / "raw"
        path = require(folder / table.file, f"{name}, MoleculeNet", f"download {table.file} (moleculenet.org) and put it into {folder}")
        header, rows = _rows(path)
        smiles |= dict.fromkeys(row[header.index(table.smiles)] for row in rows)
        files.append(path)
    texts = list(smiles)
    return _set("union of " + ", ".join(UNION), texts, texts, torch.zeros(len(texts), 0), "skip", checksum(files), cache)


def zinc15(data_root: str | None = None, cache: str | None = None) -> MoleculeSet:
    """ZINC15's 2 million molecules (file `zinc_standard_agent`), no labels."""
    folder = root(data_root) / "zinc15"
    how = f"download chem_dataset.zip of github.com/snap-stanford/pretrain-gnns and put zinc_standard_agent's csv.gz into {folder}"
    path = require(folder / "zinc_standard_agent.csv.gz", "ZINC15 subset for pre-training", how)
    header, rows = _rows(path)
    if "smiles" not in header:
        raise ValueError(f"{path}: expected a column 'smiles', found {header[:8]}")
    texts = [row[header.index("smiles")] for row in rows]
    return _set("ZINC15", texts, texts, torch.zeros(len(texts), 0), "skip", checksum(path), cache)


# -- embedded default --------------------------------------------------------------------------------------------------

DRAWN = (5, 6, 7, 8, 15)  # carbon, nitrogen, oxygen, fluorine, sulphur: atomic number - 1


def drawn(seed: int = 0, molecules: int = 400) -> MoleculeSet:
    """Random trees with ring closures over five atom types; the label says whether a nitrogen is doubly bonded to an oxygen anywhere.

    Types follow their neighbours (fluorine ends a branch, sulphur sits beside oxygen), so that a hidden atom can be guessed.
    """
    rng = np.random.default_rng(seed)
    x: list[np.ndarray] = []
    edges: list[np.ndarray] = []
    attributes: list[np.ndarray] = []
    owner: list[np.ndarray] = []
    labels = np.zeros((molecules, 1), dtype=np.float32)
    first = 0
    for m in range(molecules):
        size = int(rng.integers(8, 25))
        parent = np.array([int(rng.integers(max(0, i - 4), i)) for i in range(1, size)])
        pairs = np.stack([parent, np.arange(1, size)])
        if size > 10 and rng.random() < 0.6:
            pairs = np.concatenate([pairs, [[0], [size - 3]]], axis=1)
        degree = np.bincount(pairs.ravel(), minlength=size)
        kind = np.where(degree == 1, rng.choice([3, 2, 0], size, p=[0.5, 0.3, 0.2]), rng.choice([0, 1, 4], size, p=[0.6, 0.25, 0.15]))
        beside = np.zeros(size, dtype=bool)
        for a, b in pairs.T:
            beside[b] |= kind[a] == 4
        kind = np.where(beside & (degree == 1), 2, kind)
        bond = np.where((kind[pairs[0]] != 3) & (kind[pairs[1]] != 3), rng.choice([0, 1, 3], pairs.shape[1], p=[0.6, 0.25, 0.15]), 0)
        ends = np.sort(np.stack([kind[pairs[0]], kind[pairs[1]]]), axis=0)
        labels[m] = 1 if ((ends[0] == 1) & (ends[1] == 2) & (bond == 1)).any() else -1
        x.append(np.stack([np.array(DRAWN)[kind], np.zeros(size, dtype=np.int64)], axis=1))
        edges.append(np.stack([pairs.T, pairs[::-1].T], axis=1).reshape(-1, 2).T + first)
        attributes.append(np.stack([bond, np.zeros_like(bond)], axis=1).repeat(2, axis=0))
        owner.append(np.full(size, m))
        first += size
    joined = [torch.from_numpy(np.concatenate(parts, axis=axis)) for parts, axis in ((x, 0), (edges, 1), (attributes, 0), (owner, 0))]
    return MoleculeSet("drawn molecules", *joined, torch.from_numpy(labels), [], "generated")


def load(name: str, *, data_root: str | None = None, cache: str | None = None, unreadable: Literal["skip", "stop"] = "skip") -> MoleculeSet:
    """drawn, union, zinc15, or a MoleculeNet set."""
    if name == "drawn":
        return drawn()
    if name == "union":
        return union(data_root, cache)
    if name == "zinc15":
        return zinc15(data_root, cache)
    if name not in SETS:
        raise ValueError(f"data={name!r}: expected drawn, union, zinc15 or one of {list(SETS)}")
    return moleculenet(name, data_root, cache, unreadable)


def split(molecules: MoleculeSet) -> dict[str, Tensor]:
    """The scaffold split; drawn molecules, which have no scaffold, in order."""
    if molecules.smiles:
        return scaffold_split(molecules.smiles)
    ends = [0, int(0.8 * len(molecules)), int(0.9 * len(molecules)), len(molecules)]
    return {name: torch.arange(a, b) for name, a, b in zip(("train", "val", "test"), ends, ends[1:], strict=False)}
