"""`python -m projects`: list the papers, run an embedded default, reproduce a row, render tables and report, begin a new project.

Papers are found by folder; nothing here imports one.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import results
from common.data import VARIABLE

SKELETON = "_skeleton"


def _known(name: str) -> str:
    if name not in results.papers():
        raise SystemExit(f"no project {name!r}; expected one of: {', '.join(results.papers())}")
    return name


def _run(command: str, paper: str) -> None:
    """Run one command of a tables.yaml; its failure ends this program with the same status."""
    print(f"\n$ {command}", flush=True)
    parts = shlex.split(command)
    # threads that wait must sleep: spinning ones made small steps 90 times slower on two cores of which one was busy
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    status = subprocess.run(
        [sys.executable if parts[0] == "python" else parts[0], *parts[1:]], cwd=results.ROOT, env=environment
    ).returncode
    if status:
        raise SystemExit(f"{paper}: the command above ended with status {status}")


def _commands(entry: Mapping[str, Any] | None) -> list[str]:
    """The command of a row or demo of a tables.yaml, or its commands in order: a teacher before what it teaches."""
    given = (entry or {}).get("command") or []
    return [given] if isinstance(given, str) else list(given)


def list_papers() -> None:
    """Every paper with its status."""
    for entry in results.index():
        print(f"{entry['folder']:<16} {entry['status']:<8} {entry['sentence']}")


def demo(names: Sequence[str]) -> None:
    """Train and evaluate on the embedded defaults, print their tables, write the report."""
    chosen = results.papers() if list(names) == ["all"] else [_known(name) for name in names]
    for paper in chosen:
        commands = _commands(results.tables(paper).get("demo"))
        if not commands:
            raise SystemExit(f"{paper}: its tables.yaml names no demo command")
        for command in commands:
            _run(command, paper)
    for paper in chosen:
        print(f"\n{paper}: {results.tables(paper).get('title', '')}\n\n{results.demo_table(paper)}")
    print(f"\nreport: {results.write_report()}")


def reproduce(paper: str, row: str | None, data: str | None) -> None:
    """Run the rows of a reported table that we have recipes for, and print reported beside obtained."""
    rows = [r for r in results.tables(_known(paper)).get("rows", []) if _commands(r)]
    if row is not None:
        names = sorted({str(r.get("row", r["what"])) for r in rows})
        rows = [r for r in rows if row.lower() in (str(r.get("row", "")).lower(), Path(str(r.get("recipe"))).stem.lower())]
        if not rows:
            raise SystemExit(f"{paper}: no row {row!r}; expected one of: {', '.join(names)}")
    commands = list(dict.fromkeys(command for r in rows for command in _commands(r)))
    data = data or os.environ.get(VARIABLE)
    for command in commands:
        if "{data}" in command and not data:
            raise SystemExit(
                f"{paper}: this row needs real data: give DATA=FOLDER or set {VARIABLE}; projects/{paper}/README.md says what goes there"
            )
        _run(command.replace("{data}", shlex.quote(str(data))), paper)
    shown = {str(r["what"]) for r in rows}
    lines = results.table(paper).splitlines()
    print("\n" + "\n".join(lines[:2] + [line for line in lines[2:] if any(what in line for what in shown)]))


def tables() -> None:
    """Render the tables of all READMEs."""
    for path in results.write_tables():
        print(f"rendered {path.relative_to(results.ROOT)}")


def new(name: str) -> None:
    """Copy the skeleton project and its tests under a new name."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise SystemExit(f"name {name!r}: expected lower-case letters, digits and underscores, beginning with a letter")
    pairs = [
        (results.PROJECTS / SKELETON, results.PROJECTS / name),
        (results.ROOT / "tests/projects" / SKELETON, results.ROOT / "tests/projects" / name),
    ]
    for _, target in pairs:
        if target.exists():
            raise SystemExit(f"{target} exists already; choose another name")
    for source, target in pairs:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        for path in target.rglob("*"):
            if path.is_file():
                path.write_text(path.read_text().replace(SKELETON, name))
        print(f"wrote {target.relative_to(results.ROOT)}")
    print(
        f"next: python -m projects.{name}.evaluate --config projects/{name}/recipes/demo.yaml; pytest tests/projects/{name}; then the paper's method in projects/{name}/model.py"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m projects", description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command")
    part = commands.add_parser("demo", help="train and evaluate on embedded defaults, write the report")
    part.add_argument("papers", nargs="*", default=["all"], help="folders, or all")
    part = commands.add_parser("reproduce", help="obtain reported rows")
    part.add_argument("paper")
    part.add_argument("--row", help="row of tables.yaml; default: all that have a recipe")
    part.add_argument("--data", help=f"data root; default: {VARIABLE}")
    commands.add_parser("tables", help="render the tables of all READMEs")
    commands.add_parser("report", help="write report/index.html")
    part = commands.add_parser("new", help="begin a project from the skeleton")
    part.add_argument("name")
    given = parser.parse_args(argv)
    match given.command:
        case "demo":
            demo(given.papers)
        case "reproduce":
            reproduce(given.paper, given.row, given.data)
        case "tables":
            tables()
        case "report":
            print(results.write_report())
        case "new":
            new(given.name)
        case _:
            list_papers()


if __name__ == "__main__":
    main()
