"""What `koat data inspect` prints."""

from __future__ import annotations

from typing import Any

from koat.report.tables import make_table, print_table


def print_inspection(found: Any) -> None:
    """Print one file's rows, lengths, overflow, duplicates and what a forest saves."""
    file, lengths = found.file, found.lengths
    print(f"\n{found.path}: {len(file.records):,} rows, format {file.format}")
    for line in file.bad_rows[:5]:
        print(f"  broken: {line}")
    if len(file.bad_rows) > 5:
        print(f"  ... and {len(file.bad_rows) - 5} more broken rows")
    for line in [*file.describe_oddities(), *found.report.lines(), *found.limit]:
        print(f"  {line}")
    print_lengths(lengths)
    shown = found.sample if len(found.sample) <= 600 else f"{found.sample[:400]} … {found.sample[-200:]}"
    print("  first example, what is supervised in « »:")
    print("    " + shown.replace("\n", "\n    "))


def print_lengths(lengths: Any) -> None:
    """Print length percentiles and overflow as a table, the histogram, duplicates and sharing."""
    from koat.data.lengths import draw_histogram

    percentiles = [(f"{share} %", f"{value:,} tokens") for share, value in lengths.percentiles.items()]
    overflow = [(f"longer than {limit:,}", f"{count:,} sequences") for limit, count in lengths.overflow.items()]
    print_table(make_table("Lengths", ("", ""), [*percentiles, *overflow]))
    print(draw_histogram(lengths))
    print(f"  duplicates: {lengths.num_duplicates:,}; same prompt, another response: {lengths.num_conflicts:,}")
    print(
        f"  of {lengths.num_tokens:,} tokens forests compute {lengths.num_step_tokens:,} in steps of "
        f"{lengths.step_size} sequences, as training takes them (a factor of {lengths.step_saving:.2f}); "
        f"one forest of all {lengths.num_forest_tokens:,} (a factor of {lengths.saving:.2f})"
    )
