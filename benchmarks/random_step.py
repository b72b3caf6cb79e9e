"""A checkpoint of random weights in the shape of Step-3.5-Flash, as large as one likes.

    python benchmarks/random_step.py FOLDER [--layers 8] [--format fp8-block|bf16] [--small]

Layer shapes are those of stepfun-ai/Step-3.5-Flash-FP8: hidden 4096, 288 experts of 1280 of which a
token takes 8, a shared expert, full and sliding attention. The first layer is dense, and each other
one takes 4.5 GB in FP8. Routed experts are in the asked format, everything else is bf16. Weights
are normal with standard deviation 1/sqrt(columns), so that activations keep their size and the
logits are those of no language at all. The tokenizer, and with it the vocabulary of 640, is that of
the tiny model of examples/tiny_step.

A GPU draws the numbers if there is one. `--small` is a few megabytes, to try things out without.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_backend.checkpoint.configs import fp8_block_config, unquantised_modules
from moe_backend.checkpoint.layout import find_moe_layers
from moe_backend.checkpoint.reader import Checkpoint
from moe_backend.checkpoint.writer import CheckpointWriter, OutputTensor

TINY = Path(__file__).resolve().parents[1] / "examples" / "tiny_step" / "checkpoint"
BLOCK = 128
# The largest of a block's 16384 normal numbers is at about 4 standard deviations; what lies beyond
# 448 is clamped.
CODE_STD = 448 / 4
MAX_FILE_BYTES = 5 << 30
WRITERS = 4


@dataclass(frozen=True)
class Shape:
    """Widths as config.json has them; heads are those of full and of sliding layers."""

    hidden: int = 4096
    dense: int = 11264
    experts: int = 288
    top_k: int = 8
    expert: int = 1280
    shared: int = 1280
    heads: tuple[int, int] = (64, 96)
    kv_heads: int = 8
    head_dim: int = 128
    window: int = 512
    positions: int = 8192


STEP = Shape()
SMALL = Shape(256, 512, 4, 2, 256, 128, (8, 12), 4, 32, 16, 4096)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=8, help="with the dense first one")
    parser.add_argument("--format", choices=("fp8-block", "bf16"), default="fp8-block")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.layers < 2:
        parser.error(f"--layers {args.layers}: at least 2, the first has no experts")
    began = time.monotonic()
    size = write(args.folder, SMALL if args.small else STEP, args.layers, args.format, args.seed)
    print(f"{size / 1e9:.1f} GB in {time.monotonic() - began:.0f} s")


def write(folder: Path, shape: Shape, layers: int, format: str, seed: int = 0) -> int:
    """Write the checkpoint to a new folder; its size in bytes."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "generation_config.json"):
        shutil.copy(TINY / name, folder)
    tokenizer = json.loads((TINY / "tokenizer_config.json").read_text())
    tokenizer["model_max_length"] = shape.positions
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n")
    config = config_of(shape, layers)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    tensors = list(tensors_of(shape, layers, config["vocab_size"], format))
    writer = CheckpointWriter(folder, tensors, MAX_FILE_BYTES)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def draw(numbered: tuple[int, OutputTensor]) -> None:
        number, tensor = numbered
        generator = torch.Generator(device).manual_seed(seed * len(tensors) + number)
        writer.write(tensor.name, values(tensor, generator).cpu())

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(draw, enumerate(tensors)))  # list: an exception of a thread is raised here
    writer.finish()
    if format == "fp8-block":
        checkpoint = Checkpoint.open(folder)
        unquantised = unquantised_modules(checkpoint, find_moe_layers(checkpoint.tensors))
        config["quantization_config"] = fp8_block_config(unquantised, (BLOCK, BLOCK))
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return sum(tensor.nbytes for tensor in tensors)


def config_of(shape: Shape, layers: int) -> dict[str, Any]:
    """config.json of the tiny model with other sizes; every fourth layer attends to everything."""
    config: dict[str, Any] = json.loads((TINY / "config.json").read_text())
    full = [layer % 4 == 0 for layer in range(layers)]
    heads = {"num_attention_groups": shape.kv_heads, "head_dim": shape.head_dim}
    sliding = {"attention_type": "sliding_attention", "num_attention_heads": shape.heads[1]}
    return config | {
        **heads,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.dense,
        "num_hidden_layers": layers,
        "max_seq_len": shape.positions,
        "max_position_embeddings": shape.positions,
        "num_attention_heads": shape.heads[0],
        "layer_types": [f"{'full' if f else 'sliding'}_attention" for f in full],
        "sliding_window": shape.window,
        "attention_other_setting": {**sliding, **heads},
        "rope_theta": [5e6 if f else 1e4 for f in full],
        "partial_rotary_factors": [0.5 if f else 1.0 for f in full],
        "moe_layers_enum": ",".join(str(layer) for layer in range(1, layers)),
        "moe_num_experts": shape.experts,
        "moe_top_k": shape.top_k,
        "moe_intermediate_size": shape.expert,
        "share_expert_dim": shape.shared,
        # SiLU: all but two of the 42 MoE layers of Step-3.5-Flash have no limit.
        "swiglu_limits": [0.0] * layers,
        "swiglu_limits_shared": [0.0] * layers,
    }


