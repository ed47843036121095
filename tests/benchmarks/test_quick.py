"""Every benchmark runs through with `--quick`: what it calls of koat is there, and both sides compute the same."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_base import need_shared

NAMES = ("train_context_qa", "train_instructions", "score_choices", "evaluate", "ia3", "kgoat", "memory")


@pytest.mark.soak
@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_runs_through(name: str) -> None:
    if missing := [each for each in ("trl", "lm_eval", "matplotlib") if importlib.util.find_spec(each) is None]:
        pytest.skip(f"{', '.join(missing)} not installed: the extra `bench`")
    need_shared("data")
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
