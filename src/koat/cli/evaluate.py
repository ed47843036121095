"""Commands that evaluate."""

from __future__ import annotations

from pathlib import Path

import click

from koat.cli.front import koat


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
