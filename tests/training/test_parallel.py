"""Two processes reach the adapter of one, also where their shares are uneven or one has none."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from koat.core.json_lines import read_lines
from tests.tiny_base import find_koat, make_environment, make_rows, run_koat, write_base, write_rows
from tests.training.train_in_parallel import CASES, METHODS, train_all

ROOT = Path(__file__).parent.parent.parent


def find_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_pair(*command: str, cwd: Path) -> list[subprocess.Popen[str]]:
    """Start a command twice, as a launcher would start its two processes."""
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_port()), "ACCELERATE_USE_CPU": "true"}
    children = []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environment = make_environment(**place, **meet)
        children.append(subprocess.Popen(command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE))
    return children


@pytest.mark.soak
def test_two_processes_reach_the_adapter_of_one(tmp_path: Path, measure_distance: Callable[..., float]) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    together.mkdir()
    children = start_pair(sys.executable, "-m", "tests.training.train_in_parallel", "all", str(together), cwd=ROOT)
    train_all(alone)
    assert [child.wait(timeout=200) for child in children] == [0, 0]
    expected_losses = json.loads((alone / "losses 0.json").read_text())
    for rank in (0, 1):
        losses = json.loads((together / f"losses {rank}.json").read_text())
        for case in CASES:
            for method in METHODS:
                key = f"{method}, {case}"
                found = load_file(together / f"{key}, {rank}.safetensors")
                assert measure_distance(found, load_file(alone / f"{key}, 0.safetensors")) < 1e-6
                assert losses[key] == pytest.approx(expected_losses[key], rel=1e-6)


def test_two_processes_go_on_as_if_they_had_never_stopped(tmp_path: Path) -> None:
    children = start_pair(sys.executable, "-m", "tests.training.train_in_parallel", "noise", str(tmp_path), cwd=ROOT)
    assert [child.wait(timeout=200) for child in children] == [0, 0]
    whole = load_file(tmp_path / "whole, 0.safetensors")
    for name in ("whole, 1", "resumed, 0", "resumed, 1"):
        found = load_file(tmp_path / f"{name}.safetensors")
        assert all(torch.equal(found[key], tensor) for key, tensor in whole.items())


@pytest.mark.soak
def test_the_command_line_in_two_processes_makes_one_run(
    tmp_path: Path, measure_distance: Callable[..., float]
) -> None:
    write_base(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", make_rows(30))
    settings = ["training.max_steps=6", "training.batch_size=5", "data.validation_fraction=0.2"]
    command = ["finetune", "--base", "base", "--data", "rows.jsonl", *settings, "--out"]
    pair = start_pair(find_koat(), *command, "together", cwd=tmp_path)
    said = [child.communicate(timeout=200)[0] for child in pair]
    assert [child.returncode for child in pair] == [0, 0]
    assert "done in" in said[0]
    assert said[1] == ""
    assert run_koat(*command, "alone", cwd=tmp_path).returncode == 0
    name = "adapter/adapter_model.safetensors"
    assert measure_distance(load_file(tmp_path / "together" / name), load_file(tmp_path / "alone" / name)) < 1e-6
    lines = [read_lines(tmp_path / run / "metrics.jsonl") for run in ("together", "alone")]
    assert [line["step"] for line in lines[0]] == [1, 2, 3, 4, 5, 6]
    for found, expected in zip(*lines, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert found["tokens"] >= found["unique_tokens"] >= expected["unique_tokens"]
