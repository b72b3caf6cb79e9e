"""The trained model through vLLM with our backend: every dialect, offline and over HTTP."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import warm_vllm

pytest.importorskip("vllm")
pytestmark = [pytest.mark.e2e, pytest.mark.slow]

EXAMPLES = Path(__file__).parents[1] / "examples"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=280,
        env={**ENVIRONMENT, **env},
    )


@pytest.fixture(scope="module")
def converted(tiny, tmp_path_factory):
    """Folder of each dialect of the tiny model, converted on first use."""
    from moe_backend import cli

    root = tmp_path_factory.mktemp("converted")
    made: dict[str, Path] = {"bf16": tiny}

    def folder(dialect: str) -> Path:
        if dialect not in made:
            made[dialect] = root / dialect
            assert cli.main(["convert", str(tiny), str(made[dialect]), "--to", dialect]) == 0
        return made[dialect]

    return folder


def test_accuracy_of_every_dialect(tmp_path):
    """The command of the README, on a part of the prompts."""
    out = tmp_path / "accuracy.json"
    result = warm_vllm.run(str(EXAMPLES / "accuracy.py"), "--prompts", "150", "--json", str(out))
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    accuracy = json.loads(out.read_text())["accuracy"]
    dialects = {"bf16", "fp8-block", "nvfp4-modelopt", "nvfp4-ct"}
    assert set(accuracy) == dialects | {"nvfp4-modelopt packed", "nvfp4-modelopt folded"}
    assert accuracy["bf16"] >= 97
    assert "NVFP4 dialects answer alike: True" in result.stdout
    assert "format=nvfp4 " in result.stdout  # the packed one at least is served as it is


def test_simple_inference_prints_answers_layers_and_speed():
    result = run(str(EXAMPLES / "simple_inference.py"))
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    assert "  right" in result.stdout
    assert "WRONG" not in result.stdout
    assert re.search(r"activation=swiglustep\(limit=7.0\) kernel=\w+", result.stdout)
    assert "tokens/s" in result.stdout


def test_simple_inference_fails_on_a_wrong_answer(converted, tmp_path):
    """The clamp dropped: a model whose config calls its swiglustep layers plain silu."""
    broken = tmp_path / "unclamped"
    broken.mkdir()
    for file in converted("bf16").iterdir():
        (broken / file.name).symlink_to(file)
    config = json.loads((broken / "config.json").read_text())
    config["swiglu_limits"] = [0.0] * len(config["swiglu_limits"])
    (broken / "config.json").unlink()
    (broken / "config.json").write_text(json.dumps(config))
    result = warm_vllm.run(str(EXAMPLES / "simple_inference.py"), str(broken))
    assert "WRONG" in result.stdout
    assert "swiglustep" not in result.stdout
    assert result.returncode == 1


def test_torch_compile(converted):
    """Without --enforce-eager vLLM compiles the model; the experts are one opaque op in it."""
    code = f"""
from vllm import LLM, SamplingParams
llm = LLM({str(converted("bf16"))!r}, moe_backend="blockscale", max_model_len=256)
out = llm.generate(["1+2+3="], SamplingParams(temperature=0, max_tokens=8))
print("ANSWER", repr(out[0].outputs[0].text))
"""
    result = run("-c", code, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert "ANSWER '6'" in result.stdout, result.stdout + result.stderr[-2000:]


RELOAD = """
import sys
from vllm import LLM, SamplingParams

def spoil(worker):
    for name, p in worker.model_runner.model.named_parameters():
        if "routed_experts" in name and p.dtype.is_floating_point and p.is_contiguous():
            p.data.copy_(p.data.float().mul_(0).add_(1).to(p.dtype))

def ask():
    out = llm.generate(["57+52=", "sort 7 3 9 1: "], SamplingParams(temperature=0), use_tqdm=False)
    return [o.outputs[0].text for o in out]

