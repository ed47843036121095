"""The base model and its tokenizer: where they are, how they are loaded, and how they are told apart."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from koat.core.errors import ModelError, suggest, summarise_error
from koat.core.out_of_memory import is_out_of_memory
from koat.core.quiet import quieten
from koat.core.settings import ModelSettings, TrainingSettings
from koat.quantise.load import make_loading_options, settle_kernels
from koat.quantise.weights import count_entries

NANO = "nano"
"""The name of the small base model that ships with koat."""
log = logging.getLogger(__name__)


def locate_base(base: str) -> str:
    """Return the folder or Hub id that `base` stands for. Raises ModelError for a folder that is not there."""
    if base == NANO:
        return str(Path(__file__).parent / "nano")
    path = _expand(base)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{path} holds no config.json, so it is not a model folder. Give the folder that has it (in a clone or "
                "download of a Hub repository, often one further down), or the model's Hub id."
            )
        return str(path)
    if path.is_file():
        raise ModelError(f"{path} is a file. Give the model folder that it lies in.")
    looks_local = base.startswith((".", "/", "~")) or base.count("/") > 1 or path.exists()
    if looks_local:
        parent = path.parent
        near = suggest(path.name, [entry.name for entry in parent.iterdir()]) if parent.is_dir() else ""
        raise ModelError(f"The base model folder {base} does not exist{near}.")
    return base


def _expand(base: str) -> Path:
    """Return the path that a base would have as a folder. Raises ModelError where the system knows no such path."""
    try:
        path = Path(base).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a home that nobody has
        raise ModelError(f"The base model {base!r} is no folder and no Hub id: {error} Check it.") from error
    return path


def pick_device(device: str) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda`, `cuda:N`. Raises ModelError for others, or when it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked: torch.device | None = torch.device(device)
    except RuntimeError:
        picked = None
    if picked is None or picked.type not in ("cpu", "cuda"):
        raise ModelError(f"model.device={device!r} is no device that koat runs on. Use auto, cpu, cuda or cuda:0.")
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"model.device={device} was asked for, but PyTorch sees no CUDA GPU here. Use cpu or auto.")
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"model.device={device} was asked for, and PyTorch sees {torch.cuda.device_count()} GPUs here, counted "
            "from cuda:0."
        )
    return picked


def pick_dtype(dtype: str, device: torch.device, quantisation: str = "none") -> torch.dtype:
    """Return the type of the frozen weights: `auto` takes bfloat16 on CUDA and if quantised, float32 elsewhere.

    Quantised layers compute in it; embeddings, norms and head are stored in it.
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" or quantisation != "none" else torch.float32
    found: torch.dtype = getattr(torch, dtype)
    return found


def settle_dtype(model: ModelSettings, training: TrainingSettings) -> ModelSettings:
    """Load frozen weights in the precision that is trained in, unless their type is set."""
    if model.dtype == "auto" and training.precision != "auto":
        return model.model_copy(update={"dtype": training.precision})
    return model


def pick_precision(training: TrainingSettings, device: torch.device) -> torch.dtype:
    """Return the type that training computes in: `auto` takes bfloat16 on CUDA, float32 elsewhere."""
    return pick_dtype(training.precision, device)


