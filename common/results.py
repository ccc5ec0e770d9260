"""Obtained figures as records, reported beside obtained, tables rendered from both, and the HTML report.

A project's `tables.yaml` holds what the paper claims, `results/*.jsonl` what runs gave (append-only, one line a record). Figures of the
embedded defaults go to `report/demo/<paper>` and are shown in a table of their own.
"""

from __future__ import annotations

import base64
import html
import json
import math
import platform
import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
import yaml

from common.checkpoint import write_text
from common.recipe import changes, process_changes

ROOT = Path(__file__).resolve().parent.parent
PROJECTS = ROOT / "projects"
START, END = "<!-- table:start -->", "<!-- table:end -->"


@dataclass
class Record:
    """One obtained figure over its seeds; commit, device, date and versions are added when it is saved."""

    recipe: str
    """Path inside the project folder, `recipes/cora.yaml`."""
    metric: str
    """As the row of tables.yaml spells it: `accuracy (%)`."""
    values: list[float]
    """One a seed."""
    seeds: list[int]
    weights: str
    """`trained here`, `official, converted`, ..."""
    data: dict[str, str]
    """name, split and sha256 of the files."""
    hours: float
    """Wall time of all seeds together."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further figures and whatever a reader needs to judge this one."""


def _commit() -> str:
    """Short commit, with `+changes` when the tree differs from it; `unknown` outside a checkout."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", "*.py", "*.yaml"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        return head + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    try:
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        return names[0].strip() if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def device_name() -> str:
    """The accelerators in use, else the processor and torch's threads."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()}x {torch.cuda.get_device_name()}"
    return f"CPU, {_processor()}, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"


def demo_folder(paper: str) -> Path:
    """Where the figures and pictures of a paper's embedded default go."""
    return ROOT / "report" / "demo" / paper


def picture_path(paper: str, name: str, *, demo: bool = True) -> Path:
    """Path of a picture of the demo (`report/demo/<paper>`, untracked) or of a recorded run (`projects/<paper>/results`); its folder exists.

    Pictures that show samples of a real data set go with the demo's: few data sets allow that their samples are published.
    """
    folder = demo_folder(paper) if demo else PROJECTS / paper / "results"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.png"


def save_record(paper: str, record: Record, *, demo: bool = False) -> Path:
    """Append a record to `<recipe>-<commit>.jsonl`, one line a record; none is ever changed. Returns the file.

    Options of the command line that change the recipe are kept as `options`: no row shows such a record unless its own command gives them.

    Raises:
        ValueError: as many values as seeds were expected, at least one, all finite.
    """
    if not record.values or len(record.values) != len(record.seeds) or not all(math.isfinite(v) for v in record.values):
        raise ValueError(
            f"record of {record.recipe}: expected one finite value a seed, found values {record.values} for seeds {record.seeds}"
        )
    commit = _commit()
    about = {
        "commit": commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(),
        "versions": {name: version(name) for name in ("torch", "accelerate")} | {"python": platform.python_version()},
    }
    if options := process_changes():
        about["options"] = options
    folder = demo_folder(paper) if demo else PROJECTS / paper / "results"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{Path(record.recipe).stem}-{commit.partition('+')[0]}.jsonl"
    with path.open("a") as file:  # in one write, so that a killed run leaves whole lines
        file.write(json.dumps({**asdict(record), **about}) + "\n")
    return path


def papers() -> list[str]:
    """Projects that exist, by folder."""
    return sorted(path.parent.name for path in PROJECTS.glob("[!_]*/tables.yaml"))


def tables(paper: str) -> dict[str, Any]:
    """A project's tables.yaml.

    Raises:
        ValueError: a row without its required fields; the message names the row.
    """
    path = PROJECTS / paper / "tables.yaml"
    content = yaml.safe_load(path.read_text())
    for row in content.get("rows", []):
        if absent := {"what", "metric", "reported"} - row.keys():
            raise ValueError(f"{path}: row {row.get('what', row)} lacks {sorted(absent)}")
        if row["reported"] is not None and row.get("source") not in ("seen", "memory"):
            raise ValueError(f"{path}: row {row['what']}: expected source: seen or memory, found {row.get('source')}")
    return content


