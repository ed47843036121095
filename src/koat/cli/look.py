"""Commands that show: data, settings, names, the demo."""

from __future__ import annotations

from pathlib import Path

import click

from koat.cli.front import koat, read_flags


@koat.group()
def data() -> None:
    """Look at data."""


@data.command("inspect")
@click.argument("files", nargs=-1, required=True)
@click.option("--base", default="nano", show_default=True, help="Base model whose tokenizer counts.")
@click.option("--template", help="Prompt template; see `koat list`.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="A data setting, with or without `data.` (columns='{...}', data.columns='{...}'), or one of training's "
    "(training.batch_size=32).",
)
def inspect(files: tuple[str, ...], base: str, template: str | None, overrides: tuple[str, ...]) -> None:
    """Show rows, token lengths, what overflows, duplicates, and what a forest saves.

    \b
    koat data inspect train.json --base ./my-model --template koalpaca-context
    koat data inspect ratings.tsv --set data.columns='{instruction: document, output: label}'
    koat data inspect questions.csv --template koalpaca-context --set training.batch_size=32
    """
    from koat.workflows.shell import run_inspection

    items = tuple(item if item.startswith(("data.", "training.")) else f"data.{item}" for item in overrides)
    flags = read_flags(items, {"data.template": template})
    run_inspection(list(files), base, flags.get("data", {}), flags.get("training", {}))


@koat.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("koat-demo"),
    show_default=True,
    help="Folder for the demo's runs; an earlier demo there is replaced.",
)
def demo(out: Path) -> None:
    """Show it all in a minute or two: plan, train IA3 and LoRA, evaluate, compare.

    Uses the small Korean model and the samples that ship: needs no network and no GPU (one that PyTorch sees is used).

    \b
    koat demo --out my-demo
    """
    from koat.workflows.shell import run_demo

    run_demo(out)


@koat.command("settings")
@click.argument("prefix", default="")
def show_settings(prefix: str) -> None:
    """List every setting with its default and what it does; PREFIX narrows the list.

    \b
    koat settings data.
    """
    from koat.report.catalogue import print_catalogue
    from koat.workflows.config import RunConfig

    print_catalogue(RunConfig, prefix)


@koat.command("list")
def list_names() -> None:
    """List methods, recipes, experiments, tasks and prompt templates.

    \b
    koat list
    """
    from koat.workflows.shell import run_listing

    run_listing()
