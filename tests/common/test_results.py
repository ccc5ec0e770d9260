"""Records, tables and the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common import results
from common.results import Record, between_markers


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one project that has two rows."""
    project = tmp_path / "projects" / "toy"
    project.mkdir(parents=True)
    (project / "tables.yaml").write_text(
        """
title: A toy.
demo: {command: python -m projects.toy.evaluate, rows: [{what: digits, metric: accuracy (%), recipe: recipes/demo.yaml}]}
rows:
  - {table: Table 1, row: Cora, what: "Cora, probe", metric: accuracy (%), reported: 84.2, spread: 0.4, source: seen, recipe: recipes/cora.yaml, command: x}
  - {table: Table 1, row: PubMed, what: PubMed, metric: accuracy (%), reported: 81.1, source: memory, recipe: recipes/pubmed.yaml, command: x}
  - {table: Table 1, row: DGI, what: DGI on Cora, metric: accuracy (%), reported: 82.3, source: seen}
"""
    )
    (project / "README.md").write_text("# toy\n<!-- table:start -->\nold\n<!-- table:end -->\nrest\n")
    (tmp_path / "projects" / "papers.yaml").write_text(
        "- {folder: toy, title: Toy, sentence: Short.}\n- {folder: later, title: L, sentence: S.}\n"
    )
    (tmp_path / "README.md").write_text("<!-- index:start --><!-- index:end -->\n<!-- table:start --><!-- table:end -->\n")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "PROJECTS", tmp_path / "projects")
    return tmp_path


def record(**changes: object) -> Record:
    base = {
        "recipe": "recipes/cora.yaml",
        "metric": "accuracy (%)",
        "values": [84.0, 83.0, 85.0],
        "seeds": [0, 1, 2],
        "weights": "trained here",
    }
    return Record(**{**base, "data": {"name": "Cora"}, "hours": 0.1, **changes})  # type: ignore[arg-type]


def test_the_table_shows_reported_obtained_and_difference(house: Path) -> None:
    results.save_record("toy", record())
    lines = results.table("toy").splitlines()
    assert lines[2].startswith("| Table 1 | Cora, probe | accuracy (%) | 84.2 ± 0.4 | 84.0 ± 0.8 (n=3) | -0.2 | trained here; ")
    assert "| 81.1¹ | not run | – |" in lines[3]
    assert "| 82.3 | no recipe | – |" in lines[4]
    assert "known from memory" in lines[-1]
    assert len(results.table("toy", only_run=True).splitlines()) == 3


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.49, 0.51], "0.5000 ± 0.0100 (n=2)"),
        ([79.0, 81.3], "80.15 ± 1.15 (n=2)"),
        ([-0.06, 0.07], "0.00500 ± 0.06500 (n=2)"),
        ([0.0, 0.0], "0 ± 0 (n=2)"),
        ([12345.0, 12347.0], "1.235e+04 ± 1 (n=2)"),
    ],
)
def test_without_a_reported_figure_the_spread_has_the_decimals_of_the_mean(house: Path, values: list[float], shown: str) -> None:
    rows = house / "projects" / "toy" / "tables.yaml"
    rows.write_text("paper: Toy\nrows:\n  - {what: own row, metric: m, reported: null, recipe: recipes/own.yaml, command: x}\n")
    results.save_record("toy", record(recipe="recipes/own.yaml", metric="m", values=values, seeds=[0, 1]))
    assert f"| – | {shown} | – |" in results.table("toy")


