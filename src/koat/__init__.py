"""koat: fine-tune causal language models with few parameters, and prove what that bought.

    import koat

    run = koat.finetune({"model": {"base": "nano"}, "data": {"train": ["mine.jsonl"]}}, out="runs/mine")
    scores = koat.evaluate("runs/mine", tasks=["nsmc-prompt1"], data="test.tsv", shots="train.tsv")

The names below are imported when they are first used, so that `import koat` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from koat.core.errors import (
    AdapterError,
    ConfigError,
    DataError,
    HubError,
    KoatError,
    ModelError,
    RunFolderError,
    TrainingError,
)

if TYPE_CHECKING:
    from koat.workflows.api import ask, compare, evaluate, experiment, finetune, load, merge, plan, write_report

__all__ = [
    "AdapterError",
    "ConfigError",
    "DataError",
    "HubError",
    "KoatError",
    "ModelError",
    "RunFolderError",
    "TrainingError",
    "ask",
    "compare",
    "evaluate",
    "experiment",
    "finetune",
    "load",
    "merge",
    "plan",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in {"ask", "compare", "evaluate", "experiment", "finetune", "load", "merge", "plan", "write_report"}:
        from koat.core.quiet import quieten

        quieten()  # before PEFT is imported, and bitsandbytes with it
        from koat.workflows import api

        return getattr(api, name)
    raise AttributeError(f"module 'koat' has no attribute {name!r}")
