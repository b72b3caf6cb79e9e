"""Checked weight loading: every tensor of the right shape and dtype, every expert written.

vLLM's loader copies what it is given: a scale of the wrong shape is broadcast or narrowed, a
missing one keeps its initial value, and the model serves noise. `LoadRecord` stands in front of
it (`RoutedExperts.weight_loader`, checked on vLLM 0.30.0 to 0.33.0).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config

from moe_backend.checkpoint import preflight
from moe_backend.formats.fp8_block import cdiv
from moe_backend.formats.nvfp4 import GROUP

# Formats of --load-format that fill parameters without calling a weight loader.
_WITHOUT_LOADER = ("dummy", "sharded_state", "runai_streamer_sharded", "tensorizer")

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_SCALES = (*_FLOATS, torch.float8_e8m0fnu)
_CONVERTED = "moe_backend_converted"  # set on parameters, with what was done to them
_SEEN = "moe_backend_seen"  # likewise: by shard, the local experts whose tensors they have
Shape = tuple[int, ...]


def preflight_model() -> None:
    """Check a local checkpoint's files, experts and scales before any of it is loaded.

    A model named on a hub is not on disk yet; `LoadRecord` checks it tensor by tensor.

    Raises:
        ValueError: the checkpoint is truncated, corrupt or incomplete.
    """
    config = get_current_vllm_config()
    if config.model_config is None or config.load_config.load_format in _WITHOUT_LOADER:
        return
    folder = Path(config.model_config.model)
    if folder.is_dir() and any(folder.glob("*.safetensors*")):
        _preflight_once(folder)


@cache
def _preflight_once(folder: Path) -> None:
    preflight(folder)


class LoadRecord:
    """A weight loader that checks each tensor and remembers which experts it has seen."""

    def __init__(self, layer: Any, loader: Callable[..., Any], load_format: str) -> None:
        self.layer = layer
        self.loader = loader
        self.is_dummy = str(load_format) == "dummy"
        self.loaders_run = str(load_format) not in _WITHOUT_LOADER
        self.expected: dict[str, tuple[Shape, tuple[torch.dtype, ...]]] = {}
        self.created: dict[str, tuple[torch.dtype, Shape]] = {}  # before preparation

    def expect_parameters(
        self, block_shape: list[int] | None, refined: bool, unfilled: tuple[str, ...] = ()
    ) -> None:
        """Note shape and dtype of each parameter's checkpoint tensors, per expert.

        Args:
            block_shape: the checkpoint's FP8 block, None in other formats.
            refined: whether vLLM refines it for a tensor-parallel shard off its grid.
            unfilled: parameters that this checkpoint need not have tensors for.
        """
        config = self.layer.moe_config
        intermediate = config.intermediate_size - (config.intermediate_pad or 0)
        hidden = config.hidden_dim_unpadded or config.hidden_dim
        if block_shape is not None and intermediate % block_shape[0]:
            # vLLM's loader refines the scales by repetition and would copy one row too many.
            raise ValueError(
                f"{self.layer.layer_name}: the model's intermediate size {intermediate} is not a "
                f"multiple of its FP8 block {block_shape[0]}, which vLLM cannot load. Requantise "
                "the checkpoint with a block size that divides it, or to NVFP4."
            )
        if block_shape is not None and refined and any(hidden % size for size in block_shape):
            # The same repetition, along the other axis.
            raise ValueError(
                f"{self.layer.layer_name}: the model's hidden size {hidden} is not a multiple of "
                f"its FP8 block {block_shape}, which vLLM cannot load where a tensor-parallel "
                "shard misses the block grid. Use another tensor-parallel size or "
                "--enable-expert-parallel."
            )
        for name, parameter in self.layer.named_parameters():
            stem, _, kind = name.partition("_")
            if stem not in ("w13", "w2") or name in unfilled:
                continue
            rows, columns = (intermediate, hidden) if stem == "w13" else (hidden, intermediate)
            shape, dtypes = _expected(kind, parameter.dtype, rows, columns, block_shape)
            self.expected[name] = (shape, dtypes)
            self.created[name] = (parameter.dtype, tuple(parameter.shape))

    def note_converted(self, name: str, how: str) -> None:
        """Remember that a parameter no longer holds, or no longer means, the checkpoint's tensors.

        The note is on the parameter itself: vLLM's reload loads into new ones, made as those before
        preparation were, and shape and dtype need not tell the two apart.

        Args:
            how: what was done to it, a clause whose subject is the parameter.
        """
        setattr(getattr(self.layer, name), _CONVERTED, how)

    def poison(self) -> None:
        """Fill every scale with NaN, so that a slot which nothing writes cannot pass for one."""
        for name in self.expected:
            if "scale" in name:
                getattr(self.layer, name).data.fill_(float("nan"))

    def weight_loader(
        self,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Same contract as `RoutedExperts.weight_loader`.

        Raises:
            ValueError: the tensor has the wrong shape or dtype for its parameter, or a parameter of
                the layer no longer holds what the checkpoint does.
        """
        name = weight_name.rsplit(".", 1)[-1]
        stacked = loaded_weight.ndim == 3
        if name in self.expected:
            self._refuse_converted(name, param)
            self._check(name, loaded_weight, shard_id, expert_id, stacked)
        result = self.loader(
            param=param,
            loaded_weight=loaded_weight,
            weight_name=weight_name,
            shard_id=shard_id,
            expert_id=expert_id,
            return_success=return_success,
        )
        local = range(self.layer.local_num_experts) if stacked else [self._local(expert_id)]
        # On the parameter, so that a plain load does not count for a later reload, which loads into
        # other ones.
        seen = param.__dict__.setdefault(_SEEN, {})
        seen.setdefault(shard_id, set()).update(e for e in local if e >= 0)
        return result

    def _refuse_converted(self, name: str, param: torch.nn.Parameter) -> None:
        """A second load as plain as the first would write what the kernel takes for something else.

        One converted parameter refuses the tensors of all, so that none is written beside it.

        Raises:
            ValueError: a parameter was converted.
        """
        others = {n: getattr(self.layer, n, None) for n in self.created if n != name}
        for which, parameter in ({name: param} | others).items():
            how = getattr(parameter, _CONVERTED, None)
            if parameter is None:
                how = "is gone"  # renamed by vLLM's own processing, or changed by it
            elif how is None and (parameter.dtype, tuple(parameter.shape)) != self.created[which]:
                how = "has another shape or dtype"
            if how is not None:
                raise ValueError(
                    f"{self.layer.layer_name}.{which} {how} since these experts were loaded, and "
                    "the checkpoint's tensors cannot be loaded into them again. These experts are "
                    "as they were, but tensors of other layers may have been replaced already: "
                    "serve nothing until vLLM's reload_weights, which prepares them anew, has run."
                )

    def _local(self, expert_id: int) -> int:
        return int(self.layer._map_global_expert_id_to_local_expert_id(expert_id))

    def _check(
        self, name: str, tensor: torch.Tensor, shard_id: str, expert_id: int, stacked: bool
    ) -> None:
        shape, dtypes = self.expected[name]
        found = tuple(tensor.shape[1:] if stacked else tensor.shape)
        what = f"{self.layer.layer_name}.{name}, shard {shard_id}, expert {expert_id}"
        scalar = shape == () and found in ((), (1,))
        if stacked and len(tensor) != self.layer.local_num_experts:
            raise ValueError(
                f"{what}: the checkpoint's tensor stacks {len(tensor)} experts, "
                f"{self.layer.local_num_experts} are expected."
            )
        if found != shape and not scalar:
            raise ValueError(
                f"{what}: the checkpoint's tensor has shape {found}, {shape} is expected. "
                "Check config.json against the checkpoint, or convert it again."
            )
        if tensor.dtype not in dtypes:
            accepted = ", ".join(str(d) for d in dtypes)
            raise ValueError(
                f"{what}: the checkpoint's tensor is {tensor.dtype}; accepted: {accepted}. "
                "Check quantization_config in config.json, or convert the checkpoint again."
            )

    def check_complete(self) -> None:
        """Every parameter of every local expert was loaded.

        Raises:
            ValueError: some were not; the message names the first tensor and its experts.
        """
        if not self.loaders_run:
            return
        everyone = set(range(self.layer.local_num_experts))
        for name in self.expected:
            # Taken off: a load after this one has to write everything again.
            seen = getattr(self.layer, name).__dict__.pop(_SEEN, {})
            for shard in ("w2",) if name.startswith("w2") else ("w1", "w3"):
                missing = sorted(everyone - seen.get(shard, set()))
                if missing:
                    projection = {"w1": "gate", "w2": "down", "w3": "up"}[shard]
                    shown = ", ".join(map(str, missing[:8])) + (", ..." if missing[8:] else "")
                    raise ValueError(
                        f"{self.layer.layer_name}.{name}: the checkpoint has no {projection} "
                        f"tensor for {len(missing)} of {len(everyone)} local experts ({shown}). "
                        "The checkpoint is incomplete: download or convert it again."
                    )


# Some models ask the loader for this (vLLM `models/llama4.py`).
LoadRecord.weight_loader.supports_moe_loading = True  # type: ignore[attr-defined]


def _expected(
    kind: str, dtype: torch.dtype, rows: int, columns: int, block_shape: list[int] | None
) -> tuple[Shape, tuple[torch.dtype, ...]]:
    """Per-expert shape and accepted dtypes of a checkpoint tensor, before sharding.

    Args:
        kind: parameter name without its stem: `weight`, `weight_scale_inv`, `input_scale`, ...
    """
    if kind in ("weight", "weight_packed"):
        if dtype == torch.uint8:
            return (rows, columns // 2), (torch.uint8,)
        return (rows, columns), (_FLOATS if dtype in _FLOATS else (dtype,))
    if kind == "weight_scale_inv":
        assert block_shape is not None
        return (cdiv(rows, block_shape[0]), cdiv(columns, block_shape[1])), _SCALES
    if kind == "weight_scale":
        return (rows, columns // GROUP), (torch.float8_e4m3fn,)
    return (), _FLOATS
