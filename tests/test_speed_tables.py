"""`benchmarks/speed_tables.py`: what README and docs say of speed is what the rows say."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from moe_backend.bench.report import Row

FILE = Path(__file__).parents[1] / "benchmarks" / "speed_tables.py"


@pytest.fixture
def tables():
    spec = importlib.util.spec_from_file_location("speed_tables", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(case="step-3.5-ep8", tokens=8, ours=40.0, rival=60.0):
    kernel = "hopper: Once(blocks=1)"
    return Row(
        case, tokens, "uniform", 25.0, ours, {"marlin": rival, "triton": 99.0}, kernel=kernel
    )


def test_what_is_committed_is_of_the_rows(tables, capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().err


def test_cells(tables):
    rows = [row(tokens=1), row(), row("minimax-m3", 1, 80.0)]
    assert tables.overview(rows).splitlines() == [
        "| layer | 1 token | 8 |",
        "| --- | --- | --- |",
        "| Step-3.5 FP8, EP8 | **1.50**, 40 µs, 1.60 | **1.50**, 40 µs, 1.60 |",
        "| MiniMax-M3 bf16, one rank | **0.75**, 80 µs, 3.20 | – |",
    ]
    named = [(row.case, row.tokens) for row in tables.in_order(rows[::-1])]
    step = "Step-3.5 FP8, EP8"
    assert named == [(step, 8), (step, 1), ("MiniMax-M3 bf16, one rank", 1)]


def test_means_name_the_rows_that_are_slower(tables):
    rows = [row(), row("deepseek-v4-flash-ep8", 8, 30.0), row("minimax-m3", 1, 80.0)]
    assert tables.means(rows) == (
        "In the geometric mean of these 3 cells 1.31 times as fast as the best rival, 1.50 times "
        "in Step-3.5's at EP8, 2.00 times in DeepSeek-V4-Flash's at EP8; slower in 1: "
        "MiniMax-M3 bf16, one rank at 1 (0.750, beside marlin)."
    )
    assert tables.means(rows[:2]).endswith("at EP8; slower in 0.")
    for others, wanted in (
        (("step-3.5-tp8-even",), "EP8 and TP8"),
        (("step-3.5-tp4-even", "step-3.5-tp8-even"), "EP8, TP8 and TP4"),
    ):
        text = tables.means(rows + [row(name) for name in others])
        assert f"times in Step-3.5's at {wanted}, " in text


def test_a_cell_that_was_measured_twice_is_told(tables):
    rows = [row(), row(tokens=1), row("minimax-m3"), replace(row(), cache="layers")]
    assert tables.once(rows, "written") == rows[:3]
    assert tables.once(rows, "layers") == rows[3:]
    with pytest.raises(ValueError, match="L2 written, measured twice: step-3.5-ep8 at 8; drop"):
        tables.once([*rows, row(ours=39.0)], "written")


def test_a_table_that_is_not_of_the_rows_is_told_and_written_anew(tables, tmp_path, monkeypatch):
    file = tmp_path / "page.md"
    file.write_text("before\n<!-- speed -->\nold\n<!-- end of speed -->\nafter\n")
    monkeypatch.setattr(tables, "blocks", lambda: {file: {"speed": "new \\1"}})
    assert tables.main(["--check"]) == 1
    assert "old" in file.read_text()
    assert tables.main([]) == 0
    wanted = "before\n<!-- speed -->\n\nnew \\1\n\n<!-- end of speed -->\nafter\n"
    assert file.read_text() == wanted
    assert tables.main(["--check"]) == 0


def test_markers_that_are_missing_or_twice(tables, tmp_path):
    for text, times in (("", 0), ("<!-- a -->\n\n<!-- end of a -->\n" * 2, 2)):
        with pytest.raises(ValueError, match=f"page.md: {times} blocks between the markers of `a`"):
            tables.replaced(text, "a", "new", tmp_path / "page.md")
