"""What the command line calls: a workflow with its progress and its printing."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koat.core.config import Layer, Resolved, resolve
from koat.core.errors import ConfigError, DataError
from koat.core.settings import DataSettings, ModelSettings, TrainingSettings
from koat.report.progress import ProgressLine, TrainingDisplay, format_seconds
from koat.report.tables import format_bytes, make_table, print_table

if TYPE_CHECKING:
    from koat.workflows.ask import Answer


def quiet_libraries() -> None:
    """Silence what libraries print that a user can do nothing about."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    from koat.core.quiet import quieten

    quieten()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)


def run_finetune(resolved: Resolved[Any], out: Path, *, resume: bool, overwrite: bool) -> None:
    """Fine-tune with progress, then say where everything is and what to type next."""
    quiet_libraries()
    from koat.workflows.training.finetune import finetune_run

    run = finetune_run(resolved, out, resume=resume, overwrite=overwrite, say=print, on_step=TrainingDisplay().show)
    if int(os.environ.get("RANK", "0")) > 0:  # one of several processes speaks
        return
    manifest = run.read_manifest()
    result = manifest["result"]
    saved = result["tokens"] / max(1, result["unique_tokens"])
    print(
        f"done in {format_seconds(result['training_seconds'])}: {result['tokens']:,} tokens trained, "
        f"{result['unique_tokens']:,} computed (sharing saved a factor of {saved:.2f}), "
        f"peak memory {format_bytes(result['peak_bytes'])}"
    )
    print(f"kept the adapter of step {result['kept_step']} in {run.adapter}")
    print(f"ask it: koat ask {shlex.quote(str(out))}")
    print(f"measure it, for example: koat eval {shlex.quote(str(out))} {suggest_task(manifest)}")
    print("(`koat list` names the tasks that ship, `koat eval --help` shows a YAML file for one of your own)")


def suggest_task(manifest: Mapping[str, Any]) -> str:
    """Return the options of an evaluation that suits what was trained on: its own prompts, or questions on texts."""
    from koat.evaluation.catalogue import list_tasks

    prompts = [each["name"] for each in manifest.get("templates", ()) if each.get("name") in list_tasks()]
    if prompts:
        return f"--task {prompts[0]} --data FILE --shots-from FILE"
    on_texts = manifest.get("examples", {}).get("groups", 0) > 0
    return "--task context-qa --data FILE" if on_texts else "--task mine.yaml --data FILE"


