"""The front door: parse, call one workflow, print. Imports no PyTorch until a command runs."""

from koat.cli import ask, compare, evaluate, experiment, harness, look, share, train  # noqa: F401  (each adds its own)
from koat.cli.front import koat, main

__all__ = ["koat", "main"]