def load_config(settings: ModelSettings) -> Any:
    """Load a model's configuration alone. Raises ModelError when it cannot be had."""
    from transformers import AutoConfig

    where = locate_base(settings.base)
    try:
        return AutoConfig.from_pretrained(
            where, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except Exception as error:  # values that are checked by several libraries, each with errors of its own
        raise _refuse(settings, "configuration", error) from error


def load_tokenizer(settings: ModelSettings) -> Any:
    """Load the tokenizer that comes with a base model; a missing padding token is no matter."""
    from transformers import AutoTokenizer

    where = locate_base(settings.base)
    if Path(where).is_dir() and not any(
        (Path(where) / name).is_file()
        for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
    ):
        raise ModelError(
            f"{where} has no tokenizer (tokenizer.json or tokenizer_config.json). Copy the base model's tokenizer "
            "files into the folder, or name the Hub id."
        )
    try:
        return AutoTokenizer.from_pretrained(
            where, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except Exception as error:  # tokenizers raises plain ones
        raise _refuse(settings, "tokenizer", error) from error


def load_model(settings: ModelSettings) -> Any:
    """Load a causal model: safetensors only, frozen, in evaluation mode, on its device.

    With `quantisation` its linear layers but the head are quantised while they are read. Raises ModelError when
    the weights are absent, pickled, broken or not all there, or bitsandbytes is missing.
    """
    from transformers import AutoModelForCausalLM

    where, device = locate_base(settings.base), pick_device(settings.device)
    quieten()
    config = load_config(settings)
    attention = pick_attention(settings.attention, config)
    dtype = pick_dtype(settings.dtype, device, settings.quantisation)
    options = make_loading_options(settings.quantisation, dtype, device, lambda: build_empty(config))
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where,
            revision=settings.revision,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=settings.trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # safetensors, bitsandbytes and the family's own code, each with errors of its own
        raise _refuse(settings, "weights", error) from error
    model, report = loaded
    _check_complete(settings, report["missing_keys"])
    settle_kernels(model.requires_grad_(False).eval())
    return model


def _check_complete(settings: ModelSettings, missing: Collection[str]) -> None:
    if missing:
        raise ModelError(
            f"The weights of the base model {settings.base!r} are not all there: {len(missing)} tensors are missing, "
            f"the first is {min(missing)}. They would be random. Save or download the model again."
        )


def pick_attention(attention: str, config: Any) -> str | None:
    """Return the attention implementation for transformers, None for the family's own default.

    SDPA, the default of Gemma 2, leaves caps on scores out without a word. Raises ModelError where it was asked for.
    """
    cap = getattr(config, "attn_logit_softcapping", None)
    if attention == "auto":
        return None if cap is None else "eager"
    if attention == "sdpa" and cap is not None:
        raise ModelError(
            f"model.attention=sdpa leaves out the cap of {cap:g} that this model puts on its attention scores, and "
            "computes another model. Use model.attention=auto or eager."
        )
    return {"flex": "flex_attention"}.get(attention, attention)


def build_empty(config: Any) -> Any:
    """Build a model without weights (meta device), to count and to measure. Raises ModelError where none can be."""
    try:
        return _build_empty(config)
    except Exception as error:  # each family's own code
        name, first = getattr(config, "_name_or_path", ""), summarise_error(error)
        raise ModelError(f"No causal model can be built from the configuration of {name!r}: {first}") from error


def _build_empty(config: Any) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    own = getattr(config, "auto_map", {}).get("AutoModelForCausalLM")
    with torch.device("meta"):
        # A configuration whose class came with the model was loaded under model.trust_remote_code=true.
        if own and type(config).__module__.startswith("transformers_modules."):
            version = getattr(config, "_commit_hash", None)
            kind: Any = get_class_from_dynamic_module(
                own, config._name_or_path, revision=version, code_revision=version
            )
            return kind._from_config(config)
        return AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]


def count_parameters(model: torch.nn.Module) -> int:
    """Return the number of a model's parameters, shared ones once, quantised ones as what they stand for."""
    return sum(count_entries(parameter) for parameter in model.parameters())


def find_context_length(config: Any) -> int | None:
    """Return the longest sequence a model was made for, where its configuration says."""
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return None


def fingerprint_base(settings: ModelSettings, config: Any) -> str:
    """Return a short hash that tells base models apart: configuration, weight files' headers and ends.

    A Hub id has that of a folder with its files, once they were downloaded; before, its commit stands for them.
    """
    where = locate_base(settings.base)
    # As it is stored: what a configuration's class adds by default changes with transformers, and with it no model.
    stored, _ = type(config).get_config_dict(where, revision=settings.revision)
    # Where a model lies and what last wrote its configuration do not make it another model.
    facts = {key: value for key, value in stored.items() if key[0] != "_" and key != "transformers_version"}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    weights = list_weights(settings, config)
    for path in weights:
        with path.open("rb") as file:
            digest.update(f"{path.name}:{path.stat().st_size}".encode())
            digest.update(file.read(1 << 20))
            file.seek(-min(1 << 20, path.stat().st_size), os.SEEK_END)
            digest.update(file.read())
    if not weights and not Path(where).is_dir():
        digest.update(str(find_commit(settings, config) or settings.revision).encode())
    return digest.hexdigest()[:16]


def find_commit(settings: ModelSettings, config: Any) -> str | None:
    """Return the commit on the Hub that a configuration was loaded from, None for a folder's."""
    return None if Path(locate_base(settings.base)).is_dir() else getattr(config, "_commit_hash", None)


def list_weights(settings: ModelSettings, config: Any) -> list[Path]:
    """Return the files that a base model's weights are loaded from; none of a Hub id's while some are missing.

    Raises ModelError for a broken index of them.
    """
    from huggingface_hub import try_to_load_from_cache

    folder, commit = Path(locate_base(settings.base)), find_commit(settings, config)
    if not folder.is_dir():
        found = try_to_load_from_cache(settings.base, "config.json", revision=commit)
        if not isinstance(found, str):
            return []
        folder = Path(found).parent
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{index} is no index of weights ({error}). Save or download the model again.") from error
    paths = [folder / name for name in sorted(names)]
    there = [path for path in paths if path.is_file()]
    return there if commit is None or len(there) == len(paths) else []


def _refuse(settings: ModelSettings, what: str, error: Exception) -> ModelError:
    first = summarise_error(error)
    text = f"The {what} of the base model {settings.base!r} could not be loaded: {first}"
    folder = Path(locate_base(settings.base))
    pickled = folder.is_dir() and any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors"))
    if is_out_of_memory(error):
        text += " It is larger than the memory that is free: see `koat plan --fit`, or set model.quantisation=nf4."
    elif "safetensors" in first and (pickled or not folder.is_dir()):
        text += " koat opens no pickled weights (.bin): convert them once with transformers' save_pretrained."
    elif "trust_remote_code" in str(error) or "custom code" in str(error):
        text += " This model brings Python code of its own; to run it, set model.trust_remote_code=true."
    elif not folder.is_dir():
        text += " If it is meant to be a local folder, check the path; if a Hub id, check name, login and network."
    return ModelError(text)
