"""Tuned tables, their lookup, and the search that fills them, with a clock and a GPU of straw."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
import torch

pytest.importorskip("triton")

from moe_backend.activation import Activation
from moe_backend.bench import measure
from moe_backend.bench.shapes import SHAPES, Shape
from moe_backend.cli import main
from moe_backend.fused_moe import FusedMoE
from moe_backend.kernels.cuda import build as cuda_build
from moe_backend.kernels.hopper import choose as chooser
from moe_backend.kernels.hopper import kernel as hopper_kernel
from moe_backend.kernels.hopper import methods, table, tiles
from moe_backend.kernels.hopper.choose import choose
from moe_backend.kernels.hopper.methods import candidates, combined, from_data, sound, to_data
from moe_backend.kernels.hopper.table import Key, Row, Table, nearest, read, write
from moe_backend.kernels.hopper.tiles import (
    Few,
    Flow,
    Once,
    Pairs,
    Part,
    Tile,
    Tiles,
)
from moe_backend.kernels.reference import fused_experts
from moe_backend.kernels.registry import Selection
from moe_backend.tune import command, gpu, store
from moe_backend.tune.gpu import GpuRunner
from moe_backend.tune.loop import Checked, Lost, tune
from moe_backend.verify.problems import Case, build

GPU = "NVIDIA Straw 1"
EP8 = SHAPES["step-3.5-ep8"]
LAYER = EP8.layer()
KEY = Key.of(LAYER)
TUNED = Tiles(Tile(16, 32, 128, 4, 3, 2), Tile(16, 64, 32, 4, 3, 2))
OTHER = replace(TUNED, down=replace(TUNED.down, stages=2))
V4 = SHAPES["deepseek-v4-flash-ep8"].layer()
NAMES = ["step-3.5-ep8", "step-3.5-tp8-even", "deepseek-v4-flash-ep8", "minimax-m3-ep4"]


def row(tokens=64, choice=TUNED, **changes):
    usual = {"us": 9.0, "default_us": 10.0, "rel_l2": 0.01, "versions": {"triton": "3"}}
    return Row(**{"tokens": tokens, "choice": choice, "date": "2026-01-01", **usual, **changes})


def table_of(*rows):
    made = Table(GPU)
    for one in rows:
        made.put(KEY, one)
    return made


def without_cuda(patch):
    """Whatever is installed, nothing compiles CUDA C++: tiles are the default of most calls."""
    patch.setattr(cuda_build, "missing", lambda: "no compiler")


@pytest.fixture
def cuda(monkeypatch):
    """CUDA C++ is compiled here."""
    monkeypatch.setattr(cuda_build, "missing", lambda: None)


@pytest.fixture(autouse=True)
def folders(monkeypatch, tmp_path):
    """A GPU's name, an empty package and a folder of the user's; returns both."""
    torch.set_num_threads(1)
    without_cuda(monkeypatch)
    packaged, own = tmp_path / "packaged", tmp_path / "own"
    packaged.mkdir()
    own.mkdir()
    monkeypatch.setattr(table, "PACKAGED", packaged)
    monkeypatch.setenv("MOE_BACKEND_TUNED", str(own))
    chooser.forget()
    monkeypatch.setattr(chooser, "gpu_name", lambda: GPU)
    yield packaged, own
    monkeypatch.undo()
    chooser.forget()


def put(folder, made):
    write(folder / table.file_name(GPU), made)
    chooser._answers.clear()
    chooser._tables.cache_clear()


# --- Choices as data ------------------------------------------------------------------------------


def test_choices_survive_json():
    assert from_data(json.loads(json.dumps(to_data(TUNED)))) == TUNED
    assert to_data(TUNED)["method"] == "tiles"
    for choice in (Once(2), Flow(16, 2, 2, 6), Pairs(4)):
        assert from_data(json.loads(json.dumps(to_data(choice)))) == choice


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"method": "magic"},
            "method 'magic' is unknown; accepted: tiles, few, once",
        ),
        ({"down": {"m": 16}}, "choice.down.n is missing"),
        ({"down": 3}, "choice.down"),
        ({"depth": 3}, "depth"),
        ({"gate_up": {**to_data(TUNED)["gate_up"], "m": True}}, "gate_up.m: int expected, True"),
        ({"gate_up": {**to_data(TUNED)["gate_up"], "split": 1}}, "split: bool expected, 1 found"),
    ],
)
def test_what_is_no_choice_is_refused(change, message):
    with pytest.raises(ValueError, match="choice|method") as error:
        from_data({**to_data(TUNED), **change})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("gate_up", {"m": 8}), ("gate_up", {"n": 48}), ("gate_up", {"stages": 0}),
        ("gate_up", {"n": 256, "stages": 8}), ("gate_up", {"n": 256, "m": 256}),
        ("down", {"split": True}), ("down", {"k": 128}), ("down", {"warps": 5}),
    ],
)  # fmt: skip
def test_what_could_not_run_or_would_be_wrong_is_unsound(part, change):
    assert sound(LAYER, 8, TUNED)
    assert not sound(LAYER, 8, replace(TUNED, **{part: replace(getattr(TUNED, part), **change)}))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 8, 64, 256, 1024, 4096])
def test_candidates_are_few_and_sound_and_the_default_is_first(name, tokens):
    layer = SHAPES[name].layer()
    found = candidates(layer, tokens)
    assert found[0] == tiles.choose(layer, tokens)
    assert 10 <= len(found) <= 30
    assert len(set(found)) == len(found)
    assert all(sound(layer, tokens, c) for c in found)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 8, 64, 256, 1024, 4096])
def test_candidates_in_cuda_have_those_of_other_methods_beside_them(cuda, name, tokens):
    layer = SHAPES[name].layer()
    found = candidates(layer, tokens)
    assert found[0] == tiles.choose(layer, tokens)
    assert 2 <= len(found) <= 30
    assert len(set(found)) == len(found)
    assert all(sound(layer, tokens, c) for c in found)
    assert any(not isinstance(c, Once | Flow) for c in found)


def test_what_is_in_cuda_is_no_candidate_without_a_compiler():
    found = [c for tokens in (1, 8, 64, 1024) for c in candidates(LAYER, tokens)]
    assert not any(isinstance(c, Once | Flow) for c in found)
    methods.check(LAYER, 8, Once(1))
    assert not sound(LAYER, 8, Once(1))
    assert not sound(LAYER, 64, tiles.flow(LAYER, 8, 2, 2))


def test_candidates_are_a_step_away_unless_another_number_follows():
    found = candidates(LAYER, 256)
    for choice in found[1:]:
        if not isinstance(choice, Tiles):
            continue
        changed = methods.describe(choice, found[0]).split()
        assert len(changed) == 1 or any(c.startswith("down.k=") for c in changed)


def test_shapes_of_nvfp4s_items_are_candidates(cuda):
    """Two or four parts, which one step of one number does not turn into each other."""
    shapes = {(2, 1), (2, 2), (4, 1)}
    for tokens in (9, 64, 1024):
        found = [c for c in candidates(V4, tokens) if isinstance(c, Flow)]
        assert {(c.groups, c.blocks) for c in found} == shapes
        for choice in found:
            near = methods.neighbours(V4, tokens, choice)
            assert {(c.groups, c.blocks) for c in (choice, *near)} == shapes
    many = tiles.FLOW_MOST_SLOTS // V4.top_k + 1
    assert not sound(V4, many, found[0])


def test_the_other_method_is_a_candidate():
    few = tiles.choose(LAYER, 4)
    assert isinstance(few, Few)
    assert isinstance(tiles.choose(LAYER, 64), Tiles)
    assert few in candidates(LAYER, 16)
    assert any(isinstance(c, Tiles) for c in candidates(LAYER, 4))
    assert not any(isinstance(c, Few) for c in candidates(LAYER, 64))  # too many slots


def test_the_other_method_of_those_in_cuda(cuda):
    once, flow = tiles.choose(LAYER, 8), tiles.choose(LAYER, 64)
    assert isinstance(once, Once)
    assert isinstance(flow, Flow)
    assert flow in candidates(LAYER, 16)
    assert any(isinstance(c, Once) for c in candidates(LAYER, 4))
    assert not any(isinstance(c, Once) for c in candidates(LAYER, 64))  # too many tokens
    assert any(isinstance(c, Flow) for c in candidates(LAYER, 8))
    assert any(isinstance(c, Tiles) for c in candidates(LAYER, 64))
    assert any(isinstance(c, Pairs) for c in candidates(LAYER, 1024))
    assert any(isinstance(c, Tiles) for c in candidates(LAYER, 1024))
    assert any(isinstance(c, Few) for c in candidates(LAYER, 8))


@pytest.mark.parametrize(
    "change", [{"gate_up": Part(3, 4, 1)}, {"down": Part(32, 9, 1)}, {"per_sm": 0}, {"repeat": 17}]
)
def test_unsound_numbers_for_few_tokens(change):
    choice = tiles.few(LAYER, 8)
    assert sound(LAYER, 8, choice)
    assert not sound(LAYER, 64, choice)
    assert not sound(LAYER, 8, replace(choice, **change))


def test_a_row_for_another_installation_is_kept_quietly(folders, caplog, monkeypatch):
    put(folders[1], table_of(row(4096, Pairs(3))))
    for missing in ("no compiler", None):
        monkeypatch.setattr(cuda_build, "missing", lambda missing=missing: missing)
        chooser._answers.clear()
        assert (choose(LAYER, 4000) == Pairs(3)) == (missing is None)
    assert caplog.messages == []


def test_a_method_that_stops_being_sound_ends_its_rows_reach(folders, monkeypatch):
    put(folders[1], table_of(row(64)))
    check = methods._TILES.check

    def up_to_100(layer, tokens, choice):
        if tokens > 100:
            raise ValueError("too many")
        check(layer, tokens, choice)

    monkeypatch.setitem(methods.METHODS, "tiles", replace(methods._TILES, check=up_to_100))
    assert choose(LAYER, 100) == TUNED
    assert choose(LAYER, 101) == tiles.choose(LAYER, 101)


def test_better_choices_are_combined():
    base = tiles.choose(LAYER, 256)
    one = replace(base, gate_up=replace(base.gate_up, stages=4))
    two = replace(base, down=replace(base.down, per_sm=2))
    assert combined(LAYER, 256, base, [one, two]) == [replace(one, down=two.down)]
    assert combined(LAYER, 256, base, [one]) == []


# --- Lookup ---------------------------------------------------------------------------------------


def test_without_a_table_the_default_runs():
    assert choose(LAYER, 64) == tiles.choose(LAYER, 64)


def test_the_nearest_row_by_ratio_counts_within_reach():
    rows = [row(8, TUNED), row(32, OTHER)]
    found = {t: nearest(rows, t) for t in (3, 4, 8, 15, 16, 17, 32, 64, 65)}
    assert [found[t] and found[t].tokens for t in found] == [
        None, 8, 8, 8, 8, 32, 32, 32, None,
    ]  # fmt: skip


def test_a_row_runs_calls_near_it(folders):
    put(folders[1], table_of(row(64), row(512, None)))
    assert choose(LAYER, 0) == tiles.choose(LAYER, 0)  # near no row
    assert choose(LAYER, 64) == choose(LAYER, 100) == TUNED
    assert choose(LAYER, 512) == tiles.choose(LAYER, 512)  # measured: the default is the fastest
    assert choose(LAYER, 8) == tiles.choose(LAYER, 8)
    assert choose(replace(LAYER, top_k=4), 64) != TUNED
    assert choose(replace(LAYER, device="cpu"), 64) != TUNED
    step = Activation.from_name("swiglustep")
    assert choose(replace(LAYER, activation=step), 64) == TUNED


def test_the_users_rows_win(folders):
    packaged, own = folders
    put(packaged, table_of(row(64, OTHER), row(512, OTHER)))
    assert choose(LAYER, 64) == OTHER
    put(own, table_of(row(64)))
    assert choose(LAYER, 64) == TUNED
    assert choose(LAYER, 512) == OTHER
    assert chooser.tuned_rows(LAYER) == 2


def test_off_reads_nothing(folders, monkeypatch):
    for folder in folders:
        put(folder, table_of(row(64)))
    monkeypatch.setenv("MOE_BACKEND_TUNED", "off")
    assert choose(LAYER, 64) == tiles.choose(LAYER, 64)


def test_another_gpu_has_no_rows(folders, monkeypatch):
    put(folders[1], table_of(row(64)))
    for name in ("NVIDIA H999", None):
        monkeypatch.setattr(chooser, "gpu_name", lambda name=name: name)
        chooser._answers.clear()
        assert choose(LAYER, 64) == tiles.choose(LAYER, 64)


def test_the_default_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("MOE_BACKEND_TUNED")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert table.user_folder() == tmp_path / "moe-backend" / "tuned"
    assert table.file_name("NVIDIA H200") == "NVIDIA_H200.json"


def test_answers_are_kept(folders, monkeypatch):
    put(folders[1], table_of(row(64)))
    assert choose(LAYER, 64) == TUNED
    monkeypatch.setattr(chooser, "_choose", None)  # a second search would fail
    assert choose(LAYER, 64) == TUNED
    with pytest.raises(TypeError):
        choose(LAYER, 65)


def test_activation_groups_are_those_of_the_choice(folders):
    put(folders[1], table_of(row(64)))
    kernel = hopper_kernel.HopperKernel()
    assert kernel.activation_groups(LAYER, 64) == (128, 32)
    assert kernel.activation_groups(LAYER, 4096) == tiles.choose(LAYER, 4096).activation_groups(
        LAYER
    )
    assert "1 tuned rows" in kernel.preference(LAYER)


def test_the_log_names_every_group_of_hidden_columns(folders):
    problem = build(Case("fp8_block", LAYER.activation))
    layer = replace(problem.layer, device="cuda")
    fused = FusedMoE(problem.layer, problem.weights, kernel="reference")
    fused.layer, fused.selection = layer, Selection(hopper_kernel.HopperKernel(), "asked for")
    before = fused.describe()
    assert "1x32" not in before
    made = Table(GPU)
    made.put(Key.of(layer), row(512))
    put(folders[1], made)
    assert "1x32" in fused.describe()


BAD_ROWS = [
    {"tokens": 0}, {"tokens": "64"}, {"us": "fast"}, {"choice": {"method": "magic"}}, {"choice": 3},
    {"choice": {**to_data(TUNED), "gate_up": {**to_data(TUNED)["gate_up"], "k": 256}}}, {"more": 1},
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_ROWS, ids=str)
def test_a_bad_row_is_left_out_with_a_warning_that_names_it(folders, caplog, bad):
    data = table_of(row(64), row(512, OTHER)).to_data()
    data["layers"][0]["rows"][1] |= bad
    file = folders[1] / table.file_name(GPU)
    file.write_text(json.dumps(data))
    with caplog.at_level(logging.WARNING, "moe_backend"):
        assert choose(LAYER, 64) == TUNED
        assert choose(LAYER, 512) == tiles.choose(LAYER, 512)
    assert len(caplog.messages) == 1
    assert f"{file}: layer 0, row 1 is not used: " in caplog.messages[0]


@pytest.mark.parametrize(
    "content",
    [
        b"{", b"\xff", b"[]", b'{"version": 1}', b'{"version": 1, "gpu": "NVIDIA H999"}',
        json.dumps({"version": 2, "gpu": GPU, "layers": []}).encode(),
        json.dumps({"version": 1, "gpu": GPU, "layers": 3}).encode(),
        json.dumps({"version": 1, "gpu": GPU, "layers": [{"layer": {}, "rows": []}]}).encode(),
        json.dumps({"version": 1, "gpu": GPU, "layers": [7]}).encode(),
    ],
)  # fmt: skip
def test_a_bad_file_is_not_used_with_a_warning(folders, caplog, content):
    file = folders[1] / table.file_name(GPU)
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING, "moe_backend"):
        assert choose(LAYER, 64) == tiles.choose(LAYER, 64)
        choose(LAYER, 65)
    assert len(caplog.messages) == 1
    assert str(file) in caplog.messages[0]


def test_a_table_survives_the_file(tmp_path):
    made = table_of(row(64), row(8, None))
    shard = SHAPES["step-3.5-tp8-even"].layer()
    made.put(Key.of(shard), row(64, tiles.choose(shard, 64)))
    write(tmp_path / "a" / "t.json", made)
    assert read(tmp_path / "a" / "t.json", GPU) == made


def test_a_write_that_fails_leaves_the_file(tmp_path, monkeypatch):
    file = tmp_path / "t.json"
    write(file, table_of(row(64)))
    before = file.read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(table.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write(file, table_of(row(8)))
    assert file.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir() if f.is_file()] == ["t.json"]


# --- The search -----------------------------------------------------------------------------------


class Straw:
    """A runner whose choices take as long as `us` says and are wrong where `faults` says."""

    def __init__(self, us, faults=(), raises=()):
        self.us, self.faults, self.raises = us, dict(faults), dict(raises)
        self.compiled, self.checked, self.timed = [], [], []

    def compile(self, choices):
        self.compiled += choices

    def check(self, choice):
        assert choice in self.compiled
        self.checked.append(choice)
        if choice in self.raises:
            raise self.raises[choice]
        return Checked(0.004, self.faults.get(choice))

    def time(self, choice):
        assert choice in self.checked
        self.timed.append(choice)
        found = self.us(choice)
        return found.pop(0) if isinstance(found, list) else found


with pytest.MonkeyPatch.context() as patch:
    without_cuda(patch)
    DEFAULT, *REST = candidates(LAYER, 256)


def found_with(runner):
    return tune(runner, LAYER, 256, {"triton": "3"})


def faster(*choices, us=50.0):
    return lambda choice: us if choice in choices else 100.0


def test_the_fastest_right_choice_is_kept():
    outcome = found_with(Straw(faster(REST[3])))
    assert outcome.row.choice == REST[3]
    assert (outcome.row.us, outcome.row.default_us) == (50.0, 100.0)
    assert outcome.tried == len(REST) + 1
    assert outcome.rejected == {}


def test_what_improves_is_tried_together():
    def us(choice):
        if not isinstance(choice, Tiles):
            return 200.0
        return 100.0 - 10 * (choice.gate_up.stages == 5) - 10 * (choice.down.per_sm == 4)

    row = found_with(Straw(us)).row
    assert (row.choice.gate_up.stages, row.choice.down.per_sm, row.us) == (5, 4, 80.0)


def test_where_another_method_wins_its_neighbours_are_tried():
    first = candidates(LAYER, 8)
    start = next(c for c in first if isinstance(c, Few))
    best = methods.neighbours(LAYER, 8, start)[0]
    assert best not in first
    times = {start: 80.0, best: 60.0}
    runner = Straw(lambda c: times.get(c, 100.0))
    assert tune(runner, LAYER, 8, {"triton": "3"}).row.choice == best


def test_a_wrong_choice_is_neither_timed_nor_kept():
    runner = Straw(faster(REST[3], us=10.0), faults={REST[3]: "wrong: relative L2 0.5"})
    outcome = found_with(runner)
    assert outcome.row.choice is None
    assert outcome.rejected == {REST[3]: "wrong: relative L2 0.5"}
    assert REST[3] not in runner.timed


def test_a_choice_that_raises_is_rejected_with_the_reason():
    outcome = found_with(Straw(faster(REST[3]), raises={REST[4]: RuntimeError("out of\n shared")}))
    assert outcome.row.choice == REST[3]
    assert outcome.rejected == {REST[4]: "RuntimeError: out of shared"}


def test_a_wrong_default_leaves_no_row():
    outcome = found_with(Straw(faster(REST[3]), faults={DEFAULT: "repeated runs differ"}))
    assert outcome.row is None
    assert outcome.rejected == {DEFAULT: "repeated runs differ"}


def test_a_lost_gpu_ends_the_search():
    with pytest.raises(Lost, match=r"gone, in tiles gate_up\.m=.*, 256 tokens"):
        found_with(Straw(faster(), raises={REST[2]: Lost("gone")}))


@pytest.mark.parametrize(
    "again", [[50.0, 99.0, 99.0, 99.0], [97.0, 99.0, 99.0, 90.0]], ids=["once", "median"]
)
def test_a_choice_must_be_faster_twice(again):
    times = list(again)
    outcome = found_with(Straw(lambda c: times if c == REST[3] else 100.0))
    assert outcome.row.choice is None
    assert outcome.row.us == outcome.row.default_us == 100.0


def test_noise_is_no_reason():
    assert found_with(Straw(faster(REST[3], us=98.5))).row.choice is None
    assert found_with(Straw(faster(REST[3], us=97.5))).row.choice == REST[3]


# --- The command ----------------------------------------------------------------------------------


def tuned_file(file, runners, tokens=(8, 256), again=False):
    return command.tune_shapes([EP8], list(tokens), file, GPU, 1, again, runners)


def straws(made, stop_at=None):
    def runners(shape, jobs):
        def of(tokens):
            if tokens == stop_at:
                raise KeyboardInterrupt
            made.append(tokens)
            return Straw(
                lambda choice: (
                    100.0 - 5 * choice.gate_up.stages if isinstance(choice, Tiles) else 99.0
                )
            )

        return of

    return runners


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, capsys):
    file, made = tmp_path / "t.json", []
    assert tuned_file(file, straws(made, stop_at=256), (8, 256, 1024)) == 130
    assert list(read(file, GPU).rows[KEY]) == [8]
    assert tuned_file(file, straws(made), (8, 256, 1024)) == 0
    assert made == [8, 256, 1024]
    assert list(read(file, GPU).rows[KEY]) == [8, 256, 1024]
    shown = capsys.readouterr()
    assert "the same command goes on" in shown.err
    assert "1 rows are in" in shown.err
    assert tuned_file(file, straws(made), (8, 256, 1024)) == 0
    assert made == [8, 256, 1024]
    assert tuned_file(file, straws(made), (8,), again=True) == 0
    assert made == [8, 256, 1024, 8]


def test_an_interruption_in_the_middle_of_a_row_keeps_the_others(tmp_path):
    class Stopped(Straw):
        def time(self, choice):
            if len(self.timed) == 5:
                raise KeyboardInterrupt
            return super().time(choice)

    file = tmp_path / "t.json"
    assert tuned_file(file, straws([]), (8,)) == 0
    before = file.read_bytes()
    assert tuned_file(file, lambda *_: lambda tokens: Stopped(faster()), (8, 256)) == 130
    assert file.read_bytes() == before


def test_what_was_tuned_is_what_runs(folders):
    assert tuned_file(folders[1] / table.file_name(GPU), straws([]), (256,)) == 0
    chooser._answers.clear()
    chooser._tables.cache_clear()
    assert choose(LAYER, 256).gate_up.stages > tiles.choose(LAYER, 256).gate_up.stages


def test_rejected_choices_are_told_with_the_reason(tmp_path, capsys):
    runner = Straw(faster(REST[0]), faults={REST[1]: "wrong: relative L2 0.5"})
    assert tuned_file(tmp_path / "t.json", lambda *_: lambda tokens: runner, (256,)) == 0
    shown = capsys.readouterr().out
    what = methods.describe(REST[1], DEFAULT)
    assert f"rejected: step-3.5-ep8, 256 tokens, {what}: wrong: relative L2 0.5" in shown
    assert "2.00" in shown


def test_a_table_elsewhere_is_told_how_to_be_read(folders, tmp_path, capsys):
    tuned_file(folders[1] / table.file_name(GPU), straws([]), (256,))
    assert "MOE_BACKEND_TUNED" not in capsys.readouterr().err
    tuned_file(tmp_path / "t.json", straws([]), (256,))
    shown = " ".join(capsys.readouterr().err.split())
    assert "named NVIDIA_Straw_1.json, in the folder that MOE_BACKEND_TUNED names" in shown


def test_a_wrong_default_is_a_failure(tmp_path, capsys):
    runner = Straw(faster(), faults={DEFAULT: "wrong: not finite"})
    assert tuned_file(tmp_path / "t.json", lambda *_: lambda tokens: runner, (256,)) == 1
    assert not (tmp_path / "t.json").exists()
    assert (
        "rejected: step-3.5-ep8, 256 tokens, default: wrong: not finite" in capsys.readouterr().out
    )


def test_a_file_that_is_no_table_is_not_written_over(tmp_path):
    file = tmp_path / "t.json"
    for content in ("{}", "my notes", json.dumps(Table("NVIDIA H999").to_data())):
        file.write_text(content)
        with pytest.raises(ValueError, match="would be written over"):
            tuned_file(file, straws([]))
        assert file.read_text() == content


def test_two_runs_keep_each_others_rows(tmp_path):
    """The second one begins and ends within the first one's."""
    file = tmp_path / "t.json"

    def runners(shape, jobs):
        def of(tokens):
            if tokens == 256:
                assert tuned_file(file, straws([]), (64, 512)) == 0
            return Straw(faster())

        return of

    assert tuned_file(file, runners, (8, 256, 1024)) == 0
    assert list(read(file, GPU).rows[KEY]) == [8, 64, 256, 512, 1024]


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
import test_tune as t
from moe_backend.tune import store
for tokens in range(int(sys.argv[2]), int(sys.argv[2]) + 40):
    store.add(Path(sys.argv[1]), t.table_of(t.row(tokens)))
