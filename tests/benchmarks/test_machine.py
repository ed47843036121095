"""FLOPs are counted as they are, and results say no ratio without agreement."""

from __future__ import annotations

import pytest

pytest.importorskip("psutil", reason="the benchmarks describe the machine with psutil (extra `bench`)")
torch = pytest.importorskip("torch")

from benchmarks.machine import count_flops, count_layer_parameters, measure_matrix_rate  # noqa: E402
from benchmarks.measure import FACTORS, Findings, Result, check_equal, interleave  # noqa: E402


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_flops_agree_with_pytorchs_counter(family: str, make_model: object) -> None:
    """Forward FLOPs of a plain pass are those that PyTorch counts (which counts whole attention squares)."""
    from torch.utils.flop_counter import FlopCounterMode

    model = make_model(family, attention="eager", num_key_value_heads=4)  # type: ignore[operator]
    length = 24
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.randint(3, 200, (1, length)), use_cache=False)
    found = count_flops(model, num_tokens=length, num_keys=length**2, num_head_rows=length, trains=False)
    # Rotary frequencies are a small product as well.
    assert counter.get_total_flops() == pytest.approx(found, rel=0.01)


def test_layer_parameters_leave_embeddings_and_head_out(make_model: object) -> None:
    """Four square projections and three of the feed-forward, in each of three layers."""
    model = make_model("llama", num_key_value_heads=4)  # type: ignore[operator]
    assert count_layer_parameters(model) == 3 * (4 * 64 * 64 + 3 * 64 * 96)


def test_matrix_rate_is_positive() -> None:
    """The measurement ends and gives a rate."""
    assert measure_matrix_rate(torch.float32, torch.device("cpu"), seconds=0.0) > 0


def test_difference_or_indifference_fails_a_check() -> None:
    """A difference fails; so does agreement among numbers that are all alike; so does what is no number."""
    numbers = torch.tensor([1.0, 2.0, 3.0])
    assert check_equal("x", numbers, numbers + 1e-5, 1e-4).passed
    assert not check_equal("x", numbers, numbers + 1e-3, 1e-4).passed
    assert not check_equal("x", torch.ones(3), torch.ones(3), 1e-4).passed
    assert not check_equal("x", numbers, numbers * float("nan"), 1e-4).passed


def test_no_ratio_without_a_passed_check() -> None:
    """A result whose check failed prints no ratio and fails the run."""
    result = Result("scoring", "llama", "float32", "x", "peer", "NOT EQUAL", False, "")
    assert result.ratio is None
    assert "no ratio" in result.describe()
    assert not Findings([result]).passed
    result.rate, result.peer_rate, result.factors = 6.0, 2.0, dict.fromkeys(FACTORS, 1.0)
    assert result.ratio == 3.0


def test_sides_take_turns() -> None:
    """A B A B, and the median counts."""
    turns: list[str] = []
    given = iter([1.0, 10.0, 5.0, 30.0, 2.0, 20.0])

    def side(name: str) -> object:
        return lambda: (turns.append(name), next(given))[1]

    found = interleave({"a": side("a"), "b": side("b")}, 3, torch.device("cpu"))  # type: ignore[dict-item]
    assert turns == ["a", "b"] * 3
    assert found == {"a": 2.0, "b": 20.0}
