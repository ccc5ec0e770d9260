"""Parity cases: found in folders, filled by rule, run by kind, compared by one helper.

`python -m tests.parity` prints for every case of every paper the worst relative error beside the tolerance, and fails on a kind without a runner.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

TESTS = Path(__file__).parent
DEFAULT = TESTS / "goldens"


def _fill_rule() -> Any:
    spec = importlib.util.spec_from_file_location("fill", DEFAULT / "fill.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


fill = _fill_rule()


@dataclass
class Case:
    """One parity case: what the reference computes for fixed parameters and inputs."""

    paper: str
    name: str
    kind: str
    config: dict[str, Any]
    state: dict[str, Tensor]  # reference state-dict name -> filled value
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]  # as stored: `<key>`, or `<key>.slice` and `<key>.norm`
    raw: dict[str, Any] = field(repr=False)
    files: dict[str, Tensor] = field(repr=False)  # every tensor of the safetensors file

    def __str__(self) -> str:
        return self.name


def _stored_under(rule: Any) -> str | None:
    """Key of the safetensors file that an input's rule refers to, in any of the spellings that the cases use."""
    if isinstance(rule, str):
        return rule.removeprefix("key ") if rule.startswith("key ") else None
    return (
        next((rule[word] for word in ("file", "stored", "safetensors", "tensor", "key") if word in rule), None)
        if isinstance(rule, Mapping)
        else None
    )


def _input(name: str, rule: Any, files: Mapping[str, Tensor]) -> Any:
    """An input made by a fill rule (times `scale`, plus `shift`) or read from the file; any other rule is handed on as it stands."""
    if isinstance(rule, Mapping) and "fill" in rule:
        made = torch.from_numpy(np.array(getattr(fill, rule["fill"])(rule.get("name", name), tuple(rule["shape"]))))
        scale, shift = rule.get("scale", 1), rule.get("shift", 0)
        return made if scale == 1 and shift == 0 else made * scale + shift
    stored = _stored_under(rule)
    return files.get(stored, rule)


def _values(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Numbers that a case holds in its JSON file, by dotted name."""
    out: dict[str, Tensor] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            out |= _values(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], list | Mapping):
            out |= _values({str(i): item for i, item in enumerate(value)}, f"{prefix}{name}.")
        elif isinstance(value, int | float) or (isinstance(value, list) and all(isinstance(item, int | float) for item in value)):
            out[prefix + name] = torch.tensor(value, dtype=torch.float64)
    return out


def read_case(path: Path) -> Case:
    """The case described by `<name>.json` and the tensors of `<name>.safetensors` beside it, if any."""
    raw = json.loads(path.read_text())
    tensors = path.with_suffix(".safetensors")
    files = load_file(tensors) if tensors.is_file() else {}
    filled = {name: torch.from_numpy(np.array(fill.parameter(name, tuple(shape)))) for name, shape in (raw.get("state") or {}).items()}
    rules = raw.get("inputs") or {}
    inputs = {name: _input(name, rule, files) for name, rule in rules.items()}
    given = {_stored_under(rule) for rule in rules.values()} | set(rules)
    outputs = {key: value for key, value in files.items() if key not in given and not key.startswith("in.")}
    expected = outputs | _values(raw.get("values") or {})
    return Case(path.parent.name, path.stem, raw["kind"], raw.get("config") or {}, filled, inputs, expected, raw, files)


def folders() -> list[Path]:
    """Where cases are looked for: CONTRAMASK_GOLDENS (several separated by ':'), else `tests/goldens`."""
    given = os.environ.get("CONTRAMASK_GOLDENS")
    return [Path(part) for part in given.split(":")] if given else [DEFAULT]


def cases(paper: str) -> list[Case]:
    """Every case of a paper in the folders in force."""
    return [read_case(path) for folder in folders() for path in sorted((folder / paper).glob("*.json"))]


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in float64 (absolute where `want` is zero; infinite where shapes differ or got is not finite while want is)."""
    if got.shape != want.shape:
        return float("inf")
    a, b = got.detach().double().cpu().flatten(), want.double().cpu().flatten()
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, torch.zeros_like(a), a - b).norm()
    size = b[b.isfinite()].norm()
    error = float(difference / size) if size > 0 else float(difference)
    return error if error == error else float("inf")


