"""Once and Flow: compiled by NVRTC without a GPU, and where they are not the method of a call."""

from __future__ import annotations

import ctypes
import re
import shutil
import struct
import subprocess
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.runtime.jit import JITFunction

from moe_backend.bench.shapes import SHAPES
from moe_backend.kernels.cuda import build, launch
from moe_backend.kernels.hopper import (
    choose,
    flow,
    kernel,
    methods,
    once,
    pairs,
    route,
    tiles,
)
from moe_backend.kernels.hopper.tiles import Few, Flow, Once, Pairs, Tiles

missing = build.missing()
compiles = pytest.mark.skipif(missing is not None, reason=f"CUDA C++ is not compiled: {missing}")

EP8 = SHAPES["step-3.5-ep8"].layer()
V4 = SHAPES["deepseek-v4-flash-ep8"].layer()
M3 = SHAPES["minimax-m3-ep4"].layer()


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A small kernel and its header; compiled code is kept beside them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "more.cuh").write_text("constexpr int MORE = 3;\n")
    file = tmp_path / "small.cu"
    file.write_text(
        '#include "more.cuh"\n'
        'extern "C" __global__ void small(int* to) { to[threadIdx.x] = MORE * FACTOR; }\n'
    )
    return file


# --- The kernels ----------------------------------------------------------------------------------


@pytest.fixture
def kernels_of(monkeypatch):
    """The kernels in CUDA C++ that a choice launches, as the host code asks for them."""
    monkeypatch.setattr(JITFunction, "run", lambda *_, **__: None)
    for module in (flow, once, pairs):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132)

    def find(name, tokens, choice):
        shape, found = SHAPES[name], []
        layer = shape.layer()
        with torch.device("meta"):
            x = torch.empty(tokens, layer.hidden_size, dtype=torch.bfloat16)
            ids = torch.empty(tokens, layer.top_k, dtype=torch.int32)
            weights = torch.empty(tokens, layer.top_k)
            expert_map = torch.empty(layer.num_experts, dtype=torch.int32)
        tensors = kernel.HopperKernel().prepare(shape.weights("meta"))
        given = x, weights, ids, expert_map if layer.expert_parallel else None
        with launch.instead_of_launching(found.append):
            kernel.run(layer, tensors, *given, choice)
        return found

    return find


def compiled(source, constants):
    """Bytes of a thread's stack and of spills of a source's kernels; and the compiler's words."""
    _, words = built(source, source.read_text(), tuple(sorted(constants)))
    found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", words)
    assert found
    return max(int(number) for numbers in found for number in numbers), words


@cache
def built(source, text, constants):
    """Machine code, and the compiler's words.

    Several tests ask about the same kernel, which takes up to half a minute to compile.
    """
    return build._compile(source, [*build._options(constants), "--ptxas-options=-v"])


# Tiles that use registers and shared memory up.
FLOWS = {
    "fp8_block": ((8, 4, 1), (64, 2, 3)),
    "nvfp4": ((8, 2, 1), (8, 4, 1), (32, 2, 2), (64, 4, 1), (96, 2, 2), (128, 2, 1)),
}
ONCE, FLOW = ["moe_once"], ["route", "flow", "combine"]
SPREAD = ["count", "sort", "spread"]
PAIRS_FP8, PAIRS_NVFP4 = ([*SPREAD, gemm, gemm, "combine"] for gemm in ("pairs_fp8", "pairs_nvfp4"))


@compiles
@pytest.mark.parametrize(
    ("name", "tokens", "names"),
    [
        ("step-3.5-ep8", 8, ONCE),
        ("step-3.5-ep8", 64, FLOW),
        ("step-3.5-ep8", 256, FLOW),
        ("step-3.5-ep8", 1024, FLOW),
        ("step-3.5-tp8-even", 8, ONCE),
        ("step-3.5-tp8-even", 64, FLOW),
        ("step-3.5-tp8-even", 1024, FLOW),
        ("step-3.5-tp8-even", 4096, ["count", *FLOW]),
        ("step-3.5-ep8", 4096, PAIRS_FP8),
        ("step-3.5-tp4-even", 4096, ["count", *FLOW]),
        ("deepseek-v4-flash-ep8", 8, ONCE),
        ("deepseek-v4-flash-ep8", 64, FLOW),
        ("deepseek-v4-flash-ep8", 1024, FLOW),
        ("deepseek-v4-flash-tp1", 16384, PAIRS_NVFP4),
        ("minimax-m3-ep4", 8, ONCE),
    ],
)
def test_registers_hold_everything(kernels_of, name, tokens, names):
    found = kernels_of(name, tokens, tiles.choose(SHAPES[name].layer(), tokens))
    assert [one.name for one in found] == names
    for one in found:
        assert compiled(one.source, one.constants)[0] == 0


