"""The count of kept bytes is right where it can be known, and the benchmark's sides are what they are called."""

from __future__ import annotations

import pytest

pytest.importorskip("psutil", reason="the benchmarks describe the machine with psutil (extra `bench`)")
torch = pytest.importorskip("torch")

from benchmarks.ia3 import PEER, SHAPES, compare_with_peft, count_kept, judge_kept, judge_time, make_sides  # noqa: E402
from benchmarks.kept import count_kept_bytes  # noqa: E402
from benchmarks.workload import Options  # noqa: E402

TINY = Options(quick=True, size="tiny", device=torch.device("cpu"))


def test_storages_count_once_and_weights_not_at_all() -> None:
    """A product keeps both factors: here an input of 4 x 5 numbers, through two views, and a weight."""
    model = torch.nn.Linear(5, 5, bias=False)
    inputs = torch.randn(4, 5, requires_grad=True)
    scaled = inputs * 2
    assert count_kept_bytes(model, lambda: model(scaled)) == 4 * 5 * 4
    assert count_kept_bytes(model, lambda: (scaled[:, :2] * scaled[:, 2:4], scaled.sigmoid())) == 2 * 4 * 5 * 4
    model.requires_grad_(False)
    assert count_kept_bytes(model, lambda: model(scaled)) == 0


@pytest.mark.parametrize("name", SHAPES)
def test_both_ia3_compute_the_same_and_koat_keeps_less(name: str) -> None:
    """On tiny layers with the real ones' ratios, in bfloat16."""
    assert all(check.passed for check in compare_with_peft(name, "bfloat16", TINY))
    kept = count_kept(name, "bfloat16", False, TINY)
    assert kept.keys() == make_sides().keys()
    assert judge_kept(name, kept) == "held"
    assert judge_kept(name, kept | {"koat IA3": kept[PEER]}) == "MISSED"
    assert len(set(count_kept(name, "bfloat16", True, TINY).values())) == 1


def test_a_step_is_judged_by_the_floor_and_by_lora() -> None:
    """Both marks count."""
    assert judge_time({"koat IA3": 1.04, "LoRA r=8": 1.07}) == "held"
    assert judge_time({"koat IA3": 1.06, "LoRA r=8": 1.07}) == "MISSED"
    assert judge_time({"koat IA3": 1.04, "LoRA r=8": 1.03}) == "MISSED"
