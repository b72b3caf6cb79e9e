"""Warm-up: every variant found, compiled once and bounded; on a CPU, with a stand-in for Triton."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from triton_driver import counted

from moe_backend import envs
from moe_backend.activation import Activation
from moe_backend.formats import FORMATS
from moe_backend.kernels import warmup
from moe_backend.kernels.hopper import pairs
from moe_backend.kernels.hopper.kernel import HopperKernel
from moe_backend.kernels.reference import ReferenceKernel
from moe_backend.kernels.triton.kernel import TritonKernel, slice_tokens
from moe_backend.kernels.variants import candidates, variants_missing
from moe_backend.kernels.warmup import Report, warm_up
from moe_backend.verify.problems import Case, build

STEP = Activation.from_name("swiglustep")
KERNELS = [HopperKernel(), TritonKernel()]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_rows_are_put_one_after_another(kernel):
    problem = build(Case("nvfp4", STEP))
    w = problem.weights
    turned = w.w13.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.ones(len(w.w13), 1).expand(-1, 2)
    tensors = kernel.prepare(replace(w, w13=turned, w13_global_scale=wide))
    assert all(t is None or t.is_contiguous() for t in tensors)
    assert torch.equal(tensors[0], kernel.prepare(w)[0])


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(warmup, "_warmed", set())


@pytest.fixture
def counts(monkeypatch):
    with counted(monkeypatch) as found:
        yield found


def problem(name="fp8_block", layout="unsharded", **changes):
    case = {"num_experts": 8, "top_k": 2, "hidden_size": 128, "intermediate_size": 128}
    return build(Case(name, STEP, layout=layout, tokens=1, **{**case, **changes}))


def call(kernel, p, tokens):
    """A call with so many tokens, as `warm_up` makes them."""
    tensors = kernel.prepare(p.weights)
    return lambda: warmup._calls(kernel, p.layer, tensors, torch.device("cpu"), tokens)(tokens)


# What runs for up to 2,000 tokens of the layer below.
MANY_IN_CUDA = {
    "bf16": {"pairs_bf16"},
    "fp8_block": {"flow"},
    "nvfp4": {"flow", "pairs_nvfp4"},
}


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize("name", FORMATS)
def test_nothing_compiles_after_the_warm_up(counts, kernel, name):
    p = problem(name, "ep", hidden_size=256, intermediate_size=256)
    report = warm_up(kernel, p.layer, kernel.prepare(p.weights), 2000)
    assert report.kernels == report.compiled == len(counts.compiled) > 4
    assert report.left == ()
    assert counts.launched
    if kernel.name == "hopper":
        in_cuda = {"moe_once", *MANY_IN_CUDA[name]}
        every = {"moe_once", "flow", *pairs.KERNELS.values()}
        assert every & set(counts.launched) == in_cuda
        assert every & set(counts.compiled) == in_cuda
    before = len(counts.compiled)
    for tokens in (1, 2, 3, 7, 8, 16, 17, 31, 64, 100, 129, 512, 1000, 1234, 1999, 2000):
        call(kernel, p, tokens)()
    assert len(counts.compiled) == before


SMALL = {"hidden_size": 32, "intermediate_size": 32, "w13_block": (32, 32), "w2_block": (32, 32)}


@pytest.mark.parametrize(
    ("kernel", "changes", "most"),
    [
        (KERNELS[0], {"top_k": 1, **SMALL}, 9000),
        (KERNELS[0], {"top_k": 6, **SMALL}, 9000),
        (KERNELS[0], {"top_k": 8, **SMALL}, 9000),
        (KERNELS[0], {"top_k": 8, **SMALL}, 2048),
        (KERNELS[1], {"top_k": 6, **SMALL}, 4100),
        # With sorted tokens: their chunks are counted, too.
        (KERNELS[0], {"top_k": 2}, 4100),
        (KERNELS[0], {"name": "nvfp4", "intermediate_size": 256}, 4100),
    ],
    ids=[
        "hopper-1",
        "hopper-6",
        "hopper-8",
        "hopper-2048",
        "triton-6",
        "hopper-sorted",
        "hopper-nvfp4-sorted",
    ],
)
def test_candidates_need_every_variant_there_is(counts, kernel, changes, most):
    """Brute force over all token counts; those of the candidates are a subset by construction."""
    p = problem(**changes)
    run = warmup._calls(kernel, p.layer, kernel.prepare(p.weights), torch.device("cpu"), most)
    found = set()
    for tokens in kernel.warmup_tokens(p.layer, most):
        found |= variants_missing(lambda t=tokens: run(t))
    missed = {}
    for tokens in range(1, most + 1):
        if new := variants_missing(lambda t=tokens: run(t)) - found:
            missed[tokens] = new
            found |= new
    assert missed == {}
    assert not counts.compiled
    assert not counts.launched


def test_candidates_see_every_change_of_the_choice():
    layer = problem().layer
    found = candidates(layer, 5000, lambda tokens: tokens >= 777)
    assert set(range(777, 793)) < set(found)
    assert len(found) < 600
    assert 777 not in candidates(layer, 5000, lambda tokens: 0)
    assert candidates(layer, 3, lambda tokens: 0) == [1, 2, 3]


def test_slices_start_at_aligned_addresses():
    layer = replace(problem().layer, hidden_size=4096, top_k=8)
    assert slice_tokens(layer, 2**28) == 8192
    assert slice_tokens(replace(layer, top_k=3), 2**28) % 16 == 0
    assert slice_tokens(layer, 8 * 4096 * 5) == 5
    assert slice_tokens(layer, 1) == 1


def test_equal_layers_are_warmed_once(counts):
    p, kernel = problem(), KERNELS[0]
    assert warm_up(kernel, p.layer, kernel.prepare(p.weights), 64) is not None
    compiled = len(counts.compiled)
    assert warm_up(kernel, p.layer, kernel.prepare(p.weights), 64) is None
    other = replace(p.layer, activation=Activation.from_name("silu"))
    report = warm_up(kernel, other, kernel.prepare(p.weights), 64)
    assert 0 < report.kernels < compiled  # the second GEMM, the routing and the sum are shared
    assert len(counts.compiled) == compiled + report.kernels


def test_kernels_found_in_the_cache_are_not_called_compiled(counts):
    counts.cached = True
    p = problem()
    report = warm_up(KERNELS[0], p.layer, p.weights.tensors(), 64)
    assert report.kernels > 4
    assert report.compiled == 0
    assert counts.launched  # and they are loaded, by a call
    assert str(report).endswith("(from cache)")


def test_compiles_many_at_a_time(counts):
    counts.compile = lambda: time.sleep(0.01)
    p = problem()
    warm_up(KERNELS[0], p.layer, p.weights.tensors(), 64)
    assert len(counts.threads) > 1


@pytest.mark.parametrize("parallel", [True, False])
def test_the_bound_is_kept_and_what_was_left_is_said(counts, monkeypatch, parallel):
    import triton

    if not parallel:
        monkeypatch.delattr(triton, "AsyncCompileMode")
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def slow():
        now[0] += 3.0

    counts.compile = slow
    monkeypatch.setenv(envs.WARMUP.name, "7")
    p = problem()
    report = warm_up(KERNELS[0], p.layer, p.weights.tensors(), 4096)
    assert report.bound == 7
    assert 3 <= len(counts.compiled) < report.kernels
    assert report.left
    assert report.left[-1] not in report.called
    assert f"stopped at 7 s or {warmup.MAX_CALLS} calls ({envs.WARMUP.name})" in str(report)
    assert f"calls with {report.left[0]}," in str(report)


def test_the_number_of_calls_is_bounded(counts, monkeypatch):
    monkeypatch.setattr(warmup, "MAX_CALLS", 3)
    p = problem()
    report = warm_up(KERNELS[0], p.layer, p.weights.tensors(), 4096)
    assert len(report.called) == 3
    assert len(report.left) > 3


def in_another_thread(action):
    """Runs to its end; gives what it raised."""
    raised = []

    def run():
        try:
            action()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return raised


def test_other_threads_launch_while_variants_are_looked_for(counts):
    """Of a kernel that nobody has compiled yet, so that Triton asks the process's hook."""
    p = problem()
    kernel = KERNELS[1]  # Triton alone
    run = call(kernel, p, 4)
    launched = []

    def look():
        assert in_another_thread(run) == []
        launched.extend(counts.launched)
        run()  # what remains is this thread's: compiled by the other one, and not launched

    assert variants_missing(look) == set()
    assert launched == ["gate_up_kernel", "down_kernel", "sum_kernel"]
    assert counts.launched == launched


