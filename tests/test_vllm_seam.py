"""How the backend's name gets into vLLM: registration, choices, versions, failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from moe_backend import plugin
from moe_backend.engines import vllm as seam

# Trees of other vLLM versions (the unpacked wheels), separated by ":"; `make versions` makes
# them. The installed version is always tested.
OTHER_VERSIONS = [Path(p) for p in os.environ.get("MOE_BACKEND_TEST_VLLM", "").split(":") if p]


def run_python(code: str, *, path: Path | None = None, **env: str) -> str:
    """Run code in a fresh interpreter, with another vLLM in front of the installed one."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=240,
        env={
            **os.environ,
            "VLLM_TARGET_DEVICE": "cpu",
            **({"PYTHONPATH": str(path)} if path else {}),
            **env,
        },
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


REGISTRATION = """
import json, sys, time
import vllm.config, vllm.engine.arg_utils as arg_utils
before = set(sys.modules)
start = time.perf_counter()
from moe_backend import plugin
plugin.register()
seconds = time.perf_counter() - start
imported = sorted(set(sys.modules) - before)
plugin.register()
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = arg_utils.AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
choices = [a for a in parser._actions if "--moe-backend" in a.option_strings][0].choices
from vllm.config import KernelConfig, VllmConfig
try:
    KernelConfig(moe_backend="nonsense")
    nonsense = "accepted"
except Exception as error:
    nonsense = type(error).__name__
print(json.dumps(dict(
    failure=plugin.failure,
    seconds=seconds,
    fused_moe=[m for m in imported if ".fused_moe" in m],
    choices=list(choices),
    parsed=parser.parse_args(["--moe-backend", "Block-Scale".replace("-", "")]).moe_backend,
    kernel_config=KernelConfig(moe_backend="blockscale").moe_backend,
    vllm_config=VllmConfig(kernel_config={"moe_backend": "blockscale"}).kernel_config.moe_backend,
    nonsense=nonsense,
    finders=sum(type(f).__name__ == "_AfterImport" for f in sys.meta_path),
    vllm=__import__("vllm").__version__,
)))
"""


@pytest.mark.parametrize("path", [None, *OTHER_VERSIONS], ids=str)
def test_registration(path):
    facts = json.loads(run_python(REGISTRATION, path=path).splitlines()[-1])
    assert facts["failure"] is None
    assert facts["choices"].count("blockscale") == 1
    assert "triton" in facts["choices"]
    assert facts["parsed"] == facts["kernel_config"] == facts["vllm_config"] == "blockscale"
    assert facts["nonsense"] == "ValidationError"
    assert facts["fused_moe"] == []
    assert facts["finders"] <= 3  # a second register() adds none
    if path is not None:
        assert facts["vllm"].split("+")[0] in path.name


def test_command_line_lists_the_name():
    out = run_python(
        "import sys; sys.argv = ['vllm', 'serve', '--help=moe-backend'];"
        "from vllm.entrypoints.cli.main import main; main()"
    )
    assert "blockscale" in out


def test_without_the_plugin_the_name_is_refused():
    code = (
        "from vllm.config import KernelConfig\n"
        "try:\n    KernelConfig(moe_backend='blockscale')\n"
        "except Exception as e:\n    print(type(e).__name__)"
    )
    assert run_python(code, VLLM_PLUGINS="").strip().endswith("ValidationError")


@pytest.mark.parametrize("version", ["0.29.4", "0.34.0", "1.0.0", "0.3.3"])
def test_unknown_version_is_refused_by_name(version, monkeypatch):
    monkeypatch.setattr(seam, "installed_version", lambda: version)
    plugin.register()
    try:
        assert plugin.failure is not None
        assert f"vLLM {version} is not supported" in plugin.failure
        assert "0.30.x, 0.31.x, 0.32.x, 0.33.x" in plugin.failure
    finally:
        monkeypatch.undo()
        plugin.register()
    assert plugin.failure is None


def test_register_never_raises(monkeypatch):
    def broken() -> None:
        raise ImportError("vllm is half installed")

    monkeypatch.setattr(seam, "register", broken)
    plugin.register()
    assert plugin.failure == "ImportError: vllm is half installed"
    monkeypatch.undo()
    plugin.register()
    assert plugin.failure is None


def test_official_registry_is_used_where_it_exists(monkeypatch):
    calls = []
    name = f"{seam.FUSED_MOE}.oracle.fp8_registry"
    registry = types.ModuleType(name)
    registry.__spec__ = types.SimpleNamespace(name=name)
    registry.register_fp8_moe_backend = lambda *args, **kw: calls.append((args, kw))
    assert not seam._use_official_registry()
    monkeypatch.setitem(sys.modules, name, registry)
    assert seam._use_official_registry()
    ((args, kw),) = calls
    assert args[0] == "blockscale"
    module, _, cls = args[1].rpartition(".")
    assert hasattr(__import__(module, fromlist=[cls]), cls)
    assert kw == {"auto_select": False}


def test_hook_follows_the_first_import(tmp_path, monkeypatch):
    (tmp_path / "imported_later.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen = []
    seam.after_import("imported_later", lambda m: seen.append(m.VALUE))
    seam.after_import("imported_later", lambda m: seen.append("twice"))
    assert seen == []
    import imported_later  # noqa: F401

    assert seen == [1]


def test_importing_the_package_needs_only_torch():
    code = (
        "import sys\n"
        "import moe_backend, moe_backend.fused_moe, moe_backend.verify.run, moe_backend.doctor\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('vllm', 'triton', 'aiter')])"
    )
    assert run_python(code).strip() == "[]"
