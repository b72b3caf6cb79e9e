"""`moe-backend bench` as far as it goes without a GPU."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from dataclasses import replace
from itertools import product

import pytest
import torch

from moe_backend.bench import command, measure, report, run
from moe_backend.bench.checkpoint import shape_of
from moe_backend.bench.floor import Rates, floor_us
from moe_backend.bench.inputs import make_inputs, route
from moe_backend.bench.plot import lines_of
from moe_backend.bench.report import Row
from moe_backend.bench.shapes import SHAPES, USUAL, Shape
from moe_backend.checkpoint.reader import CheckpointError
from moe_backend.cli import main
from moe_backend.engines import vllm_rivals, vllm_triton_tuning
from moe_backend.engines.vllm_rivals import Missing, Rival
from moe_backend.formats import Fp8BlockWeights
from moe_backend.kernels.reference import fused_experts

SMALL = Shape("small", "fp8_block", 8, 8, 2, 128, 64, (32, 32), (32, 32), (1, 5))
H200 = Rates(4.3e12, 1583e12, 790e12)


def call_of(weights, shape=SMALL):
    """The reference as a backend."""

    def call(x, topk_weights, topk_ids, expert_map):
        activation = shape.layer().activation
        return fused_experts(x, weights, topk_weights, topk_ids, activation, expert_map)

    return call


@pytest.fixture
def on_cpu(monkeypatch):
    """Calls are made and not captured; a timed one takes 7 µs. Returns what L2 held before each."""
    timed = []

    def capture(call, args):
        out = call(*args)
        return lambda: out.copy_(call(*args)), out

    def microseconds(replay, milliseconds=60, cache="written"):
        timed.append(cache)
        return 7.0

    monkeypatch.setattr(measure, "capture", capture)
    monkeypatch.setattr(measure, "microseconds", microseconds)
    return timed


# --- Shapes ---------------------------------------------------------------------------------------


def test_a_tp8_shard_of_step_is_what_the_layout_says():
    from moe_backend.layout.shards import plan_tp

    even = plan_tp("fp8_block", 4096, 1280, 8, (128, 128))
    padded = plan_tp("fp8_block", 4096, 1280, 8, (128, 128), whole_blocks_of=128)
    shape = SHAPES["step-3.5-tp8-even"]
    assert (shape.intermediate, shape.w13_block, shape.w2_block) == (
        even.rows, even.w13_block, even.w2_block,
    )  # fmt: skip
    assert shape.rivals_of.intermediate == padded.rows == 256
    assert shape.rivals_of == SHAPES["step-3.5-tp8-padded"]


def test_the_usual_shapes_have_names_and_all_have_distinct_ones():
    assert set(USUAL) <= set(SHAPES)
    assert all(name == shape.name for name, shape in SHAPES.items())
    assert {s.format for s in SHAPES.values()} == {"fp8_block", "nvfp4", "bf16"}


def test_other_token_counts_go_to_the_padded_layer_too():
    shape = SHAPES["step-3.5-tp8-even"].at([3])
    assert shape.tokens == shape.rivals_of.tokens == (3,)


@pytest.mark.parametrize("format_name", ["fp8_block", "nvfp4", "bf16"])
def test_weights_are_valid(format_name):
    blocks = (32, 32) if format_name == "fp8_block" else None
    shape = replace(SMALL, format=format_name, w13_block=blocks, w2_block=blocks)
    weights = shape.weights("cpu")
    weights.validate()
    assert weights.name == format_name
    assert weights.intermediate_size == 64


def test_a_shard_off_the_grid_has_the_scales_of_whole_blocks():
    """Rank 1's 160 columns from 160 on: 96 of the block from 128 on, 64 of the next."""
    weights = replace(SHAPES["step-3.5-tp8-even"], local=2).weights("cpu")
    gate, w2 = weights.w13_scale[:, :5], weights.w2_scale
    for scale in (gate, w2.transpose(1, 2)):
        assert torch.equal(scale[:, :3], scale[:, :1].expand(-1, 3, -1))
        assert torch.equal(scale[:, 3], scale[:, 4])
        assert not (scale[:, 2] == scale[:, 3]).any()


