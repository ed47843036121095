"""What `koat plan` says of memory is what a step takes, on models that are there, within a tenth."""

from __future__ import annotations

import pytest

pytest.importorskip("psutil", reason="the benchmarks describe the machine with psutil (extra `bench`)")
torch = pytest.importorskip("torch")

from benchmarks.long_contexts import train_alone  # noqa: E402
from benchmarks.memory import CASES, Case, compare_cases, judge, measure_case, plan_case  # noqa: E402
from benchmarks.workload import Absent, Options  # noqa: E402

TINY = Options(quick=True, size="tiny", device=torch.device("cpu"))
NUM_QUICK = 13


def list_cases() -> list[object]:
    """Return the cases, every run of the tests trying some of each method and family."""
    left_out = [case for case in CASES if case.precision == "bfloat16"][: len(CASES) - NUM_QUICK]
    return [pytest.param(case, marks=[pytest.mark.soak] if case in left_out else []) for case in CASES]


@pytest.mark.parametrize("case", list_cases(), ids=str)
def test_a_plan_is_within_a_tenth_of_a_step(case: Case) -> None:
    table, held = compare_cases([case], TINY)
    assert held, table.rows


def test_a_wrong_plan_is_told() -> None:
    case = CASES[0]
    measured, config = measure_case(case, TINY)
    plan = plan_case(case, config, TINY)
    assert judge(plan.train_peak(case.num_rows, 1.5 * case.length), measured.peak) == "MISSED"
    assert judge(2 * plan.count_activations(1, case.length), measured.kept) == "MISSED"


@pytest.mark.soak
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_plan_is_within_a_tenth_of_a_wide_step(case: Case) -> None:
    table, held = compare_cases([case], Options(size="small", device=torch.device("cpu")))
    assert held, table.rows


@pytest.mark.soak
@pytest.mark.parametrize("method", ["ia3", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_long_contexts_train_in_the_memory_that_was_planned(method: str, checkpointing: bool) -> None:
    try:
        growth = train_alone(Options(amount=0.2, device=torch.device("cpu")), method, checkpointing)
    except Absent as reason:
        pytest.skip(f"{reason}; this test reads real data")
    # The plan lets every token be predicted, and only answers are.
    assert 0.5 * growth.planned <= growth.grown <= growth.planned