def read_records(folder: Path, recipe: str = "*") -> list[dict[str, Any]]:
    """All records of a folder, oldest first; `recipe` (its file's name without suffix) picks one recipe's.

    Raises:
        ValueError: a line that is no JSON object; the message names file and line.
    """
    found = []
    for path in sorted(folder.glob(f"{recipe}-*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                record = json.loads(line)
            except ValueError as err:
                raise ValueError(
                    f"{path}, line {number}: expected one record as a JSON object, found {line[:40]!r}; remove the line"
                ) from err
            if recipe in ("*", Path(record["recipe"]).stem):
                found.append(record)
    return sorted(found, key=lambda record: record["date"])


def records(paper: str, *, demo: bool = False) -> list[dict[str, Any]]:
    """All records of a paper, oldest first."""
    return read_records(demo_folder(paper) if demo else PROJECTS / paper / "results")


def _number(value: float | None, digits: int | None = None) -> str:
    if value is None:
        return "–"
    if digits is not None:
        return f"{value:.{digits}f}"
    return f"{value:.4g}"


def _digits(row: Mapping[str, Any]) -> int | None:
    """Decimals of the reported figure, so that the obtained one is shown alike."""
    shown = str(row["reported"]) if row.get("reported") is not None else None
    return len(shown.partition(".")[2]) if shown else None


def _obtained(record: Mapping[str, Any] | None, digits: int | None) -> str:
    if record is None:
        return "not run"
    values = record["values"]
    mean, spread = fmean(values), pstdev(values)
    digits = None if digits is None else max(digits, 1)
    if len(values) == 1:
        return _number(mean, digits)
    size = max(abs(mean), spread)
    if digits is None and 1e-4 <= size < 1e4:  # no reported figure: four significant digits of the larger, both with as many decimals
        digits = 3 - math.floor(math.log10(size))
    return f"{_number(mean, digits)} ± {_number(spread, digits)} (n={len(values)})"


def _cells(row: Mapping[str, Any], found: Mapping[str, Any] | None) -> dict[str, str]:
    digits = _digits(row)
    reported = _number(row.get("reported"), digits)
    if row.get("reported") is not None:
        reported += f" ± {row['spread']}" if row.get("spread") is not None else ""
        reported += "¹" if row.get("source") == "memory" else ""
    difference = (
        "–" if found is None or row.get("reported") is None else f"{fmean(found['values']) - row['reported']:+.{max(digits or 0, 1)}f}"
    )
    expected = row.get("expected")
    return {
        "Table": str(row.get("table", "")),
        "What": str(row["what"]),
        "Metric": str(row["metric"]),
        "Reported": reported,
        "Expected": "" if expected is None else str(expected),
        "Obtained": _obtained(found, digits) if row.get("recipe") else "no recipe",
        "Difference": difference,
        "How": "" if found is None else f"{found['weights']}; {found['device'].split(',')[0]}; {found['commit']}",
    }


def _as_commanded(row: Mapping[str, Any], options: Mapping[str, str]) -> bool:
    """Whether a record's options are those that the row's command gives; a value with `{data}` or the like in it is a place."""
    command = row.get("command") or ""
    expected = changes(shlex.split(command if isinstance(command, str) else command[-1]))
    return options.keys() == expected.keys() and all("{" in expected[name] or expected[name] == options[name] for name in options)


def _matching(row: Mapping[str, Any], pool: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The newest record of the row's recipe and metric, joined by older ones of other seeds: a row may be run a few seeds at a time.

    A seed that was run again and came out otherwise supersedes whatever stands before it.
    """
    fitting = [
        r
        for r in pool
        if r["recipe"] == row.get("recipe")
        and r["metric"] == row["metric"]
        and r.get("extra", {}).get("row", row.get("row")) == row.get("row")
        and _as_commanded(row, r.get("options", {}))
    ]
    if not fitting:
        return None
    newest, *older = reversed(fitting)
    found = dict(zip(newest["seeds"], newest["values"], strict=True))
    commits = [newest["commit"]]
    for record in older:
        values = dict(zip(record["seeds"], record["values"], strict=True))
        if record["weights"] != newest["weights"] or any(found.get(seed, value) != value for seed, value in values.items()):
            break
        if values.keys() - found.keys():
            found |= values
            commits.append(record["commit"])
    seeds = sorted(found)
    return {**newest, "seeds": seeds, "values": [found[seed] for seed in seeds], "commit": ", ".join(dict.fromkeys(reversed(commits)))}


def _markdown(lines: Sequence[Mapping[str, str]]) -> str:
    shown = [name for name in lines[0] if any(line[name] for line in lines)]
    head = "| " + " | ".join(shown) + " |\n|" + "---|" * len(shown)
    return "\n".join([head, *("| " + " | ".join(line[name].replace("|", "\\|") for name in shown) + " |" for line in lines)])


def table(paper: str, *, only_run: bool = False) -> str:
    """Reported beside obtained, as Markdown."""
    pool = records(paper)
    lines = [_cells(row, _matching(row, pool)) for row in tables(paper).get("rows", []) if not only_run or _matching(row, pool)]
    if not lines:
        return "No figure was obtained yet."
    note = "\n\n¹ reported figure known from memory, not read in the source" if any("¹" in line["Reported"] for line in lines) else ""
    return _markdown(lines) + note


def demo_table(paper: str) -> str:
    """Figures of the embedded default, as Markdown; they stand beside no figure of the paper."""
    pool = records(paper, demo=True)
    rows = (tables(paper).get("demo") or {}).get("rows", [])
    lines = []
    for row in rows:
        found = _matching(row, pool)
        lines.append(
            {
                "Embedded default": row["what"],
                "Metric": row["metric"],
                "Expected": str(row.get("expected", "")),
                "Obtained": _obtained(found, row.get("digits")),
            }
        )
    return _markdown(lines) if lines else "This project has no embedded default."


def between_markers(text: str, content: str, start: str = START, end: str = END, *, path: str = "README.md") -> str:
    """`text` with what stands between the two markers replaced.

    Raises:
        ValueError: a marker is missing.
    """
    if start not in text or end not in text:
        raise ValueError(
            f"{path}: expected the markers {start} and {end}, found {'only one' if start in text or end in text else 'neither'}"
        )
    before, rest = text.split(start, 1)
    return f"{before}{start}\n\n{content}\n\n{end}{rest.split(end, 1)[1]}"


def index() -> list[dict[str, str]]:
    """The sixteen papers (projects/papers.yaml), each with its status: whether its project exists here."""
    here = papers()
    known = yaml.safe_load((PROJECTS / "papers.yaml").read_text())
    return [{**entry, "status": "runs" if entry["folder"] in here else "planned"} for entry in known]


def _index_table() -> str:
    lines = []
    for entry in index():
        name = f"[{entry['folder']}](projects/{entry['folder']}/README.md)" if entry["status"] == "runs" else f"`{entry['folder']}`"
        lines.append({"Project": name, "Paper": entry["title"], "In one sentence": entry["sentence"], "Status": entry["status"]})
    return _markdown(lines)


def _folded(paper: str) -> str:
    """Rows of a paper that were run, behind a line that opens on a click."""
    shown = table(paper, only_run=True)
    rows = max(sum(line.startswith("|") for line in shown.splitlines()) - 2, 0)
    return f"<details><summary>{paper}: {rows} row{'' if rows == 1 else 's'}</summary>\n\n{shown}\n\n</details>"


def rendered() -> dict[Path, str]:
    """What every README with rendered parts should hold now."""
    out: dict[Path, str] = {}
    for paper in papers():
        path = PROJECTS / paper / "README.md"
        out[path] = between_markers(path.read_text(), table(paper), path=str(path))
    path = ROOT / "README.md"
    text = between_markers(path.read_text(), _index_table(), "<!-- index:start -->", "<!-- index:end -->")
    obtained = "\n\n".join(_folded(paper) for paper in papers())
    out[path] = between_markers(text, obtained)
    return out


def write_tables() -> list[Path]:
    """Render the tables of every README; returns the files that changed."""
    changed = []
    for path, text in rendered().items():
        if path.read_text() != text:
            write_text(path, text)
            changed.append(path)
    return changed


# ---------------------------------------------------------------- the HTML report

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8882}
body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}
h1{margin-bottom:.2rem}h2{margin-top:3rem;border-bottom:1px solid var(--line)}
table{border-collapse:collapse;font-size:.9rem;margin:1rem 0;display:block;overflow-x:auto}
th,td{padding:.3rem .7rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}th{background:var(--soft)}
figure{margin:1rem 0}figcaption{font-size:.85rem;opacity:.75}img{max-width:100%;height:auto;background:#fff;border:1px solid var(--line)}
.curves{display:flex;flex-wrap:wrap;gap:1rem}.curves figure{margin:0}svg{background:var(--soft)}nav a{margin-right:1rem}
"""


def _html_table(markdown: str) -> str:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    if not lines:
        return f"<p>{html.escape(markdown)}</p>"
    cells = [[html.escape(cell.strip().replace("\\|", "|")) for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    head = "".join(f"<th>{cell}</th>" for cell in cells[0])
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells[2:])
    note = markdown.split("\n\n", 1)[1] if "\n\n" in markdown else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{html.escape(note)}</p>"


def _curve(path: Path, name: str) -> str:
    """Loss over steps of one metrics.jsonl as an inline SVG."""
    points = [
        (line["step"], line["loss"]) for line in map(json.loads, path.read_text().splitlines()) if math.isfinite(line.get("loss", math.nan))
    ]
    if len(points) < 2:
        return ""
    points = points[:: max(1, len(points) // 300)]
    (x0, x1), (y0, y1) = [(min(c), max(c)) for c in zip(*points, strict=True)]
    width, height, pad = 320, 160, 8
    scaled = " ".join(
        f"{pad + (width - 2 * pad) * (x - x0) / max(x1 - x0, 1e-9):.1f},{height - pad - (height - 2 * pad) * (y - y0) / max(y1 - y0, 1e-12):.1f}"
        for x, y in points
    )
    line = f'<polyline points="{scaled}" fill="none" stroke="currentColor" stroke-width="1.5"/>'
    caption = f"{html.escape(name)}: loss {points[0][1]:.4g} → {points[-1][1]:.4g} in {points[-1][0]} steps"
    return f'<figure><svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" aria-label="{caption}">{line}</svg><figcaption>{caption}</figcaption></figure>'


def _images(paths: Iterable[Path]) -> str:
    out = []
    for path in sorted(paths):
        data = base64.b64encode(path.read_bytes()).decode()
        name = html.escape(path.stem.replace("_", " "))
        out.append(f'<figure><img src="data:image/png;base64,{data}" alt="{name}"><figcaption>{name}</figcaption></figure>')
    return "".join(out)


def write_report(folder: Path | None = None) -> Path:
    """Write `report/index.html`: every project's tables, curves of the runs here and pictures, in one file without outside parts."""
    parts = []
    for paper in papers():
        title = html.escape(tables(paper).get("title", ""))
        curves = "".join(
            _curve(path, "/".join(path.parent.parts[-2:])) for path in sorted((ROOT / "runs" / paper).rglob("metrics.jsonl"))[:24]
        )
        pictures = _images(demo_folder(paper).glob("*.png")) + _images((PROJECTS / paper / "results").glob("*.png"))
        parts.append(
            f'<section id="{paper}"><h2>{paper}</h2><p>{title}</p><h3>Embedded default</h3>{_html_table(demo_table(paper))}'
            f"<h3>Reported and obtained</h3>{_html_table(table(paper))}"
            + (f'<h3>Curves</h3><div class="curves">{curves}</div>' if curves else "")
            + (f"<h3>Pictures</h3>{pictures}" if pictures else "")
            + "</section>"
        )
    navigation = "".join(f'<a href="#{paper}">{paper}</a>' for paper in papers())
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>contramask report</title><style>{_STYLE}</style></head>'
        f"<body><h1>contramask</h1><p>Rendered {date} at {_commit()} on {html.escape(device_name())}.</p><nav>{navigation}</nav>{''.join(parts)}</body></html>"
    )
    path = (folder or ROOT / "report") / "index.html"
    write_text(path, page)
    return path
