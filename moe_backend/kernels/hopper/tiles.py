"""Tile sizes of the Hopper kernels by format and slots per expert.

Measured on an H200; `docs/kernels.md` and the pages it leads to say what was tried.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp

from moe_backend.formats import Bf16Weights, Fp8BlockWeights, Nvfp4Weights
from moe_backend.formats.fp8_block import cdiv
from moe_backend.kernels.cuda import build
from moe_backend.kernels.registry import LayerConfig


@dataclass(frozen=True)
class Tile:
    """One GEMM's tile and launch.

    Attributes:
        m: slots of one expert, from 16.
        n: output columns: hidden columns of the first GEMM (each one gate and one up row).
        k: depth of one step.
        warps, stages: of the launch; per_sm: programs that share a multiprocessor.
        split: (first GEMM) gate and up rows in two tiles rather than in turns of eight in one.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    per_sm: int
    split: bool = False


@dataclass(frozen=True)
class Tiles:
    """The tiled GEMMs (`tiled.py`) with these tiles."""

    gate_up: Tile
    down: Tile

    def activation_groups(self, layer: LayerConfig) -> tuple[int, int] | None:
        """As in `registry.Kernel.activation_groups`."""
        return (128, self.gate_up.n) if layer.format == Fp8BlockWeights.name else None


@dataclass(frozen=True)
class Part:
    """How one launch of matrix-vector products deals out its rows.

    Attributes:
        lanes: threads that share a weight row, each reading 16 bytes of it at a time; a power of
            two up to 32.
        unroll: such reads of two rows on their way at once.
        warps: of a program.
    """

    lanes: int
    unroll: int
    warps: int

    @property
    def groups(self) -> int:
        """Groups of lanes in a program; each has a gate and an up row, or two rows of w2."""
        return self.warps * 32 // self.lanes


@dataclass(frozen=True)
class Few:
    """Matrix-vector products in two launches (`few.py`).

    Attributes:
        gate_up, down: of the two launches.
        per_sm: programs of the first that share a multiprocessor; they take tiles in turn.
        repeat: tiles of one token that a program of the second takes.
    """

    gate_up: Part
    down: Part
    per_sm: int
    repeat: int = 1

    def activation_groups(self, layer: LayerConfig) -> tuple[int, int] | None:
        """As in `registry.Kernel.activation_groups`."""
        return None


@dataclass(frozen=True)
class Once:
    """All in one launch, for few tokens (`once.py`).

    Attributes:
        blocks: of eight tokens, 1, 2 or 4: the columns of every product.
    """

    blocks: int

    def activation_groups(self, layer: LayerConfig) -> tuple[int, int] | None:
        """As in `registry.Kernel.activation_groups`."""
        return None


@dataclass(frozen=True)
class Flow:
    """FP8 and NVFP4, both GEMMs in one launch, weights first (`flow.py`).

    Attributes:
        tokens: of a tile at most, 8 to 128.
        groups: of four warps that multiply, 2 to 4.
        blocks: of 64 weight rows for each of these, 1 to 3; with NVFP4 2 or 4 in all.
        stages: steps of 128 columns that shared memory holds, of 256 with NVFP4.
    """

    tokens: int
    groups: int
    blocks: int
    stages: int

    def activation_groups(self, layer: LayerConfig) -> tuple[int, int] | None:
        """As in `registry.Kernel.activation_groups`."""
        quantised = layer.format == Fp8BlockWeights.name
        return (128, 32 * self.groups * self.blocks) if quantised else None


@dataclass(frozen=True)
class Pairs:
    """Many tokens per expert, by pairs of blocks that share operands (`pairs.py`).

    Attributes:
        stages: steps of 128 columns that shared memory holds, with bf16 of 64; with NVFP4 of tokens
            alone.
    """

    stages: int

    def activation_groups(self, layer: LayerConfig) -> tuple[int, int] | None:
        """As in `registry.Kernel.activation_groups`."""
        return (128, 128) if layer.format == Fp8BlockWeights.name else None


Choice = Tiles | Few | Once | Flow | Pairs

MOST_TOP_K = 512  # slots of a token that the routing of `Flow` and `Pairs` places at once
# Shared memory that a program can have (CUDA C++ Programming Guide, compute capability 9.0).
# Programs that do not fit beside each other on a multiprocessor run in turns: slow at most.
SHARED_BYTES = 227 * 1024


