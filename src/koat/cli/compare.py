"""The command that compares."""

from __future__ import annotations

import json
from pathlib import Path

import click

from koat.cli.front import koat

FILE = click.Path(dir_okay=False, path_type=Path)


@koat.command()
@click.argument("targets", nargs=-1, required=True)
@click.option("--only", multiple=True, metavar="NAME", help="Compare only this subject; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--csv", "csv_file", type=FILE, help="Write a row per comparison.")
@click.option("--markdown", "markdown_file", type=FILE, help="Write tables and sentences as Markdown.")
def compare(
    targets: tuple[str, ...], only: tuple[str, ...], as_json: bool, csv_file: Path | None, markdown_file: Path | None
) -> None:
    """Say which of TARGETS is better, by how much, and how sure that is.

    TARGETS are run folders, folders or `*.scores.json` files that `koat eval` wrote, YAML or JSON files of
    published scores, or a published table that ships (kgoat).

    \b
    koat compare runs/ia3 runs/lora evaluations/nano
    koat compare runs/ia3-seed0 runs/ia3-seed1 runs/lora-seed0 runs/lora-seed1
    koat compare kgoat --only KoAlpaca --only "K(G)OAT"

    Scores are paired by item and ranked only where they stand under the same contract; p-values are corrected
    over all comparisons made. Runs that differ in their seed alone are one subject.
    """
    from koat.core.atomic import write_text
    from koat.report.comparison import print_comparison, to_csv, to_markdown
    from koat.workflows.compare import compare_targets

    found = compare_targets(targets, only)
    if csv_file is not None:
        write_text(csv_file, to_csv(found))
    if markdown_file is not None:
        write_text(markdown_file, to_markdown(found))
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False, indent=2))
        return
    print_comparison(found)