@compiles
@pytest.mark.parametrize(
    "name",
    [
        "step-3.5-tp8-even",
        "deepseek-v4-flash-ep8",
        pytest.param("gpt-oss-like", marks=pytest.mark.long),
    ],
)
def test_what_the_host_code_takes_compiles(kernels_of, name):
    """What would not, the device code asserts: shared memory above all. bf16's `Pairs` without
    targets holds its sums in registers as well.
    """
    layer = SHAPES[name].layer()
    choices = [Once(blocks) for blocks in (1, 2, 4)]
    if layer.format != "bf16":
        choices += [tiles.flow(layer, *tile) for tile in FLOWS[layer.format]]
    choices.append(tiles.pairs(layer))
    taken = [choice for choice in choices if methods.sound(layer, 1, choice)]
    assert taken
    for choice in taken:
        for one in kernels_of(name, 1, choice):
            spilled, words = compiled(one.source, one.constants)
            if isinstance(choice, Pairs):
                assert spilled == 0
                assert "serialized" not in words


@compiles
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *product(
            ["step-3.5-ep8", "step-3.5-tp4-even", "step-3.5-tp8-even", "deepseek-v4-flash-ep8"],
            [0, 3],
        ),
        ("minimax-m3-ep4", 3),  # the longest to compile: with what takes more registers
        *(
            pytest.param(name, kind, marks=pytest.mark.long)
            for name, kind in [
                ("qwen3-235b-nvfp4-tp8", 0),
                ("qwen3-235b-nvfp4-tp8", 3),
                ("minimax-m3-ep4", 0),
            ]
        ),
    ],
)
def test_pairs_hold_their_sums_in_registers(kernels_of, name, kind):
    """Shards off the block grid have sub-steps of 64 and of 32 columns, those of NVFP4 copies in
    fours. MMAs with codes do not wait for each other either.
    """
    for one in kernels_of(name, 4096, tiles.pairs(SHAPES[name].layer())):
        constants = dict(one.constants)
        if constants.get("GATED"):
            constants["ACTIVATION"] = kind
        spilled, words = compiled(one.source, constants.items())
        assert spilled == 0
        assert "serialized" not in words


@compiles
@pytest.mark.parametrize("tile", FLOWS["nvfp4"], ids=str)
def test_mmas_with_codes_do_not_wait_for_each_other(kernels_of, tile):
    """Nor do registers spill: the next operands are decoded while the tensor cores multiply."""
    name = "deepseek-v4-flash-ep8"
    for one in kernels_of(name, 64, tiles.flow(SHAPES[name].layer(), *tile)):
        spilled, words = compiled(one.source, one.constants)
        assert spilled == 0
        assert "serialized" not in words


@compiles
def test_samples_of_the_emulation_compile_for_the_gpu(tmp_path):
    """What the emulation's tests rest on is CUDA to NVRTC as well, clusters and all."""
    for path in (*once.SOURCE.parent.glob("*.cuh"), Path(__file__).parent / "cuda_host/samples.cu"):
        shutil.copy(path, tmp_path)
    code, _ = build._compile(tmp_path / "samples.cu", build._options([("COLUMNS", 48)]))
    assert code.startswith(b"\x7fELF")


@compiles
def test_what_registers_do_not_hold_is_seen(source):
    source.write_text(
        'extern "C" __global__ void small(int* to) {\n'
        "  int some[32] = {};\n"
        "  for (int i = 0; i < FACTOR; ++i) some[to[i] & 31] += i;\n"
        "  to[threadIdx.x] = some[to[threadIdx.x] & 31];\n"
        "}\n"
    )
    assert compiled(source, {"FACTOR": 99}.items())[0] == 32 * 4


