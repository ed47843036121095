"""The commands that compare: on the terminal, and as a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import click

from koat.cli.front import koat

FILE = click.Path(dir_okay=False, path_type=Path)
LANGUAGE = click.Choice(["en", "ko"])


@koat.command()
@click.argument("targets", nargs=-1, required=True)
@click.option("--only", multiple=True, metavar="NAME", help="Compare only this subject; may be repeated.")
@click.option("--language", type=LANGUAGE, default="en", show_default=True, help="Language of tables and sentences.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--csv", "csv_file", type=FILE, help="Write a row per comparison.")
@click.option("--markdown", "markdown_file", type=FILE, help="Write tables and sentences as Markdown.")
def compare(
    targets: tuple[str, ...],
    only: tuple[str, ...],
    language: Literal["en", "ko"],
    as_json: bool,
    csv_file: Path | None,
    markdown_file: Path | None,
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
    from koat.workflows.comparing.compare import compare_targets

    found = compare_targets(targets, only)
    if csv_file is not None:
        write_text(csv_file, to_csv(found))
    if markdown_file is not None:
        write_text(markdown_file, to_markdown(found, language))
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False, indent=2))
        return
    print_comparison(found, language)


@koat.command()
@click.argument("targets", nargs=-1, required=True)
@click.option("--out", type=FILE, default=Path("report.html"), show_default=True, help="The page to write.")
@click.option("--only", multiple=True, metavar="NAME", help="Show only this subject; may be repeated.")
@click.option("--language", type=LANGUAGE, default="en", show_default=True, help="Language that is shown first.")
@click.option("--title", default="", help="Title of the page [the subjects' names].")
def report(
    targets: tuple[str, ...], out: Path, only: tuple[str, ...], language: Literal["en", "ko"], title: str
) -> None:
    """Write one HTML page about TARGETS: answer, scores, differences, cost, curves, items, settings.

    TARGETS are as for `koat compare`; one alone will do. The page needs no network and holds both languages.

    \b
    koat report runs/ia3 runs/lora evaluations/nano --out report.html
    koat report runs/ia3-seed0 runs/ia3-seed1 runs/lora-seed0 runs/lora-seed1 --language ko
    koat report kgoat
    """
    from koat.workflows.comparing.report import write_report

    written = write_report(targets, out, language=language, title=title, only=only)
    click.echo(f"report: {written} ({written.stat().st_size / 1000:,.0f} kB)")