def test_a_checkpoints_shape(tiny):
    shape = shape_of(tiny, tp=2, ep=3)
    assert (shape.format, shape.experts, shape.local, shape.top_k) == ("bf16", 8, 3, 2)
    assert (shape.hidden, shape.intermediate, shape.rivals_of) == (128, 192, None)


def test_a_quantised_checkpoint_off_the_grid_gets_a_padded_twin(tiny, tmp_path):
    from moe_backend.checkpoint.convert import convert

    convert(tiny, tmp_path / "fp8", "fp8-block", progress=False)
    whole = shape_of(tmp_path / "fp8")
    assert (whole.intermediate, whole.w13_block, whole.rivals_of) == (384, (128, 128), None)
    shape = shape_of(tmp_path / "fp8", tp=4)
    assert (shape.intermediate, shape.w13_block, shape.w2_block) == (96, (32, 128), (128, 32))
    assert (shape.rivals_of.intermediate, shape.rivals_of.w13_block) == (128, (128, 128))


def test_a_checkpoint_that_does_not_split_is_refused(tiny):
    with pytest.raises(ValueError, match="does not split evenly over 5"):
        shape_of(tiny, tp=5)
    with pytest.raises(ValueError, match="1 to 8 expected"):
        shape_of(tiny, ep=9)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError):
        shape_of(tmp_path)


# --- Floor ----------------------------------------------------------------------------------------


def test_floor_by_bytes():
    # One token hits 8 experts of 3 * 1280 * 4096 bytes, and moves 4096 * 4 bytes itself.
    ids = torch.arange(8).reshape(1, 8)
    expected = (8 * 15_728_640 + 16_384) / 4.3e12 * 1e6
    assert expected == pytest.approx(29.2664, abs=1e-4)
    assert floor_us(SHAPES["step-3.5-ep8"], ids, H200) == pytest.approx(expected)
    # NVFP4: 8 bytes of codes and one of scale for 16 weights.
    assert floor_us(SHAPES["deepseek-v4-flash-tp1"], ids[:, :6], H200) == pytest.approx(
        (6 * 3 * 2048 * 4096 * 9 / 16 + 16_384) / 4.3e12 * 1e6
    )


def test_floor_by_operations():
    # 4096 tokens, 6 experts each, 2 * 3 * 2048 * 4096 operations: 1.24e12 at 790e12 a second.
    ids = torch.arange(6).repeat(4096, 1)
    expected = 4096 * 6 * 2 * 3 * 2048 * 4096 / 790e12 * 1e6
    assert floor_us(SHAPES["deepseek-v4-flash-tp1"], ids, H200) == pytest.approx(expected)
    fp8 = replace(SHAPES["step-3.5-ep8"], hidden=7168)
    ids = torch.arange(8).repeat(8192, 1)
    expected = 8192 * 8 * 2 * 3 * 1280 * 7168 / 1583e12 * 1e6
    assert floor_us(fp8, ids, H200) == pytest.approx(expected)


def test_floor_counts_neither_other_ranks_experts_nor_dropped_slots():
    shape = SHAPES["step-3.5-ep8"]
    one = torch.tensor([[0]])
    assert floor_us(shape, torch.tensor([[0, 36, 287, -1]]), H200) == floor_us(shape, one, H200)
    assert floor_us(shape, torch.tensor([[0, 35]]), H200) > floor_us(shape, one, H200)


# --- Inputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", ["uniform", "zipf"])
def test_routing_gives_distinct_experts_and_weights_that_add_up(routing):
    torch.manual_seed(0)
    weights, ids = route(SHAPES["step-3.5-ep8"], 200, routing, "cpu")
    assert all(len(set(row)) == 8 for row in ids.tolist())
    assert ids.min() >= 0
    assert ids.max() < 288
    assert torch.allclose(weights.sum(1), torch.ones(200))


def test_zipf_is_skewed_and_uniform_is_not():
    torch.manual_seed(0)
    shape = replace(SMALL, experts=64, local=64, top_k=2)
    share = {}
    for routing in ("uniform", "zipf"):
        _, ids = route(shape, 4000, routing, "cpu")
        share[routing] = ids.flatten().bincount(minlength=64).max().item() / ids.numel()
    assert share["uniform"] < 0.02 + 1 / 64
    assert share["zipf"] > 0.15