"""


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    root = Path(__file__).parent.parent
    file = tmp_path / "t.json"
    starts = (1, 101, 201)
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(file), str(start)], cwd=root)
        for start in starts
    ]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    rows = read(file, GPU).rows[KEY]
    assert sorted(rows) == [start + i for start in starts for i in range(40)]
    assert sorted(f.name for f in tmp_path.iterdir() if f.is_file()) == [".t.json.lock", "t.json"]


def test_rows_that_this_version_cannot_use_stay(tmp_path):
    file = tmp_path / "t.json"
    data = table_of(row(8), row(256), row(1024)).to_data()
    later = {"method": "magic", "depth": 3}
    data["layers"][0]["rows"][0]["choice"] = data["layers"][0]["rows"][1]["choice"] = later
    others = [7, {"layer": {"new": 1}, "rows": [{"tokens": 8}]}]
    data["layers"] += others
    data["note"] = "mine"
    file.write_text(json.dumps(data))
    assert tuned_file(file, straws([]), (256, 512)) == 0
    found = json.loads(file.read_text())
    assert found["note"] == "mine"
    assert found["layers"][1:] == others
    rows = found["layers"][0]["rows"]
    assert [r["tokens"] for r in rows] == [8, 256, 512, 1024]
    assert [r["choice"] == later for r in rows] == [True, False, False, False]


def test_of_two_entries_with_one_key_the_last_gets_the_row(tmp_path):
    file = tmp_path / "t.json"
    data = table_of(row(8), row(64, OTHER)).to_data()
    data["layers"].append(table_of(row(64, OTHER)).to_data()["layers"][0])
    file.write_text(json.dumps(data))
    assert store.add(file, table_of(row(64), row(16))) == 3
    layers = json.loads(file.read_text())["layers"]
    assert [[r["tokens"] for r in layer["rows"]] for layer in layers] == [[8], [16, 64]]
    assert read(file, GPU).rows[KEY] == {t: row(t) for t in (8, 16, 64)}


SIZES = "--format fp8_block --experts 288 --local 36 --top-k 8 --hidden 4096 --intermediate 1280"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "give --model PATH, --shape NAME, or all sizes (--format, --experts, ...)\n"),
        (
            f"--shape step-3.5-ep8 {SIZES}",
            "or all sizes (--format, --experts, ...), and only one of these",
        ),
        ("--format bf16 --experts 8", "--top-k, --hidden, --intermediate must be given"),
        (f"{SIZES} --tp 2", "go with --model"),
        (f"{SIZES} --tokens 100000", "slices of 16384"),
        ("--format bf16 --experts 8 --top-k 9 --hidden 64 --intermediate 64", "at most --experts"),
        ("--format bf16 --experts 8 --top-k 2 --hidden 60 --intermediate 64", "multiple of 8"),
        (SIZES, "torch sees no GPU"),
        # The default token counts are those that one call can have: here 7,488.
        (SIZES.replace("--top-k 8 --hidden 4096", "--top-k 10 --hidden 7168"), "torch sees no GPU"),
    ],
)
def test_options_that_do_not_fit_are_told(words, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", *words.split()]) == 1
    assert message in capsys.readouterr().err


def parsed(words):
    import argparse

    parser = argparse.ArgumentParser()
    command.add_tune_arguments(parser)
    return command.shapes_of(parser.parse_args(words.split()))


def test_sizes_are_a_layer():
    assert Key.of(parsed(SIZES)[0].layer()) == KEY
    words = SIZES.replace("--local 36", "").replace("1280", "160")
    (shape,) = parsed(f"{words} --w13-block 32x128 --w2-block 128x32")
    assert Key.of(shape.layer()) == Key.of(SHAPES["step-3.5-tp8-even"].layer())


def test_expert_parallel_as_vllm_means_it(monkeypatch):
    asked = []
    monkeypatch.setattr(command, "shape_of", lambda *given: asked.append(given) or EP8)
    parsed("--model m --tp 8")
    parsed("--model m --tp 8 --enable-expert-parallel")
    parsed("--model m --ep 4")
    assert asked == [("m", 8, 1), ("m", 1, 8), ("m", 1, 4)]


# --- The gate, with plain torch in the place of the GPU's kernels --------------------------------

SMALL = Shape("small", "bf16", 4, 4, 2, 64, 64)
with pytest.MonkeyPatch.context() as patch:
    without_cuda(patch)
    SMALL_DEFAULT, CHANGED = candidates(SMALL.layer(), 8)[:2]


@pytest.fixture
def on_cpu(monkeypatch):
    """A runner whose choices compute with plain torch; `CHANGED`'s output goes through `spoil`."""
    from types import SimpleNamespace

    state = SimpleNamespace(spoil=lambda out: out)

    def run(layer, tensors, x, topk_weights, topk_ids, expert_map, choice):
        weights = state.weights
        out = fused_experts(x, weights, topk_weights, topk_ids, layer.activation, expert_map)
        return state.spoil(out) if choice == CHANGED else out

    def capture(call, args):
        out = call(*args).clone()
        return lambda: out.copy_(call(*args)), out

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "compile_variants", lambda calls, *_: [call() for call in calls])
    monkeypatch.setattr(measure, "capture", capture)
    monkeypatch.setattr(measure, "microseconds", lambda *_: 7.0)
    monkeypatch.setattr(gpu, "_still_there", lambda: None)
    torch.manual_seed(0)
    state.weights = SMALL.weights("cpu")
    state.runner = GpuRunner(SMALL, state.weights, 8, 1)
    return state


