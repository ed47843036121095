"""The demo: on the model and samples that ship, plan, train IA3 and LoRA, evaluate base and both, compare."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koat.core.errors import RunFolderError
from koat.report.progress import TrainingDisplay
from koat.report.tables import format_bytes, format_score, make_table, print_table
from koat.workflows.config import PlanConfig, RunConfig, resolve_run
from koat.workflows.evaluating.evaluate import evaluate_subject, open_subject
from koat.workflows.planning.plan import plan_run
from koat.workflows.training.finetune import finetune_run

SAMPLES = Path(__file__).parent.parent / "nano" / "samples"
METHODS = ("ia3", "lora")
TASKS = ("nsmc-prompt1", "nsmc-prompt2")
MARK = "koat-demo.txt"

NEXT = """
What to type next, for your own model and data:
  koat data inspect my_data.jsonl --base my-model          what is in it, how long, what would overflow
  koat plan --base my-model --method ia3                    what a run takes, before it takes it
  koat finetune --base my-model --data my_data.jsonl --method ia3 --out runs/mine
  koat ask runs/mine                                        what it answers, one question at a time
  koat eval runs/mine --task nsmc-prompt1 --data test.tsv --shots-from train.tsv
"""


@dataclass(frozen=True, slots=True)
class DemoRow:
    """One line of the demo's table."""

    name: str
    trainable: int
    total: int
    seconds: float | None
    peak_bytes: int
    report: dict[str, Any]


def show_demo(out: Path) -> list[DemoRow]:
    """Run the demo in the folder `out`, print its table, and return the rows."""
    prepare_folder(out)
    rows = [evaluate_base(out)]
    for method in METHODS:
        rows.append(train_and_evaluate(method, out))
    print_demo(rows)
    print(NEXT)
    return rows


def prepare_folder(out: Path) -> None:
    """Make an empty folder, replacing an earlier demo and nothing else."""
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARK).is_file():
            raise RunFolderError(f"{out} is not empty and is no earlier demo. Choose another folder with --out.")
        try:
            shutil.rmtree(out)
        except OSError as error:
            raise RunFolderError(
                f"the earlier demo in {out} cannot be removed: {error.strerror}. Choose another folder with --out."
            ) from error
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / MARK).write_text("Made by `koat demo`, which replaces this folder.\n", encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{out} cannot be written: {error.strerror}. Choose another folder with --out.") from error


def evaluate_base(out: Path) -> DemoRow:
    """Evaluate the base model as it is."""
    print("base model: evaluating with both prompts")
    report = evaluate_on_samples("nano", out / "base")
    plan = plan_run(resolve_run(PlanConfig, recipe="demo-ia3").settings)
    peak = max(result["peak_bytes"] for result in report["results"])
    return DemoRow("base", 0, plan.total_parameters, None, peak, report)


def train_and_evaluate(method: str, out: Path) -> DemoRow:
    """Plan, train and evaluate one method with its demo recipe."""
    recipe = f"demo-{method}"
    plan = plan_run(resolve_run(PlanConfig, recipe=recipe).settings)
    print(
        f"{method}: {plan.trainable_parameters:,} of {plan.total_parameters:,} parameters, "
        f"about {format_bytes(plan.peak_bytes)} beside the libraries"
    )
    train = {"data": {"train": [str(SAMPLES / "reviews_train.tsv")]}}
    resolved = resolve_run(RunConfig, recipe=recipe, flags=train)
    run = finetune_run(resolved, out / method, on_step=TrainingDisplay(method).show)
    report = evaluate_on_samples(str(run.path), None)
    result = run.read_manifest()["result"]
    return DemoRow(
        method,
        plan.trainable_parameters,
        plan.total_parameters,
        result["training_seconds"],
        result["peak_bytes"],
        report,
    )


def evaluate_on_samples(target: str, out: Path | None) -> dict[str, Any]:
    """Evaluate on the sample reviews without shots."""
    subject = open_subject(target, out=out)
    data = str(SAMPLES / "reviews_test.tsv")
    return evaluate_subject(subject, TASKS, data, None, num_shots=0, limit="all")


def print_demo(rows: list[DemoRow]) -> None:
    """Print the demo's table."""
    columns = ("method", "trained", "of the model", "training", "peak memory", "s / item", "prompt 1", "prompt 2")
    table = make_table("koat demo: 250 reviews to train on, 160 to test on, no shots", columns, map(list_cells, rows))
    print_table(table)
    print(
        "Accuracy by label likelihood, 95 % Wilson intervals. The base chooses between two words "
        "it was never asked for."
    )


def list_cells(row: DemoRow) -> tuple[str, ...]:
    """Return a row's cells."""
    results = row.report["results"]
    seconds = sum(result["seconds"] for result in results) / sum(result["num_items"] for result in results)
    return (
        row.name,
        f"{row.trainable:,}",
        f"{row.trainable / row.total:.3%}",
        "-" if row.seconds is None else f"{row.seconds:.0f} s",
        format_bytes(row.peak_bytes),
        f"{seconds:.4f}",
        *(format_score(result["scores"]["likelihood"]) for result in results),
    )
