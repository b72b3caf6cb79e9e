"""Layers to measure, by name: one rank's share of a model's experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_backend.activation import Activation
from moe_backend.formats import Bf16Weights, Fp8BlockWeights, Nvfp4Weights, Weights
from moe_backend.formats.fp8_block import Block, cdiv
from moe_backend.kernels.registry import LayerConfig

DECODE_AND_PREFILL = (1, 8, 64, 256, 1024, 4096)


@dataclass(frozen=True)
class Shape:
    """A layer on one rank."""

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

    def layer(self) -> LayerConfig:
        return LayerConfig(
            format=self.format,
            num_experts=self.experts,
            num_local_experts=self.local,
            top_k=self.top_k,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            activation=Activation.from_name("silu"),
            dtype="bfloat16",
            device="cuda",
            expert_parallel=self.local != self.experts,
            w13_block=self.w13_block,
            w2_block=self.w2_block,
        )

    def weights(self) -> Weights:
        """Random weights on the GPU."""
        e, h, i = self.local, self.hidden, self.intermediate
        if self.format == "bf16":
            w13 = torch.empty(e, 2 * i, h, device="cuda", dtype=torch.bfloat16).normal_(0, 0.02)
            w2 = torch.empty(e, h, i, device="cuda", dtype=torch.bfloat16).normal_(0, 0.02)
            return Bf16Weights(w13, w2)
        if self.format == "nvfp4":
            factor = torch.full((e, 2), 1e-4, device="cuda")
            return Nvfp4Weights(
                _codes(e, 2 * i, h // 2), _scales(e, 2 * i, h // 16), factor,
                _codes(e, h, i // 2), _scales(e, h, i // 16), factor[:, :1].clone(),
            )  # fmt: skip
        assert self.w13_block is not None
        assert self.w2_block is not None
        (n13, k13), (n2, k2) = self.w13_block, self.w2_block
        s13 = torch.rand(e, 2 * cdiv(i, n13), cdiv(h, k13), device="cuda") * 1e-4 + 1e-4
        s2 = torch.rand(e, cdiv(h, n2), cdiv(i, k2), device="cuda") * 1e-4 + 1e-4
        w13, w2 = _fp8(e, 2 * i, h), _fp8(e, h, i)
        return Fp8BlockWeights(w13, s13, w2, s2, self.w13_block, self.w2_block)


def _codes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, device="cuda", dtype=torch.uint8)


def _scales(*shape: int) -> torch.Tensor:
    return (torch.rand(shape, device="cuda") * 100 + 20).to(torch.float8_e4m3fn)


def _fp8(e: int, rows: int, columns: int) -> torch.Tensor:
    out = torch.empty(e, rows, columns, device="cuda", dtype=torch.float8_e4m3fn)
    for expert in out:
        expert.copy_(torch.randn(rows, columns, device="cuda") * 64)
    return out


_BLOCKS = ((128, 128), (128, 128))
SHAPES = {
    s.name: s
    for s in (
        Shape("step-3.5-ep8", "fp8_block", 288, 36, 8, 4096, 1280, *_BLOCKS,
              (*DECODE_AND_PREFILL, 16384)),
        Shape("step-3.5-tp8-even", "fp8_block", 288, 288, 8, 4096, 160, (32, 128), (128, 32)),
        Shape("step-3.5-tp8-padded", "fp8_block", 288, 288, 8, 4096, 256, *_BLOCKS),
        Shape("step-3.5-tp4-padded", "fp8_block", 288, 288, 8, 4096, 384, *_BLOCKS,
              (1, 64, 1024, 4096)),
        Shape("deepseek-v3-ep8", "fp8_block", 256, 32, 8, 7168, 2048, *_BLOCKS),
        Shape("deepseek-v4-flash-ep8", "nvfp4", 256, 32, 6, 4096, 2048, None, None,
              (*DECODE_AND_PREFILL, 16384)),
        Shape("deepseek-v4-flash-tp1", "nvfp4", 256, 256, 6, 4096, 2048),
        Shape("minimax-m3-ep4", "bf16", 128, 32, 4, 6144, 3072, None, None, (1, 64, 1024)),
        Shape("minimax-m3", "bf16", 128, 128, 4, 6144, 3072, None, None, (1, 64, 1024)),
        Shape("qwen3-235b-ep8", "fp8_block", 128, 16, 8, 4096, 1536, *_BLOCKS),
        Shape("gpt-oss-like", "bf16", 128, 128, 4, 2880, 2880, None, None, (1, 8, 64, 1024)),
    )
}  # fmt: skip