def run_evaluation(
    target: str,
    tasks: list[str],
    *,
    loading: dict[str, Any],
    out: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Evaluate with progress and print the scores; `options` are the fields of `Asking`."""
    quiet_libraries()
    from koat.report.scores import print_scores
    from koat.workflows.evaluating.asking import Asking
    from koat.workflows.evaluating.evaluate import evaluate_exam
    from koat.workflows.evaluating.exam import gather_exam, refuse_unused
    from koat.workflows.evaluating.subject import open_subject

    # Before the model is loaded: a wrong name costs nothing.
    exam = refuse_unused(gather_exam(tasks, Asking(**options)))
    # A base that is not given stays empty here: the run or the adapter knows its own.
    settings = resolve(ModelSettings, [Layer("flag", {"base": "", **loading})]).settings if loading else None
    subject = open_subject(target, settings, out)
    lines: dict[str, ProgressLine] = {}

    def show(task: str, done: int, total: int) -> None:
        lines.setdefault(task, ProgressLine(task)).update(done, total)

    report = evaluate_exam(subject, exam, on_progress=show)
    if as_json:
        print(json.dumps(report, ensure_ascii=False, indent=2))
        return
    print_scores(report)
    print(f"predictions: {subject.predictions}")


def run_questions(
    target: str,
    questions: list[str],
    *,
    loading: dict[str, Any],
    template: str | None,
    fields: dict[str, str],
    context: Path | None,
    writing: dict[str, Any],
    as_json: bool,
) -> None:
    """Print what a model answers: to these questions, to those on standard input, or, at a terminal, one by one."""
    quiet_libraries()
    from koat.data.opening import read_text
    from koat.data.prompts import resolve_template
    from koat.workflows.ask import Writing, ask_model, choose_form
    from koat.workflows.evaluating.subject import open_subject

    how = Writing(**writing)
    if template:
        resolve_template(template)  # before the model is loaded: a wrong name costs nothing
    texts = {**fields, **({"context": read_text(context).strip()} if context else {})}
    alone = not questions and sys.stdin.isatty()
    given = questions or ([] if alone else read_questions())
    if not given and not alone:
        raise ConfigError("there is no question: give one after the model, or a line each on standard input.")
    settings = resolve(ModelSettings, [Layer("flag", {"base": "", **loading})]).settings if loading else None
    subject = open_subject(target, settings)
    form = choose_form(subject, template, texts)
    form.find_place()  # before the first question is typed

    show = ProgressLine("answers").update if len(given) > 1 else lambda *_: None
    if given:
        print_answers(given, ask_model(subject, given, form, how, on_progress=show), as_json)
    while alone and (question := read_question()):
        try:
            print_answers([question], ask_model(subject, [question], form, how), as_json)
        except DataError as error:  # one question too long is no reason to load the model again
            print(error, file=sys.stderr)


def print_answers(questions: list[str], answers: list[Answer], as_json: bool) -> None:
    """Print answers, each under its question where there are several, and say on stderr how many were cut."""
    for question, answer in zip(questions, answers, strict=True):
        if as_json:
            found = {"question": question, "answer": answer.text, "cut": answer.is_cut}
            print(json.dumps(found, ensure_ascii=False), flush=True)
        else:
            print(f"? {question}\n{answer.text}" if len(questions) > 1 else answer.text, flush=True)
    if num_cut := sum(answer.is_cut for answer in answers):
        print(f"{num_cut} of {len(answers)} answers cut at the longest allowed (--max-new-tokens)", file=sys.stderr)


def read_questions() -> list[str]:
    """Return the lines of standard input that hold something, without the byte-order mark of a file."""
    return [line for line in sys.stdin.read().removeprefix("\ufeff").splitlines() if line.strip()]


def read_question() -> str:
    """Return a line from the terminal; empty at its end, or where it is stopped."""
    try:
        return input("? ").strip()
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)  # what follows begins on a line of its own
        return ""


def run_inspection(files: list[str], base: str, data: dict[str, Any], training: dict[str, Any]) -> None:
    """Inspect data files as settings of these two groups describe them, and print what was found."""
    quiet_libraries()
    from koat.report.inspection import print_inspection
    from koat.workflows.inspect_data import inspect_files

    settings = resolve(DataSettings, [Layer("flag", {"train": files, **data})]).settings
    steps = resolve(TrainingSettings, [Layer("flag", training)]).settings
    for found in inspect_files(files, settings, ModelSettings(base=base), steps):
        print_inspection(found)


def run_demo(out: Path) -> None:
    """Run the demo and print its table."""
    quiet_libraries()
    from koat.workflows.demo import show_demo

    show_demo(out)


def run_listing() -> None:
    """Print methods, recipes, experiments, tasks and templates by name."""
    from koat.adapters.methods import METHODS
    from koat.data.prompts import describe_template, list_templates
    from koat.evaluation.catalogue import list_tasks, load_task
    from koat.workflows.config import describe_recipe, list_recipes
    from koat.workflows.experiment.file import describe_experiment, list_experiments

    rows = [
        ("method", name, (method.settings.__doc__ or method.title).split("\n")[0]) for name, method in METHODS.items()
    ]
    rows += [("recipe", name, describe_recipe(name)) for name in list_recipes()]
    rows += [("experiment", name, describe_experiment(name)) for name in list_experiments()]
    rows += [("task", name, load_task(name).title.en) for name in list_tasks()]
    rows += [("template", name, describe_template(name)) for name in list_templates()]
    print_table(make_table("", ("kind", "name", "what it is"), rows, numeric=9))