@pytest.mark.parametrize("tokens", [2, 8, 64])
def test_a_typical_routing_brings_this_rank_its_share(tokens):
    shape = SHAPES["step-3.5-ep8"]
    experts = 36 * (1 - (1 - 8 / 288) ** tokens)
    for seed in range(5):
        torch.manual_seed(seed)
        _, ids = route(shape, tokens, "typical", "cpu")
        own = ids[ids < 36]
        assert len(own) == pytest.approx(tokens, rel=0.15)  # tokens * 8 * 36 / 288
        assert len(own.unique()) == pytest.approx(experts, rel=0.15)


def test_something_always_falls_to_this_rank():
    torch.manual_seed(0)
    shape = replace(SMALL, experts=64, local=1, top_k=1)
    for _ in range(20):
        assert (route(shape, 1, "uniform", "cpu")[1] == 0).all()


def test_layers_that_differ_in_rows_get_the_same_tokens():
    other = replace(SMALL, intermediate=32)
    a = make_inputs(SMALL, SMALL.weights("cpu"), 5, "zipf", "cpu")
    b = make_inputs(other, other.weights("cpu"), 5, "zipf", "cpu")
    assert torch.equal(a.topk_ids, b.topk_ids)
    assert torch.equal(a.x, b.x)


# --- Measuring ------------------------------------------------------------------------------------


def test_a_right_answer_is_timed(on_cpu):
    weights = SMALL.weights("cpu")
    given = make_inputs(SMALL, weights, 5, "uniform", "cpu")
    (result,) = measure.measure(call_of(weights), given, "a note").values()
    assert result.us == 7.0
    assert 0 <= result.rel_l2 < 0.01
    assert result.note == "a note"


@pytest.mark.parametrize("fault", [lambda y: y * 1.1, lambda y: y * math.nan, torch.zeros_like])
def test_a_wrong_answer_is_not_timed(on_cpu, fault):
    weights = SMALL.weights("cpu")
    given = make_inputs(SMALL, weights, 5, "uniform", "cpu")
    call = call_of(weights)
    (result,) = measure.measure(lambda *args: fault(call(*args)), given).values()
    assert result.us == "wrong"
    assert on_cpu == []
    json.dumps(result.rel_l2, allow_nan=False)


def test_an_output_that_a_replay_does_not_write_is_wrong(on_cpu, monkeypatch):
    weights = SMALL.weights("cpu")
    given = make_inputs(SMALL, weights, 5, "uniform", "cpu")
    call = call_of(weights)
    monkeypatch.setattr(measure, "capture", lambda call, args: (lambda: None, call(*args)))
    assert measure.measure(call, given)["written"].us == "wrong"


def test_a_failure_is_reported_with_its_reason(on_cpu):
    weights = SMALL.weights("cpu")
    given = make_inputs(SMALL, weights, 5, "uniform", "cpu")

    def call(*args):
        raise RuntimeError("no such\n  tile")

    failed = measure.Result(None, None, "RuntimeError: no such tile")
    found = measure.measure(call, given, caches=("written", "read"))
    assert found == {"written": failed, "read": failed}


def test_a_clock_that_fails_leaves_the_other(on_cpu, monkeypatch):
    def timed(replay, milliseconds=60, cache="written"):
        if cache == "read":
            raise RuntimeError("out of memory")
        return 7.0

    monkeypatch.setattr(measure, "microseconds", timed)
    weights = SMALL.weights("cpu")
    given = make_inputs(SMALL, weights, 5, "uniform", "cpu")
    found = measure.measure(call_of(weights), given, caches=("read", "written"))
    assert found["read"] == measure.Result(None, None, "RuntimeError: out of memory")
    assert found["written"].us == 7.0
    rows = [Row("a", 5, "uniform", 1.0, found[cache].us, cache=cache) for cache in found]
    assert report.summary(rows)[-1] == "ours could not run: a uniform at 5 tokens, L2 read"


