"""What the repository says of itself is so: recipes parse, tables are current, links resolve, contracts hold."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from common import results
from common.recipe import read, to_yaml
from projects import __main__ as command_line
from tests.conftest import ROOT

TRACKED = [
    Path(line)
    for line in subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
]
MARKDOWN = [path for path in TRACKED if path.suffix == ".md" and (ROOT / path).is_file()]
RECIPES = sorted((ROOT / "projects").glob("*/recipes/**/*.yaml"))


def recipe_class(path: Path) -> type:
    """Recipe dataclass of the script that a YAML file is for: `# script: <module>` in its first lines, else evaluate."""
    named = re.search(r"^# script: (\w+)", path.read_text(), re.M)
    paper = path.relative_to(ROOT / "projects").parts[0]
    return importlib.import_module(f"projects.{paper}.{named[1] if named else 'evaluate'}").Recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT / "projects")))
def test_recipes_parse_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    kind = recipe_class(path)
    recipe = read(kind, path)
    (tmp_path / "again.yaml").write_text(to_yaml(recipe))
    assert read(kind, tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT / "projects")))
def test_recipes_say_what_they_are_for_and_hold_no_path(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("#"), "the first line is a comment with the table and its cost"
    assert not re.search(r"(?m)^\s*\w+:\s*['\"]?/", text), "an absolute path"


def test_rendered_tables_are_current() -> None:
    stale = [str(path.relative_to(ROOT)) for path, text in results.rendered().items() if path.read_text() != text]
    assert not stale, "run make tables"


@pytest.mark.parametrize("paper", results.papers())
def test_tables_name_recipes_and_commands_that_exist(paper: str) -> None:
    content = results.tables(paper)
    rows = content.get("rows", []) + (content.get("demo") or {}).get("rows", [])
    for row in rows:
        if row.get("recipe"):
            assert (results.PROJECTS / paper / row["recipe"]).is_file(), row["what"]
        for config in re.findall(r"--config ([^\s']+)", str(row.get("command"))):
            assert (ROOT / config).is_file(), row["what"]
    reported = [row for row in rows if row.get("reported") is not None]
    assert all(isinstance(row["reported"], int | float) for row in reported)


@pytest.mark.parametrize("paper", results.papers())
def test_records_are_complete(paper: str) -> None:
    for record in results.records(paper):
        assert len(record["values"]) == len(record["seeds"]) > 0, record["recipe"]
        assert (results.PROJECTS / paper / record["recipe"]).is_file(), record["recipe"]
        assert {"commit", "date", "device", "versions", "data", "weights", "hours", "metric"} <= record.keys(), record["recipe"]


def anchors(text: str) -> set[str]:
    return {
        re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower()).replace(" ", "-") for line in text.splitlines() if line.startswith("#")
    }


@pytest.mark.parametrize("path", MARKDOWN, ids=str)
def test_links_resolve(path: Path) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / path).read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        resolved = (ROOT / path).parent / file if file else ROOT / path
        assert resolved.exists(), target
        if anchor:
            assert anchor in anchors(resolved.read_text()), target


def test_python_commands_of_the_readmes_name_modules_and_files_that_exist() -> None:
    for path in MARKDOWN:
        for module in re.findall(r"-m ((?:projects|benchmarks|common)[\w.]*)", (ROOT / path).read_text()):
            place = ROOT / module.replace(".", "/")
            assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), f"{path}: {module}"
        for config in re.findall(r"--config (projects/\S+\.yaml)", (ROOT / path).read_text()):
            assert (ROOT / config).is_file(), f"{path}: {config}"


def test_import_contracts_hold() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stdout


def test_projects_import_without_their_extras() -> None:
    code = """
import sys, importlib
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch_geometric", "rdkit", "rasterio", "nibabel", "pointnet2_ops", "av", "h5py", "soundfile", "ogb"}:
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
for paper in PAPERS:
    importlib.import_module(f"projects.{paper}")
""".replace("PAPERS", repr(results.papers()))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_index_names_sixteen_papers_and_every_project() -> None:
    known = [entry["folder"] for entry in yaml.safe_load((ROOT / "projects" / "papers.yaml").read_text())]
    assert len(known) == len(set(known)) == 16
    assert set(results.papers()) <= set(known)


def test_the_top_level_holds_nothing_else() -> None:
    allowed = {
        "pyproject.toml",
        "common",
        "projects",
        "benchmarks",
        "tests",
        "Makefile",
        "README.md",
        ".github",
        ".ci",
        ".gitignore",
        "LICENSE",
        "CHANGELOG.md",
        ".pre-commit-config.yaml",
    }
    assert {path.parts[0] for path in TRACKED} <= allowed


def test_a_row_of_several_commands_runs_them_in_order_and_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run: list[str] = []
    monkeypatch.setattr(command_line, "_run", lambda command, paper: run.append(command))
    command_line.reproduce("mr_mae", "tinyimagenet", str(tmp_path))
    assert [re.findall(r"mr_mae\.(\w+) --config \S+/(\S+)\.yaml", command) for command in run] == [
        [("pretrain_teacher", "tinyimagenet-teacher")],
        [("evaluate", "tinyimagenet")],
    ]
    assert all(str(tmp_path) in command for command in run)


@pytest.mark.parametrize(
    "arguments", [[], ["demo", "nowhere"], ["reproduce", "graphmae", "--row", "nowhere"], ["new", "Bad-Name"]], ids=" ".join
)
def test_the_command_line_lists_or_says_what_it_expected(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "projects", *arguments], cwd=ROOT, capture_output=True, text=True)
    if arguments:
        assert done.returncode != 0
        assert "expected" in done.stderr
    else:
        assert len(done.stdout.splitlines()) == 16