# --- Launches -------------------------------------------------------------------------------------


def test_arrays_are_carved_from_one_piece_of_memory():
    whole, arrays = launch.carve(torch.device("cpu"), 300, 0, 256, 5)
    base = whole.data_ptr()
    assert [array.data_ptr() - base for array in arrays] == [0, 512, 512, 768]
    assert whole.numel() >= 768 + 5


def test_what_does_not_begin_at_a_multiple_of_sixteen_bytes_is_copied():
    numbers = torch.arange(64.0)
    assert launch.packed(numbers) is numbers
    for given in (numbers[1:33], numbers.view(8, 8).T):
        taken = launch.packed(given)
        assert torch.equal(taken, given)
        assert taken.is_contiguous()
        assert taken.data_ptr() % 16 == 0


def test_arguments_are_laid_out_as_the_driver_reads_them(monkeypatch):
    """Each at its pointer, of its size, whatever comes before it."""
    tensor = torch.zeros(4)
    map_of_it = launch.TensorMap(tensor, (128, 4), (128,), (128, 4))
    monkeypatch.setattr(launch, "_encoded", lambda address, *_: struct.pack("=16Q", *range(16)))
    given = [3, map_of_it, 0.5, launch.Memory(1 << 40), tensor, -1]
    packing = launch._Packing(given)
    packing.pack(given)
    sizes = ["i", "16Q", "f", "Q", "Q", "i"]
    found = [
        struct.unpack("=" + size, ctypes.string_at(pointer, struct.calcsize("=" + size)))
        for size, pointer in zip(sizes, packing.pointers, strict=True)
    ]
    assert found == [(3,), tuple(range(16)), (0.5,), (1 << 40,), (tensor.data_ptr(),), (-1,)]
    with pytest.raises(struct.error):
        packing.pack([0.5, *given[1:]])


@compiles
def test_launches_overlap_and_have_clusters():
    from cuda.bindings import driver

    ids = driver.CUlaunchAttributeID
    for cluster in (1, 2):
        config = driver.CUlaunchConfig()
        config.attrs = launch._attributes(cluster)
        overlapped, *rest = config.attrs
        assert overlapped.id == ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        assert overlapped.value.programmaticStreamSerializationAllowed == 1
        assert len(rest) == cluster - 1
    (clusters,) = rest
    assert clusters.id == ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    sides = clusters.value.clusterDim
    assert (sides.x, sides.y, sides.z) == (2, 1, 1)


def test_the_blocks_of_a_launch_are_whole_clusters(tmp_path):
    kernel, seen = launch.Kernel(tmp_path, "pairs", (), 0, cluster=2), []
    with launch.instead_of_launching(seen.append):
        launch.launch(kernel, 4, 32, [])
        with pytest.raises(ValueError, match="pairs: 3 blocks are not whole clusters of 2"):
            launch.launch(kernel, 3, 32, [])
    assert seen == [kernel]


# --- What is compiled -----------------------------------------------------------------------------


@compiles
def test_what_was_compiled_is_found_again(source):
    code, anew = build.machine_code(source, {"FACTOR": 2}.items())
    assert anew
    assert b"small" in code
    assert build.machine_code(source, {"FACTOR": 2}.items()) == (code, False)
    assert [file.read_bytes() for file in build.folder().iterdir()] == [code]
    other, anew = build.machine_code(source, {"FACTOR": 3}.items())
    assert anew
    assert other != code
    source.write_text(source.read_text() + "// the same but for this\n")
    assert build.machine_code(source, {"FACTOR": 2}.items())[1]
    assert len(list(build.folder().iterdir())) == 3


@compiles
def test_a_folder_that_cannot_be_written_means_another_compilation(source, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(source))
    for _ in range(2):
        assert build.machine_code(source, {"FACTOR": 2}.items())[1]


