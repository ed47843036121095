"""Commands that train, or say what training will take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from koat.cli.front import koat, read_flags

if TYPE_CHECKING:
    from koat.core.config import Resolved

NEEDED = """\b
--base, --data and --out are needed, the first two unless a recipe or a file names them.
A recipe brings a base and settings: koat finetune --recipe kgoat --data my_data.jsonl --out runs/kgoat
A line of my_data.jsonl:
  {"instruction": "한국의 수도는 어디인가요?", "input": "", "output": "서울입니다."}
"""


@koat.command(epilog=NEEDED)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--config", type=click.Path(path_type=Path), help="YAML file with settings.")
@click.option("--recipe", help="A recipe that ships; see `koat list`.")
@click.option("--base", help="Folder or Hub id of the base model; `nano` ships with koat.")
@click.option("--data", multiple=True, help="File, folder or Hub id to train on; may be repeated.")
@click.option("--method", help="Fine-tuning method [ia3]; `koat list` has them all.")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder to make.")
@click.option("--resume", type=click.Path(path_type=Path), help="Go on with the interrupted run in this folder.")
@click.option("--overwrite", is_flag=True, help="Replace the run that is in --out.")
@click.option("--show", is_flag=True, help="Print the resolved settings with their origins, and stop.")
def finetune(
    overrides: tuple[str, ...],
    config: Path | None,
    recipe: str | None,
    base: str | None,
    data: tuple[str, ...],
    method: str | None,
    out: Path | None,
    resume: Path | None,
    overwrite: bool,
    show: bool,
) -> None:
    """Fine-tune a base model and leave adapter, metrics and checkpoints in a run folder.

    \b
    koat finetune --base ./my-model --data my_data.jsonl --method lora --out runs/mine
    koat finetune --base nano --data reviews.tsv --method ia3 --out runs/ia3 \\
        data.columns='{instruction: document, output: label}' \\
        data.values='{output: {0: 부정, 1: 긍정}}' training.epochs=3
    koat finetune --resume runs/ia3
    """
    from koat.report.settings import print_settings
    from koat.workflows.config import RunConfig, resolve_run

    if resume is not None and out is not None and resume != out:
        raise click.UsageError("--resume names the run folder; leave --out away.")
    where = resume or out
    if where is None and not show:
        raise click.UsageError("Say where the run belongs: --out runs/NAME.")
    if resume is not None and config is None:
        config = resume / "config.yaml"
    named = {"model.base": base, "data.train": list(data), "adapter.method": method}
    resolved = resolve_run(RunConfig, recipe=recipe, file=config, flags=read_flags(overrides, named))
    if show:
        print_settings(resolved)
        return
    assert where is not None
    from koat.workflows.shell import run_finetune

    run_finetune(resolved, where, resume=resume is not None, overwrite=overwrite)


@koat.command()
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--base", help="Folder or Hub id of the base model.")
@click.option("--method", help="Fine-tuning method [ia3]; `koat list` has them all.")
@click.option("--config", type=click.Path(path_type=Path), help="YAML file with settings.")
@click.option("--recipe", help="A recipe that ships; see `koat list`.")
@click.option("--fit", metavar="SIZE", help="Say, per method, what trains in this memory: 24GB, 24GiB, 800MB.")
@click.option("--calibrate", is_flag=True, help="Measure this machine for two seconds and estimate the speed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(
    overrides: tuple[str, ...],
    base: str | None,
    method: str | None,
    config: Path | None,
    recipe: str | None,
    fit: str | None,
    calibrate: bool,
    as_json: bool,
) -> None:
    """Say what a run will take, from the configuration alone: parameters, memory, disk.

    \b
    koat plan --base meta-llama/Llama-3.1-8B --method lora adapter.r=16
    koat plan --base ./polyglot-ko-5.8b --method ia3 adapter.targets=peft --json
    koat plan --base ./llama-3-8b --method qlora --fit 24GB
    """
    from koat.workflows.config import PlanConfig, resolve_run

    flags = read_flags(overrides, {"model.base": base, "adapter.method": method})
    resolved = resolve_run(PlanConfig, recipe=recipe, file=config, flags=flags)
    from koat.workflows.shell import quiet_libraries

    quiet_libraries()
    from koat.report.plan import print_fits, print_plan
    from koat.report.settings import print_settings
    from koat.workflows.planning.fit import read_size
    from koat.workflows.planning.plan import plan_run

    size = read_size(fit) if fit is not None else None
    found = plan_run(resolved.settings, calibrate=calibrate).to_mapping()
    if size is not None:
        found["fits"] = list_fits(resolved, size)
    if as_json:
        echo_plan(found, resolved)
        return
    print_plan(found, resolved.settings.training.tokens_per_microbatch)
    if fit is not None:
        print_fits(found["fits"], fit)
    print_settings(resolved)


def list_fits(resolved: Resolved[Any], size: int) -> list[dict[str, Any]]:
    """Return what each method can do in `size` bytes; it takes some seconds, and shows how far it is."""
    from koat.report.progress import ProgressLine
    from koat.workflows.planning.fit import fit_methods

    return [each.to_mapping() for each in fit_methods(resolved.settings, size, ProgressLine("fitting").update)]


def echo_plan(found: dict[str, Any], resolved: Resolved[Any]) -> None:
    """Print a plan as one JSON object, the settings with their origins in it."""
    from koat.core.config import describe

    settings = {row.key: {"value": row.value, "origin": row.origin} for row in describe(resolved)}
    click.echo(json.dumps({**found, "settings": settings}, ensure_ascii=False, indent=2, default=str))
