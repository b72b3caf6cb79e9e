"""The choice between packed and folded NVFP4, without an engine."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from moe_backend.formats.folding import folded_bytes
from moe_backend.nvfp4_paths import (
    CROSSOVER_TOKENS_PER_EXPERT,
    Deployment,
    Nvfp4Path,
    choose,
    prepare,
)
from moe_backend.verify.problems import ACTIVATIONS, Case, build

LAYER = replace(
    build(Case("nvfp4", ACTIVATIONS[0])).layer,
    device="cuda",
    num_experts=288,
    num_local_experts=36,
    top_k=8,
    hidden_size=4096,
    intermediate_size=1280,
)
PACKED, FOLDED = folded_bytes(36, 4096, 1280)
GROWTH = 42 * (FOLDED - PACKED)
MANY = 288 // 8 * CROSSOVER_TOKENS_PER_EXPERT  # tokens that bring each expert to the crossover


@pytest.fixture(autouse=True)
def _unset(monkeypatch):
    monkeypatch.delenv("MOE_BACKEND_NVFP4", raising=False)
    monkeypatch.delenv("MOE_BACKEND_KERNEL", raising=False)


@pytest.mark.parametrize(
    ("deployment", "path", "reason"),
    [
        (Deployment(256, 10**12, 42), "packed", "7 tokens per expert expected, FP8 is faster from"),
        (Deployment(MANY, 10**12, 42), "folded", "48 tokens per expert expected, and the .* fit"),
        (Deployment(MANY - 36, 10**12, 42), "packed", "47 tokens per expert"),
        (Deployment(MANY, GROWTH, 42), "folded", "9.7 GiB that FP8 adds fit"),
        (
            Deployment(MANY, GROWTH - 1, 42),
            "packed",
            "but FP8 takes 9.7 GiB more and the room .* 9.7",
        ),
        (Deployment(MANY, None, 42), "packed", "and the room for it is unknown"),
        (Deployment(None, 10**12, 42), "packed", "number of tokens is unknown"),
    ],
)
def test_choice_follows_tokens_and_memory(deployment, path, reason):
    choice = choose(LAYER, deployment)
    assert choice.path == path
    assert re.search(reason, choice.reason), choice.reason
    assert str(choice) == f"nvfp4={path} ({choice.reason})"


@pytest.mark.parametrize("path", list(Nvfp4Path))
@pytest.mark.parametrize("tokens", [1, 10**6])
def test_the_variable_overrides(path, tokens, monkeypatch):
    monkeypatch.setenv("MOE_BACKEND_NVFP4", path)
    choice = choose(LAYER, Deployment(tokens, 10**12))
    assert choice.path == path
    assert choice.reason == "MOE_BACKEND_NVFP4 is set"


@pytest.mark.parametrize(
    ("free", "path", "reason"),
    [
        (10**13, "unpacked", "a CPU decodes slowly, and 31.8 GiB fit"),
        (10**9, "packed", "unpacked weights take 31.8 GiB more and the room for it is 0.9 GiB"),
        (None, "packed", "the room for it is unknown"),
    ],
)
def test_a_cpu_unpacks_where_there_is_room(free, path, reason):
    choice = choose(replace(LAYER, device="cpu"), Deployment(1, free, 42))
    assert choice.path == path
    assert reason in choice.reason


def test_the_native_kernel_takes_packed_weights(monkeypatch):
    monkeypatch.setenv("MOE_BACKEND_KERNEL", "nvfp4_native")
    assert choose(LAYER, Deployment(MANY, 10**12)).path == "packed"


def test_auto_is_the_default(monkeypatch):
    deployment = Deployment(MANY, 10**12)
    unset = choose(LAYER, deployment)
    monkeypatch.setenv("MOE_BACKEND_NVFP4", "auto")
    assert choose(LAYER, deployment) == unset


def test_malformed_weights_are_refused_before_they_are_folded(monkeypatch):
    monkeypatch.setenv("MOE_BACKEND_NVFP4", "folded")
    problem = build(Case("nvfp4", ACTIVATIONS[0]))
    bad = replace(problem.weights, w2_global_scale=problem.weights.w2_global_scale * 0)
    with pytest.raises(ValueError, match=r"layer7\.w2 global scale: 8 of 8 scales"):
        prepare(problem.layer, bad, choose(problem.layer, Deployment()), "layer7.")