def set_dates(path: Path, *dates: str) -> None:
    """Date and commit of the file's records, in order."""
    lines = [json.loads(line) | {"date": date, "commit": f"c{n}"} for n, (line, date) in enumerate(zip(path.open(), dates, strict=True))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_records_are_appended_and_the_newest_is_shown(house: Path) -> None:
    path = results.save_record("toy", record())
    first = path.read_text()
    assert results.save_record("toy", record(values=[80.0], seeds=[0])) == path
    assert path.read_text().startswith(first)
    older, newer = results.records("toy")
    assert (older["values"], newer["values"]) == ([84.0, 83.0, 85.0], [80.0])
    assert {"commit", "date", "device", "versions"} <= newer.keys()
    set_dates(path, "2026-01-01", "2026-01-02")
    assert "| 80.0 | -4.2 |" in results.table("toy")
    set_dates(path, "2026-01-02", "2026-01-01")
    assert "| 84.0 ± 0.8 (n=3) |" in results.table("toy")


def test_records_of_other_seeds_are_joined_until_a_seed_came_out_otherwise(house: Path) -> None:
    for seeds, values in (([0, 1], [70.0, 71.0]), ([0, 1], [80.0, 82.0]), ([1], [82.0]), ([1, 2], [82.0, 84.0])):
        path = results.save_record("toy", record(seeds=seeds, values=values))
    set_dates(path, "2026-01-01", "2026-01-02", "2026-01-03", "2026-01-04")
    assert "| 82.0 ± 1.6 (n=3) | -2.2 | trained here; " in results.table("toy")
    assert "; c1, c3 |" in results.table("toy")  # c2 holds nothing that c3 lacks
    results.save_record("toy", record(seeds=[3], values=[90.0], weights="official, converted"))
    assert "| 90.0 | +5.8 | official, converted; " in results.table("toy")


def test_a_record_made_with_options_stands_in_no_row_but_one_that_commands_them(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "process_changes", lambda: {"lr": "0.1", "weights": "/data/a.pth"})
    path = results.save_record("toy", record())
    assert json.loads(path.read_text())["options"] == {"lr": "0.1", "weights": "/data/a.pth"}
    assert "| 84.2 ± 0.4 | not run |" in results.table("toy")
    rows = house / "projects" / "toy" / "tables.yaml"
    rows.write_text(
        rows.read_text().replace("recipes/cora.yaml, command: x", "recipes/cora.yaml, command: [x, 'x --lr=0.1 --weights={data}/a.pth']")
    )
    assert "| 84.0 ± 0.8 (n=3) |" in results.table("toy")
    rows.write_text(rows.read_text().replace("--lr=0.1", "--lr=0.2"))
    assert "| 84.2 ± 0.4 | not run |" in results.table("toy")


def test_one_recipe_is_picked_by_its_whole_name_and_a_broken_line_is_named(house: Path) -> None:
    results.save_record("toy", record(recipe="recipes/imdb.yaml"))
    path = results.save_record("toy", record(recipe="recipes/imdb-b.yaml"))
    assert [found["recipe"] for found in results.read_records(path.parent, "imdb")] == ["recipes/imdb.yaml"]
    with path.open("a") as file:
        file.write('{"recipe": "rec')
    with pytest.raises(ValueError, match=r"imdb-b-\w+\.jsonl, line 2: expected one record"):
        results.records("toy")


@pytest.mark.parametrize("changes", [{"values": []}, {"seeds": [0]}, {"values": [1.0, 2.0, float("nan")]}])
def test_a_record_needs_one_finite_value_a_seed(house: Path, changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected one finite value a seed"):
        results.save_record("toy", record(**changes))
    assert results.records("toy") == []


def test_demo_figures_stay_apart(house: Path) -> None:
    results.save_record("toy", record(recipe="recipes/demo.yaml", values=[0.5], seeds=[0]), demo=True)
    assert "| digits | accuracy (%) | 0.5 |" in results.demo_table("toy")
    assert "0.5" not in results.table("toy")


def test_readmes_are_rendered_between_their_markers(house: Path) -> None:
    assert {path.name for path in results.write_tables()} == {"README.md"}
    text = (house / "projects" / "toy" / "README.md").read_text()
    assert text.startswith("# toy\n<!-- table:start -->\n\n| Table |")
    assert text.endswith("<!-- table:end -->\nrest\n")
    assert "| `later` | L | S. | planned |" in (house / "README.md").read_text()
    assert results.write_tables() == []
    with pytest.raises(ValueError, match="found neither"):
        between_markers("no markers", "x")


def test_rows_must_say_how_their_figure_is_known(house: Path) -> None:
    path = house / "projects" / "toy" / "tables.yaml"
    path.write_text("rows: [{what: a, metric: b, reported: 1.0}]")
    with pytest.raises(ValueError, match="expected source: seen or memory, found None"):
        results.table("toy")
    path.write_text("rows: [{what: a, metric: b}]")
    with pytest.raises(ValueError, match=r"row a lacks \['reported'\]"):
        results.table("toy")


def test_the_report_holds_tables_curves_and_pictures(house: Path) -> None:
    run = house / "runs" / "toy" / "demo"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": 1 / s}) + "\n" for s in range(1, 9)))
    results.picture_path("toy", "field_of_scores").write_bytes(b"\x89PNG")
    results.save_record("toy", record())
    page = results.write_report().read_text()
    assert "toy/demo: loss 1 → 0.125 in 8 steps" in page
    assert 'alt="field of scores"' in page
    assert "<td>84.0 ± 0.8 (n=3)</td>" in page
    assert "http" not in page
