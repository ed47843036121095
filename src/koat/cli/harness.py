"""The command that hands everything to lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path

import click

from koat.cli.front import koat


@koat.command("lm-eval", context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder with the files of koat's `local_` tasks.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[LM_EVAL_ARGUMENTS]...")
@click.pass_context
def run_lm_eval(context: click.Context, data_dir: Path | None, arguments: tuple[str, ...]) -> None:
    """Run lm-evaluation-harness with koat as a model, all its own options included.

    \b
    koat lm-eval run --model koat --model_args pretrained=runs/ia3 --tasks hellaswag --num_fewshot 10
    koat lm-eval run --model koat --model_args pretrained=nano,dtype=float32,tokens=16384 \\
        --tasks local_mmlu --num_fewshot 5 --data-dir ./benchmarks
    koat lm-eval ls tasks

    `pretrained` is a run folder, a PEFT adapter folder or a base model; `tokens` bounds what goes through the
    model at once. Prefixes that requests share are computed once; the numbers are those of `--model hf`.
    `koat lm-eval run --help` shows lm-eval's own options.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        click.echo(context.get_help())
        return
    from koat.workflows.evaluating.harness import run_harness

    run_harness(list(arguments), data_dir)