def test_a_hook_of_someone_elses_still_hears_of_other_threads(counts, monkeypatch):
    from triton import knobs

    heard = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **found: heard.append(found["fn"]))
    run = call(KERNELS[1], problem(), 4)
    variants_missing(lambda: in_another_thread(run))
    assert [fn.name for fn in heard] == ["gate_up_kernel", "down_kernel", "sum_kernel"]
    assert counts.launched


def test_warm_ups_do_not_overlap(counts):
    from triton.runtime.jit import JITFunction

    run = JITFunction.run
    p = problem()
    both = []
    second_began = threading.Event()

    def warm(layer):
        second_began.set()
        both.append(warm_up(KERNELS[1], layer, p.weights.tensors(), 64))

    other = replace(p.layer, activation=Activation.from_name("silu"))
    thread = threading.Thread(target=warm, args=(other,))
    first, inside = threading.Lock(), []

    def compile_slowly():
        if first.acquire(blocking=False):  # in the midst of the first one's compiling
            thread.start()
            second_began.wait(60)
            time.sleep(0.2)
            inside.append(len(both))

    counts.compile = compile_slowly
    assert warm_up(KERNELS[1], p.layer, p.weights.tensors(), 64) is not None
    thread.join(60)
    assert inside == [0]
    assert both[0] is not None
    assert JITFunction.run is run


