"""The ratio tables of the main README, rendered from the records: `python -m benchmarks.readme`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.kernels import RESULTS
from common.checkpoint import write_text

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"(?<=<!-- speed:start -->\n).*?(?=<!-- speed:end -->)", re.S)


def _table(columns: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|", *("| " + " | ".join(row) + " |" for row in rows), ""]


def kernel_rows(cases: list[dict[str, Any]]) -> list[list[str]]:
    """One row an operation and size: its fastest path of ours against eager torch, against `torch.compile` of the same code, and its memory."""
    rows = []
    for case in dict.fromkeys(line["case"] for line in cases):
        lines = {line["variant"]: line for line in cases if line["case"] == case and "ratio" in line}
        ours = max((line for name, line in lines.items() if name.startswith("ours")), key=lambda line: line["ratio"]["p50"], default=None)
        if ours is None:
            continue
        faster = ours["ratio"]["p50"]
        compiled = lines.get("torch.compile")
        first = lines.get(ours["times_of_first"])
        share = f"{100 * ours['peak_bytes'] / first['peak_bytes']:.0f} %" if first and first["peak_bytes"] else "–"
        rows.append([case, ours["what"], f"{faster:.1f}", f"{faster / compiled['ratio']['p50']:.1f}" if compiled else "–", share])
    return rows


def step_rows(lines: list[dict[str, Any]]) -> list[list[str]]:
    """One row a configuration: seconds of our form, and how many times as long and as much memory the others take."""
    rows = []
    for paper, name in dict.fromkeys((line["paper"], line["configuration"]) for line in lines):
        ours, *others = (line for line in lines if (line["paper"], line["configuration"]) == (paper, name))
        rows.append(
            [
                paper,
                name,
                f"{ours['processor_seconds_per_step']:.3g} s, {ours['peak_memory_mib']:.0f} MiB",
                "; ".join(f"{o['form']} {o['times_of_first_form']:.2f} ({o['peak_memory_mib']:.0f} MiB)" for o in others),
            ]
        )
    return rows


def render() -> str:
    """Tables of every device that has records."""
    out: list[str] = []
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        if (kernels := folder / "kernels.json").is_file():
            record = json.loads(kernels.read_text())
            out += [
                f"Operations on {record['device']} (torch {record['versions']['torch']}, forward and backward, medians of ratios in one run):",
                "",
            ]
            columns = ["Operation", "Used by", "times faster than eager", "than `torch.compile`", "memory against eager"]
            out += _table(columns, kernel_rows(record["cases"]))
        if (steps := folder / "steps.json").is_file():
            record = json.loads(steps.read_text())
            out += [f"Training steps on {record['device']} (processor time; other forms of the same step as multiples of ours):", ""]
            out += _table(["Project", "Step", "Ours", "Others, times ours (memory)"], step_rows(record["steps"]))
    return "\n".join(out)


def write() -> bool:
    """Put the tables between the README's markers; True if it changed."""
    old = README.read_text()
    new = BLOCK.sub(lambda _: render(), old)
    if new != old:
        write_text(README, new)
    return new != old


if __name__ == "__main__":
    print("README.md changed" if write() else "README.md is current")
