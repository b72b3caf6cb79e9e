"""The checks themselves: they pass what is right and flag every control."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from gpu_problems import but_for_one_token

from moe_backend import cli
from moe_backend.kernels.reference import fused_experts
from moe_backend.verify.controls import controls
from moe_backend.verify.metrics import difference
from moe_backend.verify.problems import ACTIVATIONS, Case, build, cases
from moe_backend.verify.run import REL_L2_FP32, expected, passes, run_cases, run_controls


@pytest.mark.parametrize("case", list(cases()), ids=lambda c: c.name)
def test_reference_in_fp32_equals_float64(case):
    p = build(case)
    out = fused_experts(
        p.x.float(), p.weights, p.topk_weights, p.topk_ids, case.activation, p.expert_map
    )
    assert difference(out, p.reference).within(REL_L2_FP32, norm=1e-5)


def test_every_case_on_every_kernel():
    results = list(run_cases())
    assert len(results) >= len(list(cases()))
    assert [r for r in results if not r.ok] == []


@pytest.mark.parametrize("control", controls(), ids=lambda c: c.name)
def test_control_is_caught(control):
    out, problem = control.outcome()
    found = difference(out, problem.reference)
    assert not passes(found, problem.case)


@pytest.mark.parametrize("control", controls(), ids=lambda c: c.name)
def test_control_is_right_but_for_its_fault(control):
    """The same problem through the sound code passes, so it is the fault that is caught."""
    p = control.make(control.case)
    assert passes(difference(control.sound(p), p.reference), p.case)


def test_metrics_see_what_cosine_does_not():
    reference = torch.randn(8, 32)
    scaled = difference(reference * 13, reference)
    assert scaled.norm_ratio == pytest.approx(13)
    assert not scaled.within(1.0)
    assert difference(reference, reference).equal
    assert not difference(reference * torch.nan, reference).within(1e9)
    assert not difference(reference + torch.inf, reference).finite


def test_metrics_of_zeros_and_shapes():
    zero = torch.zeros(2, 3)
    assert difference(zero, zero).within(0.0)
    assert not difference(zero + 1, zero).within(1e9)
    with pytest.raises(ValueError, match="shapes differ"):
        difference(zero, zero[:1])


def test_empty_batch():
    p = build(replace(Case("bf16", next(iter(cases())).activation), tokens=0))
    assert fused_experts(p.x, p.weights, p.topk_weights, p.topk_ids, p.case.activation).shape == (
        0,
        128,
    )


def test_command_writes_json(tmp_path, capsys):
    out = tmp_path / "verify.json"
    assert cli.main(["verify", "--quick", "--kernel", "reference", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert {"name", "kernel", "format", "layout", "rel_l2", "norm_ratio", "finite", "ok"} <= set(
        report["cases"][0]
    )
    assert all(c["caught"] for c in report["controls"])
    assert "0 wrong" in capsys.readouterr().out


def test_command_fails_on_a_wrong_kernel(monkeypatch, capsys):
    from moe_backend.kernels import reference

    monkeypatch.setattr(
        reference.ReferenceKernel, "apply", lambda self, layer, tensors, x, *rest: x * 0.5
    )
    assert cli.main(["verify", "--quick", "--kernel", "reference"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_command_fails_on_an_uncaught_control(monkeypatch, capsys):
    from moe_backend.verify import run

    sound = controls()[0]
    monkeypatch.setattr(
        run,
        "controls",
        lambda: [replace(sound, name="sound", run=lambda p: p.reference.bfloat16())],
    )
    assert cli.main(["verify", "--quick"]) == 1
    assert "UNCAUGHT sound" in capsys.readouterr().out


def test_command_refuses_an_unknown_kernel(capsys):
    assert cli.main(["verify", "--kernel", "nonesuch"]) == 1
    assert "accepted: hopper, triton, vllm_cpu, reference, nvfp4_native" in capsys.readouterr().err


def test_command_without_a_case_says_only_that(tmp_path, capsys):
    out = tmp_path / "verify.json"
    assert cli.main(["verify", "--quick", "--kernel", "hopper", "--json", str(out)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "no kernel ran: nothing was verified\n"
    assert json.loads(out.read_text()) == {"cases": [], "controls": []}


def test_results_of_controls_name_them():
    assert {r.name for r in run_controls()} == {c.name for c in controls()}


@pytest.mark.parametrize("groups", [None, (64, 128)], ids=str)
def test_another_quantisation_of_the_activations_is_flagged(groups):
    """What a kernel returns that quantises nothing, or its input in other groups than it says."""
    problem = build(Case("fp8_block", ACTIVATIONS[1], hidden_size=256, intermediate_size=256))
    right = expected(problem, (128, 128))
    assert passes(difference(right.bfloat16(), right), problem.case, quantised=True)
    assert not passes(difference(expected(problem, groups), right), problem.case, quantised=True)


def test_one_token_may_be_off_but_not_two():
    """The bound of the GPU tests where activations are quantised."""
    wanted = torch.randn(129, 64, generator=torch.Generator().manual_seed(0))
    out = wanted.clone()
    out[7] *= 1.3
    assert not difference(out, wanted).within(2e-2)
    assert but_for_one_token(out, wanted).equal
    out[90] *= 1.3
    assert not but_for_one_token(out, wanted).within(2e-2)
