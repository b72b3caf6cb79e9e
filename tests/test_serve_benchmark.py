"""`benchmarks/serve.py`, its random model, and how `gpu_answers.py` judges: without a GPU."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from moe_backend.checkpoint import Checkpoint, preflight
from moe_backend.formats.fp8_block import dequantize_blocks

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Import a script of that folder, which imports others of it by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str):
        spec = importlib.util.spec_from_file_location(
            f"benchmark_{name}", BENCHMARKS / f"{name}.py"
        )
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


# --- The random model ---------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["fp8-block", "bf16"])
def test_random_model_is_a_sound_checkpoint(format, script, tmp_path):
    random_step = script("random_step")
    size = random_step.write(tmp_path / "model", random_step.SMALL, 3, format)
    assert preflight(tmp_path / "model")
    checkpoint = Checkpoint.open(tmp_path / "model")
    assert size == sum(math.prod(t.shape) * t.dtype.itemsize for t in checkpoint.tensors.values())
    assert checkpoint.config["moe_layers_enum"] == "1,2"

    from safetensors.torch import load_file

    (file,) = checkpoint.files
    tensors = load_file(file)
    for projection in ("gate_proj", "down_proj"):
        name = f"model.layers.2.moe.{projection}.weight"
        weight = tensors[name].float()
        if format == "fp8-block":
            scale = tensors[f"{name}_scale_inv"]
            assert scale.unique().numel() == scale.numel()
            weight = dequantize_blocks(tensors[name], scale, (128, 128))
        assert weight.isfinite().all()
        # A handful of blocks, whose scales differ by up to a fifth.
        assert float(weight.std()) * math.sqrt(weight.shape[-1]) == pytest.approx(1, rel=0.1)
    assert not torch.equal(
        tensors["model.layers.1.moe.up_proj.weight"].float(),
        tensors["model.layers.2.moe.up_proj.weight"].float(),
    )


def test_random_model_has_the_shapes_of_step(script):
    random_step = script("random_step")
    tensors = {t.name: t for t in random_step.tensors_of(random_step.STEP, 3, 640, "fp8-block")}
    experts = [t.nbytes for name, t in tensors.items() if ".layers.1.moe." in name]
    assert sum(experts) == pytest.approx(288 * 3 * 1280 * 4096, rel=0.002)
    assert tensors["model.layers.1.moe.down_proj.weight_scale_inv"].shape == (288, 32, 10)
    assert tensors["model.layers.0.self_attn.q_proj.weight"].shape == (64 * 128, 4096)
    assert tensors["model.layers.1.self_attn.q_proj.weight"].shape == (96 * 128, 4096)


# --- Loads, reasons, tables ---------------------------------------------------------------------


def test_loads(script):
    serve = script("serve")
    assert serve.load_of("decode") is serve.LOADS["decode"]
    assert serve.load_of("4x16/8") == serve.Load("4x16/8", 4, 16, 8, 4)
    assert serve.load_of("4x16/8*9").requests == 9
    with pytest.raises(argparse.ArgumentTypeError, match="AT_ONCExINPUT/OUTPUT"):
        serve.load_of("decoding")


LOG = """\
(APIServer pid=1) WARNING 11-21 13:03:10 [a.py:2] errors like `OSError: [Errno 24] Too many`.
(EngineCore pid=2) INFO 11-21 13:06:29 [c.py:8] Initializing a V1 LLM engine: kernel=1, moe_backend
(Worker pid=2) INFO 11-21 13:06:30 [fp8.py:9] Using TRITON Fp8 MoE backend out of potential: ['A'].
(Worker pid=2) INFO 11-21 13:06:30 [m.py:1] model.layers.1 and like it: format=x kernel=hopper y
(Worker pid=2) ERROR 11-21 13:04:24 [multiproc_executor.py:953] ValueError: does not support cpu.
RuntimeError: Engine core initialization failed. See root cause above.
"""


def test_the_reason_is_the_first_error_and_not_a_warning_of_one(script, tmp_path):
    serve = script("serve")
    log = tmp_path / "log"
    log.write_text(LOG)
    assert serve.reason(log, RuntimeError("ended")).startswith("ValueError: does not support cpu.")
    log.write_text(LOG.splitlines()[0])
    assert serve.reason(log, RuntimeError("ended")) == f"ended ({log})"


def test_what_ran(script):
    serve = script("serve")
    log = serve.plain(LOG)
    assert serve.ran(log) == ["model.layers.1 and like it: format=x kernel=hopper y"]
    stock = "\n".join(line for line in log.splitlines() if "format=" not in line)
    assert serve.ran(stock) == ["Using TRITON Fp8 MoE backend"]


def test_comparison_and_ratio(script):
    serve = script("serve")
    ours = [[1, 2, 3, 4], [5, 6, 7, 8]]
    servers = {
        "blockscale": {"answers": ours, "why": None},
        "triton": {"answers": [[1, 2, 3, 4], [9, 6, 7, 8]], "why": None},
        "marlin": {"answers": [], "why": "ValueError: no"},
    }
    serve.compare(servers)
    agreement = servers["triton"]["agreement_with_ours"]
    assert agreement["first_token"] == 0.5
    assert agreement["tokens_before_the_first_difference"] == 2
    latency = {f"{m}_ms": {"median": 1.0, "p99": 2.0} for m in serve.METRICS}
    rows = [
        {"load": "decode", "backend": name, "output_tokens_per_s": speed, **latency}
        for name, speed in (("blockscale", 300.0), ("triton", 200.0), ("deep_gemm", 240.0))
    ]
    table = serve.table(rows, servers)
    assert "| decode | blockscale | 300 | 1.0 / 2.0 | 1.0 / 2.0 | 1.0 / 2.0 | 1.25 |" in table
    assert "marlin: not measured: ValueError: no" in table


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.long
def test_ours_is_measured_and_a_refusal_is_told(tmp_path):
    pytest.importorskip("vllm")
    out = tmp_path / "out.json"
    command = [sys.executable, str(BENCHMARKS / "serve.py"), "--small", "--layers", "2", "--eager"]
    command += ["--backends", "blockscale", "marlin", "--loads", "4x16/8", "--repeats", "1"]
    command += ["--json", str(out), "--logs", str(tmp_path / "logs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    content = json.loads(out.read_text())
    (row,) = content["rows"]
    assert (row["backend"], row["load"], row["requests"]) == ("blockscale", "4x16/8", 4)
    assert row["output_tokens_per_s"] > 0
    assert row["ttft_ms"]["median"] <= row["e2el_ms"]["median"] <= row["e2el_ms"]["p99"]
    assert "kernel=" in content["servers"]["blockscale"]["ran"][0]
    assert len(content["servers"]["blockscale"]["answers"]) == 16
    assert "MARLIN does not support" in content["servers"]["marlin"]["why"]


# --- Judging the tiny model's answers -----------------------------------------------------------


def row(right: float = 1.0, wrong_tokens: int = 0, kernels: tuple[str, ...] = ("hopper",)) -> dict:
    tokens = [[i, -1 if i < wrong_tokens else 7] for i in range(100)]
    return {"right": right, "tokens": tokens, "kernels": list(kernels)}


def test_answers_are_judged(script):
    faults = script("gpu_answers").faults
    assert faults(row(), row(), ["hopper"]) == []
    assert faults(row(wrong_tokens=3), row(), ["hopper"]) == []
    assert faults(row(wrong_tokens=4), row(), ["hopper"]) == ["tokens"]
    assert faults(row(right=0.96), row(), ["hopper"]) == ["answers"]
    assert faults(row(kernels=("hopper", "triton")), row(), ["hopper"]) == ["kernel"]
    assert faults(row(kernels=()), row(), ["hopper"]) == ["kernel"]
    assert faults({"error": "x"}, row(), ["hopper"]) == ["error"]
    assert faults(row(), {"error": "x"}, ["hopper"]) == ["nothing to compare with"]
    assert faults(row(0.4, 60, ("triton",)), row(), ["hopper"]) == ["answers", "tokens", "kernel"]


def test_choices_are_named(script):
    from moe_backend.bench.shapes import SHAPES
    from moe_backend.kernels.hopper import methods, tiles

    choice_of = script("choices").choice_of
    layer = SHAPES["deepseek-v4-flash-ep8"].layer()
    assert choice_of("untuned", layer, 64) == tiles.choose(layer, 64)
    assert choice_of("default", layer, 64) == tiles.choose(layer, 64)  # no table without a GPU
    assert choice_of("tiled", layer, 64) == tiles.tiles(layer, 64)
    flow = choice_of("flow 8 4 1", layer, 64)
    assert flow == tiles.flow(layer, 8, 4, 1)
    assert choice_of("once 1", layer, 8) == tiles.Once(1)
    assert choice_of("pairs 4", layer, 4096) == tiles.Pairs(4)
    assert choice_of(json.dumps(methods.to_data(flow)), layer, 64) == flow
    with pytest.raises(ValueError, match="choice 'fast' is unknown"):
        choice_of("fast", layer, 64)
    with pytest.raises(ValueError, match="2 or 4 blocks"):
        choice_of("flow 8 3 1", layer, 64)


def test_every_format_is_compared_with_its_eager_run_on_one_gpu(script):
    runs = script("gpu_answers").runs
    for tp, number in ((1, 11), (2, 16)):
        assert len(runs(tp)) == number
        for run in runs(tp):
            first = next(other for other in runs(tp) if other.format == run.format)
            assert (first.tp, first.eager, first.control) == (1, True, False)
        assert [run.control for run in runs(tp)].count(True) == 1


def test_a_widened_model_computes_the_same(script, tiny, tmp_path):
    from safetensors.torch import load_file

    from moe_backend.activation import Activation
    from moe_backend.formats import Bf16Weights
    from moe_backend.kernels.reference import fused_experts

    wide = script("gpu_answers").widen(tiny, tmp_path / "wide", 512)
    config = json.loads((wide / "config.json").read_text())
    assert (config["moe_intermediate_size"], config["hidden_size"]) == (512, 256)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 7], [1, 2], [3, 3], [5, 6], [4, 0]])
    outputs = []
    for folder, columns, times in ((tiny, 384, 1), (wide, 512, 2)):
        tensors = load_file(folder / "model.safetensors")
        gate, up, down = (
            tensors[f"model.layers.2.moe.{n}_proj.weight"] for n in ("gate", "up", "down")
        )
        assert gate.shape == up.shape == (8, columns, times * 128)
        weights = Bf16Weights(torch.cat((gate, up), 1), down)
        silu = Activation.from_name("silu")
        outputs.append(fused_experts(x.repeat(1, times), weights, torch.ones(5, 2), ids, silu))
    assert torch.allclose(outputs[0].repeat(1, 2), outputs[1], rtol=1e-4, atol=1e-5)
    assert {f.name for f in wide.iterdir()} == {f.name for f in tiny.iterdir()}


def test_every_format_of_the_tiny_model_is_made_at_once(script, tmp_path):
    answers = script("gpu_answers")
    with ThreadPoolExecutor(2) as pool:
        models = answers.make_models(tmp_path, pool)
    assert set(models) == {*answers.FORMATS, "unclamped"}
    assert len(set(models.values())) == len(models)  # a folder each
    for format, folder in models.items():
        config = json.loads((folder / "config.json").read_text())
        wide = format.endswith(answers.WIDE)
        assert config["moe_intermediate_size"] == (512 if wide else 384)
        assert ("quantization_config" in config) == (format != "bf16")
        assert any(config["swiglu_limits"]) == (format != "unclamped")
