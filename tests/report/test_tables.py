"""Tables on a terminal: the texts of others are printed as they are."""

from __future__ import annotations

import pytest

from koat.report.comparison import print_comparison
from koat.report.tables import make_table, print_table

TEXTS = ("### [INST] {instruction} [/INST]", "lora[r=8]", "lora[r=16]", "[bold]", "a :cat: b", "[/]", r"\[x]")


@pytest.mark.parametrize("text", TEXTS)
def test_what_looks_like_markup_is_text(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_table(make_table(text, (text, text), [(text, text)], numeric=9))
    assert capsys.readouterr().out.count(text) == 5


@pytest.mark.parametrize("text", TEXTS)
def test_notes_of_a_comparison_are_text(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = {"columns": [], "groups": [], "refusals": [], "comparisons": [], "notes": [text]}
    print_comparison({**found, "correction": {"num_comparisons": 0}})
    assert capsys.readouterr().out == f"note: {text}\n"