def test_a_run_marks_each_rival(on_cpu, monkeypatch):
    def build(layer, weights, wanted, milliseconds):
        call = call_of(weights)
        yield Rival("right", lambda args: (call, "a choice"))
        yield Rival("bad", lambda args: (lambda *a: call(*a) * 2, ""))
        yield Rival("unfit", lambda args: 1 / 0)
        yield Missing("absent", "not compiled")

    monkeypatch.setattr(vllm_rivals, "installed", lambda: True)
    monkeypatch.setattr(vllm_rivals, "build", build)
    kept = []

    def keep(rows):
        kept.append([list(row.rivals) for row in rows])

    rows = run.Bench(H200, ("right",), lambda text: None, "cpu").rows(SMALL, "uniform", keep)
    names = ["right", "bad", "unfit", "absent"]
    assert kept == [2 * [names[:n]] for n in range(5)]  # what an interrupted run has
    assert [row.tokens for row in rows] == [1, 5]
    for row in rows:
        assert row.ours_us == 7.0
        assert row.kernel == "reference"
        assert row.rel_l2 < 0.01
        assert row.floor_us > 0
        assert row.rivals == {"right": 7.0, "bad": "wrong", "unfit": None, "absent": None}
        assert row.notes["absent"] == "not compiled"
        assert row.notes["right"] == "a choice"
        assert "ZeroDivisionError" in row.notes["unfit"]
        assert row.date
        assert row.versions["torch"] == torch.__version__


def test_rivals_of_the_padded_layer_are_measured_once_and_named(on_cpu, monkeypatch):
    seen = []

    def build(layer, weights, wanted, milliseconds):
        seen.append(layer.intermediate_size)
        shape = replace(SMALL, intermediate=layer.intermediate_size)
        yield Rival("right", lambda args: (call_of(weights, shape), ""))

    monkeypatch.setattr(vllm_rivals, "installed", lambda: True)
    monkeypatch.setattr(vllm_rivals, "build", build)
    padded = replace(SMALL, name="padded", intermediate=96)
    bench = run.Bench(H200, ("right",), lambda text: None, "cpu")
    for row in bench.rows(replace(SMALL, rivals_of=padded), "uniform"):
        assert row.rivals == {"right": 7.0, "right (padded)": 7.0}
    bench.rows(padded, "uniform")
    assert seen == [64, 96]


def test_what_l2_holds_before_is_for_all_backends_and_in_the_rows(on_cpu, monkeypatch):
    def build(layer, weights, wanted, milliseconds):
        call = call_of(weights)
        milliseconds(call, make_inputs(SMALL, weights, 1, "uniform", "cpu").args)  # to choose tiles
        yield Rival("right", lambda args: (call, ""))

    monkeypatch.setattr(vllm_rivals, "installed", lambda: True)
    monkeypatch.setattr(vllm_rivals, "build", build)
    bench = run.Bench(H200, ("right",), lambda text: None, "cpu", ["read"])
    rows = bench.rows(SMALL, "uniform")
    assert {row.cache for row in rows} == {"read"}
    assert on_cpu == ["read"] * 5
    assert "graph replay, L2 read (" in report.markdown(rows)
    assert "(L2 read)" in report.line(rows[0])
    assert "(among layers)" in report.line(replace(rows[0], cache="layers"))
    both = report.markdown([*rows, replace(rows[0], cache="written")])
    assert "| layer | cache | tokens |" in both
    assert "L2 read: 1.00 times" in both
    assert "L2 written: 1.00 times" in both
    assert both.count("| read |") == 2
    assert both.count("| written |") == 1


def test_several_ways_of_filling_l2_have_a_row_each(on_cpu, monkeypatch):
    times = {"written": 7.0, "read": 5.0}

    def timed(replay, milliseconds=60, cache="written"):
        on_cpu.append(cache)
        return times[cache]

    fitted = []

    def build(layer, weights, wanted, milliseconds):
        call = call_of(weights)
        milliseconds(call, make_inputs(SMALL, weights, 1, "uniform", "cpu").args)
        yield Rival("right", lambda args: fitted.append(0) or (call, ""))
        yield Missing("absent", "not compiled")

    monkeypatch.setattr(measure, "microseconds", timed)
    monkeypatch.setattr(vllm_rivals, "installed", lambda: True)
    monkeypatch.setattr(vllm_rivals, "build", build)
    bench = run.Bench(H200, ("right",), lambda text: None, "cpu", ["read", "written", "read"])
    rows = bench.rows(SMALL, "uniform")
    assert [(row.cache, row.tokens) for row in rows] == [
        ("read", 1), ("read", 5), ("written", 1), ("written", 5),
    ]  # fmt: skip
    for row in rows:
        assert row.ours_us == row.rivals["right"] == times[row.cache]
        assert row.notes["absent"] == "not compiled"
    assert len(fitted) == 2  # made ready once for both
    assert on_cpu == [*["read", "written"] * 2, "read", *["read", "written"] * 2]


