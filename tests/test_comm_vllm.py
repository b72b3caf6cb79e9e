"""vLLM's own communicators, over gloo: paths left out, tried in place, switched off, refused."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from pathlib import Path

import pytest

pytest.importorskip("vllm")
import comm_fork
import torch
from comm_ranks import run_ranks, run_scenarios
from comm_shm import needs_shm

VARIABLE = "MOE_BACKEND_ALL_REDUCE"


def cached(folder: Path) -> dict[str, str]:
    """Path to outcome, in the one verdict file of the folder."""
    (file,) = folder.glob("cache/moe-backend/comm/*.json")
    return {name: r["outcome"] for name, r in json.loads(file.read_text())["results"].items()}


# --- What a rank does -----------------------------------------------------------------------------


def tensor_parallel_group(ranks: int):
    from vllm.distributed import parallel_state

    parallel_state.initialize_model_parallel(ranks, 1)
    return parallel_state.get_tp_group()


def every_operation(group, rank: int, ranks: int) -> None:
    """All that a model asks of its group, the gather of the LM head included; raises if wrong."""
    communicator = group.device_communicator
    mine = torch.arange(12.0).view(4, 3) + 100 * rank
    everyone = [torch.arange(12.0).view(4, 3) + 100 * r for r in range(ranks)]
    total = torch.stack(everyone).sum(0)
    for _ in range(2):
        torch.testing.assert_close(group.all_reduce(mine.clone()), total)
        torch.testing.assert_close(group.all_gather(mine, -1), torch.cat(everyone, -1))
        torch.testing.assert_close(group.all_gather(mine, 0), torch.cat(everyone, 0))
        gathered = group.gather(mine, dst=0)
        if rank == 0:
            torch.testing.assert_close(gathered, torch.cat(everyone, -1))
        share = total[rank * (4 // ranks) : (rank + 1) * (4 // ranks)]
        torch.testing.assert_close(group.reduce_scatter(mine.clone(), 0), share)
        sent = group.broadcast(mine.clone(), src=ranks - 1)
        torch.testing.assert_close(sent, everyone[-1])
        sizes = [4 + r for r in range(ranks)]
        ragged = [torch.full((n, 3), float(r)) for r, n in enumerate(sizes)]
        got = group.all_gatherv(ragged[rank], 0, sizes)
        torch.testing.assert_close(got, torch.cat(ragged))
        both = group.all_gatherv([ragged[rank], ragged[rank] + 1], 0, sizes)
        torch.testing.assert_close(both[1], torch.cat(ragged) + 1)
        whole = torch.arange(float(sum(sizes)))[:, None].repeat(1, 3)
        start = sum(sizes[:rank])
        got = group.reduce_scatterv(whole * (rank + 1), 0, sizes)
        factor = sum(range(1, ranks + 1))
        torch.testing.assert_close(got, whole[start : start + sizes[rank]] * factor)
    if rank == 0:
        communicator.send(mine, 1)
    elif rank == 1:
        torch.testing.assert_close(communicator.recv(mine.shape, mine.dtype, 0), everyone[0])


def cpu_rank(rank: int, ranks: int) -> str:
    """A tensor-parallel group of the CPU platform; returns what it runs on."""
    from vllm.distributed import parallel_state

    group = tensor_parallel_group(ranks)
    every_operation(group, rank, ranks)
    if ranks == 2:  # vLLM's other groups have one rank each
        assert parallel_state.get_pp_group().device_communicator is None
    communicator = group.device_communicator
    return f"{type(communicator).__name__} {type(communicator.dist_module).__name__}"


def short_limit(patch: pytest.MonkeyPatch, fault: str) -> None:
    """For the step in which the fault hangs; the other keeps its limit."""
    from moe_backend.engines import vllm_comm_start

    limit = "BUILD_LIMIT_S" if "when built" in fault else "CHECK_LIMIT_S"
    patch.setattr(vllm_comm_start, limit, 1.0)


@contextlib.contextmanager
def faulty_shared_memory(fault: str, rank: int):
    """vLLM's shared-memory all-reduce goes wrong on one rank."""
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    original = _CPUSHMDistributed.all_reduce

    def all_reduce(self, tensor, group=None):
        original(self, tensor, group)
        if fault == "nan":
            tensor.view(-1)[0] = float("nan")
        elif fault == "wrong":
            tensor.view(-1)[-1] += 1
        elif fault == "hang":
            time.sleep(1000)
        elif fault == "error":
            raise RuntimeError("shared memory is gone")

    def init(self):
        if fault == "error when built":
            raise RuntimeError("no space left on device")
        time.sleep(1000)

    with pytest.MonkeyPatch.context() as patch:
        if "hang" in fault:
            short_limit(patch, fault)
        if torch.distributed.get_rank() == rank:
            if "when built" in fault:
                patch.setattr(_CPUSHMDistributed, "_init_cpu_shm", init)
            else:
                patch.setattr(_CPUSHMDistributed, "all_reduce", all_reduce)
        yield


