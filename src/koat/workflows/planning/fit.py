"""What fits into a given memory: per method the longest sequence, the largest micro-batch, and what to change."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from koat.adapters.methods import FOUR_BIT, METHODS, check_combination, default_values
from koat.core.config import Section
from koat.core.errors import AdapterError, ConfigError, ModelError
from koat.core.settings import ModelSettings, TrainingSettings
from koat.model import find_context_length
from koat.workflows.config import PlanConfig
from koat.workflows.planning.memory import Base, Footprint, measure_base, measure_footprint

UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
ROW = 512
"""Tokens of a micro-batch's rows where attention keeps squares and the settings name no row length."""
LEAST = 64
"""Fewer tokens than these are no training: nothing fits."""
MOST = 1 << 24


@dataclass(frozen=True, slots=True)
class Fit:
    """What one method can do in the memory that was asked about."""

    method: str
    checkpointing: bool
    quantisation: str
    fixed_bytes: int
    longest: int
    """Tokens of the longest single sequence; 0: none."""
    microbatch: int
    """The largest `tokens_per_microbatch`."""
    note: str

    def to_mapping(self) -> dict[str, Any]:
        """Return a JSON-safe mapping."""
        return asdict(self)


def read_size(text: str) -> int:
    """Return the bytes that a size like 24GB stands for. Raises ConfigError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([MGT]i?B)\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * UNITS[found[2].upper()]) if found else 0
    if size <= 0:
        raise ConfigError(
            f"--fit {text!r} is not a size. Write a number above zero and its unit, for example 24GB (10^9 bytes), "
            "24GiB (2^30 bytes) or 800MB."
        )
    return size


class Measurements:
    """Footprints, each measured once."""

    def __init__(self) -> None:
        self._bases: dict[tuple[str, str], Base] = {}
        self._footprints: dict[tuple[str, str, str, bool], Footprint] = {}

    def measure(self, adapter: Section, model: ModelSettings, training: TrainingSettings) -> Footprint:
        """Return a method's footprint. Raises AdapterError or ModelError where it cannot be."""
        check_combination(adapter, model, training)
        held = (model.quantisation, model.dtype)
        key = (adapter.model_dump_json(), *held, training.activation_checkpointing)
        if held not in self._bases:
            config = next((base.config for base in self._bases.values()), None)
            self._bases[held] = measure_base(model, training, config)
        if key not in self._footprints:
            self._footprints[key] = measure_footprint(self._bases[held], adapter, training)
        return self._footprints[key]


def fit_methods(
    config: PlanConfig, size: int, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Fit]:
    """Return for each method, with and without activation checkpointing, what fits into `size` bytes.

    The method that the settings name keeps its settings, the others have their defaults.
    """
    measurements = Measurements()
    fits: list[Fit] = []
    for name, method in METHODS.items():
        adapter: Section = config.adapter if config.adapter.method == name else method.settings()
        brought = default_values(name).get("model", {}) if config.model.quantisation == "none" else {}
        model = config.model.model_copy(update=brought)
        for checkpointing in (False, True):
            training = settle_training(config.training, name, checkpointing)
            fits.append(fit_method(adapter, model, training, size, measurements))
            on_progress(len(fits), 2 * len(METHODS))
    return fits


def settle_training(training: TrainingSettings, method: str, checkpointing: bool) -> TrainingSettings:
    """Return training settings with checkpointing on or off, and no decay where the method forbids it."""
    decay = training.weight_decay if METHODS[method].allows_weight_decay else 0.0
    offload = training.activation_offload and checkpointing
    changed = {"activation_checkpointing": checkpointing, "activation_offload": offload, "weight_decay": decay}
    return training.model_copy(update=changed)


def fit_method(
    adapter: Section, model: ModelSettings, training: TrainingSettings, size: int, measurements: Measurements
) -> Fit:
    """Return what one method can do in `size` bytes, or why it cannot be."""
    name: str = adapter.method  # type: ignore[attr-defined]
    here = (name, training.activation_checkpointing, model.quantisation)
    try:
        footprint = measurements.measure(adapter, model, training)
    except (AdapterError, ModelError) as error:
        return Fit(*here, 0, 0, 0, str(error))
    longest, microbatch = find_longest(footprint, size), find_microbatch(footprint, size, training)
    note = ""
    if max(longest, microbatch) < LEAST:
        note = advise(adapter, model, training, size, measurements)
    context = find_context_length(footprint.base.config)
    if context is not None and longest > context - footprint.num_root:
        longest, note = context - footprint.num_root, f"the model's own limit; memory would do for {longest:,}"
    return Fit(*here, footprint.fixed_bytes, longest, microbatch, note)


def find_longest(footprint: Footprint, size: int) -> int:
    """Return the tokens of the longest single sequence that trains in `size` bytes, 0 for none."""
    return find_most(lambda length: footprint.train_peak(1, length) <= size)


def find_microbatch(footprint: Footprint, size: int, training: TrainingSettings) -> int:
    """Return the most tokens that train at once in `size` bytes, in rows of the length that is set."""
    if not footprint.squares and not footprint.num_root:
        return find_longest(footprint, size)
    row = training.max_row_length or ROW
    return find_most(lambda tokens: footprint.train_peak(max(1.0, tokens / row), min(row, tokens)) <= size)


def find_most(fits: Callable[[int], bool]) -> int:
    """Return the largest number up to `MOST` that fits, 0 for none; what fits, fits with less."""
    low, high = 0, MOST
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def advise(
    adapter: Section, model: ModelSettings, training: TrainingSettings, size: int, measurements: Measurements
) -> str:
    """Return what to change where nothing fits: the first of a few changes that helps, tried, not guessed."""
    spared = training.model_copy(update={"activation_checkpointing": True})
    packed = model.model_copy(update={"quantisation": FOUR_BIT[0], "dtype": "auto"})
    changes: list[tuple[str, Section, ModelSettings, TrainingSettings]] = [
        ("training.activation_checkpointing=true", adapter, model, spared),
        (f"model.quantisation={FOUR_BIT[0]}", adapter, packed, training),
        (f"model.quantisation={FOUR_BIT[0]} training.activation_checkpointing=true", adapter, packed, spared),
    ]
    if getattr(adapter, "r", 1) > 1:
        smaller = adapter.model_copy(update={"r": 1})
        changes.append((f"adapter.r=1 and model.quantisation={FOUR_BIT[0]}", smaller, packed, training))
    for words, method, base, loop in changes:
        try:
            footprint = measurements.measure(method, base, loop)
        except (AdapterError, ModelError):
            continue
        if find_longest(footprint, size) >= LEAST:
            return f"nothing fits; set {words}: {find_longest(footprint, size):,} tokens"
    return "nothing fits, quantised and checkpointed neither: take a smaller base model or more memory"
