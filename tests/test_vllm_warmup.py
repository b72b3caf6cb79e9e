"""vLLM's layers are warmed once their weights are prepared; with a stand-in for Triton."""

from __future__ import annotations

import logging

import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("vllm_world")

from triton_driver import counted
from vllm_layers import format_of, make_layer

from moe_backend.engines.vllm_methods import _most_tokens
from moe_backend.kernels import warmup
from moe_backend.kernels.hopper.kernel import HopperKernel
from moe_backend.verify.problems import ACTIVATIONS, Case, build


@pytest.fixture
def counts(monkeypatch):
    monkeypatch.setattr(warmup, "_warmed", set())
    monkeypatch.setattr(HopperKernel, "refusal", lambda self, layer: None)
    monkeypatch.setenv("MOE_BACKEND_NVFP4", "packed")
    with counted(monkeypatch) as found:
        yield found


def loaded(dialect, activation=ACTIVATIONS[1]):
    problem = build(Case(format_of(dialect), activation, intermediate_size=256))
    layer = make_layer(problem, dialect)
    layer.load(problem.weights, dialect)
    return layer, problem


@pytest.mark.parametrize("dialect", ["bf16", "fp8_block", "nvfp4_modelopt"])
def test_a_prepared_layer_compiles_nothing_more(dialect, counts, caplog):
    layer, problem = loaded(dialect)
    caplog.set_level(logging.INFO, "vllm.moe_backend")
    layer.finish()
    compiled = len(counts.compiled)
    assert compiled > 4
    [line] = [r.message for r in caplog.records if "warmed" in r.message]
    assert f"and layers like it: warmed {compiled} kernels in" in line
    layer(problem.x, problem.topk_weights, problem.topk_ids)
    most = layer.config.scheduler_config.max_num_batched_tokens
    x = torch.zeros(most, problem.case.hidden_size, dtype=torch.bfloat16)
    ids = torch.zeros(most, problem.case.top_k, dtype=torch.int32)
    layer(x, ids.float(), ids)
    assert len(counts.compiled) == compiled


def test_an_equal_layer_and_a_reload_are_not_warmed_again(counts, caplog):
    layer, problem = loaded("fp8_block")
    layer.finish()
    launched = len(counts.launched)
    caplog.set_level(logging.INFO, "vllm.moe_backend")
    loaded("fp8_block")[0].finish()
    layer.load(problem.weights, "fp8_block")
    layer.finish()
    assert len(counts.launched) == launched
    assert not any("warmed" in r.message for r in caplog.records)


def test_what_the_bound_leaves_is_a_warning(counts, monkeypatch, caplog):
    monkeypatch.setattr(warmup, "MAX_CALLS", 1)
    caplog.set_level(logging.INFO, "vllm.moe_backend")
    loaded("bf16")[0].finish()
    [record] = [r for r in caplog.records if "warmed" in r.message]
    assert record.levelno == logging.WARNING
    assert "stopped at" in record.message


def test_data_parallel_ranks_send_their_tokens():
    class Config:
        class scheduler_config:
            max_num_batched_tokens = 2048

        class parallel_config:
            data_parallel_size = 4

    assert _most_tokens(Config) == 8192


def test_nothing_on_a_cpu(monkeypatch, caplog):
    monkeypatch.setattr(warmup, "_warmed", set())
    caplog.set_level(logging.INFO, "vllm.moe_backend")
    loaded("bf16")[0].finish()
    assert not any("warmed" in r.message for r in caplog.records)
