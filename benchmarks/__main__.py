"""`python -m benchmarks`: kernels, then the training steps of every project; writes JSON and a rendered table under `benchmarks/results/<device>/`."""

from __future__ import annotations

import json
import platform
import re
import time

import torch

from benchmarks import kernels, steps
from common.checkpoint import write_text
from common.results import device_name


def step_table(lines: list[dict[str, object]]) -> str:
    """Markdown: seconds of each configuration; compare within a paper, they were taken in one run."""
    rows = [
        f"| {line['paper']} | {line['configuration']} | {line['processor_seconds_per_step']} | {line['wall_seconds_per_step']} |"
        for line in lines
    ]
    return "\n".join(["| Paper | Configuration | Processor s a step | Wall s a step |", "|---|---|---|---|", *rows]) + "\n"


def main() -> None:
    folder = kernels.main([]).parent
    lines = [line for paper in steps.papers() for line in steps.measure(paper)]
    about = {"device": device_name(), "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "python": platform.python_version()}
    write_text(folder / "steps.json", json.dumps({**about, "steps": lines}, indent=1) + "\n")
    head = f"Training steps on {re.sub(r'[|]', ' ', device_name())}, medians, one thread.\n\n"
    write_text(folder / "steps.md", head + step_table(lines))
    print((folder / "steps.md").read_text())


if __name__ == "__main__":
    main()
