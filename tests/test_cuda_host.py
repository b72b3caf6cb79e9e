"""The host emulation of CUDA computes what a GPU would, and sees what is wrong in a kernel."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from cuda_host import driver

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

SEEDS = range(12)
COLUMNS = 48
RIGHT, NO_WAIT, EARLY, LATE = range(4)  # as in samples.cu
FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> driver.Library:
    source = Path(driver.__file__).with_name("samples.cu")
    return driver.compile(source, {"COLUMNS": COLUMNS}, tmp_path_factory.mktemp("cuda_host"))


def outcomes(launch, right) -> set[str]:
    """Over the seeds: the launch gives what is right, or something else, or fails."""
    seen = set()
    for seed in SEEDS:
        try:
            seen.add("right" if torch.equal(launch(seed), right) else "wrong")
        except RuntimeError:
            seen.add("failed")
    return seen


@pytest.mark.parametrize("fault", [RIGHT, NO_WAIT, EARLY])
def test_copies_arrive_late_and_slots_are_reused(samples, fault):
    numbers = torch.randn(6 * 256)

    def launch(seed):
        out = torch.empty_like(numbers)
        driver.launch(samples, "ring", 1, 64, 2048 + 32, [numbers, out, 6, fault], seed)
        return out

    seen = outcomes(launch, 2 * numbers)
    assert seen == {"right"} if fault == RIGHT else seen - {"right"}


@pytest.mark.parametrize("fault", [RIGHT, NO_WAIT])
def test_blocks_interleave(samples, fault):
    right = torch.arange(5).int()[1:, None] + torch.arange(64).int()

    def launch(seed):
        scratch, counter, out = (torch.zeros(size).int() for size in (64, 2, 5 * 64))
        driver.launch(samples, "hand_over", 5, 64, 0, [scratch, counter, out, fault], seed)
        assert counter.tolist() == [1, 5 * 64]
        return out.view(5, 64)[1:]

    seen = outcomes(launch, right)
    assert seen == {"right"} if fault == RIGHT else "wrong" in seen


def test_a_block_that_waits_for_one_that_has_no_room(samples):
    def launch(fault, resident):
        zeros = [torch.zeros(size).int() for size in (64, 2, 5 * 64)]
        driver.launch(samples, "hand_over", 5, 64, 0, [*zeros, fault], resident=resident)

    launch(RIGHT, 1)
    launch(LATE, 5)
    with pytest.raises(RuntimeError, match="nothing can go on"):
        launch(LATE, 4)


def test_lanes(samples):
    out = torch.empty(144).int()
    driver.launch(samples, "lanes", 1, 32, 0, [out])
    x = torch.arange(32)
    expected = [x ^ 5, torch.where(x < 3, x, x - 3), x.flip(0)]
    for lanes, step in ((32, 3), (16, 5)):
        expected.append(torch.full((lanes,), sum(1 << i for i in range(0, lanes, step))))
    assert torch.equal(out, torch.cat(expected).int())
    pair, out = torch.randint(0, 1 << 15, (2, 8, 8)).short(), torch.empty(2, 8, 8).short()
    driver.launch(samples, "transpose", 1, 32, 512, [pair, out])
    assert torch.equal(out, pair.transpose(1, 2))


def test_numbers_are_rounded_as_the_gpu_does(samples):
    codes = torch.arange(256).to(torch.uint8).view(FP8).float()
    codes = codes[codes.isfinite()].unique()
    exact = torch.cat([codes, (codes[1:] + codes[:-1]) / 2])
    special = torch.tensor([1e9, -500.0, 464.0, 1e-9, -0.0, float("inf"), 1e-40])
    numbers = torch.cat([exact, exact * (1 + 1e-6), exact * (1 - 1e-6), special, torch.randn(999)])
    numbers = numbers[: len(numbers) // 128 * 128].contiguous()
    fp8, bf16 = numbers.clamp(-448, 448).to(FP8), numbers.bfloat16()
    got8, got16 = torch.empty_like(fp8), torch.empty_like(bf16)
    driver.launch(samples, "round_numbers", len(numbers) // 128, 32, 0, [numbers, got8, got16])
    assert torch.equal(got8.view(torch.uint8), fp8.view(torch.uint8))
    assert torch.equal(got16.view(torch.int16), bf16.view(torch.int16))


def test_mma(samples):
    a, b, d = torch.randn(16, 16).bfloat16(), torch.randn(8, 16).bfloat16(), torch.randn(16, 8)
    expected = d.double() + a.double() @ b.double().T
    driver.launch(samples, "multiply_in_warp", 1, 32, 0, [a, b, d])
    torch.testing.assert_close(d.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fault", [RIGHT, NO_WAIT, EARLY])
def test_wgmma_of_swizzled_boxes(samples, fault):
    a = torch.randint(-3, 4, (64, 256)).to(FP8)
    b = torch.randint(1, 4, (COLUMNS - 1, 128)).to(FP8)  # the box has a row more
    a_map = driver.tensor_map(a, (256, 64), (256,), (128, 64), 128)
    b_map = driver.tensor_map(b, (128, COLUMNS - 1), (128,), (128, COLUMNS), 128)

    def launch(seed):
        out, shared = torch.empty(64, COLUMNS), 8192 + COLUMNS * 128 + 8
        driver.launch(
            samples, "multiply_in_group", 1, 128, shared, [a_map, b_map, out, fault], seed
        )
        return out

    right = torch.nn.functional.pad(a[:, :128].float() @ b.float().T, (0, 1))
    seen = outcomes(launch, right)
    assert seen == {"right"} if fault == RIGHT else "wrong" in seen


def test_wgmma_of_bf16(samples):
    """Both operands in shared memory."""
    a, b = torch.randn(64, 80).bfloat16(), torch.randn(128, 64).bfloat16()
    a_map = driver.tensor_map(a.view(torch.uint8), (160, 64), (160,), (128, 64), 128)
    b_map = driver.tensor_map(b.view(torch.uint8), (128, 128), (128,), (128, 128), 128)
    for seed in SEEDS:
        out = torch.empty(64, 128)
        shared = 8192 + 128 * 128 + 8
        driver.launch(samples, "multiply_bf16_in_group", 1, 128, shared, [a_map, b_map, out], seed)
        torch.testing.assert_close(out, a[:, :64].float() @ b.float().T + 1)


def test_other_copies(samples):
    x = torch.arange(2 * 3 * 2 * 5 * 8).int().view(2, 3, 2, 5, 8)
    strides = [4 * stride for stride in reversed(x.stride()[:-1])]
    boxes = driver.tensor_map(x, (8, 5, 2, 3, 2), strides, (8, 4, 2, 1, 2))
    out = torch.empty(2, 1, 2, 4, 8).int()
    driver.launch(samples, "box", 1, 32, 4 * 128 + 8, [boxes, out, 128, -2, 3])
    expected = torch.zeros_like(out)
    expected[..., :2, 2:] = x[:, 1:2, :, 3:, :6]
    assert torch.equal(out, expected)
    x, index, out = torch.randn(100), torch.randint(0, 100, (64,)).int(), torch.empty(64)
    for seed in SEEDS:
        driver.launch(samples, "gather", 1, 64, 64 * 4 + 8, [x, index, out], seed)
        assert torch.equal(out, x[index.long()].flip(0))
    x, out = torch.randint(1 << 30, (9, 4)).int(), torch.empty(64, 4).int()
    index = torch.randint(-1, 9, (64,)).int()
    there = (index >= 0)[:, None]
    for seed in SEEDS:
        driver.launch(samples, "gather_pieces", 1, 64, 64 * 16 + 8, [x, index, out], seed)
        assert torch.equal(out, torch.where(there, x[index.long()], 0).flip(0))


MISUSES = [
    "no barrier at",
    "without barriers_ready",
    r"nothing can go on(?s:.*)threads 0 to 0: wait for phase 0 .*1 of 2 arrivals.*samples.cu:\d+",
    "one arrival too many",
    "32 bytes came that were not expected",
    "not aligned to 16",
    "not in an argument",
    "its source was changed",
    r"out of range.*samples.cu:\d+",
    "out of range",
    r"misaligned.*samples.cu:\d+",
    "reads lane 1, which mask 1 lacks",
    "overwritten was the barrier",
    "out of range",
    "wait until byte 0 of 256 of tensor 0, now 0, is at least 1",
    "named_sync",
]


@pytest.mark.parametrize("fault", range(len(MISUSES)), ids=lambda i: MISUSES[i][:20])
def test_misuse_is_reported(samples, fault):
    with pytest.raises(RuntimeError, match=MISUSES[fault]):
        driver.launch(samples, "misuse", 1, 64, 64, [torch.zeros(64).int(), fault])


def test_the_next_launch_starts_after_the_wait_for_those_before(samples):
    with pytest.raises(RuntimeError, match="before this one has waited"):
        driver.launch(samples, "misuse", 1, 64, 64, [None, 18])


def test_races(samples):
    """Two phases late is too late, ended threads hold up no others, changed words arrive as NaN."""
    messages, changed = "", set()
    for seed in SEEDS:
        driver.launch(samples, "misuse", 1, 64, 64, [None, 17], seed)
        try:
            driver.launch(samples, "misuse", 1, 64, 64, [None, 16], seed)
        except RuntimeError as error:
            messages += str(error)
        numbers = torch.arange(1, 65).int()
        driver.launch(samples, "misuse", 1, 64, 64, [numbers, 7], seed, sources_may_change=True)
        changed.add(tuple(numbers[4:8].tolist()))
    assert "missed a whole phase" in messages
    assert (-1, 2, 3, 4) in changed


# --- Clusters -------------------------------------------------------------------------------------


def exchange(samples, fault, seed, grid=4, tiles=7, **more):
    """What the blocks of two clusters made of tiles copied to each other; and what is right."""
    numbers = torch.randn(2 * tiles, 2, 4, 32)
    flat = driver.tensor_map(numbers, (32, 2 * tiles * 8), (128,), (32, 4))
    halves = driver.tensor_map(numbers, (32, 4, 2 * tiles * 2), (128, 512), (32, 4, 1))
    out = torch.empty(4, tiles * 256)
    args = [flat, halves, out, tiles, fault]
    driver.launch(samples, "exchange", grid, 64, 2048 + 32, args, seed, cluster=2, **more)
    return out, torch.arange(4)[:, None] * numbers.view(2, -1).repeat_interleave(2, 0)


@pytest.mark.parametrize("resident", [4, 3, 2])
def test_blocks_of_a_cluster_copy_to_each_other(samples, resident):
    """Their bytes may come before they are expected."""
    for seed in SEEDS:
        out, right = exchange(samples, RIGHT, seed, resident=resident)
        assert torch.equal(out, right)


@pytest.mark.parametrize(
    ("fault", "often", "message"),
    [
        (
            1,
            True,
            "another copy to .* of block [01]'s shared memory is under way",
        ),  # its own readers
        (2, True, r"barrier_arrive_at: (block \d has ended|it arrives after the end of block \d)"),
        (3, True, r"nothing can go on(?s:.*)0 of 1 arrivals and 512 bytes missing"),  # to itself
        (4, True, r"nothing can go on(?s:.*)1 of 3 arrivals"),
        (
            5,
            False,
            "there is no barrier at byte 2048 of 2080 of block",
        ),  # no meeting before the first
        (6, True, "512 bytes came that were not expected"),
    ],
)
def test_what_is_wrong_between_blocks_is_seen(samples, fault, often, message):
    messages = ""
    for seed in SEEDS:
        try:
            out, right = exchange(samples, fault, seed)
            assert not often or not torch.equal(out, right)
        except RuntimeError as error:
            messages += str(error)
    assert re.search(message, messages)


def test_clusters_are_whole(samples):
    for wrong, more in {
        "not whole clusters": {"grid": 3},
        "no room for all blocks": {"resident": 1},
    }.items():
        with pytest.raises(RuntimeError, match=wrong):
            exchange(samples, RIGHT, 0, **more)


@pytest.mark.parametrize("fault", [RIGHT, EARLY])
def test_a_block_copies_over_what_another_multiplies(samples, fault):
    a = torch.randint(-3, 4, (64, 128)).to(FP8)
    b = torch.randint(1, 4, (COLUMNS, 128)).to(FP8)
    a_map = driver.tensor_map(a, (128, 64), (128,), (128, 64), 128)
    b_map = driver.tensor_map(b, (128, COLUMNS), (128,), (128, COLUMNS), 128)

    def launch(seed):
        out, shared = torch.empty(64, COLUMNS), 8192 + COLUMNS * 128 + 16
        args = [a_map, b_map, out, fault]
        driver.launch(samples, "multiply_for_peer", 2, 128, shared, args, seed, cluster=2)
        return out

    seen = outcomes(launch, a.float() @ b.float().T)
    assert seen == {"right"} if fault == RIGHT else "wrong" in seen


CLUSTER_MISUSES = [
    "block 2 of a cluster of 2",
    "to blocks 4 of a cluster of 2",
    "to blocks 0 of a cluster of 2",
    "no barrier at byte 8 of 256 of block 1",
    "without barriers_ready, to the barrier at byte 8 of 256 of block 1",
    "copy_box_to_all: (block 1 has ended|it arrives after the end of block 1)",
    "bytes came that were never expected by the barrier at byte 0 of 256 of block 1",
]


@pytest.mark.parametrize(
    "fault", range(len(CLUSTER_MISUSES)), ids=lambda i: CLUSTER_MISUSES[i][:20]
)
def test_misuse_of_clusters_is_reported(samples, fault):
    numbers = driver.tensor_map(torch.zeros(32), (32, 1), (128,), (32, 1))
    messages = ""
    for seed in SEEDS:
        with pytest.raises(RuntimeError) as error:
            driver.launch(samples, "misuse_cluster", 2, 32, 256, [numbers, fault], seed, cluster=2)
        messages += str(error.value)
    assert re.search(CLUSTER_MISUSES[fault], messages)
