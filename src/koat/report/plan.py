"""A plan as a table."""

from __future__ import annotations

from typing import Any

from koat.report.tables import format_bytes, make_table, print_table


def print_plan(plan: dict[str, Any], tokens: int) -> None:
    """Print what a run will take."""
    rows = [
        ("base model", plan["base"]),
        ("parameters of the base", f"{plan['total_parameters']:,}"),
        ("trained parameters", f"{plan['trainable_parameters']:,}  ({plan['trainable_share']:.4%})"),
        ("adapter file", format_bytes(plan["adapter_bytes"])),
        (f"frozen weights ({plan['dtype']})", format_bytes(plan["weight_bytes"])),
        ("adapter, gradients, optimizer", format_bytes(sum_training(plan))),
        (f"activations of {tokens:,} tokens", format_bytes(plan["activation_bytes"])),
        ("logits", format_bytes(plan["head_bytes"])),
        ("memory while training, about", format_bytes(plan["peak_bytes"])),
    ]
    print_table(make_table(f"Plan: {plan['method']}", ("", ""), rows))
    for remark in plan["remarks"]:
        print(f"! {remark}")


def sum_training(plan: dict[str, Any]) -> int:
    """Return the bytes that training adds to the weights, activations apart."""
    return int(plan["adapter_bytes"] + plan["gradient_bytes"] + plan["optimizer_bytes"])