def test_a_kernel_that_compiles_nothing_is_not_called():
    p = problem()
    assert warm_up(ReferenceKernel(), p.layer, p.weights.tensors(), 64) is None


def test_switched_off_or_wrong(counts, monkeypatch):
    p = problem()
    monkeypatch.setenv(envs.WARMUP.name, "0")
    assert warm_up(KERNELS[0], p.layer, p.weights.tensors(), 64) is None
    assert not counts.compiled
    for wrong in ("soon", "-1", "inf", "nan"):
        monkeypatch.setenv(envs.WARMUP.name, wrong)
        with pytest.raises(ValueError, match=f"{envs.WARMUP.name}='{wrong}'"):
            warm_up(KERNELS[0], p.layer, p.weights.tensors(), 64)


def test_report():
    report = Report((1, 2), 12, 12, 21.26)
    assert str(report) == "warmed 12 kernels in 21.3 s (compiled)"
    assert str(replace(report, compiled=0)) == "warmed 12 kernels in 21.3 s (from cache)"
    assert str(replace(report, compiled=5)).endswith("(5 compiled, 7 from cache)")
    left = str(replace(report, left=tuple(range(1, 20))))
    assert "1, 2, 3, 4, 5, 6, 7, 8, ... tokens" in left


def test_cache_folder(monkeypatch, tmp_path):
    from triton import knobs

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert warmup.cache_folder() == knobs.cache.dir == str(tmp_path)
    monkeypatch.delenv("TRITON_CACHE_DIR")
    assert warmup.cache_folder() == knobs.cache.dir
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    assert warmup.cache_folder() == knobs.cache.dir
