"""Merge: a run's adapter into its base, left as a plain Hugging Face folder, checked on real prompts."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from koat.adapters.attach import restore_adapter
from koat.adapters.full import write_model_folder
from koat.adapters.merge import check_mergeable, merge_adapter, round_weights
from koat.core.atomic import atomic_folder, write_json
from koat.core.errors import AdapterError, ConfigError, RunFolderError
from koat.core.precision import exact_products
from koat.core.settings import ModelSettings
from koat.evaluation.contract import find_version
from koat.model import build_empty, load_config, load_model, load_tokenizer
from koat.quantise.undo import QuantisedLayer, dequantise_model, requantise_weights
from koat.workflows.sharing.probe import Difference, Prompts, choose_prompts, collect_logits, compare_logits
from koat.workflows.trained import (
    TEMPLATE,
    TOKENIZER,
    Trained,
    find_trained,
    fingerprint_adapter,
    public_name,
    read_base_fingerprint,
)

RECORD = "merge.json"
STORED = ("float32", "bfloat16", "float16")
FLOAT32_LIMIT = 1e-4
"""Largest logit difference that float32 arithmetic in another order explains."""


@dataclass(frozen=True, slots=True)
class Merge:
    """What a merge wrote and what its check found."""

    folder: Path
    record: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Stages:
    """Logits of the adapter, of the float32 merge, and of the merge with its weights rounded, per prompt."""

    adapter: list[Tensor]
    merged: list[Tensor]
    rounded: list[Tensor]
    again: list[Tensor] | None
    """Of the float32 merge with its weights quantised as the base was."""


@exact_products()
def merge_run(
    target: str | Path,
    out: Path,
    *,
    dtype: str = "auto",
    settings: ModelSettings | None = None,
    device: str = "cpu",
    tolerance: float = FLOAT32_LIMIT,
    measure_requantising: bool = False,
    overwrite: bool = False,
) -> Merge:
    """Merge a run or a PEFT adapter into its base and write a model folder that needs no koat.

    Weights are merged in float32 and rounded once, to `dtype` (`auto`: as the base is stored). Logits before
    and after are compared, the folder being opened again for it; a folder whose logits differ by more than
    rounding explains is not left. `tolerance` is what float32 may differ by. It is done on the CPU unless
    `device` says otherwise: float32 weights are twice to eight times what training held. Raises KoatError.
    """
    trained = find_trained(target, settings)
    trained = replace(trained, model=trained.model.model_copy(update={"device": device}))
    check_mergeable(trained.read_adapter_config(), str(target), trained.read_method())
    claim_folder(out, overwrite)
    tokenizer = load_tokenizer(trained.model)
    prompts = choose_prompts(trained, tokenizer)
    kind = pick_stored_dtype(trained.model, dtype)
    model, layers = open_for_merging(trained)
    if measure_requantising and not layers:
        raise AdapterError("--requantise: the base model is not quantised, so there is nothing to quantise again.")
    model, stages = merge_in_stages(model, prompts, kind, layers if measure_requantising else [])
    name_end(model, tokenizer)
    with atomic_folder(out) as draft:
        write_model_folder(model.to(kind), draft)
        del model
        save_company(trained, tokenizer, draft)
        folder = collect_logits(open_written(draft, trained.model), prompts)
        check = judge(stages, folder, kind, tolerance)
        record = describe_merge(trained, kind, prompts, check, layers)
        write_json(draft / RECORD, record)
    return Merge(out, record)


def claim_folder(out: Path, overwrite: bool) -> None:
    """Raise RunFolderError for a folder that holds something, unless it is an earlier merge to be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir() or not (out / RECORD).is_file():
        raise RunFolderError(f"{out} holds something that is no merged model. Choose another `--out`.")
    if not overwrite:
        raise RunFolderError(f"{out} holds an earlier merge. Use --overwrite to replace it, or another `--out`.")


def pick_stored_dtype(settings: ModelSettings, dtype: str) -> torch.dtype:
    """Return the type of the weights to write; `auto` is the type that the base is stored in."""
    if dtype not in ("auto", *STORED):
        raise ConfigError(f"dtype {dtype!r}: a merged model is stored as auto, {', '.join(STORED)}.")
    found = getattr(load_config(settings), "dtype", None) if dtype == "auto" else getattr(torch, dtype)
    return found if isinstance(found, torch.dtype) else torch.float32


def open_for_merging(trained: Trained) -> tuple[Any, list[QuantisedLayer]]:
    """Load the base in float32, quantised layers dequantised, with the adapter on it.

    A quantised base is read in the type that training read it in: its codes are those of that type's weights.
    """
    settings = trained.model
    base = load_model(settings if settings.quantisation != "none" else settings.model_copy(update={"dtype": "float32"}))
    layers = dequantise_model(base, build_empty(load_config(trained.model)))
    return restore_adapter(base.float(), trained.folder).eval(), layers


