"""From Python the same as from the shell: same bytes, same scores, same errors."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import koat
from tests.tiny_base import call_koat, make_environment
from tests.workflows.conftest import list_arguments

SETTINGS: dict[str, Any] = {
    "data": {"validation_fraction": 0.2},
    "adapter": {"method": "ia3"},
    "training": {"max_steps": 6, "batch_size": 4, "seed": 3},
}


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["README.md", "README.ko.md"])
def test_the_readmes_calls_fit_the_functions(name: str) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert len(calls) >= 6
    for call in calls:
        assert isinstance(call.func, ast.Attribute)
        function = getattr(koat, call.func.attr)
        keywords = {str(keyword.arg): None for keyword in call.keywords}
        inspect.signature(function).bind(*call.args, **keywords)


def fill_settings(place: Path) -> dict[str, Any]:
    """Return the settings of the finished run, as Python gives them."""
    data = {**SETTINGS["data"], "train": [str(place / "rows.jsonl")]}
    return {**SETTINGS, "model": {"base": str(place / "base")}, "data": data}


def test_finetune_writes_the_bytes_of_the_command_line(place: Path, finished: Path, tmp_path: Path) -> None:
    records: list[Any] = []
    run = koat.finetune(fill_settings(place), out=tmp_path / "run", on_step=records.append)
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "config.yaml"):
        assert (run.path / name).read_bytes() == (finished / name).read_bytes(), name
    assert [record.step for record in records] == [1, 2, 3, 4, 5, 6]


def test_a_file_of_settings_is_the_same_as_flags(place: Path, finished: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(fill_settings(place)), encoding="utf-8")
    run = koat.finetune(config=file, out=tmp_path / "run")
    name = "adapter/adapter_model.safetensors"
    assert (run.path / name).read_bytes() == (finished / name).read_bytes()


def test_the_seed_decides(place: Path, finished: Path, tmp_path: Path) -> None:
    status, _, error = call_koat(*list_arguments(place), "training.seed=4", "--out", tmp_path / "run")
    assert status == 0, error
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() != (finished / name).read_bytes()


def test_evaluate_gives_the_scores_of_the_command_line(own_run: Path, tmp_path: Path) -> None:
    rows = [f"{n}\t{'비가 옵니다' if n % 3 else '눈이 많이'} {n}\t{n % 2}" for n in range(10)]
    data = tmp_path / "test.tsv"
    data.write_text("\n".join(["id\tdocument\tlabel", *rows]) + "\n", encoding="utf-8")
    status, out, error = call_koat(
        "eval", own_run, "--task", "nsmc-prompt2", "--data", data, "--shots", 0, "--limit", 7, "--json"
    )
    assert status == 0, error
    shown = json.loads(out)["results"][0]
    found = koat.evaluate(own_run, tasks=["nsmc-prompt2"], data=data, num_shots=0, limit=7)["results"][0]
    for part in ("scores", "contracts", "conditions", "num_items", "num_tokens", "num_unique_tokens"):
        assert found[part] == shown[part], part
    assert found["num_items"] == 7


def test_errors_are_koats_own(place: Path, tmp_path: Path) -> None:
    with pytest.raises(koat.ConfigError, match=r"training\.epochs"):
        koat.finetune({**fill_settings(place), "training": {"epoch": 2}}, out=tmp_path / "run")
    with pytest.raises(koat.ModelError):
        koat.load(tmp_path / "no-such" / "model")
    with pytest.raises(AttributeError, match="finetuen"):
        koat.finetuen  # noqa: B018


def test_importing_koat_imports_next_to_nothing() -> None:
    code = "import koat, sys; print(sorted({'torch', 'transformers', 'peft', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=make_environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_all_that_is_named_is_there() -> None:
    assert all(getattr(koat, name) for name in koat.__all__)