def faulty_cpu_rank(rank: int, ranks: int, fault: str) -> str:
    with faulty_shared_memory(fault, rank=1):
        return cpu_rank(rank, ranks)


def trusting_cpu_rank(rank: int, ranks: int) -> bool:
    with faulty_shared_memory("nan", rank=1):
        return bool(tensor_parallel_group(ranks).all_reduce(torch.ones(4)).isnan().any())


def cpu_rank_with_faulty_children(rank: int, ranks: int, fault: str) -> str:
    from dataclasses import replace

    from moe_backend.comm import paths

    broken = replace(paths.PATHS["shm"], opener=f"comm_faults:{fault}", limit_s=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(paths.PATHS, "shm", broken)
        return cpu_rank(rank, ranks)


def rank_without_any_path(rank: int, ranks: int) -> None:
    """Shared memory is wrong, and so is torch.distributed."""
    from moe_backend.comm.checks import Collective
    from moe_backend.engines import vllm_comm_start

    with faulty_shared_memory("wrong", rank=1), pytest.MonkeyPatch.context() as patch:
        broken = Collective(all_reduce=torch.zeros_like)
        patch.setattr(vllm_comm_start, "over_group", lambda *_: broken)
        tensor_parallel_group(ranks)


def gpu_rank(
    rank: int, ranks: int, faults: dict[str, str], rocm: bool, name: str = "tp:0"
) -> tuple[list, list, list]:
    """vLLM's CudaCommunicator with stand-ins for its parts, as the first group of its process.

    Args:
        faults: path to fault, as in `comm_vllm_parts.Stand`.
        name: of the group.
    Returns:
        the paths that were built, those still there, and those that an all-reduce used.
    """
    import comm_vllm_parts as parts
    from vllm.distributed import parallel_state
    from vllm.distributed.device_communicators.cuda_communicator import CudaCommunicator
    from vllm.platforms import current_platform

    from moe_backend.engines import vllm_comm, vllm_comm_start
    from moe_backend.engines.vllm_comm_paths import PARTS

    parts.built.clear()
    parallel_state.initialize_model_parallel(ranks, 1)  # the group that the CPU platform builds
    group = parallel_state.get_tp_group()
    with pytest.MonkeyPatch.context() as patch:
        if os.environ[VARIABLE] == "auto" and "hang" in str(faults):
            short_limit(patch, str(faults))
        patch.setenv("VLLM_ALLREDUCE_USE_FLASHINFER", str(int(not rocm)))
        names = parts.install(patch, faults, rocm)
        if not name.startswith("tp"):
            names = ("pynccl", "torch")
        patch.setattr(vllm_comm_start, "candidates", lambda *_: names)
        vllm_comm_start._tried.clear()  # by the CPU platform's group
        patch.setattr(
            type(current_platform),
            "get_device_communicator_cls",
            classmethod(lambda _: f"{CudaCommunicator.__module__}.CudaCommunicator"),
        )
        vllm_comm.register()
        class_name = current_platform.get_device_communicator_cls()
        communicator_class = getattr(vllm_comm, class_name.rpartition(".")[2])
        communicator = communicator_class(
            cpu_group=group.cpu_group,
            device=torch.device("cpu"),
            device_group=group.device_group,
            unique_name=name,
        )
        assert isinstance(communicator, CudaCommunicator)  # graph capture asserts that
        group.device_communicator = communicator
        parts.used.clear()
        group.all_reduce(torch.ones(4, 8))
        used = list(parts.used)
        every_operation(group, rank, ranks)
    there = [
        name
        for name, part in PARTS.items()
        if getattr(communicator, part.attribute, None) is not None
        and type(getattr(communicator, part.attribute)).__name__ != "TorchInsteadOfPyNccl"
    ]
    return list(parts.built), there, used


# --- The CPU platform -----------------------------------------------------------------------------


@needs_shm
def test_without_our_backend_vllm_is_left_alone(tmp_path):
    ended = run_ranks(cpu_rank, 2, tmp_path)
    assert {e.value for e in ended} == {"CpuCommunicator _CPUSHMDistributed"}
    assert not (tmp_path / "cache").exists()


@needs_shm
@pytest.mark.parametrize("ranks", [2, 4])
def test_healthy_path_is_kept_and_remembered(ranks, tmp_path):
    for _ in range(2 if ranks == 2 else 1):
        ended = run_ranks(cpu_rank, ranks, tmp_path, env={VARIABLE: "auto"})
        assert {e.value for e in ended} == {"CheckedCpuCommunicator _CPUSHMDistributed"}, ended
        assert ended[0].output.count("all paths on: shm, torch; tried in place: shm") == 1
        assert "collectives of" not in ended[1].output
    assert cached(tmp_path) == {"shm": "ok"}
    assert not list(tmp_path.rglob("*.pending"))


def test_path_left_out_by_the_user(tmp_path):
    scenarios = [((), {VARIABLE: value}) for value in ("off", "-shm", "torch")]
    for ended in run_scenarios(cpu_rank, 2, tmp_path, scenarios):
        assert {e.value for e in ended} == {"CheckedCpuCommunicator module"}, ended
        assert "torch instead" in ended[0].output


@needs_shm
@pytest.mark.parametrize("ranks", [2, 4])
def test_wrong_result_switches_the_path_off(ranks, tmp_path):
    faults = {"nan": "gave NaN", "wrong": "gave a wrong result"}
    scenarios = [((fault,), {VARIABLE: "auto"}) for fault in faults]
    for fault, ended in zip(
        faults, run_scenarios(faulty_cpu_rank, ranks, tmp_path, scenarios), strict=True
    ):
        assert {e.value for e in ended} == {"CheckedCpuCommunicator module"}, ended
        assert f"shm off ({faults[fault]}: all_reduce bfloat16[128]" in ended[0].output
        assert f"on rank 1 of {ranks}), torch instead" in ended[0].output


@needs_shm
def test_finding_is_remembered(tmp_path):
    run_ranks(faulty_cpu_rank, 2, tmp_path, "wrong", env={VARIABLE: "auto"})
    assert cached(tmp_path) == {"shm": "wrong", "torch": "ok"}
    ended = run_ranks(cpu_rank, 2, tmp_path, env={VARIABLE: "auto"})
    assert {e.value for e in ended} == {"CheckedCpuCommunicator module"}, ended
    assert f"{VARIABLE}=probe tries again" in ended[0].output


def refused(ended) -> bool:
    """Every rank left, saying how to go on."""
    return all(
        e.exit_code == 70
        and "a path hangs: shm, torch not" in e.output
        and f"{VARIABLE}=-shm leaves it out now" in e.output
        for e in ended
    )


@needs_shm
def test_hang_while_it_is_built_is_refused(tmp_path):
    ended = run_ranks(faulty_cpu_rank, 2, tmp_path, "hang when built", env={VARIABLE: "auto"})
    assert refused(ended), ended
    assert len(list(tmp_path.rglob("*.pending"))) == 1


@needs_shm
def test_hang_in_the_server_is_refused_and_the_next_start_looks_first(tmp_path):
    ended = run_ranks(faulty_cpu_rank, 2, tmp_path, "hang", env={VARIABLE: "auto"})
    assert refused(ended), ended
    assert len(list(tmp_path.rglob("*.pending"))) == 1
    # Now it hangs in the child processes too, where that can be survived.
    ended = run_ranks(
        cpu_rank_with_faulty_children, 2, tmp_path, "hang_mid_run", env=children("auto")
    )
    assert {e.value for e in ended} == {"CheckedCpuCommunicator module"}, ended
    assert "left unfinished by an earlier start" in ended[0].output
    assert "shm off (did not finish: all_reduce bfloat16[8192], within 2 s" in ended[0].output
    assert cached(tmp_path)["shm"] == "hang"
    assert not list(tmp_path.rglob("*.pending"))


def children(value: str) -> dict[str, str]:
    return {VARIABLE: value, "PYTHONPATH": comm_fork.python_path()}


@needs_shm
def test_error_on_one_rank_ends_the_start_with_a_way_out(tmp_path):
    ended = run_ranks(faulty_cpu_rank, 2, tmp_path, "error when built", env={VARIABLE: "auto"})
    assert ended[1].exit_code == 1
    assert ended[0].exit_code in (1, 70)  # told by gloo, or by the watch
    assert f"{VARIABLE}=-shm leaves one out now" in ended[1].output


@needs_shm
def test_probe_runs_vllms_own_path_in_child_processes(tmp_path):
    ended = run_ranks(cpu_rank, 2, tmp_path, env=children("probe"))
    assert {e.value for e in ended} == {"CheckedCpuCommunicator _CPUSHMDistributed"}, ended
    assert "trying shm, torch in child processes" in ended[0].output
    assert cached(tmp_path) == {"shm": "ok", "torch": "ok"}
    assert not list(Path("/dev/shm").glob("moe-backend-probe-*"))


@needs_shm
def test_everything_trusted(tmp_path):
    ended = run_ranks(trusting_cpu_rank, 2, tmp_path, env={VARIABLE: "on"})
    assert ended[1].value is True  # NaN went through, as asked for
    assert f"paths are not tried: {VARIABLE}=on" in ended[0].output


def test_nothing_left_is_refused_on_every_rank(tmp_path):
    ended = run_ranks(rank_without_any_path, 2, tmp_path, env={VARIABLE: "auto"})
    for one in ended:
        assert one.exit_code == 1
        assert "NoUsablePathError: the collectives of torch.distributed" in one.output


@needs_shm
def test_path_asked_for_that_is_wrong_is_refused(tmp_path):
    ended = run_ranks(faulty_cpu_rank, 2, tmp_path, "wrong", env={VARIABLE: "shm"})
    for one in ended:
        assert one.exit_code == 1
        assert f"{VARIABLE} asks for shm, which gave a wrong result" in one.output
    # A finding, not a start that died: it is stored, and no mark is left.
    assert cached(tmp_path) == {"shm": "wrong", "torch": "ok"}
    assert not list(tmp_path.rglob("*.pending"))


def test_value_not_understood_is_refused(tmp_path):
    ended = run_ranks(cpu_rank, 2, tmp_path, env={VARIABLE: "fast"})
    assert "accepted are auto, probe, on, off" in ended[0].output
    assert [e.exit_code for e in ended] == [1, 1]


def test_elastic_expert_parallelism_keeps_vllms_class(monkeypatch):
    """Its coordinator asserts the exact class (vLLM stateless_coordinator.py)."""
    from vllm.config import VllmConfig, set_current_vllm_config

    from moe_backend.engines import vllm_comm

    monkeypatch.setenv(VARIABLE, "auto")
    config = VllmConfig()
    with set_current_vllm_config(config):
        assert vllm_comm.wanted()
        config.parallel_config.enable_elastic_ep = True
        assert not vllm_comm.wanted()
    monkeypatch.delenv(VARIABLE)
    config = VllmConfig()
    with set_current_vllm_config(config):
        assert not vllm_comm.wanted()


# --- The GPU platforms' communicator --------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 4])
def test_gpu_communicator_with_every_path_healthy(ranks, tmp_path):
    machines = [
        (["custom", "symm_mem", "flashinfer"], {}, False),
        (["custom", "quick"], {}, True),
        (["aiter", "quick"], {"aiter": ""}, True),
    ]
    scenarios = [((faults, rocm), {VARIABLE: "auto"}) for _, faults, rocm in machines]
    ended = run_scenarios(gpu_rank, ranks, tmp_path, scenarios)
    for (paths, _, _), all_ranks in zip(machines, ended, strict=True):
        for one in all_ranks:
            built, there, _ = one.value
            assert set(built) == set(there) == {*paths, "pynccl"}
            assert len(built) == len(set(built))


WRONG_PATHS = [  # path, on ROCm, what takes its place
    ("custom", False, "symm_mem"),
    ("symm_mem", False, "custom"),
    ("custom", True, "pynccl"),
    ("aiter", True, "pynccl"),
    ("pynccl", False, "custom"),
]


def test_gpu_path_that_is_wrong_is_switched_off(tmp_path):
    """FlashInfer and quick reduce, which stand before the others, are left out for this test."""
    cases = [(*case, fault) for case in WRONG_PATHS for fault in ("nan", "wrong")]
    scenarios = [
        (({path: fault}, rocm), {VARIABLE: "-quick" if rocm else "-flashinfer"})
        for path, rocm, _, fault in cases
    ]
    ended = run_scenarios(gpu_rank, 2, tmp_path, scenarios)
    for (path, _, instead, fault), all_ranks in zip(cases, ended, strict=True):
        for one in all_ranks:
            _, there, used = one.value
            assert path not in there
            assert used == [instead]
        said = "gave NaN" if fault == "nan" else "gave a wrong result"
        assert f"{path} off ({said}" in all_ranks[0].output


def test_first_group_is_tried_whatever_its_name(tmp_path):
    """As with data parallelism and -tp 1, where no group is tensor parallel."""
    ended = run_ranks(
        gpu_rank, 2, tmp_path, {"pynccl": "nan"}, False, "dp:0", env={VARIABLE: "auto"}
    )
    for one in ended:
        assert one.value == (["pynccl"], [], []), one.output
    assert "collectives of dp:0 (2 ranks): pynccl off (gave NaN" in ended[0].output


@pytest.mark.parametrize("name", ["tp:0", "ep:0"])
def test_pynccl_that_vllm_itself_leaves_out(name, tmp_path):
    """vLLM 0.33 does so in silence with NCCL before 2.29.7; its all_gatherv then fails."""
    ended = run_ranks(
        gpu_rank, 2, tmp_path, {"pynccl": "disabled"}, False, name, env={VARIABLE: "auto"}
    )
    for one in ended:
        built, there, _ = one.value or one.output
        assert "pynccl" in built
        assert "pynccl" not in there
    assert "vLLM has no PyNccl here, torch serves instead" in ended[0].output
    assert "all paths on: custom, symm_mem, flashinfer, torch" in ended[0].output or name == "ep:0"


def two_groups(rank: int, ranks: int) -> list[str]:
    """A second group after the tensor-parallel one, left in the middle of an earlier start."""
    from moe_backend.comm import cache
    from moe_backend.engines import vllm_comm_start

    gpu_rank(rank, ranks, {}, False)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_comm_start.Start, "_say", lambda *_, **__: found.append("said"))
        patch.setattr(
            vllm_comm_start,
            "probe",
            lambda paths, *_: found.extend(path.name for path in paths) or {},
        )
        patch.setattr(vllm_comm_start, "candidates", lambda *_: ("pynccl", "torch"))
        for unfinished in ([], ["pynccl"]):
            patch.setattr(cache, "unfinished", lambda *_, left=unfinished, **__: left)
            group = torch.distributed.group.WORLD
            world = vllm_comm_start.World(rank, ranks, torch.device("cpu"), group)
            vllm_comm_start.Start(world, "ep:0", group).run(None, lambda _: None)
            found.append("built")
    return found


