"""What training left on disk, found by its name: hand-edited settings, and the folder one stands in."""

from __future__ import annotations

from pathlib import Path

import pytest

import koat
from koat.workflows.trained import find_trained


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("dtype: auto", "dtyp: auto", "did you mean 'dtype'"),
        ("dtype: auto", "dtype: float33", "float32"),
        ("model:", "modell:", "base"),
    ],
)
def test_a_slip_in_a_run_s_settings_is_one_message(old: str, new: str, message: str, own_run: Path) -> None:
    path = own_run / "config.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    with pytest.raises(koat.ConfigError, match=message):
        find_trained(own_run)


def test_the_folder_one_stands_in_has_a_name(own_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own_run)
    assert find_trained(".").name == own_run.name
    (own_run.parent / "best").symlink_to(own_run)
    assert find_trained(own_run.parent / "best").name == "best"
