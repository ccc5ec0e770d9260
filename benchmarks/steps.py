"""Training steps at the papers' "Reference step for timing": `python -m benchmarks.steps <paper>` prints one JSON line a configuration.

Each `benchmarks/<paper>_step.py` gives `measure()`: ours beside plainer forms of the same step, in one run, one thread.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SUFFIX = "_step.py"


def papers() -> list[str]:
    """Papers that have a timed step."""
    return sorted(path.name.removesuffix(SUFFIX) for path in Path(__file__).parent.glob(f"*{SUFFIX}"))


def measure(paper: str) -> list[dict[str, Any]]:
    """Medians of every configuration of a paper: processor and wall seconds a step, parameters."""
    lines = importlib.import_module(f"benchmarks.{paper}_step").measure()
    return [
        {"paper": paper, **line, "configuration": ", ".join([line["configuration"], *filter(None, [line.get("form")])])} for line in lines
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description="processor and wall seconds of training steps")
    parser.add_argument("paper", choices=papers())
    paper = parser.parse_args(argv).paper
    lines = measure(paper)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    for line in lines:
        print(json.dumps({**line, "peak_memory_mib_of_the_run": round(peak)}))


if __name__ == "__main__":
    main()
