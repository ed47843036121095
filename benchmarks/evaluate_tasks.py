"""The tasks that the evaluation benchmark asks, as requests of lm-evaluation-harness, and a tokenizer of few words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.workload import Absent, Options, find_file
from koat.evaluation.catalogue import load_task
from koat.evaluation.evaluate import gather_questions
from koat.evaluation.protocol import render_context
from koat.workflows.evaluating.harness import TASKS

SMALL_HEAD = 4096
NSMC = "nsmc-prompt1"


@dataclass(frozen=True)
class Exam:
    """Tasks that are asked together: shots, items of each in all and at least, how many times the peer."""

    tasks: tuple[str, ...]
    num_shots: int
    num_items: int
    least: int
    target: float


EXAMS = {
    "HellaSwag, 10 shots": Exam(("local_hellaswag",), 10, 24, 4, 6.0),
    "MMLU, 5 shots": Exam(("local_mmlu_college_chemistry",), 5, 100, 100, 8.0),
    "ARC, 25 shots": Exam(("local_arc_challenge",), 25, 12, 2, 5.0),
    "TruthfulQA, mc1 and mc2": Exam(("local_truthfulqa_mc1", "local_truthfulqa_mc2"), 0, 24, 8, 3.0),
    "NSMC, 10 fixed shots": Exam((NSMC,), 10, 400, 200, 8.0),
}
"""Shots are the same before every item. MMLU is one whole subject, the median one by what its items share: about six
times, as over all 57 subjects (from 4.2 in high school world history to 9.6 in elementary mathematics)."""


def build_instances(exam: Exam, options: Options, tokenizer: Any, num_items: int, num_shots: int) -> list[Any]:
    """Return the requests of an exam's tasks: each side is asked these very objects."""
    if exam.tasks == (NSMC,):
        return build_nsmc(options, tokenizer, num_items, num_shots)
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise Absent(f"lm-evaluation-harness is not installed ({error}); it comes with the extra `bench`") from error
    data = options.data / "benchmarks"
    if not data.is_dir():
        raise Absent(f"there are no benchmarks in {options.data}")
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data_dir": str(data)})
    instances = []
    for task in manager.load(list(exam.tasks))["tasks"].values():
        task.set_config(key="num_fewshot", value=num_shots)
        task.build_all_requests(limit=num_items, rank=0, world_size=1)
        instances += task.instances
    return instances


def build_nsmc(options: Options, tokenizer: Any, num_items: int, num_shots: int) -> list[Any]:
    """Return koat's own NSMC task as requests of the harness, ten reviews drawn once for all items."""
    from lm_eval.api.instance import Instance

    task = load_task(NSMC).model_copy(update={"shot_rule": "fixed", "items": num_items, "num_shots": num_shots})
    files = find_file(options, "nsmc", "test.tsv"), find_file(options, "nsmc", "train.tsv")
    questions = gather_questions(task, tokenizer, *files)
    contexts = [render_context(task, item, shots) for item, shots in zip(questions.items, questions.shots, strict=True)]
    pairs = [(context, answer) for context in contexts for answer in task.labels.values()]
    return [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]


def gather_texts(options: Options, tokenizer: Any, num_items: int = 500) -> list[str]:
    """Return questions with their answers, without shots, of all exams."""
    instances = [
        instance for exam in EXAMS.values() for instance in build_instances(exam, options, tokenizer, num_items, 0)
    ]
    return list(dict.fromkeys("".join(instance.args) for instance in instances))


def train_small_tokenizer(texts: Iterable[str]) -> Any:
    """Return a byte-level BPE tokenizer of `SMALL_HEAD` words, trained on texts of the kind that it will cut."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SMALL_HEAD, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
