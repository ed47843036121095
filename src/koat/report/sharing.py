"""What merging, listing and pushing found, for people to read."""

from __future__ import annotations

from typing import Any

from koat.report.scores import format_value
from koat.report.tables import format_bytes, make_table, print_table


def print_merge(folder: str, record: dict[str, Any]) -> None:
    """Print what a merge's check found."""
    check = record["check"]
    rows = [
        (title, f"{check[stage]['max']:.2g}", f"{check[stage]['mean']:.2g}", f"{check[stage]['same_top']:.1%}")
        for stage, title in (
            ("merging", "merging, in float32"),
            ("rounding", f"rounding to {record['dtype']}"),
            ("folder", "the folder against the adapter"),
            ("requantising", "quantising the merged weights again"),
        )
        if stage in check and (stage != "rounding" or record["dtype"] != "float32")
    ]
    columns = ("what changes logits", "at most", "on average", "same first token")
    print_table(make_table(f"Merged: {record['adapter']['name']}", columns, rows))
    print(
        f"on {check['prompts']} prompts, {check['tokens']} tokens ({check['source']}); the largest logit is "
        f"{check['largest_logit']:.3g}, the limit was {check['limit']:.2g}"
    )
    print(f"a model folder that needs no koat: {folder}")


def print_adapters(entries: list[dict[str, Any]], problems: list[str]) -> None:
    """Print a table of adapters and what could not be read."""
    rows = [
        (
            entry["path"],
            entry["method"],
            entry["base"],
            f"{entry['num_parameters']:,}",
            "; ".join(f"{s['task']} {s['scoring']} {format_value(s)}" for s in entry["scores"]) or "-",
        )
        for entry in entries
    ]
    print_table(make_table("Adapters", ("folder", "method", "base", "trained", "scores"), rows, numeric=3))
    for problem in problems:
        print(f"! {problem}")


def print_adapter(entry: dict[str, Any]) -> None:
    """Print all that is known of one adapter."""
    rows = [
        ("method", entry["method"]),
        ("base model", entry["base"] + (f"  (fingerprint {entry['fingerprint']})" if entry["fingerprint"] else "")),
        ("targets", ", ".join(entry["targets"]) or "-"),
        ("trained parameters", f"{entry['num_parameters']:,}"),
        ("file", format_bytes(entry["num_bytes"])),
        ("prompt template", entry["template"] or "none beside it"),
        ("state", "finished" if entry["finished"] else "the run did not finish"),
    ]
    rows += [
        (
            f"{score['task']}, {score['scoring']}, {score['shots']} shots",
            f"{format_value(score)}  {score['contract'][:8]}",
        )
        for score in entry["scores"]
    ]
    print_table(make_table(entry["path"], ("", ""), rows, numeric=9))


def print_upload(repo: str, endpoint: str, private: bool, sizes: dict[str, int], card: str) -> None:
    """Print all that a push would send."""
    rows = [(name, format_bytes(size)) for name, size in sizes.items()]
    kind = "private" if private else "public"
    print_table(
        make_table(f"To {endpoint}/{repo} ({kind})", ("file", "size"), [*rows, ("", format_bytes(sum(sizes.values())))])
    )
    print(f"--- README.md\n{card}---")
