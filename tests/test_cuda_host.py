"""The host emulation of CUDA computes what a GPU would, and sees what is wrong in a kernel."""

from __future__ import annotations

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
