"""`koat ask`: the words around a question, what is written, and what cannot be asked."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import koat
from koat.data.templates import TextTemplate
from koat.evaluation.continuations import Ending, continue_prompts
from koat.workflows.ask import Answer, Form, Writing, ask_model, choose_form, find_limits, read_answer
from koat.workflows.shell import print_answers
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
    one = TextTemplate("reviews", ("리뷰: {document}\n감정:",))
    assert Form(one).fill("좋아요") == "리뷰: 좋아요\n감정:"
    two = TextTemplate("pairs", ("{first} / {second}:",))
    assert Form(two, {"first": "하나"}).fill("둘") == "하나 / 둘:"
    with pytest.raises(koat.DataError, match="which of first, second is the question"):
        Form(two).fill("둘")
    translate = TextTemplate("translate", ("Translate: {input}\nOutput:",))
    assert Form(translate).fill("hi") == "Translate: hi\nOutput:"
    told = TextTemplate("told", ("{instruction}: {input}",))
    assert Form(told).fill("둘") == "둘: "
    assert Form(told, {"context": "하나"}).fill("둘") == "둘: 하나"
    assert Form(told, {"instruction": "하나"}).fill("둘") == "하나: 둘"
    on = TextTemplate("on", ("{context}\n",))
    assert Form(on).fill("하나") == "하나\n"
    given = {"context": "하나"}
    for form in (Form(on, given), Form(translate, given), Form(TextTemplate("go", ("go",)))):
        with pytest.raises(koat.DataError, match="has no field left for the question"):
            form.fill("둘")
    with pytest.raises(koat.DataError, match=r"question 2 makes a prompt of .* tokens, and the model sees"):
        koat.ask(subject, "비가", "비가 옵니다. " * 900)
    with pytest.raises(koat.ConfigError, match="max_new_tokens=0"):
        koat.ask(subject, "비가", max_new_tokens=0)


def test_a_chat_has_a_place_for_the_system(finished: Path) -> None:
    subject = koat.load(finished)
    chat = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    subject.tokenizer.chat_template = chat
    form = choose_form(subject, "chat", {"system": "짧게", "context": "글"})
    assert form.fill("둘") == "<system>짧게<user>글\n\n둘"
    with pytest.raises(koat.ConfigError, match="did you mean 'system'"):
        choose_form(subject, "chat", {"sytem": "짧게"})
    with pytest.raises(koat.ConfigError, match="has no place for 'input'"):
        choose_form(subject, "koalpaca-question-first", {"input": "글"})


def test_an_answer_ends_where_training_ended_it(finished: Path) -> None:
    """At the tokenizer's end, though the model's settings of generation name none."""
    subject = koat.load(finished)
    subject.model.get_base_model().generation_config.eos_token_id = None
    end = subject.tokenizer.eos_token_id
    assert read_answer([5, end], Ending((), 2, {}), subject) == Answer(subject.tokenizer.decode([5]).strip(), False)
    assert read_answer([5, 6], Ending((), 2, {}), subject).is_cut


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


def test_the_command_line_hands_on_how_an_answer_is_written(finished: Path) -> None:
    subject = koat.load(finished)

    def ask(*options: object) -> str:
        status, out, error = call_koat("ask", finished, "비가", "--max-new-tokens", 12, "--json", *options)
        assert status == 0, error
        answer: str = json.loads(out)["answer"]
        return answer

    (whole,) = koat.ask(subject, "비가", max_new_tokens=12)
    stop = whole[len(whole) // 2]
    assert ask() == whole and ask("--until", stop) == whole[: whole.index(stop)].strip() != whole
    drawn: dict[str, Any] = {"temperature": 1.5, "top_p": 0.8, "seed": 3}
    (expected,) = koat.ask(subject, "비가", max_new_tokens=12, **drawn)
    for name, default in (("temperature", 1.0), ("top_p", 1.0), ("seed", 0)):  # each of them matters
        assert koat.ask(subject, "비가", max_new_tokens=12, **{**drawn, name: default}) != [expected]
    assert ask("--temperature", 1.5, "--top-p", 0.8, "--seed", 3) == expected


def test_a_long_question_takes_nothing_from_the_others(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subject = koat.load(finished)
    room = subject.model.config.max_position_embeddings
    form, writing = Form(None), Writing(max_new_tokens=9)
    near = next(text for n in range(room) if room - 9 < len(subject.tokenizer(text := "비가 " * n).input_ids) < room)
    alone = [ask_model(subject, [question], form, writing)[0] for question in (near, "비가")]
    assert ask_model(subject, [near, "비가"], form, writing) == alone
    assert find_limits([(1,) * (room - 4), (1, 2)], room, 9) == [4, 9]
    assert ask_model(subject, [], form, writing) == []
    # What ends by itself is not cut.
    stop = alone[1].text[:1]
    assert not ask_model(subject, ["비가"], form, Writing(9, until=stop))[0].is_cut
    print_answers(["가", "나"], [Answer("하나", True), Answer("둘", False)], as_json=False)
    assert capsys.readouterr().err == "1 of 2 answers cut at the longest allowed (--max-new-tokens)\n"


def test_all_tokens_may_be_drawn(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would draw from the 50 likeliest."""
    asked: list[Any] = []

    def watch(model: Any, layout: Any, tokenizer: Any, prompts: Any, ending: Any, **more: Any) -> Any:
        asked.append(ending.options)
        return continue_prompts(model, layout, tokenizer, prompts, ending, **more)

    monkeypatch.setattr("koat.workflows.ask.continue_prompts", watch)
    koat.ask(finished, "비가", temperature=0.5, top_p=0.9, max_new_tokens=2)
    assert asked == [{"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 0}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no question"),
        (["비가", "--field", "context"], "is not NAME=TEXT"),
        (["비가", "--template", "koalpacca"], "did you mean 'koalpaca'"),
        (["비가", "--field", "context=눈이"], "no place for context. Name a template"),
        (["비가", "--field", "contxt=눈이", "--template", "koalpaca"], "did you mean 'context'"),
        (["비가", ""], "question 2 is empty"),
        (["비가", "--context", "nowhere.txt"], "nowhere.txt"),
        (["비가", "--top-p", "0"], "top_p=0.0"),
        (["비가", "--until", r"\n"], "holds a backslash and the letter n where a line break is meant"),
        (["비가", "--until", ""], "until='' would end every answer"),
    ],
)
def test_bad_input_is_one_message(
    arguments: list[str], message: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    status, _, error = call_koat("ask", place / "base", *arguments)
    assert status == 2
    assert message in error and "Traceback" not in error