def require(holds: bool, wanted: str) -> None:
    """Raises ValueError unless a choice has what the device code is written for."""
    if not holds:
        raise ValueError(f"{wanted} expected")


BITS = {Bf16Weights.name: 16, Fp8BlockWeights.name: 8, Nvfp4Weights.name: 4}
# Where matrix-vector products win: few tokens, narrow shards a few more, and not so many weights
# that reading them takes all the time anyway.
FEW_TOKENS, FEW_TOKENS_NARROW, NARROW = 4, 8, 512
FEW_SLOTS, FEW_BYTES = 64, 250e6
# Formats whose narrow shards go on with `Flow`, if it can run them, after FEW_TOKENS: of
# Qwen3-235B in NVFP4, TP8 and TP4, `Few` took 67.4 and 91.9 us with 8 tokens, 46.5 and 61.5 with 5,
# `Flow` 49.2 and 70.0, 45.7 and 59.0; with 4 38.7 and 52.5, 43.1 and 50.0.
NARROW_FLOWS = (Nvfp4Weights.name,)
# Tiles of 128 hidden columns from which they win over tiles of 64: four for each of an H200's
# multiprocessors. Measured at 64 tokens far below (300) and far above (2,400).
ENOUGH_TILES = 528
# Tokens, or bytes of weights that are hit, from which one launch wins over two of matrix-vector
# products; from one token on with other formats. Measured with 1 and 2 tokens from 16 to 130 MB.
ONCE_FROM, ONCE_FROM_BYTES = {Fp8BlockWeights.name: 3}, 35e6
# Hidden sizes up to which it was found faster: with FP8 at 6,144 56 us with 4 tokens, `Few` 69.
# Beyond, tokens leave less shared memory for weights: at 7,168 131 us with 8, `Tiles` 98.
ONCE_HIDDEN = {Fp8BlockWeights.name: 6144, Nvfp4Weights.name: 4096, Bf16Weights.name: 6144}
ONCE_WARPS = 16  # that multiply
ONCE_BLOCKS = (1, 2, 4)  # of eight tokens
# Bytes of weights that are hit up to which one launch wins over `Flow`, which reads them faster
# once it has begun. On one rank of Step-3.5 2, 4 and 8 tokens hit 250, 480 and 910 MB.
ONCE_BYTES = 400e6
# Where weights flow: tokens of a tile by slots per expert, and for FP8 slots from which tiles of up
# to 64 tokens have 384 rows of weights and not 256. Measured from 0.4 to 228.
FLOW_SLOTS = ((4, 8), (10, 16), (20, 32), (60, 64))
FLOW_LONG = 1.0
# Items, of all experts hit, below which they are made shorter, 256 rows of weights instead of 384
# with FP8, 128 instead of 256 with NVFP4: three for each of an H200's multiprocessors. Measured
# with FP8 at 304 and 648 and with NVFP4 at 192, 320, 500 and far above.
FLOW_ITEMS = 400
# Intermediate sizes of FP8 shards that flow beyond. Measured at 160, 256, 320 and 384.
FLOW_NARROW = 384
# The same for NVFP4, and up to how many slots per expert: at 64 it is 1.14 times as fast as `Pairs`
# with 192 columns, at 256 slots as fast; with 384 columns as fast at 64.
FLOW_NARROW_NVFP4, FLOW_SLOTS_NVFP4 = 256, 128
FLOW_MOST_SLOTS = 1 << 17  # of a call
# Slots per expert from which sorted tokens win where weights do not flow (with bf16 measured at 32,
# where tiles are faster by a fiftieth, and at 64, where they take 1.16 to 1.2 times as long).
MANY, MANY_BF16 = 14, 48
# Where pairs of blocks share what they read: the most steps that shared memory holds, and tokens of
# an item of weights first.
PAIRS_STAGES = {Fp8BlockWeights.name: 4, Nvfp4Weights.name: 4, Bf16Weights.name: 3}
PAIRS_TOKENS = {Nvfp4Weights.name: 128, Bf16Weights.name: 192}


