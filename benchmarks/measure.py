"""Timing two sides in turns, and what a result is made of."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as ListLike
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch

from benchmarks.machine import synchronise

FACTORS = ("padding", "sharing", "head", "kernel")


@dataclass
class Check:
    """Whether both sides computed the same thing: the largest difference, and how much is allowed."""

    what: str
    difference: float
    tolerance: float
    spread: float
    """Standard deviation of the compared numbers: a difference far below it is agreement, not indifference."""

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance, and the tolerance within the spread."""
        return self.difference <= self.tolerance < self.spread

    def __str__(self) -> str:
        verdict = "equal" if self.passed else "NOT EQUAL"
        allowed = f"allowed {self.tolerance:.0e}, spread {self.spread:.2g}"
        return f"{verdict}: {self.what} differ by {self.difference:.1e} ({allowed})"


def check_equal(what: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> Check:
    """Compare two lists of numbers."""
    difference = float((ours.double() - theirs.double()).abs().max())
    spread = float(theirs.double().std())
    return Check(what, difference if difference == difference else float("inf"), tolerance, spread)


@dataclass
class Result:
    """One line of the table. Without a passed check there are no rates and no ratio."""

    benchmark: str
    model: str
    precision: str
    method: str
    peer: str
    check: str
    passed: bool
    settings: str
    rate: float | None = None
    """Original tokens per second."""
    peer_rate: float | None = None
    factors: dict[str, float] = field(default_factory=dict)
    machine_share: float | None = None
    """Share of the machine's matrix rate that koat reaches on unique tokens."""
    target: float | None = None
    notes: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times the peer's rate."""
        return self.rate / self.peer_rate if self.rate and self.peer_rate else None

    def to_mapping(self) -> dict[str, Any]:
        """Return a JSON-safe mapping, the ratio included."""
        return {**asdict(self), "ratio": self.ratio}

    def describe(self) -> str:
        """Return the result as a line to print."""
        head = f"{self.benchmark} | {self.model} {self.precision} {self.method} | vs {self.peer} | {self.check}"
        if self.ratio is None or self.rate is None or self.peer_rate is None:
            return f"{head} | no ratio"
        parts = " x ".join(f"{name} {self.factors[name]:.2f}" for name in FACTORS if name in self.factors)
        share = f" | {self.machine_share:.0%} of matrix rate" if self.machine_share is not None else ""
        wanted = f" (target {self.target:g})" if self.target else ""
        return f"{head} | {self.rate:,.0f} vs {self.peer_rate:,.0f} tok/s = {self.ratio:.2f}x{wanted} = {parts}{share}"


@dataclass(frozen=True)
class Table:
    """Further figures that belong beside the results: a title, a header and rows."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    picture: str = ""
    """A file beside the page that shows this table, and those before it, as a plot."""


@dataclass
class Findings:
    """What one benchmark found; `skipped` says why lines are missing."""

    results: list[Result] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every check of equality held."""
        return all(result.passed for result in self.results)


def time_once(work: Callable[[], float | None], device: torch.device) -> float:
    """Return the seconds that `work` took: what it returns, where it measures itself, else wall clock."""
    synchronise(device)
    began = time.perf_counter()
    own = work()
    synchronise(device)
    return time.perf_counter() - began if own is None else own


def interleave(sides: Mapping[str, Callable[[], float | None]], rounds: int, device: torch.device) -> dict[str, float]:
    """Run the sides in turns, A B A B, and return the median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, work in sides.items():
            seconds[name].append(time_once(work, device))
    return {name: median(values) for name, values in seconds.items()}


def take_turns(
    steps: Mapping[str, Callable[[], None]], rounds: int, num_steps: int, device: torch.device, seed: int
) -> dict[str, list[float]]:
    """Return each side's median seconds of a step in every round.

    In training a step follows one of the same model: each side takes a few in a row, the first of them not counted.
    The sides' order is drawn anew each round, for whoever comes after a side finds the memory that it left. The first
    round is not counted either.
    """
    seconds: dict[str, list[float]] = {side: [] for side in steps}
    order, shuffle = list(steps), random.Random(seed).shuffle
    for turn in range(rounds + 1):
        shuffle(order)
        for side in order:
            spent = [time_once(steps[side], device) for _ in range(num_steps)]
            if turn:
                seconds[side].append(median(spent[1:]))
    return seconds


def compare_rounds(seconds: Mapping[str, ListLike[float]], floor: str) -> dict[str, float]:
    """Return each side's median ratio to the floor's steps of the same round."""
    return {side: median(a / b for a, b in zip(each, seconds[floor], strict=True)) for side, each in seconds.items()}


def pick_fastest(
    candidates: Mapping[str, Callable[[], float | None]], device: torch.device, repeats: int = 1
) -> tuple[str, dict[str, float]]:
    """Return the name of the fastest candidate and the best seconds of each."""
    seconds = {name: min(time_once(work, device) for _ in range(repeats)) for name, work in candidates.items()}
    return min(seconds, key=lambda name: seconds[name]), seconds