def test_a_right_output_passes(on_cpu):
    assert on_cpu.runner.check(CHANGED).fault is None
    assert on_cpu.runner.check(CHANGED).rel_l2 < 4e-3
    assert on_cpu.runner.time(CHANGED) == 7.0


def one_token_wrong(out):
    return torch.cat((out[:-1], 1.5 * out[-1:]))


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (one_token_wrong, "wrong: relative L2"),
        (lambda out: out * 1.02, "wrong: relative L2"),
        (lambda out: out * float("inf"), "wrong: not finite"),
        (lambda out: out + torch.rand_like(out) * 8e-3 * out, "repeated runs differ"),
    ],
)
def test_the_gate_rejects(on_cpu, spoil, fault):
    on_cpu.spoil = spoil
    assert on_cpu.runner.check(SMALL_DEFAULT).fault is None
    assert on_cpu.runner.check(CHANGED).fault.startswith(fault)


def test_the_whole_search_leaves_a_wrong_kernel_out(on_cpu, monkeypatch):
    on_cpu.spoil = one_token_wrong
    monkeypatch.setattr(
        on_cpu.runner, "time", lambda choice: 1.0 if choice == CHANGED else 100.0, raising=True
    )
    outcome = tune(on_cpu.runner, SMALL.layer(), 8, {})
    assert outcome.row.choice is None
    assert list(outcome.rejected) == [CHANGED]
    on_cpu.spoil = lambda out: out
    assert tune(on_cpu.runner, SMALL.layer(), 8, {}).row.choice == CHANGED


