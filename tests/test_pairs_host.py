"""GEMMs of FP8 and bf16 for many tokens (`pairs_fp8.cu`, `pairs_bf16.cu`) on a CPU."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

import pytest
import torch
from cuda_host import driver

from moe_backend.activation import Activation

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

E4M3 = torch.float8_e4m3fn
POISON = 0x7F  # NaN
SHARED_BYTES = 227 * 1024
GROUP = 128
KINDS = ("silu", "swiglustep", "clamped_silu", "swigluoai_uninterleave")


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Case:
    tokens: tuple[int, ...]  # of each expert
    n: int
    k: int
    block: tuple[int, int] | None  # of scales; None: bf16
    gated: bool = True
    kind: int = 1
    grid: int = 4
    stages: int = 3
    lone: bool = False  # some outputs go to their token's row
    tile: int = 192  # bf16: tokens of an item at most


CASES = {
    "one token": Case((0, 1, 0), 128, 256, (128, 128)),
    "one block of rows": Case((70, 3), 64, 192, (32, 128)),
    "tiles in pairs": Case((129, 0, 200), 256, 128, (128, 128), kind=2),
    "pairs and one": Case((300, 65), 320, 256, (64, 128), kind=3),
    "halves filled": Case((64, 40, 192), 160, 144, (32, 64), kind=0, grid=2),
    "outputs": Case((129, 17, 0, 64), 512, 320, (128, 128), gated=False),
    "odd outputs": Case((100, 5), 264, 160, (64, 32), gated=False),
    "shard": Case((140, 90), 768, 320, (128, 64), gated=False, stages=4),
    "half a block left": Case((200, 129, 50), 192, 128, (64, 128), grid=2),
    "outputs that go elsewhere": Case(
        (129, 17, 0, 64), 520, 320, (128, 128), gated=False, lone=True
    ),
    "half a block of outputs": Case((30, 250), 384, 128, (128, 128), gated=False),
    "bf16: one token": Case((0, 1, 0), 128, 192, None),
    "bf16: one block of rows": Case((70, 3), 64, 200, None, kind=0),
    "bf16: tokens of items": Case((129, 0, 200, 17, 145, 104), 256, 128, None, kind=2),
    "bf16: several tiles": Case((385, 65, 8), 328, 136, None, kind=3),
    "bf16: short tiles": Case((300, 65, 64), 136, 72, None, tile=64),
    "bf16: half a block left": Case((200, 129, 50), 192, 64, None, grid=2, stages=2),
    "bf16: outputs": Case((129, 17, 0, 64), 520, 168, None, gated=False),
    "bf16: outputs that go elsewhere": Case((30, 250), 384, 128, None, gated=False, lone=True),
    "bf16: most outputs that go elsewhere": Case((192,), 264, 64, None, gated=False, lone=True),
}


class Problem:
    """A case's tensors, its launch, and what torch makes of them."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case = case
        e, (n, k), pair = len(case.tokens), (case.n, case.k), 2 if case.gated else 1
        entries, first = [], 0
        for expert, count in enumerate(case.tokens):
            if count:
                entries += [expert, first, first + count]
            first += cdiv(count, 4) * 4
        self.positions = first
        self.list = torch.tensor([len(entries) // 3, *entries], dtype=torch.int32)
        self.kind = E4M3 if case.block else torch.bfloat16
        self.weights = (torch.randn(e * pair, n, k) * 2).to(self.kind)
        block = case.block or (n, k)
        self.scale = torch.rand(e * pair, cdiv(n, block[0]), cdiv(k, block[1])) * 0.1 + 0.01
        for column in range(1, self.scale.shape[2]):  # some neighbours have the same
            same = torch.rand(self.scale.shape[:2]) < 0.6
            self.scale[..., column][same] = self.scale[..., column - 1][same]
        self.tokens = (torch.randn(first, k) * 2).to(self.kind)
        self.token_scale = torch.rand(cdiv(k, 128), first) * 0.1 + 0.01
        if case.block is None:  # products as large as with FP8
            self.scale[:], self.token_scale[:] = 1, 1
            self.tokens *= 0.1**2
        routed = torch.zeros(first, dtype=torch.bool)
        for _, begin, end in self.ranges():
            routed[begin:end] = True
        self.routed = routed
        raw = self.tokens.view(torch.uint8 if case.block else torch.int16)
        raw[~routed] = POISON if case.block else -1  # NaN, what lies between experts
        if case.block:
            self.token_scale[:, ~routed] = float("nan")
        # Of positions: rows of the sums, some of which are not here, and weights.
        self.row = torch.randperm(first + 7)[:first].int()
        self.row[torch.rand(first) < 0.4] = -1
        self.weight = torch.where(self.row < 0, 1.0, torch.rand(first))

    def ranges(self) -> list[tuple[int, int, int]]:
        return [(row[0], row[1], row[2]) for row in self.list[1:].view(-1, 3).tolist()]

    def run(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the kernel writes: hidden codes with scales, or outputs and those of targets."""
        case, p, (n, k) = self.case, self.positions, (self.case.n, self.case.k)
        coded, wide = case.gated and case.block is not None, self.weights.element_size()
        targets = torch.stack([self.row, self.weight.view(torch.int32)], 1).contiguous()
        targets[~self.routed] = 1 << 30
        sums = torch.full((p + 7, n), -1, dtype=torch.bfloat16)
        kind = torch.uint8 if coded else torch.bfloat16
        out = torch.full((p, n), POISON if coded else -1, dtype=kind)
        out_scale = torch.full((cdiv(n, GROUP), p), float("nan"))
        scales = torch.cat([self.token_scale.flatten(), torch.full((128,), float("nan"))])
        row, activation = wide * k, [7.0 if case.kind else 0.0, 1.702, 1.0]
        box = 64 if case.block else 16
        tokens = driver.tensor_map(self.tokens.view(torch.uint8), [row, p], [row], [128, box], 128)
        defines = {
            "GATED": int(case.gated), "STAGES": case.stages, "EXPERTS": len(case.tokens),
            "ACTIVATION": case.kind, "LONE": int(case.lone), "SHARED_BYTES": SHARED_BYTES,
        }  # fmt: skip
        if case.block:
            name = "pairs_fp8"
            defines |= {"SCALE_N": case.block[0], "SCALE_K": case.block[1], "STREAMED": 1}
            given = [
                tokens, self.matrices(64), scales, self.scale, self.list, out, out_scale,
                *activation, n, k, p, *self.scale.shape[1:], targets, sums,
            ]  # fmt: skip
        else:
            name = "pairs_bf16"
            defines["TILE"] = case.tile
            weights = self.gate_up() if case.gated else self.matrices(256)
            given = [tokens, weights, self.list, out, *activation, n, k, targets, sums]
        library = driver.compile(driver.KERNELS / f"{name}.cu", defines)
        driver.launch(library, name, case.grid, 384, SHARED_BYTES, given, seed, cluster=2)
        return out, out_scale if coded else sums

    def matrices(self, box: int) -> driver.TensorMap:
        """Weights in boxes of so many rows of a matrix."""
        (n, k), wide = (self.case.n, self.case.k), self.weights.element_size()
        return driver.tensor_map(
            self.weights.view(torch.uint8), [wide * k, n, len(self.weights)],
            [wide * k, wide * n * k], [128, box, 1], 128,
        )  # fmt: skip

    def gate_up(self) -> driver.TensorMap:
        """bf16's, eights of gate and of up rows in turn."""
        n, row, e = self.case.n, 2 * self.case.k, len(self.case.tokens)
        return driver.tensor_map(
            self.weights.view(torch.uint8), [row, 8, 2, n // 8, e],
            [row, n * row, 8 * row, 2 * n * row], [128, 8, 2, 16, 1], 128,
        )  # fmt: skip

    def product(self, matrix: int, begin: int, end: int) -> torch.Tensor:
        """Tokens of some positions with a matrix of weights."""
        n, k = self.case.n, self.case.k
        block = self.case.block or (n, k)
        scale = self.token_scale[:, begin:end].T.repeat_interleave(128, 1)[:, :k].double()
        spread = self.scale[matrix].repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        weights = self.weights[matrix].double() * spread[:n, :k]
        return (self.tokens[begin:end].double() * scale) @ weights.T

    def outputs(self, out: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        """Of all positions, from wherever they have gone."""
        if not self.case.lone:
            assert (sums == -1).all()
            return out.double()
        away = self.routed & (self.row >= 0)
        assert (out[away] == -1).all()
        untouched = torch.ones(len(sums), dtype=torch.bool)
        untouched[self.row[away].long()] = False
        assert (sums[untouched] == -1).all()
        out = out.double()
        out[away] = sums[self.row[away].long()].double() / self.weight[away, None].double()
        return out

    def check(self, out: torch.Tensor, out_scale: torch.Tensor) -> None:
        case = self.case
        if not case.gated:
            out = self.outputs(out, out_scale)
        activation = Activation.from_name(KINDS[case.kind], limit=7.0 if case.kind else None)
        for expert, begin, end in self.ranges():
            if not case.gated:
                wanted = self.product(expert, begin, end)
                tolerance = float(wanted.abs().max()) * 1e-5
                # bf16's are rounded before their weight as well.
                rtol = 2**-7 if case.lone and case.block is None else 2**-8
                torch.testing.assert_close(
                    out[begin:end].double(), wanted, rtol=rtol, atol=tolerance
                )
                continue
            gate, up = (self.product(2 * expert + i, begin, end) for i in range(2))
            wanted = activation(gate, up).double()
            if case.block is None:
                tolerance = float(wanted.abs().max()) * 1e-5
                torch.testing.assert_close(
                    out[begin:end].double(), wanted, rtol=2**-7, atol=tolerance
                )
                continue
            padded = torch.nn.functional.pad(wanted, (0, -case.n % GROUP))
            amax = padded.view(end - begin, -1, GROUP).abs().amax(2)
            scale = out_scale[:, begin:end].T
            torch.testing.assert_close(scale, (amax / 448).float(), rtol=1e-4, atol=0)
            scales = scale.repeat_interleave(GROUP, 1)[:, : case.n].double()
            codes = out[begin:end].view(E4M3)
            same = (wanted / scales).to(E4M3).float() == codes.float()
            assert same.double().mean() > 0.99
            torch.testing.assert_close(
                codes.double() * scales, wanted, rtol=0.07, atol=float(amax.max()) / 2**14
            )
        coded = case.gated and case.block is not None
        assert (out[~self.routed] == (POISON if coded else -1)).all()


@pytest.mark.parametrize("name", CASES)
def test_results(name: str) -> None:
    problem = Problem(CASES[name])
    first = problem.run(seed=1)
    problem.check(*first)
    again = problem.run(seed=2)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("block", [(32, 128), None], ids=["fp8", "bf16"])
def test_more_experts_than_threads(block: tuple[int, int] | None) -> None:
    """The list of those that were hit is read in rounds, by several warps."""
    torch.manual_seed(1)
    tokens = tuple(int(n) for n in torch.randint(0, 3, (600,)))
    problem = Problem(Case(tokens, 16, 32, block))
    problem.check(*problem.run(seed=1))


@pytest.mark.parametrize("name", ["one token", "bf16: one token"])
def test_nothing_routed(name: str) -> None:
    problem = Problem(CASES[name])
    problem.list[0] = 0
    out, _ = problem.run(seed=0)
    assert (out == (POISON if problem.case.block else -1)).all()
