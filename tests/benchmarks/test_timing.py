"""What the benchmarks compare is the same step, and the switch for kernels reaches them. No time is asserted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks import __main__ as bench
from benchmarks import graphmae_step, readme, regularized_ae_step, steps
from benchmarks.timing import Built, Feed, fed, held, interleaved, kernels_off
from common.contrastive import symmetric_info_nce
from common.kernels import pair_lse, points


@pytest.mark.parametrize("name", list(regularized_ae_step.configurations()))
def test_forms_of_a_regularised_step_give_the_same_numbers(name: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(regularized_ae_step, "BATCH", 50)
    ours, naive = (make().step() for make in regularized_ae_step.configurations()[name].values())
    torch.testing.assert_close(ours, naive, rtol=1e-7, atol=1e-9)


def test_forms_of_a_graph_step_have_the_same_parameters() -> None:
    counts = {form: make().parameters for form, make in graphmae_step.configurations()["graph"].items()}
    assert len(set(counts.values())) == 1


def test_a_switched_off_kernel_takes_the_definition(monkeypatch: Any) -> None:
    taken: list[str] = []
    original = pair_lse.reference
    monkeypatch.setattr(pair_lse, "reference", lambda *args: taken.append("plain") or original(*args))
    rows = F.normalize(torch.randn(1100, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    fused = symmetric_info_nce(rows, rows.flip(0), 5.0)
    assert taken == []
    with kernels_off():
        plain = symmetric_info_nce(rows, rows.flip(0), 5.0)
        assert points.choose(rows, True) == "plain"
    assert taken == ["plain"]
    torch.testing.assert_close(fused, plain)


def test_lines_of_a_configuration() -> None:
    calls = {"ours": 0, "plain": 0}

    def make(form: str) -> Built:
        def step() -> torch.Tensor:
            calls[form] += 1
            return torch.zeros(2**18).add(1)

        return Built(step, parameters=7, calls=2)

    lines = interleaved({"toy": {form: lambda form=form: make(form) for form in calls}}, kernels=["toy"], rounds=3, warm_up=1)
    assert [line["form"] for line in lines] == ["ours", "plain", "ours, kernels off"]
    assert calls == {"ours": 2 * 5, "plain": 5}  # warm-up, three rounds and the memory; the switched form runs ours too
    assert lines[0]["times_of_first_form"] == 1.0
    assert {line["peak_memory_mib"] for line in lines} == {2.0}
    assert lines[0]["parameters"] == 7


def test_held_memory_is_the_most_at_once() -> None:
    assert held(lambda: [torch.zeros(2**10) for _ in range(3)].pop()) == 3 * 2**12
    assert held(lambda: torch.zeros(2**10).sum() + torch.zeros(2**10).sum()) < 2 * 2**12


def test_a_feed_is_iterated_again_when_it_ends() -> None:
    (line,) = fed({"two batches": Feed([0, 1], samples=10)}, seconds=0.01)
    assert line["samples_per_second"] > 20


def test_every_paper_with_a_step_names_its_forms() -> None:
    assert {"graphmae", "regularized_ae"} <= set(steps.papers())
    table = bench.render("loaders", {"device": "D", "date": "T", "torch": "2"}, [{"a_b": 1}, {"a_b": 2, "c": 3}])
    assert "| a b | c |\n|---|---|\n| 1 |  |\n| 2 | 3 |\n" in table


def test_the_readme_shows_the_records() -> None:
    (shown,) = readme.BLOCK.findall(readme.README.read_text())
    assert shown == readme.render(), "run `make tables`"
    assert "times faster than eager" in shown


def test_ratios_are_those_of_the_record() -> None:
    def line(variant: str, ratio: float, held: int) -> dict[str, Any]:
        return {"case": "c", "what": "w", "variant": variant, "ratio": {"p50": ratio}, "times_of_first": "eager", "peak_bytes": held}

    cases = [line("eager", 1.0, 200), line("torch.compile", 2.0, 100), line("ours, plain", 0.9, 300), line("ours, tiled", 3.0, 10)]
    assert readme.kernel_rows(cases) == [["c", "w", "3.0", "1.5", "5 %"]]
