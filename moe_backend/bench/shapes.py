"""Layers to measure, by name: one rank's share of a model's experts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from moe_backend.activation import Activation
from moe_backend.formats import Bf16Weights, Fp8BlockWeights, Nvfp4Weights, Weights
from moe_backend.formats.fp8_block import Block, by, cdiv
from moe_backend.kernels.registry import LayerConfig

DECODE_AND_PREFILL = (1, 8, 64, 256, 1024, 4096)


@dataclass(frozen=True)
class Shape:
    """A layer on one rank.

    Attributes:
        format: name of the weight format.
        experts: of the model; local: of this rank.
        hidden, intermediate: elements of this rank's shard.
        w13_block, w2_block: `(n, k)` that one scale covers in fp8_block, None elsewhere.
        tokens: token counts to measure.
        rivals_of: the same layer as backends store it that do not take this one's scale blocks;
            they are measured on it and named `NAME (padded)`.
        stored: what stands there for `padded`. Layers that only this package turns into another
            format have no rivals but those.
    """

    name: str
    format: str
    experts: int
    local: int
    top_k: int
    hidden: int
    intermediate: int
    w13_block: Block | None = None
    w2_block: Block | None = None
    tokens: tuple[int, ...] = DECODE_AND_PREFILL
    rivals_of: Shape | None = None
    stored: str = "padded"

    def at(self, tokens: Iterable[int]) -> Shape:
        """The same layer, measured at other token counts."""
        counts = tuple(tokens)
        other = self.rivals_of and replace(self.rivals_of, tokens=counts)
        return replace(self, tokens=counts, rivals_of=other)

    def layer(self, device: str = "cuda") -> LayerConfig:
        """What the kernels are told; the activation is silu, as the rivals all have it."""
        return LayerConfig(
            format=self.format,
            num_experts=self.experts,
            num_local_experts=self.local,
            top_k=self.top_k,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            activation=Activation.from_name("silu"),
            dtype="bfloat16",
            device=device,
            expert_parallel=self.local != self.experts,
            w13_block=self.w13_block,
            w2_block=self.w2_block,
        )

    def weights(self, device: str = "cuda") -> Weights:
        """Random canonical weights."""
        e, h, i = self.local, self.hidden, self.intermediate
        if self.format == Bf16Weights.name:
            w13 = torch.empty(e, 2 * i, h, device=device, dtype=torch.bfloat16).normal_(0, 0.02)
            w2 = torch.empty(e, h, i, device=device, dtype=torch.bfloat16).normal_(0, 0.02)
            return Bf16Weights(w13, w2)
        if self.format == Nvfp4Weights.name:
            factor = torch.full((e, 2), 1e-4, device=device)
            return Nvfp4Weights(
                _codes(device, e, 2 * i, h // 2), _scales(device, e, 2 * i, h // 16), factor,
                _codes(device, e, h, i // 2), _scales(device, e, h, i // 16),
                factor[:, :1].clone(),
            )  # fmt: skip
        assert self.w13_block is not None
        assert self.w2_block is not None
        (n13, k13), (n2, k2) = self.w13_block, self.w2_block
        # The second rank's: where its shard is off the grid, neighbours have the same block's.
        rows, columns = _blocks(i, n13), _blocks(i, k2)
        s13 = torch.rand(e, 2, int(rows[-1]) + 1, cdiv(h, k13), device=device) * 1e-4 + 1e-4
        s2 = torch.rand(e, cdiv(h, n2), int(columns[-1]) + 1, device=device) * 1e-4 + 1e-4
        s13 = s13[:, :, rows.to(device)].flatten(1, 2)
        s2 = s2[..., columns.to(device)].contiguous()
        w13, w2 = _fp8(device, e, 2 * i, h), _fp8(device, e, h, i)
        return Fp8BlockWeights(w13, s13, w2, s2, self.w13_block, self.w2_block)

    def describe(self) -> str:
        """One line for `--list`."""
        blocks = dict.fromkeys(by(b) for b in (self.w13_block, self.w2_block) if b is not None)
        block = f" {' and '.join(blocks)}" if blocks else ""
        return (
            f"{self.format}{block}, {self.local}/{self.experts} experts, top-{self.top_k}, "
            f"hidden {self.hidden}, intermediate {self.intermediate}, "
            f"tokens {' '.join(map(str, self.tokens))}"
        )


def _blocks(size: int, each: int) -> torch.Tensor:
    """The checkpoint's block, 128 wide, of each `each` of the second shard's `size`, from 0 on."""
    first = torch.arange(size, 2 * size, each)
    return first // max(each, 128) - size // max(each, 128)


def _codes(device: str, *shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, device=device, dtype=torch.uint8)


def _scales(device: str, *shape: int) -> torch.Tensor:
    return (torch.rand(shape, device=device) * 100 + 20).to(torch.float8_e4m3fn)


def _fp8(device: str, e: int, rows: int, columns: int) -> torch.Tensor:
    out = torch.empty(e, rows, columns, device=device, dtype=torch.float8_e4m3fn)
    for expert in out:
        expert.copy_(torch.randn(rows, columns, device=device) * 64)
    return out


_BLOCKS = ((128, 128), (128, 128))
_LONG = (*DECODE_AND_PREFILL, 16384)
_FEW = (1, 64, 1024, 4096)
_STEP = ("fp8_block", 288, 288, 8, 4096)
_TP8 = Shape("step-3.5-tp8-padded", *_STEP, 256, *_BLOCKS)
_PACKED = Shape("deepseek-v4-flash-ep8", "nvfp4", 256, 32, 6, 4096, 2048, None, None, _LONG)
_TP4 = Shape("step-3.5-tp4-padded", *_STEP, 384, *_BLOCKS, _FEW)

SHAPES = {
    s.name: s
    for s in (
        Shape("step-3.5-ep8", "fp8_block", 288, 36, 8, 4096, 1280, *_BLOCKS, _LONG),
        Shape("step-3.5-tp1", *_STEP, 1280, *_BLOCKS),
        # 1280 rows over eight ranks are 160, over four 320: not whole blocks of 128.
        Shape("step-3.5-tp8-even", *_STEP, 160, (32, 128), (128, 32), rivals_of=_TP8),
        _TP8,
        Shape("step-3.5-tp4-even", *_STEP, 320, (64, 128), (128, 64), _FEW, _TP4),
        _TP4,
        Shape("deepseek-v4-flash-tp1", "nvfp4", 256, 256, 6, 4096, 2048),
        _PACKED,
        # The same experts folded into FP8 while loading (docs/nvfp4.md).
        Shape("deepseek-v4-flash-ep8-folded", "fp8_block", 256, 32, 6, 4096, 2048, *_BLOCKS, _LONG,
              _PACKED, "nvfp4"),
        Shape("minimax-m3", "bf16", 128, 128, 4, 6144, 3072, None, None, (1, 64, 1024, 4096)),
        Shape(
            *("minimax-m3-ep4", "bf16", 128, 32, 4, 6144, 3072, None, None),
            (1, 64, 1024, 4096, 16384),
        ),
        Shape("deepseek-v3-ep8", "fp8_block", 256, 32, 8, 7168, 2048, *_BLOCKS),
        Shape("qwen3-235b-ep8", "fp8_block", 128, 16, 8, 4096, 1536, *_BLOCKS),
        # Shards of 1536 rows that are no whole steps of NVFP4's second GEMM, of 256 columns.
        Shape("qwen3-235b-nvfp4-tp8", "nvfp4", 128, 128, 8, 4096, 192),
        Shape("qwen3-235b-nvfp4-tp4", "nvfp4", 128, 128, 8, 4096, 384),
        Shape("glm-class-ep8", "fp8_block", 288, 36, 8, 6144, 2048, *_BLOCKS),
        Shape("gpt-oss-like", "bf16", 128, 128, 4, 2880, 2880, None, None, (1, 8, 64, 1024, 4096)),
    )
}  # fmt: skip

# The layers that the project's speed is judged by; measured where no shape is named.
USUAL = (
    "step-3.5-ep8", "step-3.5-tp8-even", "step-3.5-tp8-padded", "step-3.5-tp4-padded",
    "deepseek-v4-flash-tp1", "deepseek-v4-flash-ep8", "deepseek-v4-flash-ep8-folded",
    "minimax-m3", "minimax-m3-ep4",
)  # fmt: skip
