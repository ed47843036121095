"""A tiny random base model on disk, rows to train it on, and the command line, for tests of whole runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).parent.parent.parent / "shared"
"""Real data and configurations beside the repository, where there are any."""
VOCABULARY = 330
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
}
_WORDS = ["비가", "눈이", "해가", "옵니다", "집니다", "뜹니다", "오늘", "내일", "어제", "조금", "많이", "영화", "노래"]


class PowerCutError(Exception):
    """Stands for whatever stops a run."""


def stop_after(step: int) -> Callable[[Any], None]:
    """Return what a run is to call after each step, and is stopped by at the one given."""

    def stop(record: Any) -> None:
        if record.step == step:
            raise PowerCutError

    return stop


def need_shared(*parts: str) -> Path:
    """Return a path of the shared material, or skip the test that wants it."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"../shared/{'/'.join(parts)} is not here; this test reads real data")
    return path


def make_rows(num_rows: int) -> list[dict[str, str]]:
    """Return rows of different lengths, several to a question."""
    rows = []
    for number in range(num_rows):
        question = " ".join(_WORDS[(number // 3 + step) % len(_WORDS)] for step in range(2 + number // 3 % 4))
        answer = " ".join(_WORDS[(number * 5 + step * 3) % len(_WORDS)] for step in range(1 + number % 3))
        rows.append({"instruction": question, "output": f"{answer} {number}"})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_base(folder: Path, *, with_tokenizer: bool = True) -> Path:
    """Write a tiny random Llama, and a byte-level tokenizer trained on the rows' words, into a folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(5)
    config = LlamaConfig(vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=0, pad_token_id=None, **SHAPE)
    model = LlamaForCausalLM(config)
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.data = torch.randn_like(weight) * weight.shape[-1] ** -0.5
    model.save_pretrained(folder)
    if with_tokenizer:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<eos>"],
            show_progress=False,
        )
        tokenizer.train_from_iterator([" ".join(_WORDS)] * 3, trainer)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


def call_koat(*arguments: object) -> tuple[int, str, str]:
    """Run the command line in this process; return (status, standard output, standard error)."""
    import contextlib
    import io

    from koat.cli import main

    out, error, before, status = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = ["koat", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            main()
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.argv = before
    return status, out.getvalue(), error.getvalue()


def find_koat() -> str:
    """Return the `koat` command of the environment that runs the tests."""
    return str(Path(sys.executable).with_name("koat"))


def make_environment(**more: str) -> dict[str, str]:
    """Return an environment for a child process: one thread, no network."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **more}


def start_koat(*arguments: str, cwd: Path, **options: Any) -> subprocess.Popen[str]:
    """Start the command line in a process of its own."""
    return subprocess.Popen(
        [find_koat(), *arguments],
        cwd=cwd,
        env=make_environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def run_koat(*arguments: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own and wait for it."""
    child = start_koat(*arguments, cwd=cwd, **options)
    out, error = child.communicate(timeout=240)
    return subprocess.CompletedProcess(child.args, child.returncode, out, error)
