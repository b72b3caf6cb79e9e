"""Which rank owns which expert.

A placement is a pure function of the model and the number of ranks: every rank computes the whole
of it and can check it alone. `ids` are what the router writes into `topk_ids`: logical experts,
or physical experts where some experts have copies (vLLM's EPLB; the router then picks the copy).

An `ExpertMap` and an `ExpertMask` say the same in two ways that kernels tell apart only by reading
nonsense, so they are two types.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class ExpertMap:
    """What vLLM's and this package's kernels take.

    Attributes:
        tensor: `[num_ids]` int32, the local slot of each id, -1 where another rank owns it.
        num_local_experts: number of slots on this rank.
    """

    tensor: torch.Tensor
    num_local_experts: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> ExpertMap:
        """Wrap an engine's map after a look at its values; for start-up, it reads the host.

        Raises:
            ValueError: the local slots are not 0, 1, ... each once, as in a mask given for a map.
        """
        if tensor.dtype != torch.int32 or tensor.ndim != 1:
            raise ValueError(
                f"expert_map: {tensor.dtype} of {tensor.ndim} dimensions found, one of int32 "
                "expected."
            )
        slots = sorted(s for s in tensor.tolist() if s != -1)
        if slots != list(range(len(slots))):
            raise ValueError(
                f"expert_map: local slots {_short(slots)} found, each of 0 to {len(slots) - 1} "
                "exactly once (and -1 elsewhere) expected. A 0/1 expert mask is not a map."
            )
        return cls(tensor, len(slots))

    def to(self, device: torch.device | str) -> ExpertMap:
        return ExpertMap(self.tensor.to(device), self.num_local_experts)


@dataclass(frozen=True, eq=False)
class ExpertMask:
    """What aiter's kernels take; never an argument of a function that wants a map.

    Attributes:
        flags: `[num_ids + num_fused_shared_experts]` int32, 1 where this rank owns the id.
    """

    flags: torch.Tensor

    def with_sentinel(self) -> torch.Tensor:
        """The tensor that aiter reads: one 0 more at the end, for ids that nobody owns.

        (vLLM 0.32 `fused_moe/expert_map_manager.py`, `determine_expert_map`.)
        """
        return torch.nn.functional.pad(self.flags, (0, 1))

    def to(self, device: torch.device | str) -> ExpertMask:
        return ExpertMask(self.flags.to(device))


@dataclass(frozen=True)
class ExpertPlacement:
    """The experts of one layer over all ranks; made by the functions below.

    Attributes:
        strategy: `contiguous`, `round_robin` or `physical`, for the log.
        num_experts: logical experts, those of the checkpoint.
        rank_ids: for each rank the id in each of its slots.
        logical_of: the logical expert of each id; the identity without copies.
        copies: how many ids each logical expert is meant to have.
    """

    strategy: str
    num_experts: int
    rank_ids: tuple[tuple[int, ...], ...]
    logical_of: tuple[int, ...]
    copies: tuple[int, ...]

    @property
    def num_ranks(self) -> int:
        return len(self.rank_ids)

    @property
    def num_ids(self) -> int:
        return len(self.logical_of)

    def local_experts(self, rank: int) -> tuple[int, ...]:
        """The logical expert whose weights go into each slot of `rank`."""
        return tuple(self.logical_of[i] for i in self.rank_ids[rank])

    def expert_map(self, rank: int) -> ExpertMap:
        ids = self.rank_ids[rank]
        table = torch.full((self.num_ids,), -1, dtype=torch.int32)
        table[list(ids)] = torch.arange(len(ids), dtype=torch.int32)
        return ExpertMap(table, len(ids))

    def expert_mask(self, rank: int, num_fused_shared_experts: int = 0) -> ExpertMask:
        """Args: num_fused_shared_experts: ids behind the routed ones that every rank owns."""
        routed = (self.expert_map(rank).tensor >= 0).int()
        return ExpertMask(torch.nn.functional.pad(routed, (0, num_fused_shared_experts), value=1))

    def check(self) -> None:
        """Every id is owned by exactly one rank, every logical expert as often as planned.

        Raises:
            ValueError: some are not; the message names the first of them and its ranks.
        """
        owners: list[list[int]] = [[] for _ in self.logical_of]
        for rank, ids in enumerate(self.rank_ids):
            for i in ids:
                if not 0 <= i < self.num_ids:
                    raise ValueError(
                        f"rank {rank} owns expert {i}; ids are 0 to {self.num_ids - 1}"
                    )
                owners[i].append(rank)
        check_owners(owners, self.num_ranks)
        found: list[list[int]] = [[] for _ in range(self.num_experts)]
        for i, expert in enumerate(self.logical_of):
            if not 0 <= expert < self.num_experts:
                raise ValueError(
                    f"physical expert {i} holds logical expert {expert}; the model has "
                    f"{self.num_experts}"
                )
            found[expert].extend(owners[i])
        for expert, (ranks, planned) in enumerate(zip(found, self.copies, strict=True)):
            if len(ranks) != planned or planned < 1:
                raise ValueError(
                    f"logical expert {expert} has {len(ranks)} copies ({_on(ranks)}), "
                    f"{planned} planned and at least 1 needed. Check the redundancy plan."
                )


def check_owners(owners: Sequence[Sequence[int]], num_ranks: int) -> None:
    """Raise ValueError unless `owners[i]`, the ranks that own id i, is one rank for every id."""
    for i, ranks in enumerate(owners):
        if len(ranks) != 1:
            raise ValueError(
                f"expert {i} is owned by {len(ranks)} of {num_ranks} ranks ({_on(ranks)}); exactly "
                "one must own it. All ranks must start with the same expert-parallel settings."
            )


def contiguous(num_experts: int, num_ranks: int) -> ExpertPlacement:
    """Runs of neighbours; the first ranks own one more when it does not come out even.

    So does vLLM's `linear` (0.30 to 0.33), although its docstring gives the rest to the last rank.
    """
    return _placement("contiguous", _runs(num_experts, num_ranks), num_experts)


def round_robin(num_experts: int, num_ranks: int) -> ExpertPlacement:
    """Expert e on rank `e % num_ranks`."""
    ranks = tuple(tuple(range(r, num_experts, num_ranks)) for r in range(num_ranks))
    return _placement("round_robin", ranks, num_experts)


def physical(
    physical_to_logical: Sequence[int],
    num_experts: int,
    num_ranks: int,
    copies: Sequence[int] | None = None,
) -> ExpertPlacement:
    """An explicit table of physical experts, which lie on the ranks in contiguous runs.

    Args:
        physical_to_logical: the logical expert of each physical one; some occur more than once.
        copies: planned number of copies of each logical expert; None takes the table's own.
    """
    logical_of = tuple(physical_to_logical)
    if copies is None:
        copies = [logical_of.count(e) for e in range(num_experts)]
    return _placement(
        "physical", _runs(len(logical_of), num_ranks), num_experts, logical_of, tuple(copies)
    )


def with_redundancy(num_experts: int, num_redundant: int, num_ranks: int) -> ExpertPlacement:
    """The table that vLLM's EPLB starts from: all experts, then copies of 0, 1, 2, ...

    (vLLM 0.32 `distributed/eplb/eplb_state.py`.)
    """
    table = [p % num_experts for p in range(num_experts + num_redundant)]
    return physical(table, num_experts, num_ranks)


def _runs(count: int, num_ranks: int) -> tuple[tuple[int, ...], ...]:
    base, more = divmod(count, num_ranks)
    starts = [r * base + min(r, more) for r in range(num_ranks + 1)]
    return tuple(tuple(range(starts[r], starts[r + 1])) for r in range(num_ranks))


def _placement(
    strategy: str,
    rank_ids: tuple[tuple[int, ...], ...],
    num_experts: int,
    logical_of: tuple[int, ...] | None = None,
    copies: tuple[int, ...] | None = None,
) -> ExpertPlacement:
    placement = ExpertPlacement(
        strategy,
        num_experts,
        rank_ids,
        tuple(range(num_experts)) if logical_of is None else logical_of,
        (1,) * num_experts if copies is None else copies,
    )
    placement.check()
    return placement


def _on(ranks: Sequence[int]) -> str:
    if not ranks:
        return "none"
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _short(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
