"""Items that some answer right and others wrong: counts by hand, and which are shown."""

from __future__ import annotations

from typing import Any

import pytest

from koat.evaluation.disagreements import find_disagreements


def answer(marks: str, **more: Any) -> dict[str, dict[str, Any]]:
    """Return predictions to items 0, 1, ...: `r` is right, `w` wrong."""
    return {
        str(number): {
            "text": {"text": f"item {number}"}, "gold": "yes", "correct": {"likelihood": mark == "r"},
            "predicted": {"likelihood": "yes" if mark == "r" else "no"}, "logprobs": {"no": -1.0, "yes": -1.0}, **more,
        }
        for number, mark in enumerate(marks)
    }  # fmt: skip


def test_groups_are_counted_and_items_taken_from_them_in_turn() -> None:
    found = find_disagreements({"A": answer("rrwrrw"), "B": answer("rwwwwr")}, "likelihood", limit=3)
    assert found is not None
    assert (found["num_items"], found["num_differing"]) == (6, 4)
    assert found["groups"] == [
        {"right": ["A"], "wrong": ["B"], "num_items": 3},
        {"right": ["B"], "wrong": ["A"], "num_items": 1},
    ]
    assert [item["id"] for item in found["items"]] == ["1", "5", "3"]
    first = found["items"][0]
    assert (first["text"], first["gold"]) == ({"text": "item 1"}, "yes")
    assert first["answers"][1] == {"subject": "B", "predicted": "no", "is_right": False, "probability": 0.5}


def test_only_items_that_all_have_answered_count() -> None:
    found = find_disagreements({"A": answer("rr"), "B": answer("wr"), "C": {"1": answer("rr")["1"]}}, "likelihood")
    assert found is not None and (found["num_items"], found["num_differing"], found["items"]) == (1, 0, [])


UNSURE = answer("r", correct={"likelihood": 0.4})


@pytest.mark.parametrize(
    "predictions",
    [{}, {"A": answer("r")}, {"A": answer("r"), "B": {}}, {"A": answer("r"), "B": UNSURE}],
    ids=["nobody", "one", "nothing in common", "neither right nor wrong"],
)
def test_there_may_be_nothing_to_show(predictions: dict[str, Any]) -> None:
    assert find_disagreements(predictions, "likelihood") is None


def test_a_text_may_be_missing_or_plain() -> None:
    both = {"A": answer("r", text="plain", logprobs=None), "B": answer("w", text=None, logprobs=None)}
    found = find_disagreements(both, "likelihood")
    assert found is not None and found["items"][0]["text"] == {"text": "plain"}
    assert found["items"][0]["answers"][0]["probability"] is None
    turned = find_disagreements(dict(reversed(both.items())), "likelihood")
    assert turned is not None and turned["items"][0]["text"] == {}