def test_a_kernel_that_raises_is_met_in_the_check(on_cpu):
    def fail(out):
        raise RuntimeError("does not compile")

    on_cpu.spoil = fail
    on_cpu.runner.compile([CHANGED, SMALL_DEFAULT])
    with pytest.raises(RuntimeError, match="does not compile"):
        on_cpu.runner.check(CHANGED)


def test_fp8_is_compared_with_the_same_quantisation():
    shape = Shape("fp8", "fp8_block", 4, 4, 2, 128, 128, (128, 128), (128, 128))
    runner = GpuRunner(shape, shape.weights("cpu"), 8, 1)
    exact, coarse, fine = (runner.expected(g) for g in (None, (128, 128), (128, 32)))
    errors = [((e - exact).norm() / exact.norm()).item() for e in (coarse, fine)]
    assert 0.005 < errors[1] < 0.1
    assert not torch.equal(coarse, fine)


# --- The package ----------------------------------------------------------------------------------


def test_every_table_in_the_package_is_sound(monkeypatch, caplog):
    monkeypatch.undo()
    files = sorted(table.PACKAGED.glob("*.json"))
    for file in files:
        data = json.loads(file.read_text())
        with caplog.at_level(logging.WARNING, "moe_backend"):
            made = read(file, data["gpu"])
        assert file.name == table.file_name(data["gpu"])
        assert caplog.messages == []
        assert json.loads(json.dumps(made.to_data())) == data  # rows that read dropped are missed


