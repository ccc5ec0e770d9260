"""Recipes: one frozen dataclass a script, YAML files layered with `--config`, single fields changed by options.

The library behind it is jsonargparse, and this file is the only one that knows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

R = TypeVar("R")

set_parsing_settings(docstring_parse_attribute_docstrings=True)

NEUTRAL = {"name", "seed", "seeds", "compare", "data_root", "cache", "out", "workers"}
NEUTRAL |= {f"training.{name}" for name in ("checkpoint_every", "log_every", "trackers")}
"""Options that leave a row's figure what it is: which seeds and variants run, where files lie, what is shown meanwhile."""

_process_changes: dict[str, str] = {}


def _parser(recipe: type, *, exit_on_error: bool = True) -> ArgumentParser:
    parser = ArgumentParser(description=recipe.__doc__, exit_on_error=exit_on_error)
    parser.add_argument("--config", action="config", help="YAML recipe; repeat to layer, the last one wins")
    parser.add_class_arguments(recipe, as_group=False)
    return parser


def _build(recipe: type[R], parser: ArgumentParser, namespace: Namespace) -> R:
    fields = vars(parser.instantiate(namespace))
    return recipe(**{name: value for name, value in fields.items() if name != "config"})


def _underscored(part: str) -> str:
    """`--data-root=x` -> `--data_root=x`; anything else as it is."""
    name, equals, value = part.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else part


def changes(arguments: Sequence[str]) -> dict[str, str]:
    """Options of a command line that change what its recipe computes, by name: all but `NEUTRAL` and the first `--config`."""
    found: dict[str, str] = {}
    configs = 0
    for place, part in enumerate(arguments):
        if not part.startswith("--"):
            continue
        name, equals, value = _underscored(part)[2:].partition("=")
        configs += name == "config"
        if name in NEUTRAL or (name == "config" and configs == 1):
            continue
        found[name] = value if equals else " ".join(arguments[place + 1 : place + 2])
    return found


def process_changes() -> dict[str, str]:
    """`changes` of the command line that `parse` read for this process; empty where no script runs."""
    return dict(_process_changes)


def parse(recipe: type[R], argv: Sequence[str] | None = None) -> R:
    """Recipe from the command line (`argv`, default: the process's own).

    Options may be spelled with hyphens or underscores; records keep those of the process that change a figure. A typo, a wrong type or a failed check of `__post_init__` (ValueError) prints one line that names the key and exits with status 2.
    """
    parser = _parser(recipe)
    given = sys.argv[1:] if argv is None else argv
    if argv is None:
        _process_changes.clear()
        _process_changes.update(changes(given))
    try:
        return _build(recipe, parser, parser.parse_args([_underscored(part) for part in given]))
    except ValueError as err:  # from __post_init__: checks across fields
        parser.error(str(err))


def read(recipe: type[R], *paths: str | Path, **changes: Any) -> R:
    """Recipe from YAML files, later ones over earlier ones, then `changes` (top-level fields) over all.

    Raises:
        ValueError: a key that the recipe does not have, a value of a wrong type, or a failed check; the message names it.
        FileNotFoundError: a path that does not exist.
    """
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"recipe {path}: no such file; expected a YAML file with fields of {recipe.__name__}")
    parser = _parser(recipe, exit_on_error=False)
    arguments = [part for path in paths for part in ("--config", str(path))]
    try:
        namespace = parser.parse_args(arguments)
        for name, value in changes.items():
            namespace[name] = value
        parser.validate(namespace)
        return _build(recipe, parser, namespace)
    except Exception as err:  # jsonargparse's ArgumentError names neither the file nor the recipe
        raise ValueError(f"recipe {', '.join(map(str, paths)) or recipe.__name__}: {err}") from err


def to_yaml(recipe: object) -> str:
    """The recipe with every field written out; parsed again it equals `recipe`. Stands beside every checkpoint and record."""
    parser = _parser(type(recipe))
    return parser.dump(parser.parse_object(asdict(recipe)))  # type: ignore[call-overload]
