"""A plan as tables."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from typing import Any

from koat.report.tables import format_bytes, make_table, print_table


def print_plan(plan: dict[str, Any], tokens: int) -> None:
    """Print what a run will take, with `tokens` in a micro-batch."""
    state = plan["quantisation_state_bytes"]
    rows = [
        ("base model", plan["base"]),
        ("parameters of the base", f"{plan['total_parameters']:,}"),
        ("trained parameters", f"{plan['trainable_parameters']:,}  ({plan['trainable_share']:.4%})"),
        (f"frozen weights ({plan['dtype']})", format_bytes(plan["weight_bytes"])),
        *([("  of these, scales and tables", format_bytes(state))] if state else []),
        ("trained weights", format_bytes(plan["adapter_bytes"])),
        ("gradients", format_bytes(plan["gradient_bytes"])),
        ("optimizer", format_bytes(plan["optimizer_bytes"])),
        (f"activations of {tokens:,} tokens", format_bytes(plan["activation_bytes"])),
        ("head, or", format_bytes(plan["head_bytes"])),
        ("  workspace of the backward pass", format_bytes(plan["workspace_bytes"])),
        ("memory while training, about", format_bytes(plan["peak_bytes"])),
        (f"memory while scoring {tokens:,} tokens at once, about", format_bytes(plan["evaluation_peak_bytes"])),
        ("disk: result and checkpoints", format_bytes(plan["disk_bytes"])),
    ]
    print_table(make_table(f"Plan: {plan['method']}", ("", ""), [*rows, *list_pace(plan["pace"])]))
    for remark in plan["remarks"]:
        print(f"! {remark}")


def list_pace(pace: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return the rows of an estimate of speed, none without one."""
    if pace is None:
        return []
    minutes = 1e6 / pace["tokens_per_second"] / 60
    return [
        ("matrix products here", f"{pace['matrix_rate'] / 1e9:,.0f} GFLOP/s"),
        ("a trained token", f"{pace['flops_per_token'] / 1e9:,.2f} GFLOP"),
        ("estimated speed", f"{pace['tokens_per_second']:,.0f} tokens/s, a million in {minutes:,.0f} min"),
    ]


def print_fits(fits: ListLike[dict[str, Any]], size: str) -> None:
    """Print per method what fits into a memory of `size`."""
    rows = [
        (
            fit["method"],
            fit["quantisation"],
            "yes" if fit["checkpointing"] else "no",
            format_bytes(fit["fixed_bytes"]) if fit["fixed_bytes"] else "-",
            f"{fit['longest']:,}" if fit["longest"] else "-",
            f"{fit['microbatch']:,}" if fit["microbatch"] else "-",
        )
        for fit in fits
    ]
    header = ("method", "base", "checkpointing", "without tokens", "longest sequence", "largest micro-batch")
    print_table(make_table(f"Training in {size}, in tokens", header, rows, numeric=3))
    for fit in fits:
        if fit["note"]:
            print(f"! {fit['method']}{', checkpointing' if fit['checkpointing'] else ''}: {fit['note']}")