def choose(layer: LayerConfig, tokens: int) -> Choice:
    """The method for a call with this many tokens, and its numbers."""
    once, flowing = _once(layer, tokens), _flowing(layer, tokens)
    expert = 3 * layer.intermediate_size * layer.hidden_size * BITS[layer.format] // 8  # bytes
    slots = tokens * layer.top_k * layer.num_local_experts / layer.num_experts  # on this rank
    if once and flowing is not None:
        hit = layer.num_local_experts * (1 - exp(-slots / layer.num_local_experts))
        if hit * expert > ONCE_BYTES:
            return flowing
    enough = tokens >= ONCE_FROM.get(layer.format, 1) or slots * expert > ONCE_FROM_BYTES
    if once and enough:
        return Once(1)
    flows = flowing is not None and layer.format in NARROW_FLOWS
    narrow = layer.intermediate_size <= NARROW and not flows
    most = FEW_TOKENS_NARROW if narrow else FEW_TOKENS
    if tokens <= most and tokens * layer.top_k <= FEW_SLOTS and slots * expert <= FEW_BYTES:
        return few(layer, tokens)
    if once:
        return Once(1)
    if flowing is not None:
        return flowing
    paired = _paired(layer, tokens)
    return tiles(layer, tokens) if paired is None else paired


def _paired(layer: LayerConfig, tokens: int) -> Pairs | None:
    """Where pairs of blocks share what they read."""
    choice = pairs(layer)
    least = MANY_BF16 if layer.format == Bf16Weights.name else MANY
    many = tokens * layer.top_k >= least * layer.num_experts
    fits = all(holds for holds, _ in pairs_needs(layer, choice))
    return choice if many and fits and build.missing() is None else None


def _once(layer: LayerConfig, tokens: int) -> bool:
    """Whether one launch can do it all."""
    fits = (
        tokens <= 8
        and layer.hidden_size <= ONCE_HIDDEN[layer.format]
        and all(holds for holds, _ in once_needs(layer, 1))
    )
    return fits and build.missing() is None


def _flowing(layer: LayerConfig, tokens: int) -> Flow | None:
    """Where both GEMMs go through one launch."""
    slots = tokens * layer.top_k / layer.num_experts
    if layer.format == Bf16Weights.name or build.missing() is not None:
        return None
    quantised = layer.format == Fp8BlockWeights.name
    if quantised:
        narrow = layer.intermediate_size <= FLOW_NARROW
    else:
        narrow = layer.intermediate_size <= FLOW_NARROW_NVFP4 and slots <= FLOW_SLOTS_NVFP4
    tile = _flow_tile(slots)
    if (tile > 64 and not narrow) or tokens * layer.top_k > FLOW_MOST_SLOTS:
        return None  # tokens first
    if not quantised:
        choice = flow_nvfp4(layer, tokens)
    elif tile <= 64:  # long items, but not where there are few experts or items to work on
        long = slots >= FLOW_LONG and _flow_items(layer, slots, 6) >= FLOW_ITEMS
        choice = flow(layer, tile, 3 if long else 2, 2)
    else:  # items of 96 or 128 hidden columns, whichever the shard fills better
        parts = cdiv(layer.intermediate_size, 32)
        shape = (3, 1) if cdiv(parts, 3) * 3 < cdiv(parts, 4) * 4 else (2, 2)
        choice = flow(layer, tile, *shape)
    return choice if all(holds for holds, _ in flow_needs(layer, choice)) else None


