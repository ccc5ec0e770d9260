"""What the projects' loaders deliver: `python -m benchmarks.loaders [paper]` prints one JSON line a loader.

`loaders()` of `benchmarks/<paper>_step.py` names them; a worker process of a DataLoader delivers as much again. Compare with the samples a second of the
paper's step: a loader keeps up where workers times its rate exceeds the step's.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from typing import Any

from benchmarks.steps import papers
from benchmarks.timing import fed


def measure(paper: str) -> list[dict[str, Any]]:
    """Every loader of a paper, none for a paper that trains on whole graphs or drawn points."""
    feeds = getattr(importlib.import_module(f"benchmarks.{paper}_step"), "loaders", dict)()
    return [{"paper": paper, **line} for line in fed(feeds)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loaders", description="samples a second of the projects' loaders")
    parser.add_argument("paper", choices=papers(), nargs="*", default=papers())
    for paper in parser.parse_args(argv).paper:
        for line in measure(paper):
            print(json.dumps(line))


if __name__ == "__main__":
    main()
