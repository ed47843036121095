"""Tables of groups of tasks beside one another: whose columns stand together, means over seeds, both languages."""

from __future__ import annotations

from typing import Any

import pytest

from koat.report.groups import list_group_rows, list_headings, title_group
from koat.workflows.comparing.groups import set_groups_side_by_side
from koat.workflows.comparing.scored import Source, Subject


def make_subject(name: str, *shares: float, contracts: tuple[str, ...] = ("a", "b"), **group: Any) -> Subject:
    """Return a subject with a run for each share of a task ARC; the task QA has half of it."""
    sources = []
    for share in shares:
        rows = [
            {"label": label, "scoring": scoring, "num_shots": 25, "num_items": 40, "weighed": "", "value": value,
             "low": value - 0.1, "high": value + 0.1}
            for label, scoring, value in (("ARC", "acc_norm", share), ("QA", "acc", share / 2))
        ]  # fmt: skip
        views = [{"name": "A", "rows": rows, "mean": 0.75 * share}]
        made = {"group": "board", "title": "the board", "views": views, "contracts": list(contracts), **group}
        sources.append(Source(name, name, [], [], groups=[made]))
    return Subject(name, sources)


def test_subjects_asked_the_same_share_a_table_and_seeds_are_averaged() -> None:
    (table,) = set_groups_side_by_side([make_subject("base", 0.4), make_subject("ia3", 0.5, 0.6)])
    assert title_group(table) == "board, metrics of A"
    assert list_headings(table)[-2:] == ["base", "ia3"]
    assert list_group_rows(table) == [
        ["ARC", "acc_norm", "25", "40", "40.0 % (30.0–50.0)", "55.0 %"],
        ["QA", "acc", "25", "40", "20.0 % (10.0–30.0)", "27.5 %"],
        ["mean", "of the rows", "", "", "30.0 %", "41.2 %"],
    ]
    assert list_group_rows(table, "ko")[-1][:2] == ["평균", "위 행들의 평균"]


def test_subjects_asked_otherwise_never_stand_in_one_table() -> None:
    tables = set_groups_side_by_side([make_subject("base", 0.4), make_subject("other", 0.5, contracts=("a", "c"))])
    assert [table["subjects"] for table in tables] == [["base"], ["other"]]


def test_a_plain_group_shows_its_means_in_both_ways() -> None:
    means = {"acc": {way: {"value": value, "low": 0.1, "high": 0.9, "num_items": 7} for way, value in
                     (("items", 0.25), ("tasks", 0.5))}}  # fmt: skip
    subject = make_subject("base", 0.4, views=(), means=means)
    (table,) = set_groups_side_by_side([subject])
    assert title_group(table) == "board"
    assert [row[:2] + row[4:] for row in list_group_rows(table)] == [
        ["acc", "each item alike", "25.0 % (10.0–90.0)"],
        ["acc", "each task alike", "50.0 % (10.0–90.0)"],
    ]


@pytest.mark.parametrize("missing", ["base", "ia3"])
def test_a_row_that_a_subject_lacks_is_left_open(missing: str) -> None:
    subjects = [make_subject("base", 0.4), make_subject("ia3", 0.5)]
    for subject in subjects:
        if subject.name == missing:
            del subject.sources[0].groups[0]["views"][0]["rows"][1]  # type: ignore[index]
    (table,) = set_groups_side_by_side(subjects)
    (row,) = (row for row in list_group_rows(table) if row[0] == "QA")
    assert (row[4] == "-", row[5] == "-") == (missing == "base", missing == "ia3")