def test_timing_after_reading(monkeypatch):
    done, clock = [], iter(range(10**6))

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            done.append("record")
            self.at = next(clock)

        def elapsed_time(self, end):
            return 2.0 * (end.at - self.at)

    class Other:
        def sum(self):
            done.append("read")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: Other())
    assert measure.microseconds(lambda: done.append("replay"), 60, "read") == 2000.0
    # The first five take 18 from the first event to the last: 3.6 each.
    assert done == ["read", "record", "replay", "record"] * (5 + 15 * 10 // 36 + 60 * 10 // 36)


def test_timing_among_layers(monkeypatch):
    """A call costs 7 ms and the reading before it 3: 7 of 10 are the call's."""
    recorded, works, clock = [], [], [0.0]
    costs = {"read": 3.0, "call": 7.0}

    class Graph:
        def replay(self):
            clock[0] += sum(costs[done] for done in self.work)

    @contextlib.contextmanager
    def graph(made):
        recorded.clear()
        yield
        made.work = list(recorded)
        works.append(made.work)

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, end):
            return end.at - self.at

    class Other:
        def sum(self):
            recorded.append("read")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: Other())
    made = []
    monkeypatch.setattr(measure, "capture", lambda call, args: (made.append, torch.empty(0)))

    def call(*args):
        recorded.append("call")

    assert measure._microseconds(call, (), made.append, 60, "layers") == 7000.0
    assert measure.quick_milliseconds(call, (), "layers") == 7.0
    assert made == []  # a graph of one call is not what counts
    assert {tuple(work) for work in works} == {("read", "call") * 8, ("read",) * 8}


def test_without_rivals_ours_is_measured_alone(on_cpu, monkeypatch):
    monkeypatch.setattr(vllm_rivals, "installed", lambda: False)
    rows = run.Bench(H200, vllm_rivals.NAMES, lambda text: None, "cpu").rows(SMALL, "uniform")
    assert [(row.ours_us, row.rivals) for row in rows] == [(7.0, {}), (7.0, {})]
    monkeypatch.setattr(vllm_rivals, "installed", lambda: True)
    padded = Shape("no weights of it are made", "none", 0, 0, 0, 0, 0)
    shape = replace(SMALL, rivals_of=padded)
    rows = run.Bench(H200, (), lambda text: None, "cpu").rows(shape, "uniform")
    assert [row.rivals for row in rows] == [{}, {}]


# --- Rivals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "triton"),
    [
        ({}, True),
        ({"w13_block": (128, 128), "w2_block": (128, 128)}, True),
        ({"w13_block": (32, 128), "w2_block": (128, 32), "intermediate": 160}, True),
        ({"format": "nvfp4", "w13_block": None, "w2_block": None}, False),
        ({"format": "bf16", "w13_block": None, "w2_block": None}, True),
    ],
)
def test_vllms_backends_are_built_or_say_why_not(changes, triton):
    pytest.importorskip("vllm")
    from vllm.config import VllmConfig, set_current_vllm_config

    shape = replace(SMALL, hidden=256, **{"intermediate": 128, **changes})
    layer = shape.layer()
    with set_current_vllm_config(VllmConfig()):
        found = list(
            vllm_rivals.build(layer, shape.weights("cpu"), vllm_rivals.NAMES, lambda c, a: 0.0)
        )
    assert [rival.name for rival in found] == list(vllm_rivals.offered(layer))
    # Triton's experts can be built on a CPU, though not called; the others need their libraries.
    built = [rival.name for rival in found if isinstance(rival, Rival)]
    assert built == (["triton", "triton-tuned"] if triton else [])
    assert all(rival.reason for rival in found if isinstance(rival, Missing))


