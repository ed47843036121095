"""Whether a model carries a soft prompt: what both the adapters and the forest must know of it."""

from __future__ import annotations

from typing import Any


def has_soft_prompt(model: object) -> bool:
    """Whether a model is a `PeftModel` with virtual tokens or keys before every sequence."""
    config: Any = getattr(model, "active_peft_config", None)
    return bool(getattr(config, "is_prompt_learning", False))
