"""Layers for the one-launch kernel (once.cu), and by torch what it must make of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from cuda_host import driver

from moe_backend.kernels.hopper.codes import rearranged, rearranged_scales

SOURCE = driver.KERNELS / "once.cu"
SHARED = 120000
BF16, FP8, NVFP4 = range(3)
SILU, SWIGLUSTEP, CLAMPED_SILU, SWIGLUOAI = range(4)
LIMIT, ALPHA, BETA = 2.0, 1.702, 1.0
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


@dataclass(frozen=True)
class Layer:
    format: int
    h: int
    i: int
    activation: int
    experts: int = 5
    num_ids: int = 9
    top_k: int = 3
    n13: int = 128
    k13: int = 128
    n2: int = 128
    k2: int = 128
    blocks: int = 3
    token_blocks: int = 1
    producers: int = 3
    wide_ids: bool = False
    weight_on_input: bool = False
    consumers: int = 8
    chunk: int = 2048

    def defines(self) -> dict[str, object]:
        constants: dict[str, object] = {
            "FORMAT": self.format, "SIZE_H": self.h, "SIZE_I": self.i, "EXPERTS": self.experts,
            "NUM_IDS": self.num_ids, "TOP_K": self.top_k, "TOKEN_BLOCKS": self.token_blocks,
            "ROW_GROUPS": -(-self.h // (16 * self.blocks)), "ACTIVATION": self.activation,
            "HAS_MAP": int(self.num_ids != self.experts), "IDS64": int(self.wide_ids),
            "WEIGHT_ON_INPUT": int(self.weight_on_input), "SHARED_BYTES": SHARED,
            "CONSUMERS": self.consumers, "COPYING": self.producers, "CHUNK": self.chunk,
        }  # fmt: skip
        if self.format == FP8:
            constants |= {"N13": self.n13, "K13": self.k13, "N2": self.n2, "K2": self.k2}
        return constants


@dataclass
class Weights:
    """A projection: what the kernel reads, and what it stands for in fp32."""

    codes: torch.Tensor
    scale: torch.Tensor
    factor: torch.Tensor
    dense: torch.Tensor


def weights(layer: Layer, rows: int, columns: int, n: int, k: int, halves: int) -> Weights:
    e, none = layer.experts, torch.zeros(1)
    if layer.format == BF16:
        codes = (torch.randn(e, halves * rows, columns) * columns**-0.5).bfloat16()
        return Weights(codes, none, none, codes.float())
    if layer.format == FP8:
        codes = torch.randn(e, halves * rows, columns).to(torch.float8_e4m3fn)
        scale = (torch.rand(e, halves, -(-rows // n), -(-columns // k)) + 0.5) * columns**-0.5
        spread = scale.repeat_interleave(n, 2)[:, :, :rows].repeat_interleave(k, 3)[..., :columns]
        return Weights(codes, scale, none, codes.float() * spread.flatten(1, 2))
    nibbles = torch.randint(0, 16, (e, halves * rows, columns))
    packed = rearranged((nibbles[..., ::2] | nibbles[..., 1::2] << 4).to(torch.uint8))
    scale = (torch.rand(e, halves * rows, columns // 16) * 2).to(torch.float8_e4m3fn)
    own_scale = rearranged_scales(scale, gate_up=halves == 2)
    factor = (torch.rand(e, halves) + 0.5) * columns**-0.5 * 0.3
    dense = E2M1[nibbles] * scale.float().repeat_interleave(16, 2)
    return Weights(packed, own_scale, factor, dense * factor.repeat_interleave(rows, 1)[..., None])


def activated(kind: int, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if kind in (CLAMPED_SILU, SWIGLUOAI):
        gate = gate.clamp(max=LIMIT)
    if kind != SILU:
        up = up.clamp(-LIMIT, LIMIT)
    if kind == SWIGLUOAI:
        return gate * torch.sigmoid(ALPHA * gate) * (up + BETA)
    gate = torch.nn.functional.silu(gate)
    return (gate.clamp(max=LIMIT) if kind == SWIGLUSTEP else gate) * up


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


class Case:
    def __init__(self, layer: Layer, tokens: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.layer, self.tokens = layer, tokens
        self.x = (torch.randn(tokens, layer.h) * 2).bfloat16()
        self.ids = torch.rand(tokens, layer.num_ids).argsort(1)[:, : layer.top_k].contiguous()
        self.topk_weights = torch.rand(tokens, layer.top_k)
        self.map = torch.full((layer.num_ids,), -1, dtype=torch.int32)
        mapped = layer.num_ids != layer.experts
        local = torch.randperm(layer.num_ids) if mapped else torch.arange(layer.experts)
        self.map[local[: layer.experts]] = torch.arange(layer.experts, dtype=torch.int32)
        self.w13 = weights(layer, layer.i, layer.h, layer.n13, layer.k13, 2)
        self.w2 = weights(layer, layer.h, layer.i, layer.n2, layer.k2, 1)
        self.counters = torch.zeros(96, dtype=torch.int32)

    def run(self, seed: int = 0, resident: int | None = None) -> torch.Tensor:
        """The output; `hidden`, what the first GEMM left, stays."""
        layer, columns, w13, w2 = self.layer, 8 * self.layer.token_blocks, self.w13, self.w2
        hits = min(layer.experts, columns * layer.top_k)
        self.hidden = torch.full((hits * columns, layer.i), float("nan"), dtype=torch.bfloat16)
        out = torch.full((self.tokens, layer.h), float("nan"), dtype=torch.bfloat16)
        ids = self.ids.to(torch.int64 if layer.wide_ids else torch.int32)
        driver.launch(
            driver.compile(SOURCE, layer.defines()), "moe_once", layer.blocks,
            32 * (layer.consumers + 2 + layer.producers), SHARED,
            [self.x, ids, self.map, self.topk_weights, w13.codes, w13.scale, w13.factor, w2.codes,
             w2.scale, w2.factor, self.hidden, out, self.counters, self.tokens, LIMIT, ALPHA, BETA],
            seed=seed, resident=resident,
        )  # fmt: skip
        assert not self.counters.any(), "the counters are not as the next launch wants them"
        return out

    def routes(self) -> list[tuple[int, int, int, float]]:
        """(hit, expert, token, weight), in ascending order."""
        weight: dict[tuple[int, int], float] = {}
        for token, k in product(range(self.tokens), range(self.layer.top_k)):
            name = int(self.ids[token, k])
            expert = int(self.map[name]) if 0 <= name < self.layer.num_ids else -1
            if expert >= 0:
                pair = expert, token
                weight[pair] = weight.get(pair, 0.0) + float(self.topk_weights[token, k])
        hits = sorted({expert for expert, _ in weight})
        return [(hits.index(e), e, token, w) for (e, token), w in sorted(weight.items())]

    def hidden_of(self, hit: int, expert: int, token: int) -> torch.Tensor:
        row = self.hidden[hit * self.tokens + token].float()
        if self.layer.format == BF16:
            return row
        if self.layer.format == NVFP4:
            row = row.view(-1, 4, 4, 4, 2).permute(0, 2, 1, 4, 3).flatten()
            return row / (self.w2.factor[expert] * 256)
        if self.layer.k2 >= 64 and self.layer.i % 64 == 0:
            row = row.view(-1, 2, 4, 8).transpose(1, 2)  # of 64: odd eights behind even ones
        return row.reshape(-1, 2, 2).transpose(1, 2).flatten()  # 0 2 1 3 of each four

    def check(self, out: torch.Tensor) -> None:
        """Each GEMM by itself."""
        layer, expected = self.layer, torch.zeros(self.tokens, self.layer.h)
        for hit, expert, token, weight in self.routes():
            x = self.x[token]
            if layer.weight_on_input:
                x, weight = (x.float() * weight).bfloat16(), 1.0
            gate, up = (x.float() @ self.w13.dense[expert].T).chunk(2)
            hidden = self.hidden_of(hit, expert, token)
            assert apart(hidden, activated(layer.activation, gate, up) * weight) < 0.005
            expected[token] += hidden @ self.w2.dense[expert].T
        assert apart(out.float(), expected) < 0.005
