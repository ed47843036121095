"""What a piece of work cost: seconds and peak memory."""

from __future__ import annotations

import os
import threading
import time
from types import TracebackType

import psutil
import torch


class Cost:
    """Measures wall-clock seconds and peak memory within a `with` block.

    On CUDA the peak is the device's (`max_memory_allocated`); elsewhere the process' resident memory, looked
    at fifty times a second.
    """

    seconds: float = 0.0
    peak_bytes: int = 0

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._process = psutil.Process(os.getpid())

    def __enter__(self) -> Cost:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._thread.start()
        self._began = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.monotonic() - self._began
        self._stop.set()
        self._thread.join()
        if self._device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self._device)

    def _watch(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)
            if self._stop.wait(0.02):
                return
