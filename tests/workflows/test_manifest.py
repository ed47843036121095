"""What a run records about its surroundings, and what its work cost."""

from __future__ import annotations

import hashlib
import mmap
import platform
import time
from pathlib import Path

import peft
import pytest
import torch

from koat.core.errors import ConfigError
from koat.core.settings import ModelSettings, TrainingSettings
from koat.workflows.measure import Cost
from koat.workflows.training import finetune
from koat.workflows.training.manifest import describe_hardware, describe_versions, fingerprint_data


def test_versions_are_those_that_run() -> None:
    versions = describe_versions()
    assert versions["python"] == platform.python_version()
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert versions["peft"] == peft.__version__


def test_hardware_of_a_processor() -> None:
    facts = describe_hardware(torch.device("cpu"))
    assert facts["device"] == "cpu"
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cores"] >= 1
    assert facts["processor"]


def test_data_is_fingerprinted_by_content(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"one\n")
    found = fingerprint_data([str(file), "owner/name"])
    assert found[str(file)] == {"sha256": hashlib.sha256(b"one\n").hexdigest(), "bytes": 4}
    assert found["owner/name"] == "not a file"


def test_cost_measures_time_and_peak() -> None:
    size = 256 << 20
    with Cost(torch.device("cpu")) as idle:
        time.sleep(0.1)
    # Straight from the system: an allocator may serve a block from memory that the process has held before.
    with mmap.mmap(-1, size) as block, Cost(torch.device("cpu")) as busy:
        block[:: mmap.PAGESIZE] = bytes(size // mmap.PAGESIZE)  # touches every page
        latest = time.monotonic() + 20  # on a busy machine the watching thread may wait for its turn
        while busy.peak_bytes - idle.peak_bytes <= size // 2 and time.monotonic() < latest:
            time.sleep(0.02)
    assert idle.seconds == pytest.approx(0.1, abs=0.15)
    assert busy.peak_bytes - idle.peak_bytes > size // 2


def test_cost_is_told_also_after_an_error() -> None:
    cost = Cost(torch.device("cpu"))
    with pytest.raises(ZeroDivisionError), cost:
        _ = 1 // 0
    assert cost.peak_bytes > 0


def test_one_process_computes_on_the_gpu_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate's single process computes on the current GPU, which is the first unless somebody says so."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(finetune, "pick_device", lambda device: torch.device(device))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(finetune, "Accelerator", lambda **options: options)
    training = TrainingSettings(precision="float32")
    made = finetune.make_accelerator(ModelSettings(base="nano", device="cuda:1"), training)
    assert chosen == [torch.device("cuda:1")] and made == {"cpu": False, "mixed_precision": "no"}
    finetune.make_accelerator(ModelSettings(base="nano", device="cpu"), training)
    assert len(chosen) == 1


def test_processes_that_were_launched_together_share_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "pick_device", lambda device: torch.device(device))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(finetune, "Accelerator", lambda **options: options)
    training = TrainingSettings(precision="float32")
    for count, device in [("2", "cuda"), ("2", "cpu"), ("1", "cuda:1"), ("", "cuda:1")]:
        monkeypatch.setenv("WORLD_SIZE", count)
        assert finetune.make_accelerator(ModelSettings(base="nano", device=device), training)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # two machines, each with its first GPU
    assert finetune.make_accelerator(ModelSettings(base="nano", device="cuda:0"), training)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    for device in ("cuda:0", "cuda:1"):
        with pytest.raises(ConfigError, match=rf"model\.device={device} puts all 2 .*Set model\.device=cuda,"):
            finetune.make_accelerator(ModelSettings(base="nano", device=device), training)
