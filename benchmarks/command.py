"""The command line that all benchmarks share."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.measure import Findings
from benchmarks.workload import AMOUNT, FAMILIES, SIZES, Absent, Options
from koat.model import pick_device

Benchmark = Callable[[Options, dict[str, float]], Findings]
"""From options and the machine's matrix rates by precision to what was found."""


def parse_options(arguments: list[str] | None = None, description: str | None = None) -> Options:
    """Read the options of a benchmark from the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--amount", type=float, default=AMOUNT, help=f"share of all items there are; default: {AMOUNT}")
    parser.add_argument("--quick", action="store_true", help="a few examples, tiny models: shows that it runs")
    parser.add_argument("--tokenizer", default="nano", help="tokenizer folder; default: the one that ships")
    parser.add_argument("--base", default="nano", help="base model of the quality comparison")
    parser.add_argument("--data", type=Path, help="folder of the data; default: ../shared/data")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", choices=SIZES, help="default: small; with --quick tiny")
    parser.add_argument("--family", choices=FAMILIES, action="append", help="may be given twice; default: all")
    parser.add_argument(
        "--rounds", type=int, help="how often each side trains, in turns; the median counts; default: 3"
    )
    parser.add_argument("--precision", choices=("float32", "bfloat16"), action="append", help="default: both")
    given = parser.parse_args(arguments)
    chosen = {
        "families": tuple(given.family) if given.family else None,
        "precisions": tuple(given.precision) if given.precision else None,
        "data": given.data,
    }
    return Options(
        amount=given.amount,
        quick=given.quick,
        tokenizer=given.tokenizer,
        base=given.base,
        device=pick_device(given.device),
        asked_rounds=given.rounds,
        size=given.size or ("tiny" if given.quick else "small"),
        **{name: value for name, value in chosen.items() if value is not None},
    )


def keep_quiet() -> None:
    """Silence what the peers say while they are set up; progress bars cost time as well."""
    import transformers

    for name in ("HF_HUB_OFFLINE", "TRL_EXPERIMENTAL_SILENCE"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # as for users: unset, it is on until a process forks
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("lm_eval", "accelerate", "trl", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def run_guarded(benchmark: Benchmark, options: Options, rates: dict[str, float]) -> Findings:
    """Run a benchmark; when data or its peer is absent, return why instead."""
    try:
        return benchmark(options, rates)
    except Absent as reason:
        return Findings(skipped=[f"{benchmark.__module__.rpartition('.')[2]}: {reason}"])


def print_findings(findings: Findings) -> None:
    """Print tables and what was skipped; results are printed as they come."""
    for table in findings.tables:
        print(f"\n{table.title}\n{' | '.join(table.header)}")
        for row in table.rows:
            print(" | ".join(row))
    for reason in findings.skipped:
        print(f"skipped: {reason}")


def main(benchmark: Benchmark, description: str | None) -> None:
    """Run one benchmark from the shell; exit status 1 when both sides did not compute the same."""
    from benchmarks.machine import describe_machine, measure_matrix_rate

    options = parse_options(description=description)
    keep_quiet()
    for name, value in describe_machine(options.device).items():
        print(f"{name}: {value}")
    rates = {
        precision: measure_matrix_rate(getattr(torch, precision), options.device) for precision in options.precisions
    }
    print("matrix rate: " + ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in rates.items()))
    findings = run_guarded(benchmark, options, rates)
    print_findings(findings)
    sys.exit(0 if findings.passed else 1)
