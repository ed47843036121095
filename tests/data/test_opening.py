"""From a path to text: where `~` leads."""

from __future__ import annotations

from pathlib import Path

import pytest

from koat.core.errors import DataError
from koat.data.opening import read_text
from koat.data.readers import read_records


def test_a_tilde_stands_for_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text('{"instruction": "가", "output": "나"}\n', encoding="utf-8")
    assert [record.fields["output"] for record in read_records("~/rows.jsonl").records] == ["나"]
    with pytest.raises(DataError, match="nobody-of-this-name"):
        read_text(Path("~nobody-of-this-name/rows.jsonl"))