def test_only_wanted_rivals_are_built():
    pytest.importorskip("vllm")
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        found = vllm_rivals.build(
            SMALL.layer(), SMALL.weights("cpu"), ("triton-tuned", "marlin"), lambda c, a: 0.0
        )
        assert [rival.name for rival in found] == ["triton-tuned"]


def test_scales_are_refined_without_changing_what_they_say():
    weights = replace(SMALL, w13_block=(32, 64), w2_block=(64, 32)).weights("cpu")
    assert isinstance(weights, Fp8BlockWeights)
    s13 = vllm_rivals._refined(weights.w13_scale, (32, 64), (32, 32), weights.w13)
    s2 = vllm_rivals._refined(weights.w2_scale, (64, 32), (32, 32), weights.w2)
    finer = Fp8BlockWeights(weights.w13, s13, weights.w2, s2, (32, 32), (32, 32))
    finer.validate()
    given = make_inputs(SMALL, weights, 5, "uniform", "cpu")
    assert torch.equal(call_of(weights)(*given.args), call_of(finer)(*given.args))


def test_the_fastest_tiling_that_runs_is_taken():
    def milliseconds(call, args):
        taken = call(*args)
        if taken is None:
            raise RuntimeError("out of shared memory")
        return taken

    configs = vllm_triton_tuning.candidates("fp8_block", 100)
    assert configs[0] is None
    times = iter([3.0, None, 2.0, 4.0])
    best = vllm_triton_tuning.fastest([None] * 4, lambda *args: next(times), (), milliseconds)
    assert best is None
    seen = []

    def fake(config, call):
        return lambda *args: seen.append(config) or (1.0 if config == configs[2] else 2.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_triton_tuning, "under", fake)
        best = vllm_triton_tuning.fastest(configs, None, (), milliseconds)
    assert best == configs[2]
    assert seen == configs


def test_a_tiling_is_in_force_for_its_call_alone():
    fused_moe = pytest.importorskip("vllm.model_executor.layers.fused_moe")
    config = vllm_triton_tuning.candidates("bf16", 1)[1]
    assert vllm_triton_tuning.under(config, lambda: fused_moe.get_config())() == config
    with pytest.raises(ZeroDivisionError):
        vllm_triton_tuning.under(config, lambda: 1 / 0)()
    assert fused_moe.get_config() is None
    assert vllm_triton_tuning.under(None, lambda: fused_moe.get_config())() is None


# --- Report ---------------------------------------------------------------------------------------

ROWS = [
    Row("a", 1, "uniform", 10.0, 20.0, {"x": 40.0, "y": "wrong", "z": None}, 0.01, "k", {"z": "n"}),
    Row("a", 8, "uniform", 20.0, 50.0, {"x": 60.0, "y": 25.0}, 0.01, "k"),
    Row("b", 1, "uniform", 10.0, 11.0, {}, 0.01, "k"),
]


def test_a_row_knows_its_best_rival():
    assert [row.best_rival for row in ROWS] == [("x", 40.0), ("y", 25.0), None]
    assert [row.faster_by for row in ROWS] == [2.0, 0.5, None]
    assert [row.over_floor for row in ROWS] == [2.0, 2.5, 1.1]
    assert report.geometric_mean(ROWS) == pytest.approx(1.0)
    assert report.geometric_mean(ROWS[2:]) is None


def test_the_markdown_table():
    lines = report.markdown(ROWS).splitlines()
    assert lines[:5] == [
        "| layer | tokens | floor | ours | × floor | best rival | ours is faster by |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| a | 1 | 10.0 | 20.0 | 2.00 | 40.0 x | 2.00 |",
        "| a | 8 | 20.0 | 50.0 | 2.50 | 25.0 y | 0.50 |",
        "| b | 1 | 10.0 | 11.0 | 1.10 | – | – |",
    ]
    assert "geometric mean of 2 rows" in lines[-1]
    chosen = [replace(ROWS[0], kernel="hopper: Flow(tokens=8, groups=3)"), ROWS[1]]
    assert report.table(chosen).splitlines() == [
        "| layer | tokens | floor | ours | method | × floor | best rival | ours is faster by |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| a | 1 | 10.0 | 20.0 | Flow | 2.00 | 40.0 x | 2.00 |",
        "| a | 8 | 20.0 | 50.0 |  | 2.50 | 25.0 y | 0.50 |",
    ]
    skewed = replace(ROWS[0], routing="zipf", ours_us="wrong")
    lines = report.markdown([*ROWS, skewed]).splitlines()
    assert lines[0].startswith("| layer | routing | tokens |")
    assert "| a | zipf | 1 | 10.0 | wrong | – | 40.0 x | – |" in lines
    assert lines[-1] == "ours is WRONG: a zipf at 1 tokens"


