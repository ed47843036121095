"""Plans of real configurations: counts that must come out exactly, and estimates that must be near the truth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import koat
from koat.adapters.methods import METHODS
from koat.model import build_empty
from koat.quantise.weights import read_linear_shapes
from koat.workflows.planning import pace
from koat.workflows.planning.pace import count_active_experts
from tests.tiny_base import VOCABULARY, call_koat, need_shared


def plan(base: Path | str, method: str, *settings: str) -> dict[str, Any]:
    """Return what `koat plan --json` prints."""
    status, out, error = call_koat("plan", "--base", base, "--method", method, *settings, "--json")
    assert status == 0, error
    found: dict[str, Any] = json.loads(out)
    return found


@pytest.mark.parametrize(
    ("base", "method", "settings", "expected", "held"),
    [
        ("polyglot-ko-5.8b", "ia3", ["adapter.targets=peft"], 802_816, 0),
        ("polyglot-ko-5.8b", "ia3", ["adapter.targets=paper"], 688_128, 28 * 4096),
        ("polyglot-ko-5.8b", "lora", ["adapter.targets=[query_key_value]", "adapter.r=8"], 3_670_016, 0),
        ("llama-2-13b", "ia3", ["adapter.targets=peft"], 962_560, 0),
        ("llama-2-13b", "ia3", ["adapter.targets=[q_proj,k_proj,v_proj,down_proj]", "adapter.feedforward=down_proj"],
         1_167_360, 0),
    ],
)  # fmt: skip
def test_counts_of_real_models(base: str, method: str, settings: list[str], expected: int, held: int) -> None:
    """Entries of fused projections that stay one (`held`) are not trained, but they take their place."""
    found = plan(need_shared("models", base), method, *settings)
    assert found["trainable_parameters"] == expected
    assert found["adapter_bytes"] == found["gradient_bytes"] == 4 * (expected + held)
    assert found["optimizer_bytes"] == 8 * (expected + held)
    assert found["trainable_share"] == expected / found["total_parameters"]


def test_total_of_a_real_model() -> None:
    folder = need_shared("models", "llama-7b")
    # 32 layers of 4 x 4096^2 + 3 x 4096 x 11008 and two norms, embedding and head of 32,000, one last norm.
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    found = plan(folder, "ia3")
    assert found["total_parameters"] == layers + 2 * 32_000 * 4096 + 4096
    assert found["weight_bytes"] == found["total_parameters"] * {"float32": 4, "bfloat16": 2}[found["dtype"]]


def test_settings_come_with_their_origins(tmp_path: Path, place: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("training: {batch_size: 3, seed: 8}\nadapter: {targets: attention}\n", encoding="utf-8")
    found = plan(place / "base", "ia3", "--config", str(file), "training.seed=9")["settings"]
    origins = {key: (entry["value"], entry["origin"]) for key, entry in found.items()}
    assert origins["training.seed"] == (9, "flag")
    assert origins["training.batch_size"] == (3, "file")
    assert origins["adapter.targets"] == ("attention", "file")
    assert origins["adapter.method"] == ("ia3", "flag")
    assert origins["training.learning_rate"] == (METHODS["ia3"].learning_rate, "method")
    assert origins["training.epochs"] == (1.0, "default")
    assert origins["model.base"] == (str(place / "base"), "flag")


def test_the_same_from_python(place: Path) -> None:
    settings = {"model": {"base": str(place / "base")}, "adapter": {"method": "lora", "r": 4}}
    shown = plan(place / "base", "lora", "adapter.r=4")
    shown.pop("settings")
    assert koat.plan(settings).to_mapping() == shown


def test_the_parts_add_up_and_grow_as_they_should(place: Path) -> None:
    small, large = (plan(place / "base", "lora", f"training.tokens_per_microbatch={n}") for n in (256, 1024))
    for found in (small, large):
        parts = sum(found[f"{part}_bytes"] for part in ("weight", "adapter", "gradient", "optimizer", "activation"))
        assert found["peak_bytes"] == pytest.approx(parts + max(found["head_bytes"], found["workspace_bytes"]), abs=4)
        assert found["weight_bytes"] < found["evaluation_peak_bytes"] < found["peak_bytes"]
        # Three checkpoints (one being written), each with adapter, best adapter and two moments, and the result.
        assert found["disk_bytes"] == 3 * (2 + 2) * found["adapter_bytes"] + found["adapter_bytes"]
    assert large["activation_bytes"] == pytest.approx(4 * small["activation_bytes"], rel=0.01)
    assert large["weight_bytes"] == small["weight_bytes"]
    spared = plan(place / "base", "lora", "training.activation_checkpointing=true")
    assert spared["activation_bytes_per_token"] < small["activation_bytes_per_token"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_planned(place: Path, method: str) -> None:
    # Four bits want rows of 64 on some processors; the tiny model has none.
    found = plan("nano" if METHODS[method].needs_quantised_base else place / "base", method)
    assert found["trainable_parameters"] > 0
    assert found["activation_bytes"] > 0 and found["pace"] is None


def test_a_soft_prompt_at_the_root_keeps_the_whole_model(place: Path) -> None:
    """A vector in the last layer alone needs nothing of the layers below; an embedding needs all of them."""
    last = plan(place / "base", "ia3", "adapter.targets=[model.layers.1.self_attn.v_proj]")
    root = plan(place / "base", "prompt")
    assert root["activation_bytes"] > 1.5 * last["activation_bytes"]


def test_a_calibration_gives_a_pace(place: Path) -> None:
    status, out, error = call_koat("plan", "--base", place / "base", "--method", "ia3", "--calibrate", "--json")
    assert status == 0, error
    pace = json.loads(out)["pace"]
    # Two layers of q, k, v, o (1 key-value head of 2), three matrices of the block, and the head: 4 FLOPs each.
    linear = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + VOCABULARY * 32
    assert pace["flops_per_token"] == pytest.approx(4 * linear, rel=0.06)
    assert 0 < pace["tokens_per_second"] <= pace["matrix_rate"] / pace["flops_per_token"]
    status, out, _ = call_koat("plan", "--base", place / "base", "--method", "ia3", "--calibrate")
    assert "estimated speed" in out


def test_a_pace_counts_the_experts_that_a_token_meets() -> None:
    """Mixtral 8x7B: 12.9 billion of its 46.7 billion parameters are active for a token (Jiang et al. 2024)."""
    config = AutoConfig.for_model("mixtral", num_experts_per_tok=2, num_local_experts=8)
    empty = build_empty(config)
    experts = count_active_experts(empty, config)
    assert experts == 32 * 2 * 3 * 4096 * 14336
    linear = sum(inputs * outputs for inputs, outputs in read_linear_shapes(empty).values())
    head = empty.get_output_embeddings().weight.numel()
    # Less the embeddings, as large as the head, which multiply nothing.
    assert linear + head + experts == pytest.approx(12.9e9 - head, rel=0.01)
    assert count_active_experts(build_empty(AutoConfig.for_model("llama")), AutoConfig.for_model("llama")) == 0


def test_a_plan_for_people_shows_the_count_and_the_settings(place: Path) -> None:
    status, out, _ = call_koat("plan", "--base", place / "base", "--method", "ia3")
    assert status == 0
    assert "160" in out
    assert "training.learning_rate" in out
    assert "method" in out


def test_a_recipe_is_a_plan(place: Path) -> None:
    found = koat.plan({"model": {"base": str(place / "base")}}, recipe="demo-lora")
    assert (found.method, found.base) == ("lora", str(place / "base"))


def test_a_gpu_is_given_products_that_take_longer_than_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def note(rows: int, columns: int, **options: Any) -> torch.Tensor:
        asked.append((rows, columns))
        return torch.zeros(2, 2)

    monkeypatch.setattr(pace.torch, "ones", note)
    monkeypatch.setattr(pace.torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(pace.time, "perf_counter", iter(float(second) for second in range(99)).__next__)
    # A hundred teraflops a second of a large GPU: 6 milliseconds, and 40 microseconds for the processor's.
    assert pace.measure_rate(torch.bfloat16, torch.device("cuda"), 1.0) == 2.0 * 4096 * 8192 * 8192
    assert asked == [(4096, 8192), (8192, 8192)]
    assert pace.measure_rate(torch.float32, torch.device("cpu"), 1.0) == 2.0 * 1024 * 1024 * 2048
