"""Training steps at the papers' "Reference step for timing": `python -m benchmarks.steps <paper>` prints one JSON line a form of each configuration.

Each `benchmarks/<paper>_step.py` gives `configurations()`: by name, the forms of a step, ours first, then plainer ones; and may name in `KERNELS` the
configurations to be timed with the fused operations switched off as well.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.timing import interleaved

SUFFIX = "_step.py"


def papers() -> list[str]:
    """Papers that have a timed step."""
    return sorted(path.name.removesuffix(SUFFIX) for path in Path(__file__).parent.glob(f"*{SUFFIX}"))


def measure(paper: str, rounds: int = 7) -> list[dict[str, Any]]:
    """Every form of every configuration of a paper (`benchmarks.timing.interleaved`)."""
    module = importlib.import_module(f"benchmarks.{paper}_step")
    return [{"paper": paper, **line} for line in interleaved(module.configurations(), getattr(module, "KERNELS", ()), rounds)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description="processor and wall seconds of training steps")
    parser.add_argument("paper", choices=papers())
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(argv)
    for line in measure(options.paper, options.rounds):
        print(json.dumps(line))


if __name__ == "__main__":
    main()
