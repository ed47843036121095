"""What koat gives the frozen layers around an adapter, and takes back when it is merged into them."""

from __future__ import annotations

from torch import nn

from koat.adapters.norms import refine_norms, release_norms
from koat.adapters.projections import refine_projections, release_projections
from koat.adapters.rotary import refine_rotary, release_rotary


def refine_frozen(model: nn.Module) -> None:
    """Give a frozen model's norms, projections and rotary positions koat's forward passes."""
    refine_norms(model)
    refine_projections(model)
    refine_rotary(model)


def release_frozen(model: nn.Module) -> None:
    """Give those layers their own classes back."""
    release_norms(model)
    release_projections(model)
    release_rotary(model)
