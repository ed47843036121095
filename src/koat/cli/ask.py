"""The command that asks a model something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from koat.cli.front import koat


@koat.command()
@click.argument("target")
@click.argument("questions", nargs=-1, metavar="[QUESTION]...")
@click.option("--context", type=click.Path(path_type=Path), help="Text file that the questions are about.")
@click.option("--field", "fields", multiple=True, metavar="NAME=TEXT", help="Text for another field of the template.")
@click.option("--template", help="Prompt template [the one it was trained with]; see `koat list`.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Longest answer.")
@click.option("--until", multiple=True, metavar="TEXT", help="End the answer before this text, too.")
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 takes the likeliest token."
)
@click.option(
    "--top-p",
    type=float,
    default=1.0,
    show_default=True,
    help="Draw from the likeliest tokens that make up this share of the probability.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed of the draw, where --temperature is above 0.",
)
@click.option("--base", help="Base model of an adapter, when it is not where it was.")
@click.option("--device", help="auto, cpu, cuda or cuda:N [the run's own; auto: a GPU where there is one].")
@click.option("--dtype", help="Type of the weights: auto, float32, bfloat16, float16 [the run's own; auto].")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each question.")
def ask(
    target: str,
    questions: tuple[str, ...],
    context: Path | None,
    fields: tuple[str, ...],
    template: str | None,
    base: str | None,
    device: str | None,
    dtype: str | None,
    as_json: bool,
    **writing: Any,
) -> None:
    """Ask TARGET (a run folder, a PEFT adapter folder, or a base model) something, in the words it was trained with.

    \b
    koat ask runs/mine "한국의 수도는 어디인가요?"
    koat ask runs/qa --context article.txt "언제 열렸나요?" "누가 참석했나요?"
    koat ask runs/mine < questions.txt
    koat ask nano --template koalpaca "..." --temperature 0.7 --top-p 0.9
    koat ask runs/mine --field input="비가 옵니다." "영어로 옮겨 주세요." --until "###"

    Each question stands alone; several are answered together, what they share computed once. Without a question
    they are read from standard input, a line each; at a terminal, one at a time. A base model has no template of
    its own: it goes on from what is given.
    """
    from koat.workflows.shell import run_questions

    texts = dict(item.partition("=")[::2] for item in fields)
    broken = [item for item in fields if "=" not in item]
    if broken:
        raise click.BadParameter(f"{broken[0]!r} is not NAME=TEXT.", param_hint="--field")
    loading = {"device": device, "dtype": dtype, "base": base}
    run_questions(
        target, list(questions), loading={key: value for key, value in loading.items() if value is not None},
        template=template, fields=texts, context=context, writing=writing, as_json=as_json,
    )  # fmt: skip
