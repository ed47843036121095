"""Run all benchmarks and write docs/benchmarks.md. Exit status 1 when a check of equality failed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence as ListLike
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks import evaluate, ia3, memory, score_choices, train_context_qa, train_instructions
from benchmarks.command import keep_quiet, parse_options, print_findings, run_guarded
from benchmarks.machine import describe_machine, measure_matrix_rate
from benchmarks.measure import FACTORS, Findings, Result, Table
from benchmarks.workload import ROOT, Options

BENCHMARKS = {
    "Training, context QA": train_context_qa,
    "Training, instructions": train_instructions,
    "Scoring choices": score_choices,
    "Evaluation, lm-eval's tasks": evaluate,
    "Lean IA3": ia3,
    "Planned memory": memory,
}
HEADER = (
    "model", "precision", "what", "peer", "koat tok/s", "peer tok/s", "ratio", "target",
    *FACTORS, "of matrix rate", "check",
)  # fmt: skip
READING = """Rates count the *original* tokens of the sequences, before sharing and padding. The columns:

- *target*: the ratio that koat set itself beforehand, its mark. In other tables *held* says that a row reached its
  mark, *MISSED* that it did not.
- A ratio is the product of four factors. *padding*: padding that the peer computes and koat does not. *sharing*: tokens
  that koat computes once where the peer computes them again (and last tokens, which predict nothing). *head*: koat's
  time with all rows of the LM head, over its time with only those that some target needs. *kernel*: the rest, the speed
  per computed token.
- *of matrix rate*: FLOPs of the unique tokens, over koat's time, over the machine's measured rate of matrix products.
- *check*: no ratio is given unless both sides computed the same numbers. It shows the largest difference, how much is
  allowed, and the *spread* (standard deviation) of the numbers: a difference far below the spread is agreement.
- *HFLM* is lm-evaluation-harness' own backend for Hugging Face models. *floor* is the frozen base, which computes
  activation gradients and trains nothing; *of floor* is what a method takes or keeps, over that.

Both sides ran in turns in one process, and medians count."""


def format_row(cells: ListLike[str]) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def format_table(header: ListLike[str], rows: ListLike[ListLike[str]]) -> list[str]:
    """Return a Markdown table as lines."""
    return [format_row(header), format_row(["---"] * len(header)), *(format_row(row) for row in rows), ""]


def list_cells(result: Result) -> list[str]:
    """Return a result as the cells of its row; a failed check leaves them empty."""

    def show(value: float | None, form: str) -> str:
        return format(value, form) if value is not None else "-"

    return [
        result.model,
        result.precision,
        result.method,
        result.peer,
        show(result.rate, ",.0f"),
        show(result.peer_rate, ",.0f"),
        f"**{result.ratio:.2f}**" if result.ratio is not None else "-",
        show(result.target, "g"),
        *(show(result.factors.get(name), ".2f") for name in FACTORS),
        show(result.machine_share, ".0%"),
        result.check,
    ]


def format_findings(title: str, findings: Findings) -> list[str]:
    """Return one benchmark's section."""
    lines = [f"## {title}", ""]
    if findings.results:
        lines += format_table(HEADER, [list_cells(result) for result in findings.results])
        lines += ["Amounts and settings:", ""]
        for result in findings.results:
            name = f"{result.model}, {result.precision}, {result.method}"
            lines.append(f"- {name}: {result.notes or 'no ratio'}. {result.settings}.")
        lines.append("")
    for table in findings.tables:
        lines += [f"### {table.title}", "", *format_table(table.header, table.rows)]
        lines += [f"![{table.title}]({table.picture})", ""] if table.picture else []
    lines += [f"Skipped: {reason}.\n" for reason in findings.skipped]
    return lines


def format_page(options: Options, machine: dict[str, str], sections: dict[str, Findings], seconds: float) -> str:
    """Return the whole page."""
    today = datetime.now(UTC).date().isoformat()
    mark = (
        " This was a `--quick` run: it shows that everything runs, its figures mean nothing." if options.quick else ""
    )
    scale = "--quick" if options.quick else f"--amount {options.amount:g}"
    lines = [
        "# Benchmarks",
        "",
        f"Written by `make bench` on {today} in {seconds / 60:.0f} minutes.{mark}",
        "",
    ]
    lines += format_table(("machine", ""), [list(entry) for entry in machine.items()])
    lines += ["Again: `make bench`, or", "", "```", f"python -m benchmarks.run_all {scale}"]
    lines += [f"python -m {module.__name__} {scale}" for module in BENCHMARKS.values()]
    lines += ["python -m benchmarks.profile_step", "```", "", READING, ""]
    for title, findings in sections.items():
        lines += format_findings(title, findings)
    return "\n".join(lines).rstrip() + "\n"


def summarise(sections: dict[str, Findings]) -> Table:
    """Return each target beside the lowest ratio that was measured for it."""
    lowest: dict[tuple[str, str], Result] = {}
    for findings in sections.values():
        for result in findings.results:
            key = (result.benchmark, result.peer)
            if result.ratio is None or result.target is None:
                continue
            if key not in lowest or result.ratio < (lowest[key].ratio or 0):
                lowest[key] = result
    rows = [
        (
            what,
            peer,
            f"{result.ratio:.2f}",
            f"{result.target:g}",
            f"{result.model} {result.precision} {result.method}",
        )
        for (what, peer), result in lowest.items()
    ]
    return Table("Lowest ratios", ("what", "peer", "lowest ratio", "target", "where"), rows)


def run_all(options: Options, page: Path) -> bool:
    """Run every benchmark, write the page, and return whether all checks passed."""
    began = time.monotonic()
    machine = describe_machine(options.device)
    rates = {name: measure_matrix_rate(getattr(torch, name), options.device) for name in options.precisions}
    print("\n".join(f"{name}: {value}" for name, value in machine.items()), flush=True)
    sections: dict[str, Findings] = {}
    for title, module in BENCHMARKS.items():
        print(f"\n{title}", flush=True)
        # Measured anew, and the best counts: one busy moment must not lower what all are held against.
        for name in rates:
            rates[name] = max(rates[name], measure_matrix_rate(getattr(torch, name), options.device))
        sections[title] = run_guarded(module.run, options, rates)
        print_findings(sections[title])
        machine["matrix rate"] = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in rates.items())
        # After each benchmark: whoever stops a long run keeps what it measured.
        write_page(page, format_page(options, machine, sections, time.monotonic() - began), sections)
    print(f"matrix rate: {machine['matrix rate']}")
    print_findings(Findings(tables=[summarise(sections)]))
    return all(findings.passed for findings in sections.values())


def write_page(page: Path, text: str, sections: dict[str, Findings]) -> None:
    """Write the page, and its results as JSON beside it."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")
    lines = [result.to_mapping() for findings in sections.values() for result in findings.results]
    page.with_suffix(".json").write_text(json.dumps(lines, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    asked = parse_options(description=__doc__)
    keep_quiet()
    # A quick run must not replace measured figures.
    target = ROOT / "build" / "benchmarks-quick.md" if asked.quick else ROOT / "docs" / "benchmarks.md"
    sys.exit(0 if run_all(asked, target) else 1)
