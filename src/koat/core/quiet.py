"""What libraries say of themselves and nobody asked for."""

from __future__ import annotations

import logging


def quieten() -> None:
    """Silence what bitsandbytes says of speed on a CPU: once when PEFT imports it, and at every 8-bit product."""
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).setLevel(logging.ERROR)
