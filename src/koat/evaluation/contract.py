"""What was asked (the contract) and how this model was asked (the conditions), in named parts with a hash.

Scores under different contracts are not comparable; differing conditions may be the very thing under study.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import nn

from koat.evaluation.harvest import Item
from koat.evaluation.task import Scoring, Task
from koat.forest.score import Layout, unwrap


@dataclass(frozen=True, slots=True)
class Parts:
    """Named parts, JSON-safe, and the hash that pins them all."""

    parts: Mapping[str, Any]

    @property
    def hash(self) -> str:
        """Sixteen hexadecimal digits of the parts' SHA-256."""
        return hash_value(self.parts)

    def to_mapping(self) -> dict[str, Any]:
        """Return `hash` and `parts` as a JSON-safe mapping."""
        return {"hash": self.hash, "parts": dict(self.parts)}


def hash_value(value: Any) -> str:
    """Return sixteen hexadecimal digits of the SHA-256 of a JSON-safe value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", errors="backslashreplace")).hexdigest()[:16]


def fingerprint_items(items: Iterable[Item]) -> str:
    """Return a hash of items as they are asked: ids, cleaned fields and gold labels, in order."""
    return hash_value([[item.id, sorted(item.fields.items()), item.gold] for item in items])


def fingerprint_source(items: Iterable[Item]) -> str:
    """Return a hash of what shots are drawn from: ids, fields as in the file, labels, in order."""
    return hash_value([[item.id, sorted(item.raw.items()), item.gold] for item in items])


def make_contract(task: Task, items: Iterable[Item], shots_source: str | None, scoring: Scoring) -> Parts:
    """Pin what a score under `scoring` means; `shots_source` is the fingerprint of the shots' file.

    What does not bear on the score (a seed when there are no shots, the normalisation of a likelihood that is
    not used) is left out, so that equal questions have equal contracts.
    """
    items = list(items)
    shots: dict[str, Any] = {"num": task.num_shots}
    if task.num_shots:
        shots |= {
            "source": shots_source, "rule": task.shot_rule, "seed": task.shot_seed,
            "pool": to_pool(task), "separator": task.shot_separator,
        }  # fmt: skip
    return Parts(
        {
            "items": {"num": len(items), "fingerprint": fingerprint_items(items)},
            "shots": shots,
            "prompt": {"source": task.prompt, "clean": dict(sorted(task.clean.items()))},
            "labels": dict(sorted(task.labels.items())),
            "normalisation": (scoring == "likelihood" and task.normalisation) or "none",
            "scoring": scoring,
            "metric": task.metric,
        }
    )


def to_pool(task: Task) -> dict[str, Any]:
    """Return what decides which rows may be shots."""
    return {"field": task.shot_pool.field, "max_tokens": task.shot_pool.max_tokens}


def describe_conditions(
    model: nn.Module, layout: Layout, tokenizer: Any, *, truncation: str = "none", template: str = "none"
) -> Parts:
    """Say how this model is asked. Call it where scoring runs: autocast is part of the precision."""
    return Parts(
        {
            "tokenizer": fingerprint_tokenizer(tokenizer),
            "template": template,
            "truncation": truncation,
            "precision": describe_precision(model),
            "layout": f"forest, {layout.plan.kernel}" if layout.plan is not None else "padded",
            "koat": find_version(),
        }
    )


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """Return a hash of what turns text into tokens; the padding and truncation of the moment do not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return hash_value([type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.all_special_tokens])
    state = json.loads(backend.to_str())
    return hash_value({key: value for key, value in state.items() if key not in ("padding", "truncation")})


def describe_precision(model: nn.Module) -> str:
    """Say in which type the weights are and the computation runs."""
    causal = unwrap(model)
    weights, device = str(causal.dtype).removeprefix("torch."), causal.device.type
    quantised = getattr(causal.config, "quantization_config", None)
    if quantised is not None:
        settings = quantised if isinstance(quantised, dict) else quantised.to_dict()
        weights = f"{weights}, quantised {hash_value({key: str(value) for key, value in settings.items()})}"
    if not torch.is_autocast_enabled(device):
        return weights
    return f"{weights}, autocast {str(torch.get_autocast_dtype(device)).removeprefix('torch.')}"


def find_version() -> str:
    """Return koat's version, "unknown" when it runs from a source folder that is not installed."""
    try:
        return metadata.version("koat")
    except metadata.PackageNotFoundError:
        return "unknown"


def compare_contracts(left: Parts | Mapping[str, Any], right: Parts | Mapping[str, Any]) -> list[str]:
    """Return the names of the parts that differ, in the order of `left`; for contracts and for conditions."""
    first, second = (side.parts if isinstance(side, Parts) else side["parts"] for side in (left, right))
    names = dict.fromkeys([*first, *second])
    missing = object()
    return [name for name in names if first.get(name, missing) != second.get(name, missing)]
