"""Give layers koat's forward pass by changing their class in place: parameters, names and files stay as they are."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

REFINED = frozenset({"Linear", "Linear4bit", "Linear8bitLt"})
"""PEFT's layers that get one; the quantised ones exist only beside bitsandbytes."""


def is_refinable(module: nn.Module, method: str) -> bool:
    """Whether a module is a linear layer of PEFT's for a method (`ia3`, `lora`), as PEFT made it."""
    plain = type(module)
    return plain.__module__.startswith(f"peft.tuners.{method}.") and plain.__name__ in REFINED


def mix_in(module: nn.Module, mixin: type[nn.Module]) -> None:
    """Put `mixin` before a module's own class."""
    layer: Any = module
    layer.__class__ = _derive_class(mixin, type(module))  # type: ignore[arg-type]  # classes hash; modules it asks


def take_out(module: nn.Module) -> None:
    """Give a module back the class it had before `mix_in`."""
    layer: Any = module
    layer.__class__ = type(module).__bases__[1]


@functools.cache
def _derive_class(mixin: type[nn.Module], plain: type[nn.Module]) -> type[nn.Module]:
    return type(f"{mixin.__name__.removesuffix('Linear')}{plain.__name__}", (mixin, plain), {})