@compiles
def test_a_damaged_file_is_compiled_again(source, monkeypatch):
    kernel = launch.Kernel(source, "small", (("FACTOR", 2),), 0)
    code, _ = launch.machine_code(kernel)
    (kept,) = build.folder().iterdir()

    def handle(kernel, code):
        if code == b"damaged":
            raise RuntimeError("the driver says no")
        return code

    monkeypatch.setattr(launch, "_handle", handle)
    kept.write_bytes(b"damaged")
    assert launch._load(kernel) == kept.read_bytes() == code
    kept.unlink()
    monkeypatch.setattr(launch, "machine_code", lambda kernel: (b"damaged", True))
    with pytest.raises(RuntimeError, match="says no"):
        launch._load(kernel)


@compiles
def test_the_compiler_writes_into_no_object_of_the_interpreter(source):
    """An empty log is one byte. Python shares such strings: `b" "` was another one afterwards."""
    source.write_text("")
    build._compile(source, build._options(()))
    every = bytes(range(256))
    assert [n for n in range(256) if ord(every[n : n + 1]) != n] == []


@compiles
def test_the_words_of_the_compiler(source):
    with pytest.raises(RuntimeError, match='identifier "FACTOR" is undefined') as error:
        build.machine_code(source, ())
    assert "small.cu --gpu-architecture=sm_90a" in str(error.value)
    assert not build.folder().exists()


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.folder() == tmp_path / "moe-backend" / "cuda"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.folder() == tmp_path / ".cache" / "moe-backend" / "cuda"


@compiles
def test_without_a_home_nothing_is_kept(source, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert build.folder() is None
    for _ in range(2):
        code, anew = build.machine_code(source, {"FACTOR": 2}.items())
        assert anew
    build.forget(source, {"FACTOR": 2}.items())
    assert b"small" in code


@compiles
@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ((0, 12080), r"the driver is for CUDA 12\.8, NVRTC is 13\.\d"),
        ((0, 13000), None),
        ((0, 14020), None),
        ((0, 0), None),
        ((999, 0), None),
        (RuntimeError("no driver"), None),
    ],
)
def test_a_driver_older_than_the_compiler_is_seen(found, wanted, monkeypatch):
    from cuda.bindings import driver

    def version():
        if isinstance(found, Exception):
            raise found
        return driver.CUresult(found[0]), found[1]

    monkeypatch.setattr(driver, "cuDriverGetVersion", version)
    build.missing.cache_clear()
    said = build.missing()
    build.missing.cache_clear()
    assert said is wanted is None or re.fullmatch(wanted, said)


# --- Which calls they run -------------------------------------------------------------------------


def blocks(n13=128, k13=128, n2=128, k2=128):
    return {"w13_block": (n13, k13), "w2_block": (n2, k2)}


@pytest.mark.parametrize(
    ("layer", "changes", "tokens", "count", "wanted"),
    [
        (EP8, {}, 8, 3, "1, 2 or 4 blocks of tokens"),
        (EP8, {}, 9, 1, "at most 8 tokens"),
        (EP8, {"top_k": 33}, 8, 1, "at most 256 slots of 8 tokens"),
        (EP8, {"hidden_size": 16384}, 8, 1, "room for two steps beside 8 tokens of 16384 columns"),
        (EP8, {"hidden_size": 4160}, 8, 1, "a hidden size that is a multiple of 128"),
        (EP8, {"intermediate_size": 1296}, 8, 1, "an intermediate size that is a multiple of 32"),
        (EP8, blocks(n13=4), 8, 1, "one scale for 8 rows of w13 and for 16 of w2"),
        (EP8, blocks(n2=8), 8, 1, "one scale for 8 rows of w13 and for 16 of w2"),
        (EP8, blocks(k13=64), 8, 1, "one scale of w13 for 128 columns"),
        (EP8, blocks(k2=96), 8, 1, "scales of w2 for 32, 64 or multiples of 128 columns"),
        (V4, {"intermediate_size": 1920}, 8, 1, "sizes that are multiples of 256"),
        (V4, {"hidden_size": 4224}, 8, 1, "sizes that are multiples of 256"),
        (M3, {"intermediate_size": 3088}, 8, 1, "sizes that are multiples of 32"),
    ],
)
def test_what_once_cannot_take_is_refused(layer, changes, tokens, count, wanted):
    once.check(layer, 8, Once(1))
    with pytest.raises(ValueError, match=f"{wanted}.* expected$"):
        once.check(replace(layer, **changes), tokens, Once(count))


