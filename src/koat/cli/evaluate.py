"""Commands that evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from koat.cli.front import koat

OWN_TASK = """\b
A task of your own with labels, tickets.yaml:
  name: tickets
  columns: {text: message, label: kind}    # field: column of --data
  prompt: "문의: {text}\\n종류:"
  labels: {refund: " 환불", delivery: " 배송"}    # what stands in the column: the answer
and one with answers that the model writes:
  kind: answer
  name: notes
  columns: {instruction: q, output: a}
"""


@koat.command("eval", epilog=OWN_TASK)
@click.argument("target")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    required=True,
    help="koat's or lm-eval's task or group, or a YAML file; repeat it.",
)
@click.option(
    "--data",
    help="File with the items of koat's own tasks: for nsmc-* a table with document and label, for context-qa SQuAD's "
    "format or a table with context, question and answer, for yours what its `columns` name.",
)
@click.option("--shots-from", "shots", help="File from which koat's own tasks draw examples; never the items' own.")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Folder with benchmark files: lm-eval's tasks are then read from there where a `local_` variant exists.",
)
@click.option("--include-path", type=click.Path(path_type=Path), help="Folder with lm-eval tasks of your own.")
@click.option("--shots", "num_shots", type=click.IntRange(min=0), help="Examples before each item [the task's].")
@click.option("--limit", help="How many items, or `all` [the task's].")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of the shots [the task's].")
@click.option("--apply-chat-template", "chat_template", is_flag=True, help="Ask lm-eval's tasks in the chat template.")
@click.option("--base", help="Base model of an adapter, when it is not where it was.")
@click.option("--device", help="auto, cpu, cuda or cuda:N [the run's own; auto: a GPU where there is one].")
@click.option("--dtype", help="Type of the weights: auto, float32, bfloat16, float16 [the run's own; auto].")
@click.option(
    "--tokens",
    "token_budget",
    type=click.IntRange(min=64),
    default=8192,
    show_default=True,
    help="Tokens that go through the model at once.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for predictions and scores [`predictions` in the run; evaluations/NAME for a base].",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(
    target: str,
    tasks: tuple[str, ...],
    limit: str | None,
    base: str | None,
    device: str | None,
    dtype: str | None,
    out: Path | None,
    as_json: bool,
    **asking: Any,
) -> None:
    """Evaluate TARGET (a run folder, a PEFT adapter folder, or a base model) on tasks.

    \b
    koat eval nano --task nsmc-prompt1 --data test.tsv --shots 0 --limit all
    koat eval runs/ia3 --task nsmc-prompt1 --task nsmc-prompt2 --data test.tsv --shots-from train.tsv
    koat eval runs/ia3 --task context-qa --data KorQuAD_v1.0_dev.json --limit 500
    koat eval runs/ia3 --task ./tickets.yaml --data tickets_test.csv
    koat eval runs/ia3 --task hellaswag --task mmlu --shots 5
    koat eval runs/ia3 --task leaderboard-2023 --data-dir ./benchmarks --limit 100

    Every score has a 95 % interval and a contract, the hash of what was asked; scores under different
    contracts are not comparable. Every prediction is kept beside the run. `koat list` shows koat's own tasks,
    `koat lm-eval ls tasks` those of lm-evaluation-harness.
    """
    from koat.workflows.shell import run_evaluation

    count = int(limit) if limit is not None and limit.isdigit() else limit
    if count is not None and count != "all" and not isinstance(count, int):
        raise click.BadParameter(f"{limit!r} is neither a number nor `all`.", param_hint="--limit")
    loading = {"device": device, "dtype": dtype, "base": base}
    run_evaluation(
        target, list(tasks), loading={key: value for key, value in loading.items() if value is not None},
        out=out, as_json=as_json, limit=count, **asking,
    )  # fmt: skip