def errors(case: Case, outputs: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative error of every expected output; one that the runner does not give counts as infinite."""
    out: dict[str, float] = {}
    every = _strides(case)
    for key, want in case.expected.items():
        if key in outputs:
            got = torch.as_tensor(outputs[key])
        elif key.endswith(".slice") and key.removesuffix(".slice") in outputs:
            stem = key.removesuffix(".slice")
            flat = torch.as_tensor(outputs[stem]).flatten()
            got = flat[:: every[stem]].reshape(want.shape)
        elif key.endswith(".norm") and key.removesuffix(".norm") in outputs:
            got = torch.as_tensor(outputs[key.removesuffix(".norm")]).double().norm().reshape(want.shape)
        else:
            out[key] = float("inf")
            continue
        out[key] = relative_error(got, want)
    return out


def _strides(case: Case) -> dict[str, int]:
    """`{output: k}` for outputs kept as every k-th element, in any of the spellings that the cases use."""
    found: dict[str, Any] = {**(case.raw.get("slices") or {}), **(case.raw.get("slice_every") or {})}
    for name, about in (case.raw.get("outputs") or {}).items():
        if isinstance(about, Mapping):
            if step := about.get("slice_step") or about.get("slice"):
                found[name] = step
        elif isinstance(about, str) and (told := re.search(r"every (\d+)-th element", about)):
            found[name] = int(told[1])
    return {name: about["every"] if isinstance(about, Mapping) else about for name, about in found.items()}


Runner = Callable[[Case], Mapping[str, Tensor]]


def tolerances(case: Case) -> Callable[[str], float]:
    """Tolerance of an output: its own where the case names one, else the case's; "exact" in words is 0."""
    default = case.raw.get("tolerance", 0.0)
    own = dict(case.raw.get("tolerances") or {})
    if isinstance(default, Mapping):
        own, default = {**default, **own}, default["default"]
    return lambda key: 0.0 if isinstance(bound := own.get(key, default), str) else float(bound)


def check(case: Case, runners: Mapping[str, Runner]) -> None:
    """Run a case and fail with the worst outputs if any is off by more than the tolerance."""
    if case.kind not in runners:
        raise AssertionError(f"{case.paper}/{case.name}: no runner for kind {case.kind!r}; known: {sorted(runners)}")
    if not case.expected:
        raise AssertionError(f"{case.paper}/{case.name}: nothing to compare")
    found = errors(case, runners[case.kind](case))
    bound = tolerances(case)
    wrong = {key: value for key, value in found.items() if not value <= bound(key)}
    if wrong:
        worst = sorted(wrong.items(), key=lambda item: -item[1])[:8]
        raise AssertionError(
            f"{case.paper}/{case.name}: {len(wrong)} of {len(found)} outputs are off by more than the tolerance: "
            + ", ".join(f"{k} {v:.2g} (allowed {bound(k):.0e})" for k, v in worst)
        )


def runners_of(paper: str) -> Mapping[str, Runner]:
    """RUNNERS of the paper's `test_parity.py`."""
    path = (TESTS / "common" if paper == "common" else TESTS / "projects" / paper) / "test_parity.py"
    spec = importlib.util.spec_from_file_location(f"parity_{paper}", path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module.RUNNERS


def main() -> int:
    papers = sorted({path.name for folder in folders() if folder.is_dir() for path in folder.iterdir() if path.is_dir()})
    failures = 0
    print(f"{'paper':<16} {'case':<44} {'worst relative error':>20} {'tolerance':>10}")
    for paper in papers:
        place = (TESTS / "common" if paper == "common" else TESTS / "projects" / paper) / "test_parity.py"
        if not place.is_file():
            if (TESTS.parent / "projects" / paper).is_dir() or paper == "common":
                failures += 1
                print(f"{paper:<16} no runners: expected {place.relative_to(TESTS.parent)}")
            else:
                print(f"{paper:<16} not built yet: {sum(len(list((folder / paper).glob('*.json'))) for folder in folders())} cases not run")
            continue
        runners = runners_of(paper)
        for case in cases(paper):
            if case.kind not in runners:
                failures += 1
                print(f"{paper:<16} {case.name:<44} {'no runner for kind ' + repr(case.kind):>20}")
                continue
            try:
                found = errors(case, runners[case.kind](case))
                bound = tolerances(case)  # after the run: a runner may read a tolerance that the case states in words
                name = max(found, key=lambda key: (found[key] > bound(key), found[key]), default="")
                worst, allowed = (found[name], bound(name)) if found else (float("inf"), 0.0)
                note = "" if worst <= allowed else f"  FAILED {name or 'nothing to compare'}"
            except Exception as err:
                worst, allowed, note = float("inf"), 0.0, f"  FAILED {type(err).__name__}: {err}"
            failures += bool(note)
            print(f"{paper:<16} {case.name:<44} {worst:>20.2e} {allowed:>10.0e}{note}")
    print(f"{failures} failed" if failures else "all within tolerance")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