@pytest.mark.parametrize(
    ("layer", "changes", "choice", "wanted"),
    [
        (M3, {}, Flow(8, 2, 2, 4), "FP8 or NVFP4"),
        (EP8, {}, Flow(8, 2, 2, 1), "2 stages or more that fit into shared memory"),
        (EP8, {}, Flow(128, 2, 2, 8), "2 stages or more that fit into shared memory"),
        (EP8, {}, Flow(24, 2, 2, 4), "tiles of 8, 16, 32, 64, 96 or 128 tokens"),
        (EP8, {}, Flow(8, 1, 2, 4), "2 to 4 groups, 1 to 3 blocks"),
        (EP8, {}, Flow(8, 2, 4, 2), "2 to 4 groups, 1 to 3 blocks"),
        (EP8, {}, Flow(128, 2, 3, 2), "fewer sums"),
        (EP8, {}, Flow(96, 3, 2, 2), "fewer sums"),
        (EP8, {"hidden_size": 4128}, Flow(8, 2, 2, 4), "a hidden size in 64s"),
        (EP8, {"intermediate_size": 1288}, Flow(8, 2, 2, 4), "an intermediate size in 16s"),
        (EP8, blocks(n13=16), Flow(8, 2, 2, 4), "one scale for 32 rows of w13 and for 64 of w2"),
        (EP8, blocks(n2=32), Flow(8, 2, 2, 4), "one scale for 32 rows of w13 and for 64 of w2"),
        (EP8, blocks(k2=16), Flow(8, 2, 2, 4), "scales for 32 columns or more"),
        (V4, {}, Flow(128, 2, 2, 2), "2 stages or more that fit into shared memory"),
        (V4, {}, Flow(8, 3, 1, 4), "2 or 4 blocks of 64 weight rows"),
        (V4, {"hidden_size": 4224}, Flow(8, 2, 2, 4), "a hidden size that is a multiple of 256"),
        (V4, {"intermediate_size": 1952}, Flow(8, 2, 2, 4), "size that is a multiple of 64"),
    ],
)
def test_what_flow_cannot_take_is_refused(layer, changes, choice, wanted):
    flow.check(EP8, Flow(8, 2, 2, 6))
    flow.check(V4, Flow(8, 2, 2, 5))
    with pytest.raises(ValueError, match=f"{wanted}.* expected$"):
        flow.check(replace(layer, **changes), choice)


@pytest.mark.parametrize(
    ("layer", "tile"),
    [
        *product([EP8], [(8, 4, 1), (16, 3, 2), (32, 2, 3), (64, 2, 2), (128, 2, 2)]),
        *product([V4], [(8, 4, 1), (32, 2, 2), (96, 2, 2), (128, 2, 1)]),
    ],
    ids=str,
)
def test_stages_fill_shared_memory(layer, tile):
    choice = tiles.flow(layer, *tile)
    flow.check(layer, choice)
    if choice.stages < 8:
        with pytest.raises(ValueError, match="fit into shared memory"):
            flow.check(layer, replace(choice, stages=choice.stages + 1))


