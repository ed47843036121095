"""Begin training from an adapter that is there already, koat's or PEFT's, instead of from a fresh one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peft import PeftModel

from koat.adapters.attach import read_adapter_state, write_adapter_state
from koat.adapters.files import CONFIG, WEIGHTS, compare_states, read_adapter_config, read_adapter_file, read_extra
from koat.adapters.ia3 import holds_queries
from koat.adapters.reach import list_places
from koat.adapters.soft_prompts import name_finished
from koat.core.errors import AdapterError
from koat.core.soft_prompt import has_soft_prompt

SETTINGS = {
    "peft_type": "method",
    "target_modules": "targets",
    "feedforward_modules": "feedforward",
    "r": "r",
    "lora_alpha": "alpha",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "num_virtual_tokens": "num_virtual_tokens",
}
"""What decides how an adapter acts, by its name in PEFT's file: the setting that must agree with it."""
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""PEFT's ways of beginning a LoRA that leave the base as it is."""
GOES_ON_AS = {"P_TUNING": "PROMPT_TUNING"}
"""What a finished adapter is trained further as, where not as itself: the network of P-tuning is not in its file."""


def start_from(model: PeftModel, folder: Path) -> None:
    """Give a freshly attached adapter the tensors of a saved one, from its folder or its run's.

    Raises AdapterError when the saved one acts otherwise than the settings say, or does not fit: training would
    go on with another adapter than either names.
    """
    folder = find_adapter(folder)
    stored, extra = read_adapter_config(folder), read_extra(folder)
    stored["peft_type"] = GOES_ON_AS.get(stored["peft_type"], stored["peft_type"])
    for key, setting in SETTINGS.items():
        wanted, found = _plain(getattr(model.peft_config["default"], key, None)), _plain(stored.get(key))
        if wanted != found:
            raise AdapterError(
                f"adapter.start={folder} has {key}={found}, and the settings make it {wanted}. Set adapter.{setting} "
                "so that both agree (layers can be named: adapter.targets=[...] adapter.feedforward=[...])."
            )
    _check_simple(stored, folder)
    if holds_queries(model) and not extra.get("holds_queries"):
        raise AdapterError(
            f"adapter.start={folder} also scales the queries of fused projections, and adapter.targets=paper holds "
            "those at one. Use adapter.targets=peft, or name the layers."
        )
    wanted, found = list_places(model.get_base_model()), extra.get("places", [])
    if wanted != found:
        raise AdapterError(
            f"adapter.start={folder} has vectors of koat's own in {len(found)} modules that PEFT does not reach, and "
            f"the settings want them in {len(wanted)}. Set adapter.reach={'whole' if found else 'peft'}, and the same "
            "targets."
        )
    state = read_adapter_file(folder / WEIGHTS)
    if has_soft_prompt(model):
        state = name_finished(model, state)
    compare_states(read_adapter_state(model), state, str(folder))
    write_adapter_state(model, state)


def find_adapter(folder: Path) -> Path:
    """Return the folder that holds the adapter: itself, or the one in it that is a run's."""
    folder = Path(os.path.expanduser(folder))
    return folder / "adapter" if (folder / "adapter" / CONFIG).is_file() else folder


def _check_simple(stored: dict[str, Any], folder: Path) -> None:
    """Refuse a LoRA whose ranks or scales differ by layer, or that began by changing its base."""
    for key in ("rank_pattern", "alpha_pattern"):
        if stored.get(key):
            raise AdapterError(
                f"adapter.start={folder} has {key}={stored[key]}, and koat trains one rank and scale for all layers. "
                "Merge it into its base with PEFT, and begin a fresh adapter on that."
            )
    if not begins_plainly(stored):
        raise AdapterError(
            f"adapter.start={folder} began with init_lora_weights={stored['init_lora_weights']}, which takes something "
            "away from the base's weights; on the base as it is the adapter would be another. Merge it with PEFT, or "
            "convert it (PEFT's save_pretrained with path_initial_model_for_weight_conversion)."
        )


def begins_plainly(stored: dict[str, Any]) -> bool:
    """Whether a LoRA began without taking anything away from its base's weights."""
    begun = stored.get("init_lora_weights", True)
    return (begun.lower() if isinstance(begun, str) else begun) in PLAIN_STARTS


def _plain(value: Any) -> Any:
    """Return a value as it stands in a file, names in order."""
    value = getattr(value, "value", value)
    return sorted(value) if isinstance(value, (list, set, tuple)) else value or None
