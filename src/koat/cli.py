"""The front door: parse, call one workflow, print. Imports no PyTorch until a command runs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from koat.core.errors import KoatError

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=HELP)
@click.version_option(package_name="koat")
def koat() -> None:
    """Fine-tune causal language models with few parameters, and prove what that bought.

    \b
    Begin with:
      koat demo                              everything at once, on a small model that ships
      koat data inspect my_data.jsonl        what is in your data, how long it is
      koat plan --base DIR_OR_ID             what a run will take, before it takes it
      koat finetune --base DIR_OR_ID --data my_data.jsonl --method ia3 --out runs/mine
      koat eval runs/mine --task nsmc-prompt1 --data test.tsv --shots-from train.tsv

    Settings can be given as `section.key=value` on every command; `koat settings` lists them all.
    """


def read_flags(overrides: tuple[str, ...], named: dict[str, Any]) -> dict[str, Any]:
    """Merge options such as --base into `key=value` overrides; overrides win."""
    from koat.core.config_files import parse_overrides

    merged: dict[str, dict[str, Any]] = {}
    for key, value in named.items():
        if value not in (None, (), []):
            section, _, name = key.partition(".")
            merged.setdefault(section, {})[name] = value
    for section, values in parse_overrides(overrides).items():
        merged[section] = {**merged.get(section, {}), **values} if isinstance(values, dict) else values
    return merged


@koat.command()
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--config", type=click.Path(path_type=Path), help="YAML file with settings.")
@click.option("--recipe", help="A recipe that ships; see `koat list`.")
@click.option("--base", help="Folder or Hub id of the base model; `nano` ships with koat.")
@click.option("--data", multiple=True, help="File, folder or Hub id to train on; may be repeated.")
@click.option("--method", help="ia3 or lora.")
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
@click.option("--method", help="ia3 or lora.")
@click.option("--config", type=click.Path(path_type=Path), help="YAML file with settings.")
@click.option("--recipe", help="A recipe that ships; see `koat list`.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(
    overrides: tuple[str, ...],
    base: str | None,
    method: str | None,
    config: Path | None,
    recipe: str | None,
    as_json: bool,
) -> None:
    """Say what a run will take, from the configuration alone: parameters, file size, memory.

    \b
    koat plan --base meta-llama/Llama-3.1-8B --method lora adapter.r=16
    koat plan --base ./polyglot-ko-5.8b --method ia3 adapter.targets=peft --json
    """
    from koat.workflows.config import PlanConfig, resolve_run

    flags = read_flags(overrides, {"model.base": base, "adapter.method": method})
    resolved = resolve_run(PlanConfig, recipe=recipe, file=config, flags=flags)
    from koat.report.plan import print_plan
    from koat.report.settings import print_settings
    from koat.workflows.plan import plan_run
    from koat.workflows.shell import quiet_libraries

    quiet_libraries()
    found = plan_run(resolved.settings).to_mapping()
    if as_json:
        from koat.core.config import describe

        settings = {row.key: {"value": row.value, "origin": row.origin} for row in describe(resolved)}
        click.echo(json.dumps({**found, "settings": settings}, ensure_ascii=False, indent=2, default=str))
        return
    print_plan(found, resolved.settings.training.tokens_per_microbatch)
    print_settings(resolved)


@koat.command("eval")
@click.argument("target")
@click.option("--task", "tasks", multiple=True, required=True, help="Task by name or YAML file; may be repeated.")
@click.option("--data", required=True, help="File with the items.")
@click.option("--shots-from", help="File from which few-shot examples are drawn; never the items' own.")
@click.option("--shots", "num_shots", type=click.IntRange(min=0), help="Examples before each item [the task's].")
@click.option("--limit", help="How many items, or `all` [the task's].")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of the shots [the task's].")
@click.option("--base", help="Base model of an adapter, when it is not where it was.")
@click.option("--device", help="auto, cpu, cuda or cuda:N.")
@click.option("--dtype", help="Type of the weights: auto, float32, bfloat16, float16.")
@click.option(
    "--tokens",
    "token_budget",
    type=click.IntRange(min=64),
    default=8192,
    show_default=True,
    help="Tokens that go through the model at once.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for predictions and scores.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(
    target: str,
    tasks: tuple[str, ...],
    data: str,
    shots_from: str | None,
    num_shots: int | None,
    limit: str | None,
    seed: int | None,
    base: str | None,
    device: str | None,
    dtype: str | None,
    token_budget: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Evaluate TARGET (a run folder, a PEFT adapter folder, or a base model) on tasks.

    \b
    koat eval nano --task nsmc-prompt1 --data test.tsv --shots 0 --limit all
    koat eval runs/ia3 --task nsmc-prompt1 --task nsmc-prompt2 --data test.tsv --shots-from train.tsv

    Every score has a 95 % interval and a contract, the hash of what was asked; scores under different
    contracts are not comparable. Every prediction is kept beside the run.
    """
    from koat.workflows.shell import run_evaluation

    count = int(limit) if limit is not None and limit.isdigit() else limit
    if count is not None and count != "all" and not isinstance(count, int):
        raise click.BadParameter(f"{limit!r} is neither a number nor `all`.", param_hint="--limit")
    loading = {"device": device, "dtype": dtype, "base": base}
    run_evaluation(
        target, list(tasks), data, shots_from,
        loading={key: value for key, value in loading.items() if value is not None},
        out=out, num_shots=num_shots, limit=count, seed=seed, token_budget=token_budget, as_json=as_json,
    )  # fmt: skip


@koat.group()
def data() -> None:
    """Look at data."""


@data.command("inspect")
@click.argument("files", nargs=-1, required=True)
@click.option("--base", default="nano", show_default=True, help="Base model whose tokenizer counts.")
@click.option("--template", help="Prompt template; see `koat list`.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A data setting, e.g. columns='{...}'.")
def inspect(files: tuple[str, ...], base: str, template: str | None, overrides: tuple[str, ...]) -> None:
    """Show rows, token lengths, what overflows, duplicates, and what a forest saves.

    \b
    koat data inspect train.json --base ./my-model --template koalpaca-context
    koat data inspect ratings.tsv --set columns='{instruction: document, output: label}'
    """
    from koat.workflows.shell import run_inspection

    flags = read_flags(tuple(f"data.{item}" for item in overrides), {"data.template": template})
    run_inspection(list(files), base, flags.get("data", {}))


@koat.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("koat-demo"),
    show_default=True,
    help="Folder for the demo's runs; an earlier demo there is replaced.",
)
def demo(out: Path) -> None:
    """Show it all in under three minutes: plan, train IA3 and LoRA, evaluate, compare.

    Uses the small Korean model and the samples that ship; no network, no GPU.

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
    """List methods, recipes, tasks and prompt templates.

    \b
    koat list
    """
    from koat.workflows.shell import run_listing

    run_listing()


def main() -> None:
    """Run the command line: status 2 and a plain message for what a user can mend."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        koat(standalone_mode=False)
    except KoatError as error:
        click.echo(f"koat: {error}", err=True)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("\nkoat: stopped. A training run goes on with `koat finetune --resume RUN`.", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
