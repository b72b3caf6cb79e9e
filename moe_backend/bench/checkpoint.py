"""The shape of a checkpoint's expert layers on one rank."""

from __future__ import annotations

from pathlib import Path

from moe_backend.bench.shapes import DECODE_AND_PREFILL, Shape
from moe_backend.checkpoint.dialects import read_quantisation
from moe_backend.checkpoint.layout import find_moe_layers, text_config
from moe_backend.checkpoint.preflight import check_experts
from moe_backend.checkpoint.reader import Checkpoint, CheckpointError
from moe_backend.layout.ownership import contiguous
from moe_backend.layout.shards import TpPlan, plan_tp

# Experts per token in config.json: Qwen, DeepSeek, GLM, Mixtral and MiniMax; Step; Ernie.
TOP_K_KEYS = ("num_experts_per_tok", "moe_top_k", "moe_k")
FORMATS = {
    "bf16": "bf16",
    "fp8-block": "fp8_block",
    "nvfp4-modelopt": "nvfp4",
    "nvfp4-ct": "nvfp4",
}


def shape_of(path: str | Path, tp: int = 1, ep: int = 1) -> Shape:
    """The first expert layer of the checkpoint in directory `path`, on the first rank.

    Reads config.json and the headers of the safetensors files.

    Args:
        tp: ranks that split each expert; ep: ranks among which experts are spread.

    Raises:
        CheckpointError: a file is missing or damaged, or the experts are in no known format.
        ValueError: the layer does not split over so many ranks.
    """
    checkpoint = Checkpoint.open(path)
    layers = find_moe_layers(checkpoint.tensors)
    if not layers:
        raise CheckpointError(f"{path}: no routed experts found.")
    experts = check_experts(checkpoint, layers)
    gate = layers[0].modules[0]
    dialect = read_quantisation(checkpoint).dialect_of(
        layers[0].block, gate.name.rpartition(".")[2]
    )
    if dialect.name not in FORMATS or dialect.codes not in gate.tensors:
        raise CheckpointError(
            f"{gate.name}: its format is not known here; accepted: {', '.join(FORMATS)}."
        )
    rows, columns = checkpoint.tensors[gate.tensors[dialect.codes]].shape[-2:]
    hidden = dialect.columns(columns)
    format_name = FORMATS[dialect.name]
    block = dialect.block_shape if format_name == "fp8_block" else None
    if not 1 <= ep <= experts:
        raise ValueError(f"--ep {ep}: 1 to {experts} expected, the number of experts")
    local = len(contiguous(experts, ep).local_experts(0))
    name = f"{Path(path).resolve().name}-tp{tp}-ep{ep}"
    top_k = _top_k(checkpoint)

    def on_rank(plan: TpPlan, name: str, rivals_of: Shape | None = None) -> Shape:
        return Shape(
            name, format_name, experts, local, top_k, hidden, plan.rows,
            plan.w13_block, plan.w2_block, DECODE_AND_PREFILL, rivals_of,
        )  # fmt: skip

    plan = plan_tp(format_name, hidden, rows, tp, block)
    if block is None or plan.w13_block == plan.w2_block == block:
        return on_rank(plan, name)
    whole = plan_tp(format_name, hidden, rows, tp, block, whole_blocks_of=max(block))
    return on_rank(plan, name, on_rank(whole, f"{name}-padded"))


def _top_k(checkpoint: Checkpoint) -> int:
    config = text_config(checkpoint.config)
    for key in TOP_K_KEYS:
        if isinstance(config.get(key), int):
            return int(config[key])
    raise CheckpointError(
        f"{checkpoint.path / 'config.json'}: experts per token not found; "
        f"looked for {', '.join(TOP_K_KEYS)}."
    )
