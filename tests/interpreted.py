"""Scripts beside the tests that run device code in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def assert_right(script: str) -> None:
    """The script ends without an error, and its last word is `right`."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name(script))],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split()[-1] == "right"