def few(layer: LayerConfig, tokens: int) -> Few:
    """How matrix-vector products deal out the rows of a layer.

    A row's reads are all on their way at once where the registers hold them.
    """
    if layer.format == Nvfp4Weights.name:
        return Few(Part(32, 8, 1), Part(16, 4, 1), 16)
    bits = BITS[layer.format]
    reads = cdiv(layer.hidden_size * bits // 8, 512)
    first = Part(32, min(8, reads), 1)
    row = layer.intermediate_size * bits // 8  # bytes, of which 16 lanes read 256 at once
    if row <= 512:  # those of several slots together
        second = Part(32 if row > 256 else 16, 4, 1)
    else:  # all at once up to six, or else as many in each turn
        reads = cdiv(row, 256)
        second = Part(16, cdiv(reads, cdiv(reads, 6)), 1)
    return Few(first, second, 16, 1 if tokens <= 2 else 2 if tokens <= 4 else 4)


def once_needs(layer: LayerConfig, blocks: int) -> list[tuple[bool, str]]:
    """What the device code of `once.py` is written for, and whether a layer has it."""
    h, i, columns = layer.hidden_size, layer.intermediate_size, 8 * blocks
    needs = [
        (layer.top_k * columns <= 256, f"at most 256 slots of {columns} tokens"),
        (
            _once_room(layer, blocks) >= 0,
            f"room for two steps beside {columns} tokens of {h} columns",
        ),
    ]
    if layer.format == Nvfp4Weights.name:
        whole = h % 256 == 0 and i % 256 == 0
        return [*needs, (whole, "hidden and intermediate sizes that are multiples of 256")]
    if layer.format == Bf16Weights.name:
        whole = h % 32 == 0 and i % 32 == 0
        return [*needs, (whole, "hidden and intermediate sizes that are multiples of 32")]
    assert layer.w13_block is not None
    assert layer.w2_block is not None
    (n13, k13), (n2, k2) = layer.w13_block, layer.w2_block
    return [
        *needs,
        (h % 128 == 0, "a hidden size that is a multiple of 128"),
        (i % 32 == 0, "an intermediate size that is a multiple of 32"),
        (n13 % 8 == 0 and n2 % 16 == 0, "one scale for 8 rows of w13 and for 16 of w2"),
        (k13 % 128 == 0, "one scale of w13 for 128 columns"),
        (k2 % 128 == 0 or k2 in (32, 64), "scales of w2 for 32, 64 or multiples of 128 columns"),
    ]


def _once_room(layer: LayerConfig, blocks: int) -> int:
    """Bytes of shared memory that two steps of weights leave, at least; `cuda/once.cu` is exact."""
    h, columns = layer.hidden_size, 8 * blocks
    hits = min(layer.num_local_experts, columns * layer.top_k)
    tokens = columns * (cdiv(2 * h - 64, 128) * 128 + 64)
    sums = ONCE_WARPS * blocks * 512
    experts = layer.num_local_experts + layer.num_experts
    tables = 4 * (hits * (columns + 5) + experts + columns * layer.top_k + 96)
    room = SHARED_BYTES - tokens - sums - tables
    # 16 rows of 2 KB, or a third of the room for those of the second GEMM, in rows that are padded.
    stage = max(16 * 2048, min(24 * 2048, room // 3)) * 9 // 8
    return room - 2 * (stage + stage // 7)  # and their scales


def flow_needs(layer: LayerConfig, choice: Flow) -> list[tuple[bool, str]]:
    """The same for `flow.py` and its tiles."""
    if layer.format not in (Fp8BlockWeights.name, Nvfp4Weights.name):
        return [(False, "FP8 or NVFP4")]
    h, i, tokens = layer.hidden_size, layer.intermediate_size, choice.tokens
    fits = _flow_bytes(layer, choice) <= SHARED_BYTES and choice.stages >= 2
    needs = [
        (fits, "2 stages or more that fit into shared memory"),
        (tokens in (8, 16, 32, 64, 96, 128), "tiles of 8, 16, 32, 64, 96 or 128 tokens"),
        (choice.groups in (2, 3, 4) and choice.blocks in (1, 2, 3), "2 to 4 groups, 1 to 3 blocks"),
        (tokens * choice.blocks <= {2: 256, 3: 128, 4: 64}.get(choice.groups, 0), "fewer sums"),
        (layer.top_k <= MOST_TOP_K, f"at most {MOST_TOP_K} slots of a token"),
    ]
    if layer.format == Nvfp4Weights.name:
        return [
            *needs,
            (h % 256 == 0, "a hidden size that is a multiple of 256"),
            (i % 64 == 0, "an intermediate size that is a multiple of 64"),
            (choice.groups * choice.blocks in (2, 4), "2 or 4 blocks of 64 weight rows"),
        ]
    assert layer.w13_block is not None
    assert layer.w2_block is not None
    (n13, k13), (n2, k2) = layer.w13_block, layer.w2_block
    return [
        *needs,
        (h % 64 == 0 and i % 16 == 0, "a hidden size in 64s, an intermediate size in 16s"),
        (n13 % 32 == 0 and n2 % 64 == 0, "one scale for 32 rows of w13 and for 64 of w2"),
        (all(k % 128 == 0 or k in (32, 64) for k in (k13, k2)), "scales for 32 columns or more"),
    ]


def pairs_needs(layer: LayerConfig, choice: Pairs) -> list[tuple[bool, str]]:
    """The same for `pairs.py`."""
    sizes = layer.hidden_size, layer.intermediate_size
    most = PAIRS_STAGES[layer.format]
    needs = [
        (2 <= choice.stages <= most, f"2 to {most} stages, which fit into shared memory"),
        (layer.top_k <= MOST_TOP_K, f"at most {MOST_TOP_K} slots of a token"),
    ]
    if layer.format == Nvfp4Weights.name:
        return [
            *needs,
            (pairs_code_stages(layer, choice) >= 2, "room for two steps of codes beside them"),
            (sizes[0] % 256 == 0, "a hidden size that is a multiple of 256"),
            (sizes[1] % 64 == 0, "an intermediate size that is a multiple of 64"),
        ]
    if layer.format == Bf16Weights.name:
        whole = all(size % 8 == 0 for size in sizes)
        return [*needs, (whole, "hidden and intermediate sizes in eights")]
    assert layer.w13_block is not None
    assert layer.w2_block is not None
    (n13, k13), (n2, k2) = layer.w13_block, layer.w2_block
    return [
        *needs,
        (all(size % 16 == 0 for size in sizes), "hidden and intermediate sizes in 16s"),
        (n13 % 64 == 0 or n13 == 32, "scales of w13 for 32 rows, or multiples of 64"),
        (n2 % 128 == 0 or n2 in (32, 64), "scales of w2 for 32 or 64 rows, or multiples of 128"),
        (all(k % 128 == 0 or k in (32, 64) for k in (k13, k2)), "scales for 32 columns or more"),
    ]


def pairs(layer: LayerConfig) -> Pairs:
    """As many stages as fit: fewer than the most with NVFP4 and very many experts."""
    stages = PAIRS_STAGES[layer.format]
    if layer.format == Nvfp4Weights.name:
        while stages > 2 and pairs_code_stages(layer, Pairs(stages)) < 2:
            stages -= 1
    return Pairs(stages)


def pairs_code_stages(layer: LayerConfig, choice: Pairs) -> int:
    """Steps of NVFP4 codes that fit beside the tokens; `cuda/pairs_nvfp4_shared.cuh` is exact."""
    staging, hits = 2 * (8192 + 1024), 16 * (layer.num_local_experts + 1)
    tokens = choice.stages * (PAIRS_TOKENS[layer.format] * 256 + 64)
    return (SHARED_BYTES - 512 - staging - hits - tokens) // (4 * (8192 + 1024) + 16)


def _flow_bytes(layer: LayerConfig, choice: Flow) -> int:
    """Shared memory of a program; `cuda/flow_shared.cuh` is exact."""
    tokens, stages, parts = choice.tokens, choice.stages, choice.groups * choice.blocks
    group = 32 * parts  # hidden columns that share a scale; their greatest power of two counts
    if layer.format == Nvfp4Weights.name:
        stage = parts * (8192 + 1024) + tokens * 512 + 64
        turned, row, each = min(tokens, 16), 2 * group + 16, 12
        aligned = 288  # up to; between arrays
    else:
        assert layer.w13_block is not None
        assert layer.w2_block is not None
        sub13, sub2 = min(128, layer.w13_block[1]), min(128, layer.w2_block[1], group & -group)
        stage = parts * 8192 + tokens * 136 + 4 * parts * max(256 // sub13, 128 // sub2) + 64
        turned, row, each = min(tokens, 32 if parts <= 4 else 16), group + 16, 16
        aligned = 128
    staging = max(parts * turned * 128, tokens * max(row, 16 * choice.groups))
    lists = 16 * (layer.num_local_experts + 8) + each * tokens
    return stages * stage + staging + lists + aligned


def flow(layer: LayerConfig, tokens: int, groups: int, blocks: int) -> Flow:
    """Tiles of so many tokens, with as many stages as fit, up to eight."""
    for stages in range(8, 2, -1):
        choice = Flow(tokens, groups, blocks, stages)
        if _flow_bytes(layer, choice) <= SHARED_BYTES:
            return choice
    return Flow(tokens, groups, blocks, 2)


def _flow_tile(slots: float) -> int:
    """Tokens of a tile with so many slots per expert."""
    return next((tile for most, tile in FLOW_SLOTS if slots <= most), 128)


def flow_nvfp4(layer: LayerConfig, tokens: int) -> Flow:
    """NVFP4's tiles for so many tokens: short items where there are few."""
    slots = tokens * layer.top_k / layer.num_experts
    tile = min(_flow_tile(slots), 64)
    short = _flow_items(layer, slots, 4) < FLOW_ITEMS
    return flow(layer, tile, *((2, 1) if short else (4, 1)))


def _flow_items(layer: LayerConfig, slots: float, parts: int) -> float:
    """Of both GEMMs, each with so many parts of 64 rows of weights, of all experts hit."""
    blocks = cdiv(layer.intermediate_size, 32 * parts) + cdiv(layer.hidden_size, 64 * parts)
    return layer.num_local_experts * (1 - exp(-slots)) * blocks


def tiles(layer: LayerConfig, tokens: int) -> Tiles:
    """Tiles for a call, by the average number of slots per expert."""
    slots = tokens * layer.top_k / layer.num_experts
    if layer.format == Fp8BlockWeights.name:
        return _fp8(layer, slots)
    if layer.format == Nvfp4Weights.name:
        return _nvfp4(slots)
    assert layer.format == Bf16Weights.name
    return _bf16(slots)


def _fp8(layer: LayerConfig, slots: float) -> Tiles:
    assert layer.w13_block is not None
    assert layer.w2_block is not None
    (scale_rows, k13), k2 = layer.w13_block, layer.w2_block[1]
    k13 = min(128, k13)
    m = 16 if slots <= 12 else 32
    m2 = 16 if slots <= 20 else 32
    if scale_rows % 64 or layer.intermediate_size % 64:
        # Tiles of 64 gate rows and 64 up rows need one scale for all rows of each.
        k2 = min(32, k2)
        if slots <= 60:
            return Tiles(Tile(m, 32, k13, 4, 6, 3), Tile(m2, 256, k2, 4, 4, 3))
        return Tiles(Tile(64, 32, k13, 4, 5, 2), Tile(64, 128, k2, 4, 5, 2))
    small = layer.intermediate_size <= 512  # few steps in the second GEMM: make them deep
    # Narrow tiles, so that every multiprocessor has some.
    hit = layer.num_local_experts * (1 - exp(-slots))
    scarce = hit * cdiv(layer.intermediate_size, 128) < ENOUGH_TILES
    few = slots < 0.1 if small else slots < 4 and scarce
    if scale_rows % 128 or layer.intermediate_size % 128 or few:
        k2 = min(64, k2)
        return Tiles(Tile(m, 64, k13, 4, 5, 3, True), Tile(m2, 128, k2, 4, 5, 4))
    k2 = min(128, k2)
    if m == 16:
        second = Tile(16, 256, k2, 4, 2, 3) if small else Tile(16, 128, k2, 4, 4, 3)
        return Tiles(Tile(16, 128, k13, 4, 4, 2, True), second)
    return Tiles(Tile(32, 128, k13, 4, 3, 2, True), Tile(32, 256, k2, 4, 3, 2))


def _nvfp4(slots: float) -> Tiles:
    if slots <= 4:
        return Tiles(Tile(16, 32, 256, 4, 3, 3), Tile(16, 64, 256, 4, 3, 3))
    if slots <= 40:
        m = 16 if slots <= 12 else 32
        return Tiles(Tile(m, 64, 256, 4, 3, 2), Tile(m, 128, 256, 4, 3, 2))
    return Tiles(Tile(64, 128, 256, 8, 3, 1), Tile(64, 256, 256, 8, 3, 1))


def _bf16(slots: float) -> Tiles:
    if slots <= 12:  # deep steps: weights come in longer pieces
        return Tiles(Tile(16, 64, 128, 4, 5, 1, True), Tile(16, 128, 128, 4, 5, 1))
    if slots <= 96:
        return Tiles(Tile(64, 64, 64, 4, 4, 2, True), Tile(64, 128, 64, 4, 4, 2))
    # Where `Pairs` cannot be compiled.
    return Tiles(Tile(128, 128, 64, 8, 4, 1), Tile(128, 256, 64, 8, 4, 1))
