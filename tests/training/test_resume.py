"""A run killed with SIGKILL and resumed ends with the very bytes of the run that nobody stopped."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from koat.core.json_lines import read_lines
from tests.tiny_base import make_rows, run_koat, start_koat, write_base, write_rows

NUM_STEPS = 60
SEED = "KOAT_KILL_SEED"
"""A variable of the environment from which the moments of killing are drawn; else they differ from run to run."""
WEIGHTS = "adapter/adapter_model.safetensors"
VARIANTS = {
    "ia3": ["--method", "ia3"],
    "lora-dropout-noise": ["--method", "lora", "adapter.r=4", "adapter.dropout=0.3", "training.noise=5"],
    "shuffled-checkpointing": [
        *("--method", "lora", "adapter.targets=attention", "adapter.dropout=0.1", "training.sampler=shuffled"),
        *("training.activation_checkpointing=true", "training.keep=last", "training.keep_checkpoints=1"),
    ],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base model and rows to train it on."""
    folder = tmp_path_factory.mktemp("resume")
    write_base(folder / "base")
    write_rows(folder / "rows.jsonl", make_rows(50))
    return folder


def list_arguments(variant: str, out: str, **options: object) -> list[str]:
    """Return the command that begins a run."""
    settings = {"max_steps": NUM_STEPS, "batch_size": 4, "save_every": 1, "validate_every": 7, **options}
    flags = ["--base", "base", "--data", "rows.jsonl", "--out", out, "data.validation_fraction=0.2"]
    return ["finetune", *flags, *VARIANTS[variant], *(f"training.{key}={value}" for key, value in settings.items())]


def wait_for_step(run: Path, step: int) -> Callable[[], bool]:
    """Return a question: has the run recorded this step?"""
    metrics = run / "metrics.jsonl"
    return lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= step


def wait_for_draft(run: Path, step: int) -> Callable[[], bool]:
    """Return a question: is a checkpoint of this step or a later one half written?"""
    folder = run / "checkpoints"

    def is_saving() -> bool:
        names = [name for name in os.listdir(folder) if name.startswith(".step-")] if folder.exists() else []
        return any(int(name[6:12]) >= step for name in names)

    return is_saving


def kill_when(child: subprocess.Popen[str], is_time: Callable[[], bool], about: str) -> None:
    """Kill a process, at once and without warning, when it is time; fail if it ends before."""
    deadline = time.monotonic() + 200
    while not is_time():
        assert child.poll() is None, f"{about}: ended with {child.returncode} before that: {child.communicate()}"
        assert time.monotonic() < deadline, about
        time.sleep(0.0005)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL


def check_resumed(run: Path, whole: Path, about: object) -> None:
    """Assert that a resumed run is the uninterrupted one: same bytes, every step once."""
    assert (run / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes(), about
    lines, expected = read_lines(run / "metrics.jsonl"), read_lines(whole / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1)), about
    for line, other in zip(lines, expected, strict=True):
        assert {**line, "seconds": 0} == {**other, "seconds": 0}, about
    assert not list(run.rglob(".*")), about


def begin_draw() -> tuple[random.Random, str]:
    """Return what moments are drawn from, and how to draw the same again, for messages."""
    seed = os.environ.get(SEED) or str(random.SystemRandom().randrange(10**6))
    return random.Random(seed), f"{SEED}={seed} draws this again"


def run_whole(place: Path, variant: str) -> Path:
    """Return the folder of the uninterrupted run of a variant, made when it is first asked for."""
    whole = place / f"whole-{variant}"
    if not whole.exists():
        done = run_koat(*list_arguments(variant, whole.name), cwd=place)
        assert done.returncode == 0, done.stderr
    return whole


def test_killed_and_resumed_is_the_uninterrupted_run(place: Path) -> None:
    draw, again = begin_draw()
    step = draw.randint(2, NUM_STEPS - 20)
    about = f"killed at step {step}; {again}"
    untouched = start_koat(*list_arguments("lora-dropout-noise", "untouched"), cwd=place)
    child = start_koat(*list_arguments("lora-dropout-noise", "killed"), cwd=place)
    kill_when(child, wait_for_step(place / "killed", step), about)
    assert not (place / "killed" / "adapter").exists(), about
    resumed = run_koat("finetune", "--resume", "killed", cwd=place)
    assert resumed.returncode == 0, f"{about}\n{resumed.stderr}"
    untouched.communicate(timeout=200)
    assert untouched.returncode == 0
    check_resumed(place / "killed", place / "untouched", about)


@pytest.mark.soak
@pytest.mark.parametrize("round_number", range(8))
@pytest.mark.parametrize("while_saving", [False, True], ids=["at-a-step", "while-saving"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_twice_at_random(variant: str, while_saving: bool, round_number: int, place: Path) -> None:
    whole = run_whole(place, variant)
    run = place / f"{variant}-{while_saving}-{round_number}"
    wait = wait_for_draft if while_saving else wait_for_step
    draw, again = begin_draw()
    first, second = sorted((draw.randint(1, NUM_STEPS - 20), draw.randint(2, NUM_STEPS - 10)))
    about = f"killed at {first} and {second + 1}; {again}"
    kill_when(start_koat(*list_arguments(variant, run.name), cwd=place), wait(run, first), about)
    kill_when(start_koat("finetune", "--resume", run.name, cwd=place), wait(run, second + 1), about)
    resumed = run_koat("finetune", "--resume", run.name, cwd=place)
    assert resumed.returncode == 0, f"{about}\n{resumed.stderr}"
    check_resumed(run, whole, about)


@pytest.mark.soak
def test_killed_at_any_moment_it_can_begin_again_or_go_on(place: Path) -> None:
    whole = run_whole(place, "ia3")
    draw, seed = begin_draw()
    for number in range(6):
        run = place / f"moment-{number}"
        arguments = list_arguments("ia3", run.name)
        child = start_koat(*arguments, cwd=place)
        moment = draw.uniform(0.5, 12)
        time.sleep(moment)
        child.kill()
        child.communicate()
        begun = (run / "config.yaml").exists()
        again = run_koat("finetune", "--resume", run.name, cwd=place) if begun else run_koat(*arguments, cwd=place)
        if again.returncode:  # killed too late: there was nothing left to do
            assert "finished" in again.stderr, again.stderr
        check_resumed(run, whole, f"killed after {moment:.2f} s; {seed}")
