"""The command that runs a whole comparison."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from koat.cli.front import koat

if TYPE_CHECKING:
    from koat.workflows.experiment.file import Experiment


@koat.command()
@click.argument("file")
@click.argument("items", nargs=-1, metavar="[INPUT=PATH | KEY=VALUE]...")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the experiment; needed.")
@click.option("--dry-run", is_flag=True, help="Show what is done and what is missing, and stop.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Processes at a time.")
@click.option("--overwrite", multiple=True, metavar="CELL", help="Make this cell again; may be repeated.")
@click.option(
    "--language", type=click.Choice(["en", "ko"]), default="en", show_default=True, help="Of tables and report."
)
@click.option("--cell", metavar="CELL", help="Do this cell alone, and write no report.")
def experiment(file: str, items: tuple[str, ...], out: Path | None, **options: Any) -> None:
    """Run the experiment in FILE (a name that ships, or a YAML file) as far as it is missing, and report.

    \b
    koat experiment koat-vs-lora train=ratings_train.txt test=ratings_test.txt --out experiments/reviews
    koat experiment koat-vs-lora train=... test=... --out experiments/small --dry-run \\
        data.limit=1000 seeds='[0]' evaluate.limit=200
    koat experiment koat-vs-lora train=... test=... --out experiments/polyglot --jobs 2 \\
        model.base=./polyglot-ko-1.3b ia3.training.learning_rate=5e-3 lora.training.learning_rate=2e-4
    koat experiment experiments/reviews/experiment.yaml --out experiments/reviews --language ko

    A file names variants, seeds and tasks; every variant is trained with every seed (a cell) and asked the same.
    INPUT is what the file asks you for: without any, the command says which, and what the experiment is about.
    `section.key=value` sets something for all variants,
    `VARIANT.section.key=value` for one, `seeds=[...]` and `evaluate.key=value` replace the file's.

    Killed anywhere, the same command goes on. A finished cell whose settings have changed is never mixed in: it is
    named, and made again with --overwrite, from its beginning each time that is given. `koat list` has the
    experiments that ship.
    """
    from koat.workflows.experiment.file import load_experiment, split_items

    loaded = load_experiment(file, *split_items(items))  # first: it says which inputs are missing, and what it is about
    if out is None:
        raise click.UsageError(f"Say where the experiment belongs: --out experiments/{loaded.name}")
    try:
        run_loaded(loaded, out, **options)
    except KeyboardInterrupt:
        click.echo("\nkoat: stopped. The same command goes on where it was.", err=True)
        raise SystemExit(130) from None


def run_loaded(
    loaded: Experiment,
    out: Path,
    *,
    dry_run: bool,
    jobs: int,
    overwrite: tuple[str, ...],
    language: Literal["en", "ko"],
    cell: str | None,
) -> None:
    """Show an experiment's cells, or run one or all of them."""
    from koat.workflows.shell import quiet_libraries

    quiet_libraries()
    from koat.report.experiment import ExperimentDisplay, print_cells, print_outcome
    from koat.workflows.experiment.jobs import run_in_processes
    from koat.workflows.experiment.plan import describe_cells, plan_experiment
    from koat.workflows.experiment.run import Watch, find_cell, run_cell, run_experiment

    plan = plan_experiment(loaded, out, overwrite=overwrite)
    display = ExperimentDisplay()
    watch = Watch(click.echo, display.show_step, display.show_item)
    if dry_run:
        print_cells(describe_cells(plan))
        return
    if cell is not None:
        run_cell(plan, find_cell(plan, cell), watch, overwrite=cell in overwrite)
        return
    several = partial(run_in_processes, jobs=jobs, overwrite=overwrite, say=click.echo) if jobs > 1 else None
    outcome = run_experiment(plan, overwrite=overwrite, language=language, watch=watch, run_cells=several)
    print_outcome(outcome.comparison, outcome.report, language)
