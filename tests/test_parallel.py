"""The trained model over real processes (gloo): every layout gives the answers of one rank."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import warm_vllm

pytest.importorskip("vllm")
pytestmark = [pytest.mark.e2e, pytest.mark.slow]

EXAMPLES = Path(__file__).parents[1] / "examples"
PROMPTS = 60
LAYOUTS = {
    "tp2": ["-tp", "2"],
    "tp4": ["-tp", "4"],
    "tp2-ep": ["-tp", "2", "--enable-expert-parallel"],
    "tp4-ep": ["-tp", "4", "--enable-expert-parallel"],
}


def answers(model: Path, out: Path, *flags: str, fork_ranks: bool = True) -> dict:
    command = [str(EXAMPLES / "accuracy.py"), "--answer", str(model)]
    command += ["--prompts", str(PROMPTS), "--json", str(out), *flags]
    result = warm_vllm.run(*command, fork_ranks=fork_ranks)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    return {**json.loads(out.read_text()), "log": result.stdout}


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """Folder of a dialect and its answers on one rank, each made once."""
    from moe_backend import cli

    root = tmp_path_factory.mktemp("parallel")
    made: dict[str, tuple[Path, dict]] = {}

    def model(dialect: str) -> tuple[Path, dict]:
        if dialect not in made:
            folder = tiny if dialect == "bf16" else root / dialect
            if dialect != "bf16":
                assert cli.main(["convert", str(tiny), str(folder), "--to", dialect]) == 0
            made[dialect] = folder, answers(folder, root / f"{dialect}.json")
        return made[dialect]

    return model


DIALECTS = ("bf16", "fp8-block", "nvfp4-modelopt", "nvfp4-ct")
IN_MAKE_TEST = (("fp8-block", "tp2"), ("fp8-block", "tp2-ep"), ("nvfp4-ct", "tp4-ep"))


@pytest.mark.parametrize(
    ("dialect", "layout"),
    [
        pytest.param(*case, marks=() if case in IN_MAKE_TEST else pytest.mark.long)
        for case in itertools.product(DIALECTS, LAYOUTS)
    ],
)
def test_answers_of_one_rank(dialect, layout, models, tmp_path):
    folder, alone = models(dialect)
    # Where ranks are fewest they start as vLLM has it, and import everything themselves.
    fork_ranks = layout != "tp2"
    several = answers(folder, tmp_path / "out.json", *LAYOUTS[layout], fork_ranks=fork_ranks)
    assert several["completions"] == alone["completions"]
    assert sum(several["right"]) >= 0.97 * PROMPTS
    if dialect == "fp8-block" and "ep" not in layout:
        # The even split: 384 rows over 2 or 4 ranks miss the 128 grid, nothing is padded.
        block, rows = {"tp2": ("64x128 and 128x64", 192), "tp4": ("32x128 and 128x32", 96)}[layout]
        assert f"fp8_block {block}" in several["log"]
        assert f"intermediate {rows} " in several["log"]
    if layout.endswith("ep"):
        assert "intermediate 384 " in several["log"]