llm = LLM(
    sys.argv[1],
    moe_backend="blockscale",
    max_model_len=256,
    enforce_eager=True,
    tensor_parallel_size=int(sys.argv[2]),
)
before = ask()
llm.collective_rpc(spoil)
spoilt = ask()
llm.collective_rpc("reload_weights")
print("RELOADED", before == ask() == ["109", "1 3 7 9"], spoilt != before)
"""


@pytest.mark.parametrize(
    ("dialect", "path", "tp"),
    [
        ("bf16", "auto", 1),
        ("fp8-block", "auto", 1),
        ("nvfp4-modelopt", "auto", 1),
        ("nvfp4-ct", "packed", 1),
        ("nvfp4-modelopt", "folded", 1),
        # Scales that are merged after loading.
        pytest.param("fp8-block", "auto", 2, marks=pytest.mark.long),
    ],
)
def test_weights_reload_in_place(dialect, path, tp, converted):
    result = warm_vllm.run(
        "-c",
        RELOAD,
        str(converted(dialect)),
        str(tp),
        MOE_BACKEND_NVFP4=path,
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",
        VLLM_CPU_OMP_THREADS_BIND="auto" if tp == 1 else "nobind",
    )
    assert "RELOADED True True" in result.stdout, result.stdout + result.stderr[-2000:]


DATA_PARALLEL = ["--data-parallel-size", "2", "--enable-expert-parallel", "--api-server-count", "1"]


@pytest.mark.parametrize(
    ("dialect", "flags"),
    [
        ("bf16", []),
        pytest.param("fp8-block", [], marks=pytest.mark.long),
        ("nvfp4-ct", DATA_PARALLEL),
        *(
            pytest.param(dialect, DATA_PARALLEL, marks=pytest.mark.long)
            for dialect in ("bf16", "fp8-block", "nvfp4-modelopt")
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "dp2-ep" if value else "one",
)
def test_vllm_serve_answers_over_http(dialect, flags, converted, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    model = str(converted(dialect))
    log = tmp_path / "serve.log"
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
    command += ["--moe-backend", "blockscale", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--enforce-eager", "--max-model-len", "256", "--served-model-name", "tiny", *flags]
    environment = {**ENVIRONMENT, **({"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if flags else {})}
    with log.open("w") as sink:
        server = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        for prompt, expected in (("57+52=", "109"), ("36+62+79=", "177"), ("1+2+3=", "6")):
            body = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 8}
            text = post(f"http://127.0.0.1:{port}/v1/completions", body, server, log)
            assert text["choices"][0]["text"] == expected
    finally:
        server.terminate()
        server.wait(30)
    written = log.read_text()
    assert "kernel=" in written
    assert "swiglustep(limit=7.0)" in written


def post(url: str, body: dict, server: subprocess.Popen, log: Path, seconds: float = 180) -> dict:
    """POST until the server is up."""
    deadline = time.monotonic() + seconds
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


# --- Bad checkpoints stop the server before it serves -------------------------------------------


def serve_error(folder: Path) -> str:
    """What `LLM(folder)` fails with; fails itself if it loads."""
    code = f"""
from vllm import LLM
LLM({str(folder)!r}, moe_backend="blockscale", max_model_len=256, enforce_eager=True)
print("LOADED")
"""
    result = warm_vllm.run("-c", code, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert result.returncode != 0
    assert "LOADED" not in result.stdout
    return result.stdout + result.stderr


def copy_of(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_truncated_checkpoint(converted, tmp_path):
    folder = copy_of(converted("bf16"), tmp_path / "truncated")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "model.safetensors" in serve_error(folder)


def test_wrong_expert_count(converted, tmp_path):
    folder = copy_of(converted("bf16"), tmp_path / "experts")
    config = json.loads((folder / "config.json").read_text())
    config["moe_num_experts"] = 16
    (folder / "config.json").write_text(json.dumps(config))
    error = serve_error(folder)
    assert re.search(r"8 experts found.*16", error)


def test_missing_scale(converted, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copy_of(converted("fp8-block"), tmp_path / "scale")
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("up_proj.weight_scale_inv"))
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    assert name in serve_error(folder)


NATIVE = """
import sys
sys.path[:0] = sys.argv[2:]
import tasks
from nvfp4_vllm_op import model_op
from moe_backend.kernels import registry
from moe_backend.kernels.nvfp4_native import Nvfp4NativeKernel
registry.kernels = lambda: [Nvfp4NativeKernel(model_op)]
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], moe_backend="blockscale", max_model_len=256, enforce_eager=True)
samples = tasks.held_out(100)
sampling = SamplingParams(temperature=0, max_tokens=32)
outputs = llm.generate([prompt for _, prompt, _ in samples], sampling, use_tqdm=False)
right = sum(tasks.check(s[1], o.outputs[0].text) for s, o in zip(samples, outputs))
print("RIGHT", right)
"""


def test_w4a4_answers_like_bf16(converted):
    """Weights and activations in NVFP4, with a model of the GEMM that a CPU has not."""
    result = warm_vllm.run(
        "-c",
        NATIVE,
        str(converted("nvfp4-modelopt")),
        str(Path(__file__).parent),
        str(EXAMPLES / "tiny_step"),
        MOE_BACKEND_KERNEL="nvfp4_native",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )
    found = re.search(r"RIGHT (\d+)", result.stdout)
    assert found, result.stdout + result.stderr[-2000:]
    assert "kernel=nvfp4_native activations=nvfp4" in result.stdout + result.stderr
    assert int(found[1]) >= 97