def test_doctor_names_the_tables_in_use(monkeypatch, tmp_path):
    from moe_backend import doctor

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor._tables() == "none, as there is no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    monkeypatch.setattr(table, "PACKAGED", tmp_path / "none")
    monkeypatch.setenv("MOE_BACKEND_TUNED", str(tmp_path))
    assert doctor._tables() == f"none for {GPU}"
    file = tmp_path / table.file_name(GPU)
    write(file, table_of(row(64)))
    assert doctor._tables() == f"{file} (1 rows)"


@pytest.mark.slow
def test_a_wheel_has_the_tables_and_sources(tmp_path):
    root = Path(__file__).parents[1]
    source = tmp_path / "source"
    copytree(root / "moe_backend", source / "moe_backend")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((root / name).read_bytes())
    folder = source / "moe_backend" / "kernels" / "hopper" / "tuned"
    folder.mkdir(exist_ok=True)
    write(folder / table.file_name(GPU), table_of(row(64)))
    build = "import setuptools.build_meta as b; print(b.build_wheel('../wheel'))"
    (tmp_path / "wheel").mkdir()
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    packed = zipfile.ZipFile(wheel).namelist()
    tables = {f"moe_backend/kernels/hopper/tuned/{f.name}" for f in folder.glob("*.json")}
    assert tables
    assert tables <= set(packed)
    sources = (root / "moe_backend/kernels/hopper/cuda").iterdir()  # what NVRTC compiles
    assert {str(f.relative_to(root)) for f in sources} <= set(packed)