def test_lines_name_what_is_wrong():
    assert "(2.00x floor)" in report.line(ROWS[0])
    assert "best rival    40.0 x (2.00x ours)" in report.line(ROWS[0])
    assert report.line(ROWS[0]).endswith("wrong: y")
    failed = replace(ROWS[2], ours_us=None, notes={"ours": "no memory"})
    assert report.line(failed).endswith("ours failed: no memory")


def test_json_comes_back(tmp_path):
    report.write_json(ROWS, tmp_path / "rows.json")
    assert report.read_json(tmp_path / "rows.json") == ROWS
    (data, *_) = json.loads((tmp_path / "rows.json").read_text())
    promised = "case tokens routing floor_us ours_us rivals rel_l2 device versions date kernel"
    assert set(promised.split()) <= set(data)
    (tmp_path / "other.json").write_text('{"rows": 1}')
    with pytest.raises(ValueError, match=r"other.json: not a file.*: a list of rows expected"):
        report.read_json(tmp_path / "other.json")
    report.write_json([replace(ROWS[0], cache="warm")], tmp_path / "newer.json")
    with pytest.raises(ValueError, match="newer.json: .*'warm' found, accepted: written, read"):
        report.read_json(tmp_path / "newer.json")


def test_lines_of_the_plot_leave_out_what_is_wrong(tmp_path):
    assert lines_of(ROWS[:2]) == {
        "moe_backend": [(1, 2.0), (8, 2.5)],
        "x": [(1, 4.0), (8, 3.0)],
        "y": [(8, 1.25)],
    }


# --- Command --------------------------------------------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_the_command_says_so(no_gpu, capsys):
    assert main(["bench"]) == 1
    assert "torch sees no GPU here" in capsys.readouterr().err


def test_named_rivals_without_vllm_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(vllm_rivals, "installed", lambda: False)
    assert main(["bench", "--rivals", "marlin"]) == 1
    assert "--rivals marlin: vLLM is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tp", "8"], "--tp 8 belongs to --model"),
        (["--model", "{tiny}", "--shape", "minimax-m3"], "one of them"),
        (["--model", "{tiny}", "--tp", "5"], "does not split evenly"),
        (["--model", "/nowhere"], "no such directory"),
        (["--json", "/nowhere/rows.json"], "there is no directory /nowhere"),
        (["--rivals"], "torch sees no GPU"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, no_gpu, tiny, capsys):
    assert main(["bench", *(option.format(tiny=tiny) for option in options)]) == 1
    assert message in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused_before_measuring(no_gpu, monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "--plot", "plot.png"]) == 1
    assert "--plot needs matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--shape", "x"], ["--rivals", "x"], ["--tokens", "0"]])
