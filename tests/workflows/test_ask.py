"""`koat ask`: the words around a question, what is written, and what cannot be asked."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import koat
from tests.tiny_base import call_koat

ARTICLE = "비가 옵니다. 눈이 많이"
QUESTIONS = ("비가?", "눈이 많이?", "비가 옵니다")


@pytest.fixture(scope="module")
def reader(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained on questions on a text."""
    folder = tmp_path_factory.mktemp("reader")
    rows = [{"context": ARTICLE, "question": text, "answer": "눈이"} for text in QUESTIONS * 3]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    settings = {
        "model": {"base": str(place / "base")},
        "data": {
            "train": [str(folder / "rows.jsonl")], "columns": {"instruction": "question", "output": "answer"},
            "template": "koalpaca-context",
        },
        "training": {"max_steps": 4, "batch_size": 4, "learning_rate": 0.1},
    }  # fmt: skip
    return koat.finetune(settings, out=folder / "run").path


@torch.no_grad()
def write_singly(subject: Any, prompt: str, num_new: int) -> str:
    """The oracle: one plain pass per token."""
    ids = subject.tokenizer(prompt).input_ids
    start, end = len(ids), subject.tokenizer.eos_token_id
    while len(ids) < start + num_new and end not in ids[start:]:
        ids.append(int(subject.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return str(subject.tokenizer.decode(ids[start:], skip_special_tokens=True)).strip()


def test_answers_are_those_of_single_prompts_in_the_words_of_training(reader: Path) -> None:
    subject = koat.load(reader)
    found = koat.ask(subject, *QUESTIONS, fields={"context": ARTICLE}, max_new_tokens=7)
    prompts = [f"### 맥락: {ARTICLE}\n\n### 질문: {question}\n\n### 답변:" for question in QUESTIONS]
    assert found == [write_singly(subject, prompt, 7) for prompt in prompts]
    assert any(found)
    # A base has no words of its own.
    base = koat.load(subject.model.get_base_model().config.name_or_path)
    assert koat.ask(base, "비가", max_new_tokens=5) == [write_singly(base, "비가", 5)]


def test_an_answer_ends_at_a_text_and_what_is_drawn_repeats(finished: Path) -> None:
    subject = koat.load(finished)
    (whole,) = koat.ask(subject, "비가", max_new_tokens=12)
    stop = whole[len(whole) // 2]
    assert koat.ask(subject, "비가", max_new_tokens=12, until=(stop,)) == [whole[: whole.index(stop)].strip()]
    drawn = [koat.ask(subject, "비가", temperature=1.5, seed=seed, max_new_tokens=12) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_question_fills_the_field_that_is_left(finished: Path, tmp_path: Path) -> None:
    subject = koat.load(finished)
    from koat.data.templates import TextTemplate
    from koat.workflows.ask import Form

    one = TextTemplate("reviews", ("리뷰: {document}\n감정:",))
    assert Form(one).fill("좋아요") == "리뷰: 좋아요\n감정:"
    two = TextTemplate("pairs", ("{first} / {second}:",))
    assert Form(two, {"first": "하나"}).fill("둘") == "하나 / 둘:"
    with pytest.raises(koat.DataError, match="which of first, second is the question"):
        Form(two).fill("둘")
    with pytest.raises(koat.DataError, match=r"the longest prompt has .* tokens, and the model sees"):
        koat.ask(subject, "비가 옵니다. " * 900)
    with pytest.raises(koat.ConfigError, match="max_new_tokens=0"):
        koat.ask(subject, "비가", max_new_tokens=0)


def test_the_command_line_asks_what_it_is_given(
    reader: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "article.txt").write_text(ARTICLE + "\n", encoding="utf-8")
    options = ["--context", tmp_path / "article.txt", "--max-new-tokens", 7]
    expected = koat.ask(reader, *QUESTIONS, fields={"context": ARTICLE}, max_new_tokens=7)
    status, out, error = call_koat("ask", reader, *QUESTIONS, *options, "--json")
    assert status == 0, error
    pairs = [json.loads(line) for line in out.splitlines()]
    assert [(pair["question"], pair["answer"]) for pair in pairs] == list(zip(QUESTIONS, expected, strict=True))
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(QUESTIONS[:2]) + "\n\n"))
    status, out, _ = call_koat("ask", reader, *options)
    assert out == f"? {QUESTIONS[0]}\n{expected[0]}\n? {QUESTIONS[1]}\n{expected[1]}\n"

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    lines = iter([QUESTIONS[2], ""])
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert call_koat("ask", reader, *options)[1] == f"{expected[2]}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no question"),
        (["비가", "--field", "context"], "is not NAME=TEXT"),
        (["비가", "--template", "koalpacca"], "did you mean 'koalpaca'"),
        (["비가", "--field", "context=눈이"], "give --template to use --field"),
        (["비가", "--context", "nowhere.txt"], "nowhere.txt"),
        (["비가", "--top-p", "0"], "top_p=0.0"),
    ],
)
def test_bad_input_is_one_message(
    arguments: list[str], message: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    status, _, error = call_koat("ask", place / "base", *arguments)
    assert status == 2
    assert message in error and "Traceback" not in error
