"""Export: a merged folder, or a LoRA adapter as it is, with a note on how another program serves it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koat.adapters.files import CONFIG as ADAPTER_CONFIG
from koat.core.atomic import atomic_folder, write_text
from koat.core.errors import AdapterError, ConfigError, RunFolderError, suggest
from koat.core.settings import ModelSettings
from koat.workflows.sharing.merge import RECORD, claim_folder, merge_run
from koat.workflows.trained import find_trained, is_trained

README = "README.txt"
CONFIG = "config.json"
SERVED_BY_VLLM = {"LORA"}
"""PEFT's types that vLLM puts on a base model by itself; IA3 is not among them."""


BEYOND_VLLM = ("use_dora", "modules_to_save", "bias")
"""What a LoRA may have and vLLM refuses (its `vllm/lora/peft_helper.py`)."""


@dataclass(frozen=True, slots=True)
class Target:
    """A program that serves models: what it is called and what to tell its user."""

    title: str
    explain: Callable[[str, str], str]
    """From the folder's name and the weights' type to the note that goes beside them."""
    renames: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: {}
    """From a model's configuration to what the program reads from it under other names."""


def _explain_vllm(name: str, dtype: str) -> str:
    return (
        "This folder is a whole Hugging Face model: weights, configuration, tokenizer.\n\n"
        f"    pip install vllm\n    vllm serve ./{name} --dtype {dtype}\n\n"
        "The prompt form that the model was trained on is in prompt_template.json. Send finished prompts in that form\n"
        "to /v1/completions; /v1/chat/completions needs a chat template, which only models trained on one have.\n\n"
        "koat has not run this command: vLLM was not at hand where koat is tested.\n"
    )


def _explain_llama_cpp(name: str, dtype: str) -> str:
    kind = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[dtype]
    return (
        "This folder is a whole Hugging Face model: weights, configuration, tokenizer.\n"
        "llama.cpp reads GGUF files; its own converter makes one. The converter is in llama.cpp's repository, not on\n"
        "PyPI (the package `gguf` there is the library that it uses):\n\n"
        "    git clone https://github.com/ggml-org/llama.cpp\n"
        "    pip install -r llama.cpp/requirements/requirements-convert_hf_to_gguf.txt\n"
        f"    python llama.cpp/convert_hf_to_gguf.py ./{name} --outfile {name}.gguf --outtype {kind}\n"
        f"    llama-cli -m {name}.gguf -p PROMPT\n\n"
        "From Python: pip install llama-cpp-python, then llama_cpp.Llama(model_path=...).\n\n"
        "The prompt form that the model was trained on is in prompt_template.json. The converter must know the model\n"
        "family and the tokenizer; it says so when it does not.\n\n"
        "Tried with llama-cpp-python 0.3.36 and its converter on small Llama and GPT-NeoX models with IA3 and LoRA\n"
        "merged, in float32: the tokens were those of transformers, but for one GPT-NeoX answer of six, from its 20th\n"
        "token on.\n"
    )


def name_rotary_share(config: dict[str, Any]) -> dict[str, Any]:
    """Return GPT-NeoX's rotary settings under the names that llama.cpp reads and transformers 5 writes no more."""
    rope = config.get("rope_parameters") or {}
    if config.get("model_type") != "gpt_neox" or "partial_rotary_factor" not in rope:
        return {}
    return {"rotary_pct": rope["partial_rotary_factor"], "rotary_emb_base": rope["rope_theta"]}


def _explain_vllm_lora(name: str, base: str) -> str:
    return (
        "This folder is a LoRA adapter in PEFT's format. vLLM puts it on its base model:\n\n"
        "    pip install vllm\n"
        f"    vllm serve {base} --enable-lora --max-lora-rank RANK --lora-modules {name}=./{name}\n\n"
        f"RANK must be at least `r` in adapter_config.json. Ask for the model named {name}. The prompt form is in\n"
        "prompt_template.json.\n\n"
        "koat has not run this command: vLLM was not at hand where koat is tested.\n"
    )


TARGETS = {
    "vllm": Target("vLLM", _explain_vllm),
    "llama.cpp": Target("llama.cpp", _explain_llama_cpp, name_rotary_share),
}


def export_model(
    source: Path,
    program: str,
    out: Path,
    *,
    as_adapter: bool = False,
    dtype: str = "auto",
    settings: ModelSettings | None = None,
    overwrite: bool = False,
) -> Path:
    """Write what `program` needs to serve `source`, a run, an adapter or a merged folder; return `out`.

    A run is merged first. With `as_adapter` a LoRA adapter is copied instead, for vLLM to put on its base.
    Raises KoatError.
    """
    if program not in TARGETS:
        raise ConfigError(f"--for {program!r}{suggest(program, TARGETS)}: known are {', '.join(TARGETS)}.")
    if as_adapter:
        return export_adapter(source, program, out, settings, overwrite)
    if (source / RECORD).is_file():
        claim_folder(out, overwrite)
        copy_folder(source, out)
    elif is_trained(source):
        merge_run(source, out, dtype=dtype, settings=settings, overwrite=overwrite)
    else:
        raise RunFolderError(
            f"{source} is neither a run, nor an adapter, nor a folder that `koat merge` wrote. A model folder that is "
            "whole already needs no export: give it to the program as it is."
        )
    config = json.loads((out / CONFIG).read_text(encoding="utf-8"))
    renamed = TARGETS[program].renames(config)
    if renamed:
        write_text(out / CONFIG, json.dumps({**config, **renamed}, indent=2, ensure_ascii=False) + "\n")
    write_text(out / README, TARGETS[program].explain(out.resolve().name, read_dtype(out)))
    return out


def export_adapter(
    source: Path, program: str, out: Path, settings: ModelSettings | None, overwrite: bool = False
) -> Path:
    """Copy a LoRA adapter with a note on how vLLM serves it."""
    trained = find_trained(source, settings)
    stored = trained.read_adapter_config()
    kind = str(stored["peft_type"])
    more = [f"{kind} with {name}" for name in BEYOND_VLLM if stored.get(name) not in (None, False, [], "none")]
    if program != "vllm" or kind not in SERVED_BY_VLLM or more:
        raise AdapterError(
            f"--adapter: {TARGETS[program].title} does not serve a {', '.join(more) or kind} adapter of PEFT's as it "
            "is. Leave --adapter away: the merged model is exported then."
        )
    claim_adapter_folder(out, overwrite)
    copy_folder(trained.folder, out)
    write_text(out / README, _explain_vllm_lora(out.resolve().name, trained.model.base))
    return out


def claim_adapter_folder(out: Path, overwrite: bool) -> None:
    """Raise RunFolderError for a folder that holds something, unless it is an earlier export to be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / ADAPTER_CONFIG).is_file() or not (out / README).is_file():
        raise RunFolderError(f"{out} holds something that is no exported adapter. Choose another `--out`.")
    if not overwrite:
        raise RunFolderError(f"{out} holds an earlier export. Use --overwrite to replace it, or another `--out`.")


def copy_folder(source: Path, out: Path) -> None:
    """Copy a folder's files, whole or not at all."""
    with atomic_folder(out) as draft:
        for path in sorted(source.iterdir()):
            if path.is_file():
                shutil.copyfile(path, draft / path.name)


def read_dtype(folder: Path) -> str:
    """Return the type of a merged folder's weights."""
    from koat.core.config_files import read_config_file

    record: dict[str, Any] = read_config_file(folder / RECORD)
    return str(record["dtype"])