def test_unknown_names_are_bad_usage(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *options])
    assert stopped.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_shapes_are_listed_without_a_gpu(no_gpu, capsys):
    assert main(["bench", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in SHAPES)
    assert "triton-tuned" in out


def test_what_is_named_is_listed_alone(no_gpu, tiny, capsys):
    assert main(["bench", "--list", "--model", str(tiny), "--tp", "2"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"{shape_of(str(tiny), 2, 1).name}: {shape_of(str(tiny), 2, 1).describe()}"
    assert main(["bench", "--list", "--shape", "minimax-m3"]) == 0
    assert [name for name in capsys.readouterr().out.split() if name in SHAPES] == ["minimax-m3"]
    assert main(["bench", "--list", "--tp", "2"]) == 1
    assert "--tp 2 belongs to --model" in capsys.readouterr().err


def test_help_says_that_all_can_be_named(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    assert "layers to measure, or `all`;" in " ".join(capsys.readouterr().out.split())


def test_rows_of_several_runs_are_reported_together(no_gpu, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    report.write_json(ROWS[:1], tmp_path / "1.json")
    report.write_json(ROWS[1:], tmp_path / "2.json")
    out = {name: tmp_path / f"out.{name}" for name in ("json", "md", "png")}
    files = [str(tmp_path / "1.json"), str(tmp_path / "2.json")]
    options = ["--json", str(out["json"]), "--markdown", str(out["md"]), "--plot", str(out["png"])]
    assert main(["bench", "--read", *files, *options]) == 0
    assert report.read_json(out["json"]) == ROWS
    assert out["md"].read_text() == report.markdown(ROWS)
    assert out["png"].read_bytes().startswith(b"\x89PNG")
    assert "geometric mean of 2 rows" in capsys.readouterr().out


def test_ours_wrong_is_a_failure(tmp_path, capsys):
    for bad in ("wrong", None):
        report.write_json([*ROWS, replace(ROWS[0], ours_us=bad)], tmp_path / "rows.json")
        assert main(["bench", "--read", str(tmp_path / "rows.json")]) == 1
    assert "ours could not run: a uniform at 1 tokens" in capsys.readouterr().out


class FakeBench:
    """Rows without measuring."""

    def __init__(self, rates, wanted, say, caches):
        self.wanted, self.caches = wanted, caches

    def rows(self, shape, routing, keep):
        rivals = dict.fromkeys(self.wanted)
        cells = product(self.caches, (1, 8))
        found = [Row(shape.name, t, routing, 1.0, 2.0, rivals, cache=c) for c, t in cells]
        keep(found)
        if shape.name == "deepseek-v3-ep8":
            raise KeyboardInterrupt
        return found


def test_what_a_run_leaves(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    monkeypatch.setattr(vllm_rivals, "installed", lambda: False)
    monkeypatch.setattr(command, "rates", lambda: H200)
    monkeypatch.setattr(command, "Bench", FakeBench)
    file = tmp_path / "rows.json"
    given = ["bench", "--shape", "minimax-m3", "gpt-oss-like", "--routing", "both"]
    assert main([*given, "--json", str(file)]) == 0
    rows = report.read_json(file)
    assert [(row.case, row.routing) for row in rows[::2]] == [
        ("minimax-m3", "uniform"), ("minimax-m3", "zipf"),
        ("gpt-oss-like", "uniform"), ("gpt-oss-like", "zipf"),
    ]  # fmt: skip
    assert {row.cache for row in rows} == {"written"}
    assert main(["bench", "--shape", "minimax-m3", "--cache", "read", "--json", str(file)]) == 0
    assert {row.cache for row in report.read_json(file)} == {"read"}
    given += ["--cache", "written", "layers", "--json", str(file)]
    assert main(given) == 0
    assert [row.cache for row in report.read_json(file)][:4] == 2 * ["written"] + 2 * ["layers"]
    said = capsys.readouterr().err
    assert "vLLM is not installed here: ours is timed alone" in said
    assert "gpt-oss-like zipf: 0 s, 3.0 GiB" in said
    given = ["bench", "--shape", "minimax-m3", "deepseek-v3-ep8", "--json", str(file)]
    with pytest.raises(KeyboardInterrupt):
        main(given)
    assert [row.case for row in report.read_json(file)[::2]] == ["minimax-m3", "deepseek-v3-ep8"]
    given = ["bench", "--shape", "minimax-m3", "gpt-oss-like", "--routing", "both"]
    assert main([*given, "--budget", "-1"]) == 1  # nothing was measured
    assert "not measured: minimax-m3 uniform, minimax-m3 zipf" in capsys.readouterr().err


def test_the_script_is_the_command(monkeypatch, capsys):
    import runpy
    from pathlib import Path

    script = Path(__file__).parents[1] / "benchmarks" / "moe.py"
    monkeypatch.setattr(sys, "argv", ["moe.py", "--list"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    assert stopped.value.code == 0
    assert "step-3.5-ep8" in capsys.readouterr().out
