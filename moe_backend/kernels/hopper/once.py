"""The host side of the single launch for few tokens. Safe in a CUDA graph."""

from __future__ import annotations

from pathlib import Path

import torch

from moe_backend.formats.fp8_block import cdiv
from moe_backend.kernels.cuda import build
from moe_backend.kernels.cuda.launch import Kernel, launch, packed, zeros
from moe_backend.kernels.hopper.tiled import multiprocessors
from moe_backend.kernels.hopper.tiles import (
    ONCE_BLOCKS,
    ONCE_WARPS,
    SHARED_BYTES,
    Once,
    once_needs,
    require,
)
from moe_backend.kernels.registry import LayerConfig
from moe_backend.kernels.triton.kernel import ACTIVATIONS, FORMATS, unpack

SOURCE = Path(__file__).parent / "cuda" / "once.cu"
WARPS, CLERKS, COPYING = ONCE_WARPS, 2, 2  # that multiply, store hidden columns, and copy
CHUNK = 2048  # bytes of a weight row in a step
COUNTERS = 96  # int32 that a call counts in: three lines of memory
ROOM = 8192  # layers times streams on a GPU


def run(
    layer: LayerConfig,
    tensors: list[torch.Tensor | None],
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    choice: Once,
) -> torch.Tensor:
    """The experts of one layer; arguments as in `registry.Kernel.apply`.

    Raises:
        ValueError: what `check` says.
        RuntimeError: a CUDA graph is captured on a GPU where no layer was prepared, or more layers
            times streams have run there than counters have room.
    """
    tokens, top_k = topk_ids.shape
    check(layer, tokens, choice)
    x = packed(x)
    out = torch.empty_like(x)
    if tokens == 0:
        return out
    w13, w13_scale, w13_global, w2, w2_scale, w2_global = unpack(layer, tensors)
    ids = topk_ids.contiguous()
    weights = topk_weights.float().contiguous()
    columns = 8 * choice.blocks  # of tokens in the products
    hits = min(layer.num_local_experts, columns * top_k)
    hidden = torch.empty(
        hits * columns, layer.intermediate_size, dtype=torch.bfloat16, device=x.device
    )
    grid = multiprocessors(x.device)
    kernel = _kernel(layer, choice, grid, ids.dtype == torch.int64, expert_map is not None)
    activation = layer.activation
    launch(
        kernel, grid, 32 * (WARPS + CLERKS + COPYING),
        [x, ids, ids if expert_map is None else expert_map, weights, w13, w13_scale, w13_global, w2,
         w2_scale, w2_global, hidden, out, _counters(w13), tokens, activation.limit or 0.0,
         activation.alpha, activation.beta],
    )  # fmt: skip
    return out


def _kernel(layer: LayerConfig, choice: Once, grid: int, long_ids: bool, mapped: bool) -> Kernel:
    constants = {
        "FORMAT": FORMATS[layer.format],
        "SIZE_H": layer.hidden_size,
        "SIZE_I": layer.intermediate_size,
        "EXPERTS": layer.num_local_experts,
        "NUM_IDS": layer.num_experts if mapped else layer.num_local_experts,
        "TOP_K": layer.top_k,
        "TOKEN_BLOCKS": choice.blocks,
        "ROW_GROUPS": cdiv(cdiv(layer.hidden_size, 16), grid),
        "ACTIVATION": ACTIVATIONS[layer.activation.kind],
        "HAS_MAP": int(mapped),
        "IDS64": int(long_ids),
        "WEIGHT_ON_INPUT": int(layer.apply_router_weight_on_input),
        "CONSUMERS": WARPS,
        "COPYING": COPYING,
        "CHUNK": CHUNK,
        "SHARED_BYTES": SHARED_BYTES,
    }
    if layer.w13_block is not None and layer.w2_block is not None:
        names = ("N13", "K13", "N2", "K2")
        constants |= dict(zip(names, layer.w13_block + layer.w2_block, strict=True))
    return Kernel(SOURCE, "moe_once", tuple(constants.items()), SHARED_BYTES)


def check(layer: LayerConfig, tokens: int, choice: Once) -> None:
    """Raises ValueError for what the device code cannot take."""
    require(choice.blocks in ONCE_BLOCKS, "1, 2 or 4 blocks of tokens")
    require(tokens <= 8 * choice.blocks, f"at most {8 * choice.blocks} tokens")
    for holds, wanted in once_needs(layer, choice.blocks):
        require(holds, wanted)


# --- Counters -------------------------------------------------------------------------------------

_rooms: dict[torch.device, torch.Tensor] = {}
_taken: dict[torch.device, dict[tuple[int, int], torch.Tensor]] = {}


def make_room(device: torch.device) -> None:
    """Zeros for the counters of all calls on a GPU; not while a CUDA graph is captured.

    A launch finds its counters zero and leaves them so. Calls that may run at the same time must
    have counters of their own, so each layer has some for each stream that it was called on. A
    CUDA graph keeps those of the stream of its capture: graphs of one layer captured on one stream
    must not be replayed at the same time on two.

    The memory is the driver's own: what PyTorch gives while an engine loads weights, the engine may
    discard while it sleeps (vLLM's sleep level 2).
    """
    if device.type != "cuda" or build.missing() is not None:
        return
    if device in _rooms:
        _rooms[device].zero_()
    else:
        _rooms[device] = zeros(device, ROOM * COUNTERS).view(ROOM, COUNTERS)


def _counters(w13: torch.Tensor) -> torch.Tensor:
    device = w13.device
    if device.type != "cuda":  # a dry run
        return w13
    if device not in _rooms:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"no layer was prepared on {device} before the capture of a CUDA graph: call "
                "`prepare`, or run the layer once, before"
            )
        make_room(device)
    return own(_rooms[device], w13.data_ptr(), torch.cuda.current_stream(device).cuda_stream)


def own(room: torch.Tensor, weights: int, stream: int) -> torch.Tensor:
    """The counters, of a GPU's room, of a layer on a stream; `weights` is its weights' address."""
    taken = _taken.setdefault(room.device, {})
    if (weights, stream) not in taken:
        if len(taken) == len(room):
            raise RuntimeError(
                f"the method `once` has counters for {len(room)} layers times streams on "
                f"{room.device}, and all are taken: use fewer streams"
            )
        taken[weights, stream] = room[len(taken)]
    return taken[weights, stream]
