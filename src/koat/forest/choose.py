"""The layout that a user's settings and a model's verification come to."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from koat.core.errors import ConfigError
from koat.core.settings import ModelSettings
from koat.forest.score import Layout, make_padded
from koat.forest.verify import Verification, verify_layout


def choose_layout(
    model: nn.Module, settings: ModelSettings, compute: torch.dtype | None = None
) -> tuple[Layout, Verification]:
    """Verify the model and return the layout to use; `padded` is taken at its word.

    `compute` is the type that training computes in, where it is not the model's own. Raises ConfigError where `forest`
    was asked for and cannot be.
    """
    layout, verification = verify_layout(model, settings.attention, compute)
    if settings.layout == "padded" and layout.shares:
        padded = make_padded(verification.split_head)
        return padded, replace(verification, shares=False, streams=False, reason="model.layout=padded")
    if settings.layout == "forest" and not layout.shares:
        raise ConfigError(
            f"model.layout=forest was asked for, but prefixes cannot be shared exactly here: {verification.reason}. "
            "Use model.layout=auto."
        )
    return layout, verification