DEFAULTS = {
    "step-3.5-ep8": {2: Few, 3: Once, 8: Once, 9: Flow, 1024: Flow},
    "step-3.5-tp8-even": {2: Few, 8: Once, 64: Flow, 4096: Flow},
    # 31 MB of weights are little enough for Few, 63 are not; 480 are too much for Once.
    "step-3.5-tp4-even": {1: Few, 2: Once, 8: Once},
    "step-3.5-tp1": {1: Once, 2: Once, 4: Flow, 8: Flow, 9: Flow},
    "deepseek-v3-ep8": {1: Few, 4: Few, 8: Flow},  # hidden 7168
    "glm-class-ep8": {1: Once, 4: Once, 8: Once, 9: Flow},  # hidden 6144
    "deepseek-v4-flash-ep8": {1: Once, 8: Once, 9: Flow, 1024: Flow, 4096: Pairs},
    "deepseek-v4-flash-tp1": {1: Once, 4: Once, 8: Flow, 64: Flow},
    # Shards that are padded to 256 columns: 64 and 256 slots per expert at 1024 and 4096 tokens.
    "qwen3-235b-nvfp4-tp8": {4: Few, 5: Flow, 16: Flow, 1024: Flow, 4096: Pairs},
    "qwen3-235b-nvfp4-tp4": {16: Flow, 512: Flow, 1024: Pairs},
    "minimax-m3-ep4": {1: Once, 8: Once, 64: Tiles, 1535: Tiles, 1536: Pairs, 16384: Pairs},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_they_are_the_default_where_they_can_be_compiled(name, monkeypatch):
    layer = SHAPES[name].layer()
    monkeypatch.setattr(build, "missing", lambda: None)
    for tokens, kind in DEFAULTS[name].items():
        choice = tiles.choose(layer, tokens)
        assert isinstance(choice, kind), tokens
        assert methods.sound(layer, tokens, choice)
    monkeypatch.setattr(build, "missing", lambda: "no compiler")
    for tokens in (1, 2, 3, 8, 9, 64, 1024, 4096):
        assert not isinstance(tiles.choose(layer, tokens), Once | Flow | Pairs), tokens


def test_tiles_of_bf16_grow_with_slots(monkeypatch):
    """Where CUDA C++ cannot be compiled there are no `Pairs` for many."""
    layer = SHAPES["minimax-m3-ep4"].layer()
    monkeypatch.setattr(build, "missing", lambda: "no compiler")
    for tokens, m in ((64, 16), (384, 16), (385, 64), (3072, 64), (3073, 128), (16384, 128)):
        choice = tiles.choose(layer, tokens)
        assert choice.gate_up.m == choice.down.m == m
        methods.check(layer, tokens, choice)


def test_pairs_have_as_many_stages_as_fit():
    layer = SHAPES["deepseek-v4-flash-ep8"].layer()
    for experts, stages in ((32, 4), (520, 4), (600, 3), (1024, 3)):
        many = replace(layer, num_experts=experts, num_local_experts=experts)
        assert tiles.pairs(many) == Pairs(stages)
        methods.check(many, 16384, Pairs(stages))


def test_experts_are_listed_by_their_items_where_weights_are_first(kernels_of):
    """More than threads in their own order."""
    for name, wanted in (("deepseek-v4-flash-ep8", 128), ("minimax-m3", 192), ("step-3.5-ep8", 0)):
        _, sort, _, gemm, *_ = (dict(one.constants) for one in kernels_of(name, 4096, Pairs(3)))
        assert sort["TILE"] == gemm.get("TILE", 0) == wanted
    for experts, wanted in ((512, 192), (513, 0)):
        many = replace(M3, num_experts=experts, num_local_experts=experts)
        assert dict(route._sort(many, (), False).constants)["TILE"] == wanted


def test_gemms_are_interleaved_where_hidden_columns_are_one_item(kernels_of):
    for name, tile, wanted in (
        ("step-3.5-tp8-even", (16, 3, 2), 1),
        ("step-3.5-tp8-even", (16, 2, 2), 0),
        ("step-3.5-ep8", (16, 3, 2), 0),
        ("qwen3-235b-nvfp4-tp8", (16, 4, 1), 0),
    ):
        choice = tiles.flow(SHAPES[name].layer(), *tile)
        (found,) = [one for one in kernels_of(name, 256, choice) if one.name == "flow"]
        assert dict(found.constants)["INTERLEAVED"] == wanted
    choice = tiles.flow(SHAPES["step-3.5-tp8-even"].layer(), 32, 3, 1)
    for columns, wanted in ((96, 1), (128, 0)):
        layer = replace(SHAPES["step-3.5-tp8-even"].layer(), intermediate_size=columns)
        assert dict(flow._kernel(layer, choice).constants)["INTERLEAVED"] == wanted


DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"


@compiles
@pytest.mark.skipif(not DISASSEMBLER.exists(), reason="Triton's nvdisasm is not there")
@pytest.mark.parametrize("name", ["step-3.5-ep8", "deepseek-v4-flash-ep8"])
def test_matrices_of_mmas_are_known_to_be_the_same_for_all_lanes(kernels_of, name, tmp_path):
    """Where the compiler cannot prove it, it moves each MMA's operands to uniform registers one by
    one, which made NVFP4 at 64 tokens a tenth slower.
    """
    _, found, _ = kernels_of(name, 64, tiles.choose(SHAPES[name].layer(), 64))
    told = disassembled(found, tmp_path)
    loops = list(loops_of(told))
    mmas = [loop for loop in loops if sum("GMMA" in line for line in loop) >= 8]
    assert len(mmas) >= 2  # of both GEMMs
    for loop in mmas:
        if len(loop) < 600:  # innermost
            assert sum("R2UR" in line for line in loop) <= 2


@compiles
@pytest.mark.skipif(not DISASSEMBLER.exists(), reason="Triton's nvdisasm is not there")
@pytest.mark.parametrize(
    ("name", "tokens", "streamed"),
    [
        ("step-3.5-ep8", 256, False),  # tiles of 16
        ("step-3.5-ep8", 512, True),
        ("step-3.5-ep8", 4096, True),
        ("deepseek-v4-flash-ep8", 64, True),
        ("deepseek-v4-flash-ep8", 4096, True),
        ("step-3.5-tp8-even", 1024, False),  # rows of 160 bytes
        ("step-3.5-tp1", 1024, False),  # all experts
        ("qwen3-235b-nvfp4-tp4", 64, False),  # of 192
    ],
)
def test_l2_gives_up_first_the_weights_of_whole_lines(
    kernels_of, name, tokens, streamed, monkeypatch, tmp_path
):
    """Copies of weights have the policy, others not, and with it L2 fetches no more than a line."""
    calls = []
    for module in (flow, pairs):
        monkeypatch.setattr(
            module, "launch", lambda kernel, *rest: calls.append((kernel, rest[-1]))
        )
    kernels_of(name, tokens, tiles.choose(SHAPES[name].layer(), tokens))
    assert len(calls) in (1, 2)  # the GEMMs
    weights, found = 0, {}
    for its, arguments in calls:
        for one in arguments:
            if isinstance(one, launch.TensorMap):
                is_weight = isinstance(one.memory, torch.Tensor)
                weights += is_weight
                assert one.streamed == (is_weight and streamed)
        for kind, first_out in copies_of(its, tmp_path):
            found.setdefault(kind, set()).add(first_out)
    nvfp4 = SHAPES[name].layer().format == "nvfp4"
    assert weights == (4 if nvfp4 else 2)  # with block scales
    # Of weights in boxes of five and three dimensions, with NVFP4 w2's of two and its scales of
    # three; FP8's `Flow` has hidden columns in boxes of two as well.
    own = {"5D": {streamed}, "3D": {streamed}, "3D.MULTICAST": {streamed}}
    own |= {"2D.MULTICAST": {False}, "S.G": {False}}  # tokens, and scales of theirs
    if nvfp4:
        own |= {"2D": {streamed}}
        if len(calls) == 1:
            own |= {"3D": {streamed, False}}  # scales, hidden columns
    else:
        own |= {"2D": {True, False} if streamed and len(calls) == 1 else {False}}
    assert found == {kind: own[kind] for kind in found}
    assert "2D" in found or "3D" in found


@compiles
@pytest.mark.skipif(not DISASSEMBLER.exists(), reason="Triton's nvdisasm is not there")
@pytest.mark.parametrize("layer", [EP8, M3, V4], ids=["fp8", "bf16", "nvfp4"])
def test_l2_gives_up_first_what_once_reads(layer, tmp_path):
    """All weights, with NVFP4's block scales."""
    kernel = once._kernel(layer, Once(1), 132, False, True)
    assert {first_out for kind, first_out in copies_of(kernel, tmp_path) if kind == "S.G"} == {True}


def copies_of(kernel, folder):
    """Of a kernel's copies by the accelerator the kind, and whether they have a policy for L2."""
    for line in disassembled(kernel, folder):
        if copy := re.search(r"(?:UTMALDG|UBLKCP)\.(\S+) (.*);", line):
            yield copy[1], "desc" in copy[2]


def disassembled(kernel, folder):
    """A kernel's instructions, a line each, with labels."""
    source, constants = kernel.source, tuple(sorted(kernel.constants))
    code, _ = built(source, source.read_text(), constants)
    (folder / "code").write_bytes(code)
    command = [DISASSEMBLER, "-c", folder / "code"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def loops_of(told):
    """Of lines, instructions from a label to a branch back to it."""
    labels, instructions = {}, []
    for line in told:
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/", line):
            instructions.append(line)
            back = re.search(r"BRA.*`\(\.(L_x_\d+)\)", line)
            if back and back[1] in labels:
                yield instructions[labels[back[1]] :]


def test_sums_of_lone_slots_come_from_the_gemm_where_experts_are_spread(kernels_of):
    for name, wanted in (("step-3.5-ep8", 1), ("step-3.5-tp1", 0)):
        last = dict(kernels_of(name, 4096, Pairs(4))[-1].constants)
        _, gemm = [
            dict(k.constants) for k in kernels_of(name, 4096, Pairs(4)) if k.name == "pairs_fp8"
        ]
        assert last["LONE"] == gemm["LONE"] == wanted


@pytest.mark.parametrize(
    ("name", "tokens", "tile"),
    [
        ("step-3.5-tp8-even", 512, (32, 3, 2)),
        ("step-3.5-tp8-even", 4096, (128, 3, 1)),
        ("step-3.5-tp8-padded", 4096, (128, 2, 2)),
        ("step-3.5-ep8", 1024, (64, 3, 2)),
        ("qwen3-235b-ep8", 64, (8, 2, 2)),  # 304 long items, two for each multiprocessor
        ("qwen3-235b-ep8", 256, (32, 2, 2)),
        ("deepseek-v4-flash-ep8", 16, (8, 2, 1)),
        ("deepseek-v4-flash-ep8", 64, (8, 4, 1)),
        ("deepseek-v4-flash-ep8", 1024, (64, 4, 1)),
    ],
)
def test_tiles_of_flow(name, tokens, tile, monkeypatch):
    monkeypatch.setattr(build, "missing", lambda: None)
    layer = SHAPES[name].layer()
    assert tiles.choose(layer, tokens) == tiles.flow(layer, *tile)


def test_slots_beyond_what_the_routing_is_for_get_another_method(monkeypatch):
    monkeypatch.setattr(build, "missing", lambda: None)
    layer = replace(SHAPES["step-3.5-tp8-even"].layer(), hidden_size=1024)
    assert isinstance(tiles.choose(layer, 16384), Flow)
    assert not isinstance(tiles.choose(layer, 16385), Flow)


def test_a_layer_that_they_cannot_take_gets_another_method(monkeypatch):
    monkeypatch.setattr(build, "missing", lambda: None)
    changed = [
        replace(EP8, hidden_size=4128), replace(EP8, **blocks(n13=16, k13=64)),
        replace(V4, intermediate_size=2080), replace(M3, intermediate_size=3088),
    ]  # fmt: skip
    for layer, tokens in product(changed, (1, 3, 8, 64, 1024)):
        assert not isinstance(tiles.choose(layer, tokens), Once | Flow), (layer, tokens)


def test_each_layer_and_stream_counts_in_lines_of_its_own():
    room = torch.zeros(3, once.COUNTERS, dtype=torch.int32, device="meta")
    offsets = [once.own(room, *key).storage_offset() for key in ((1, 0), (1, 7), (2, 0), (1, 7))]
    assert offsets == [0, 96, 192, 96]
    with pytest.raises(RuntimeError, match="3 layers times streams on meta, and all are taken"):
        once.own(room, 2, 7)
    once._taken.pop(room.device)


def test_the_log_line_says_what_is_lacking(monkeypatch):
    monkeypatch.setattr(build, "missing", lambda: "cuda-bindings is not installed")
    said = kernel.HopperKernel().preference(EP8)
    assert said.endswith("without its CUDA C++ methods: cuda-bindings is not installed")
    assert "; few to 4 tokens, tiles, without " in said


def test_the_log_line_says_which_method_runs_with_how_many_tokens(monkeypatch):
    monkeypatch.setattr(build, "missing", lambda: None)
    choose.forget()
    said = kernel.HopperKernel().preference(EP8)
    assert said.endswith("; few to 2 tokens, once to 8 tokens, flow to 2,160 tokens, pairs")
    said = kernel.HopperKernel().preference(SHAPES["step-3.5-tp4-even"].layer())
    assert said.endswith("; few to 1 token, once to 8 tokens, flow")
    choose.forget()