def test_later_groups_are_tried_only_where_a_start_did_not_finish(tmp_path):
    """The message after a hang promises as much."""
    for one in run_ranks(two_groups, 2, tmp_path, env={VARIABLE: "auto"}):
        assert one.value == ["built", "said", "pynccl", "built"], one.output


def test_path_asked_for_that_is_not_there(tmp_path):
    ended = run_ranks(cpu_rank, 2, tmp_path, env={VARIABLE: "custom"})
    assert {e.value for e in ended} == {"CheckedCpuCommunicator module"}, ended
    assert "WARNING" in ended[0].output
    assert f"{VARIABLE} asks for custom, which is not enabled here" in ended[0].output


@pytest.mark.parametrize("path", ["custom", "flashinfer"])
def test_gpu_path_that_one_rank_has_alone_is_switched_off(path, tmp_path):
    """A model would reduce over it on that rank and over another path on the rest."""
    faults = {path: "only on rank 0"}
    ended = run_ranks(gpu_rank, 2, tmp_path, faults, False, env={VARIABLE: "auto"})
    for one in ended:
        _, there, used = one.value or one.output
        assert path not in (*there, *used)
    assert f"{path} off (failed: it is enabled on 1 of 2 ranks only)" in ended[0].output


def test_gpu_path_left_out_is_never_built(tmp_path):
    paths = ["custom", "symm_mem", "flashinfer", "pynccl", "quick", "aiter"]
    scenarios = [
        (({path: "hang when built"}, path in ("quick", "aiter")), {VARIABLE: f"-{path}"})
        for path in paths
    ]
    ended = run_scenarios(gpu_rank, 2, tmp_path, scenarios)
    for path, all_ranks in zip(paths, ended, strict=True):
        for one in all_ranks:
            built, there, used = one.value
            assert path not in (*built, *there, *used)
        assert f"{path} off ({VARIABLE} leaves it out)" in all_ranks[0].output


@pytest.mark.parametrize("ranks", [2, 4])
def test_gpu_fallback_for_every_operation(ranks, tmp_path):
    """Everything off: also where vLLM asserts that PyNccl is there."""
    ended = run_ranks(gpu_rank, ranks, tmp_path, {}, False, env={VARIABLE: "off"})
    for one in ended:
        assert one.value == ([], [], []), one.output


@pytest.mark.parametrize("fault", ["hang", "error", "hang when built", "error when built"])
def test_gpu_path_that_hangs_or_raises_is_refused(fault, tmp_path):
    began = time.monotonic()
    ended = run_ranks(gpu_rank, 2, tmp_path, {"custom": fault}, False, env={VARIABLE: "auto"})
    assert time.monotonic() - began < 40
    assert all(e.exit_code not in (0, None) for e in ended)
    assert any(f"{VARIABLE}=-custom" in e.output for e in ended)
    assert len(list(tmp_path.rglob("*.pending"))) == 1


def test_log_uses_vllms_logger():
    from moe_backend.engines import vllm_comm_start

    assert vllm_comm_start.logger is logging.getLogger("vllm.moe_backend")
