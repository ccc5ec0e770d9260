"""`python -m benchmarks`: kernels, training steps, loaders, two processes against one; writes JSON and rendered tables under `benchmarks/results/<device>/`.

`--only` picks some of the four; each has its own files.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import kernels, loaders, processes, readme, steps
from common.checkpoint import write_text

Lines = list[dict[str, Any]]
ABOUT: dict[str, tuple[Callable[[], Lines], str]] = {
    "steps": (
        lambda: [line for paper in steps.papers() for line in steps.measure(paper)],
        "Training steps, forward, backward and update: medians of one thread, the forms of a configuration timed in turn in one run. Times of the first form: median "
        "over the rounds of this form's processor time over the first's. Memory: most held during a step beyond what was there before.",
    ),
    "loaders": (
        lambda: [line for paper in steps.papers() for line in loaders.measure(paper)],
        "Loaders: one thread reads, augments and collates.",
    ),
    "processes": (
        processes.measure,
        "Two processes against one at the same global batch, one thread each; losses and gradients are compared in the same run.",
    ),
}


def render(name: str, about: dict[str, str], lines: Lines) -> str:
    """The lines as Markdown."""
    columns = list(dict.fromkeys(key for line in lines for key in line))
    rows = ["| " + " | ".join(str(line.get(column, "")) for column in columns) + " |" for line in lines]
    head = "| " + " | ".join(column.replace("_", " ") for column in columns) + " |"
    said = f"# {name.capitalize()} on {about['device']}\n\n{ABOUT[name][1]} ({about['date']}, torch {about['torch']}.)"
    return "\n".join([said, "", head, "|---" * len(columns) + "|", *rows]) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="benchmarks on whatever this machine has")
    parser.add_argument("--only", nargs="+", choices=["kernels", *ABOUT], default=["kernels", *ABOUT])
    only = parser.parse_args(argv).only
    folder: Path = kernels.folder()
    if "kernels" in only:
        print(kernels.main([]).read_text())
    for name in (name for name in ABOUT if name in only):
        lines = ABOUT[name][0]()
        if not lines:
            continue
        about = {
            "device": kernels.device_name(),
            "date": time.strftime("%Y-%m-%d"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        write_text(folder / f"{name}.json", json.dumps({**about, name: lines}, indent=1) + "\n")
        write_text(folder / f"{name}.md", render(name, about, lines))
        print((folder / f"{name}.md").read_text())
    readme.write()


if __name__ == "__main__":
    main()
