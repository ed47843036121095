"""What a method cannot do on a family is said by `plan` and by `finetune`, before training."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from koat.forest.score import make_padded
from koat.forest.verify import Verification
from koat.workflows.training.prepare import describe_layout
from tests.tiny_base import SHAPE, VOCABULARY, call_koat


@pytest.fixture(scope="module")
def base(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen 3, which norms its keys, with the other base's tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("qwen3")
    config = Qwen3Config(vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=0, head_dim=16, **SHAPE)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    for path in (place / "base").glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize(("method", "said"), [("ia3", True), ("lora", False)])
def test_plan_says_it(base: Path, method: str, said: bool) -> None:
    status, out, error = call_koat("plan", "--base", base, "--method", method)
    assert status == 0, error
    assert ("! qwen3 norms its keys" in out) == said


def test_finetune_says_it_and_trains(base: Path, place: Path, tmp_path: Path) -> None:
    arguments = ("--base", base, "--data", place / "rows.jsonl", "--method", "ia3", "--out", tmp_path / "run")
    status, out, error = call_koat("finetune", *arguments, "training.max_steps=1")
    assert status == 0, error
    said = out + error
    assert said.index("! qwen3 norms its keys") < said.index("forest verified")


def test_how_sequences_go_through_a_model_is_said_as_it_is() -> None:
    inexact = Verification(False, True, "sdpa", None, None, None, "no mask fits")
    padded = make_padded()
    assert describe_layout(padded, inexact).endswith("(no mask fits); running padded batches of similar length")
    assert describe_layout(replace(padded, alone=True), inexact).endswith("; running one sequence at a time")