def tensors_of(shape: Shape, layers: int, vocab: int, format: str) -> Iterator[OutputTensor]:
    """Names, dtypes and shapes, layer by layer."""

    def bf16(name: str, *size: int) -> OutputTensor:
        return OutputTensor(f"{name}.weight", torch.bfloat16, size)

    hidden = shape.hidden
    yield bf16("model.embed_tokens", vocab, hidden)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        heads = shape.heads[layer % 4 > 0]
        yield bf16(f"{at}.input_layernorm", hidden)
        yield bf16(f"{at}.post_attention_layernorm", hidden)
        yield bf16(f"{at}.self_attn.q_proj", heads * shape.head_dim, hidden)
        yield bf16(f"{at}.self_attn.k_proj", shape.kv_heads * shape.head_dim, hidden)
        yield bf16(f"{at}.self_attn.v_proj", shape.kv_heads * shape.head_dim, hidden)
        yield bf16(f"{at}.self_attn.g_proj", heads, hidden)
        yield bf16(f"{at}.self_attn.o_proj", hidden, heads * shape.head_dim)
        yield bf16(f"{at}.self_attn.q_norm", shape.head_dim)
        yield bf16(f"{at}.self_attn.k_norm", shape.head_dim)
        mlp, width = (f"{at}.share_expert", shape.shared) if layer else (f"{at}.mlp", shape.dense)
        yield bf16(f"{mlp}.gate_proj", width, hidden)
        yield bf16(f"{mlp}.up_proj", width, hidden)
        yield bf16(f"{mlp}.down_proj", hidden, width)
        if layer:
            yield OutputTensor(f"{at}.moe.gate.weight", torch.float32, (shape.experts, hidden))
            yield OutputTensor(f"{at}.moe.router_bias", torch.float32, (shape.experts,))
            for name, rows, columns in (
                ("gate_proj", shape.expert, hidden),
                ("up_proj", shape.expert, hidden),
                ("down_proj", hidden, shape.expert),
            ):
                yield from experts(f"{at}.moe.{name}", shape.experts, rows, columns, format)
    yield bf16("model.norm", hidden)
    yield bf16("lm_head", vocab, hidden)


def experts(name: str, count: int, rows: int, columns: int, format: str) -> Iterator[OutputTensor]:
    """One projection of all experts, and its scales."""
    fp8 = format == "fp8-block"
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    yield OutputTensor(f"{name}.weight", dtype, (count, rows, columns))
    if fp8:
        blocks = (count, math.ceil(rows / BLOCK), math.ceil(columns / BLOCK))
        yield OutputTensor(f"{name}.weight_scale_inv", torch.float32, blocks)


def values(tensor: OutputTensor, generator: torch.Generator) -> torch.Tensor:
    """Random numbers for one tensor, on the generator's device."""
    name = tensor.name
    if "norm" in name or name.endswith("router_bias"):
        return torch.zeros(tensor.shape, dtype=tensor.dtype)  # norms multiply by 1 + weight
    if name.endswith("weight_scale_inv"):
        # The codes' standard deviation is CODE_STD; no two blocks get the same scale.
        drawn = torch.rand(tensor.shape, device=generator.device, generator=generator)
        return (drawn * 0.4 + 0.8) / (CODE_STD * math.sqrt(tensor.shape[-1] * BLOCK))
    drawn = torch.empty(tensor.shape, dtype=torch.bfloat16, device=generator.device)
    if tensor.dtype == torch.float8_e4m3fn:
        drawn.normal_(0, CODE_STD, generator=generator)
        return drawn.clamp_(-448, 448).to(tensor.dtype)
    std = 1.0 if "embed" in name else tensor.shape[-1] ** -0.5
    return drawn.normal_(0, std, generator=generator).to(tensor.dtype)


if __name__ == "__main__":
    main()