def open_written(folder: Path, settings: ModelSettings) -> Any:
    """Open a merged folder as anyone would, computing in float32."""
    plain = ModelSettings(base=str(folder), dtype="float32", device=settings.device)
    return load_model(plain.model_copy(update={"trust_remote_code": settings.trust_remote_code}))


def merge_in_stages(model: Any, prompts: Prompts, kind: torch.dtype, again: list[QuantisedLayer]) -> tuple[Any, Stages]:
    """Merge, then round to `kind`, taking logits in float32 after each stage; `again` are layers to requantise."""
    adapter = collect_logits(model, prompts)
    model = merge_adapter(model)
    merged = collect_logits(model, prompts)
    requantised = None
    if again:
        kept = {layer.name: model.get_submodule(layer.name).weight.clone() for layer in again}
        requantise_weights(model, again)
        requantised = collect_logits(model, prompts)
        for name, weight in kept.items():
            model.get_submodule(name).weight.data = weight
    round_weights(model, kind)
    rounded = collect_logits(model, prompts) if kind != torch.float32 else merged
    return model, Stages(adapter, merged, rounded, requantised)


def judge(stages: Stages, folder: list[Tensor], kind: torch.dtype, tolerance: float) -> dict[str, Any]:
    """Compare the stages and raise AdapterError when logits differ by more than rounding explains."""
    merging = compare_logits(stages.adapter, stages.merged)
    rounding = compare_logits(stages.merged, stages.rounded)
    whole = compare_logits(stages.adapter, folder)
    name = str(kind).removeprefix("torch.")
    _refuse_beyond("The merged weights in float32", merging, tolerance)
    limit = tolerance if kind == torch.float32 else max(tolerance, 2 * rounding.max)
    _refuse_beyond(f"The folder as written, in {name},", whole, limit)
    found = {"merging": merging, "rounding": rounding, "folder": whole}
    if stages.again is not None:
        found["requantising"] = compare_logits(stages.merged, stages.again)
    return {
        **{stage: difference.to_mapping() for stage, difference in found.items()},
        "limit": limit,
        "largest_logit": float(max(logits.abs().max() for logits in stages.adapter)),
    }


def _refuse_beyond(what: str, found: Difference, limit: float) -> None:
    if not found.max <= limit or math.isinf(found.max):
        raise AdapterError(
            f"{what} gives logits that differ from the adapter's by up to {found.max:.3g}; rounding explains "
            f"{limit:.3g}. Nothing was written. If the model's logits are large and this is still small for them, "
            "raise the limit with --tolerance; otherwise the adapter has parts that a merge does not carry: use it "
            "unmerged."
        )


def name_end(model: Any, tokenizer: Any) -> None:
    """Let a model that names no token to stop at stop at the one that koat trains responses to end with."""
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id


def save_company(trained: Trained, tokenizer: Any, folder: Path) -> None:
    """Put the tokenizer, its chat template and koat's prompt template beside the merged weights."""
    own = [path for pattern in TOKENIZER for path in trained.folder.glob(pattern) if path.is_file()]
    for path in own:  # as it was trained with
        shutil.copyfile(path, folder / path.name)
    if not own:
        tokenizer.save_pretrained(str(folder))
    name_tokenizer_class(folder / "tokenizer_config.json")
    template = trained.read_template()
    if template is not None:
        # A chat template without its text would be of no use there.
        stored = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trained.model.trust_remote_code)
        template.bind(stored)
        shutil.copyfile(trained.folder / TEMPLATE, folder / TEMPLATE)


def name_tokenizer_class(path: Path) -> None:
    """Call a tokenizer by the name that transformers 4 knows as well; llama.cpp's converter, for one, brings that."""
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if stored.get("tokenizer_class") == "TokenizersBackend":
        write_json(path, {**stored, "tokenizer_class": "PreTrainedTokenizerFast"})


def describe_merge(
    trained: Trained, kind: torch.dtype, prompts: Prompts, check: dict[str, Any], layers: list[QuantisedLayer]
) -> dict[str, Any]:
    """Return the record that lies in the merged folder; it names no folder of this machine."""
    return {
        "koat": find_version(),
        "adapter": {
            "name": trained.name,
            "kind": trained.read_adapter_config()["peft_type"],
            "sha256": fingerprint_adapter(trained.folder),
        },
        "base": {"name": public_name(trained.model.base), "fingerprint": read_base_fingerprint(trained)},
        "dtype": str(kind).removeprefix("torch."),
        "dequantised_layers": len(layers),
        "check": {
            "prompts": len(prompts.token_ids),
            "tokens": prompts.num_tokens,
            "source": prompts.source,
            **check,
        },
    }
