"""`koat export`: a folder that holds all that another program needs, and an honest note."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import koat
from koat.workflows.sharing.export import export_model
from koat.workflows.sharing.merge import merge_run
from tests.tiny_base import call_koat


@pytest.mark.parametrize(("program", "command"), [("vllm", "vllm serve ./served"), ("llama.cpp", "./served --outfile")])
def test_a_run_is_merged_and_explained(program: str, command: str, finished: Path, tmp_path: Path) -> None:
    status, out, error = call_koat("export", finished, "--for", program, "--out", tmp_path / "served")
    assert status == 0, error
    note = (tmp_path / "served" / "README.txt").read_text(encoding="utf-8")
    assert command in note and note.rstrip() in out
    assert ("has not run" in note) == (program == "vllm")
    merge_run(finished, tmp_path / "merged")
    wanted, found = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "served"))
    assert wanted.keys() == found.keys()
    assert all(wanted[name].equal(found[name]) for name in wanted)


def test_the_type_of_the_weights_is_named(finished: Path, tmp_path: Path) -> None:
    merge_run(finished, tmp_path / "merged", dtype="bfloat16")
    for program, word in (("vllm", "--dtype bfloat16"), ("llama.cpp", "--outtype bf16")):
        folder = export_model(tmp_path / "merged", program, tmp_path / program)
        assert word in (folder / "README.txt").read_text(encoding="utf-8")
        names = {path.name for path in folder.iterdir()} - {"README.txt"}
        assert names == {path.name for path in (tmp_path / "merged").iterdir()}


def make_lora(place: Path, folder: Path) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(place / "base")
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(folder)
    return folder


def test_vllm_takes_lora_as_it_is_and_not_ia3(place: Path, finished: Path, tmp_path: Path) -> None:
    lora = make_lora(place, tmp_path / "lora")
    folder = export_model(lora, "vllm", tmp_path / "served", as_adapter=True)
    assert (folder / "adapter_model.safetensors").read_bytes() == (lora / "adapter_model.safetensors").read_bytes()
    assert "--enable-lora" in (folder / "README.txt").read_text(encoding="utf-8")
    for source, program in ((finished, "vllm"), (lora, "llama.cpp")):
        with pytest.raises(koat.AdapterError, match="Leave --adapter away"):
            export_model(source, program, tmp_path / "other", as_adapter=True)
    assert not (tmp_path / "other").exists()


def test_an_adapter_is_exported_as_it_is_where_the_command_line_says_so(
    place: Path, finished: Path, tmp_path: Path
) -> None:
    status, _, error = call_koat("export", finished, "--for", "vllm", "--adapter", "--out", tmp_path / "ia3")
    assert status == 2 and "Leave --adapter away" in error
    assert not (tmp_path / "ia3").exists()
    lora = make_lora(place, tmp_path / "lora")
    status, out, error = call_koat("export", lora, "--for", "vllm", "--adapter", "--out", tmp_path / "served")
    assert status == 0, error
    assert "--enable-lora" in out
    names = {path.name for path in (tmp_path / "served").iterdir()}
    assert "adapter_config.json" in names and "config.json" not in names


@pytest.mark.parametrize("more", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "lora_only"}])
def test_vllm_is_given_no_lora_that_it_refuses(place: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    lora = make_lora(place, tmp_path / "lora")
    config = json.loads((lora / "adapter_config.json").read_text(encoding="utf-8"))
    (lora / "adapter_config.json").write_text(json.dumps({**config, **more}), encoding="utf-8")
    with pytest.raises(koat.AdapterError, match=f"LORA with {next(iter(more))}.*Leave --adapter away"):
        export_model(lora, "vllm", tmp_path / "other", as_adapter=True)


def test_an_exported_adapter_is_replaced_when_asked(place: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "lora", tmp_path / "served"
    flags = ["--base", place / "base", "--data", place / "rows.jsonl", "--method", "lora", "--out", run]
    status, _, error = call_koat("finetune", *flags, "training.max_steps=1")
    assert status == 0, error
    export_model(run, "vllm", out, as_adapter=True)
    (out / "README.txt").write_text("old", encoding="utf-8")
    with pytest.raises(koat.RunFolderError, match="--overwrite to replace it"):
        export_model(run, "vllm", out, as_adapter=True)
    export_model(run, "vllm", out, as_adapter=True, overwrite=True)
    assert "--enable-lora" in (out / "README.txt").read_text(encoding="utf-8")
    with pytest.raises(koat.RunFolderError, match="no exported adapter"):
        export_model(run, "vllm", run / "adapter", as_adapter=True, overwrite=True)


def test_what_cannot_be_exported(place: Path, finished: Path, tmp_path: Path) -> None:
    refused: list[tuple[Any, str, str]] = [
        (finished, "vlm", "did you mean 'vllm'"),
        (place / "base", "vllm", "needs no export"),
        (tmp_path / "nowhere", "vllm", "neither a run"),
    ]
    for source, program, said in refused:
        with pytest.raises(koat.KoatError, match=said):
            export_model(source, program, tmp_path / "out")
    shutil.copytree(place / "base", tmp_path / "out")
    with pytest.raises(koat.RunFolderError, match="no merged model"):
        export_model(finished, "vllm", tmp_path / "out", overwrite=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["model_type"] == "llama"


@pytest.mark.parametrize("program", ["llama.cpp", "vllm"])
def test_gpt_neox_says_its_rotary_share_as_llama_cpp_reads_it(program: str, tmp_path: Path) -> None:
    """transformers 5 keeps it in `rope_parameters`; llama.cpp's converter asks for `rotary_pct`."""
    from transformers import AutoConfig, GPTNeoXConfig

    rope = {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.5}
    merged = tmp_path / "merged"
    GPTNeoXConfig(rope_parameters=rope).save_pretrained(merged)
    (merged / "merge.json").write_text('{"dtype": "float32"}', encoding="utf-8")
    folder = export_model(merged, program, tmp_path / "served")
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (written.get("rotary_pct"), written.get("rotary_emb_base")) == (
        (0.5, 5e4) if program == "llama.cpp" else (None, None)
    )
    assert AutoConfig.from_pretrained(folder).rope_parameters == rope
