"""Plan a run from configurations alone: parameters, adapter size, memory, and time if asked. Reads no weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from koat.adapters.attach import attach_adapter, count_trainable
from koat.adapters.methods import check_combination
from koat.adapters.remarks import describe_remarks
from koat.model import build_empty
from koat.workflows.config import PlanConfig
from koat.workflows.planning.fit import ROW
from koat.workflows.planning.memory import measure_base, measure_footprint
from koat.workflows.planning.pace import Pace, estimate_pace


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will take; sizes in bytes."""

    base: str
    method: str
    dtype: str
    total_parameters: int
    trainable_parameters: int
    trainable_share: float
    weight_bytes: int
    quantisation_state_bytes: int
    """Part of `weight_bytes`: scales and tables."""
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes_per_token: int
    activation_bytes: int
    """What the layers keep from their forward to their backward pass."""
    head_bytes: int
    workspace_bytes: int
    """What the layers' backward pass needs besides. The head is done by then: of these two the larger counts."""
    peak_bytes: int
    evaluation_peak_bytes: int
    disk_bytes: int
    """Adapter and checkpoints."""
    row_length: int
    """Tokens of a row that activations were counted for; it matters where attention keeps squares."""
    pace: Pace | None
    """An estimate of speed, where a calibration was asked for."""
    remarks: list[str]
    """What the method's targets do not do on this model family."""

    def to_mapping(self) -> dict[str, Any]:
        """Return a JSON-safe mapping."""
        return asdict(self)


def plan_run(config: PlanConfig, *, calibrate: bool = False) -> Plan:
    """Plan a run: exact counts, and its memory while training and while scoring.

    With `calibrate` two seconds of matrix products on this machine give an estimate of its speed.
    """
    adapter, training = config.adapter, config.training
    check_combination(adapter, config.model, training)
    base = measure_base(config.model, training)
    trainable = count_trainable(attach_adapter(build_empty(base.config).requires_grad_(False), adapter))
    footprint = measure_footprint(base, adapter, training)
    tokens = training.tokens_per_microbatch
    length = min(tokens, training.max_row_length or (ROW if footprint.squares else tokens))
    rows = tokens / length
    activations = footprint.count_activations(rows, length)
    return Plan(
        base=config.model.base,
        method=adapter.method,
        dtype=str(base.dtype).removeprefix("torch."),
        total_parameters=base.num_parameters,
        trainable_parameters=trainable,
        trainable_share=trainable / base.num_parameters,
        weight_bytes=footprint.frozen_bytes,
        quantisation_state_bytes=base.state_bytes,
        adapter_bytes=footprint.adapter_bytes,
        gradient_bytes=footprint.gradient_bytes,
        optimizer_bytes=footprint.optimizer_bytes,
        activation_bytes_per_token=int(activations / tokens),
        activation_bytes=int(activations),
        head_bytes=int(footprint.count_head(rows, length)),
        workspace_bytes=int(footprint.count_workspace(rows, length)),
        peak_bytes=int(footprint.train_peak(rows, length)),
        evaluation_peak_bytes=int(footprint.evaluate_peak(rows, length)),
        disk_bytes=footprint.count_disk(training),
        row_length=length,
        pace=estimate_pace(base, footprint, training) if calibrate else None,
        remarks=describe_remarks(adapter, base.config),
    )
