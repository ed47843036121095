"""Prompt templates: texts written out by hand, fields, and what a bad template is told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from koat.core.errors import DataError
from koat.core.settings import TemplateSettings
from koat.data.prompts import BUILTIN_TEMPLATES, Segment, from_mapping, list_templates, resolve_template
from koat.data.records import Record, Turn

PLAIN = {"instruction": "질문", "input": "", "output": "답"}
WITH_INPUT = PLAIN | {"input": "자료"}
WITH_CONTEXT = {"instruction": "질문", "context": "본문", "output": "답"}
STANFORD_WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
질문

### Input:
자료

### Response:"""
STANFORD = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
질문

### Response:"""


@pytest.mark.parametrize(
    ("name", "fields", "prompt"),
    [
        ("koalpaca", PLAIN, "### 질문: 질문\n\n### 답변:"),
        ("koalpaca", WITH_INPUT, "### 질문: 질문\n\n### 맥락: 자료\n\n### 답변:"),
        ("koalpaca", WITH_CONTEXT, "### 질문: 질문\n\n### 맥락: 본문\n\n### 답변:"),
        ("koalpaca-context", WITH_CONTEXT, "### 맥락: 본문\n\n### 질문: 질문\n\n### 답변:"),
        ("koalpaca-context", WITH_INPUT, "### 맥락: 자료\n\n### 질문: 질문\n\n### 답변:"),
        ("koalpaca-context", PLAIN, "### 질문: 질문\n\n### 답변:"),
        ("koalpaca-question-first", WITH_CONTEXT, "### 질문: 질문\n\n### 맥락: 본문\n\n### 답변:"),
        ("koat", PLAIN, "질문\n\n정답:"),
        ("koat", WITH_CONTEXT, "본문\n\n질문\n\n정답:"),
        ("koat", WITH_INPUT, "자료\n\n질문\n\n정답:"),
        ("alpaca", WITH_INPUT, STANFORD_WITH_INPUT),
        ("alpaca", PLAIN, STANFORD),
    ],
)
def test_built_in_prompts(name: str, fields: dict[str, str], prompt: str) -> None:
    template = resolve_template(name)[0]
    segments = template.render(Record(fields))
    assert [segment.text for segment in segments if segment.supervised] == [" 답"]
    assert "".join(segment.text for segment in segments) == prompt + " 답"
    # Inference has no response to give.
    assert template.render_prompt(Record({key: text for key, text in fields.items() if key != "output"})) == prompt


def test_the_context_is_marked() -> None:
    assert resolve_template("koalpaca-context")[0].render(Record(WITH_CONTEXT)) == [
        Segment("### 맥락: ", supervised=False),
        Segment("본문", supervised=False, is_context=True),
        Segment("\n\n### 질문: 질문\n\n### 답변:", supervised=False),
        Segment(" 답", supervised=True),
    ]


def test_custom_templates_are_literal() -> None:
    template = resolve_template(TemplateSettings(prompt="{{x}} {document}\n", response="{label}", name="mine"))[0]
    record = Record({"document": "글 {y}", "label": "긍정"})
    assert [segment.text for segment in template.render(record)] == ["{x} 글 {y}\n", "긍정"]
    assert template.name == "mine"


def test_several_templates_keep_their_order() -> None:
    custom = TemplateSettings(prompt="{instruction}")
    assert [template.name for template in resolve_template(["koat", custom, "alpaca"])] == [
        "koat",
        "custom",
        "alpaca",
    ]
    with pytest.raises(DataError, match="'koat' is listed twice"):
        resolve_template(["koat", "koat"])
    with pytest.raises(DataError, match="list of templates is empty"):
        resolve_template([])


def test_mappings_survive_json() -> None:
    custom = resolve_template(TemplateSettings(prompt="{{}} {instruction}", response=">{output}"))[0]
    for template in [*BUILTIN_TEMPLATES.values(), custom]:
        again = from_mapping(json.loads(json.dumps(template.to_mapping())))
        assert again == template
        assert again.to_mapping() == template.to_mapping()
    assert from_mapping(custom.to_mapping()).render(Record(PLAIN)) == custom.render(Record(PLAIN))


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ({"kind": "txt"}, "kind 'txt' (did you mean 'text'?)"),
        ({}, "kind 'None'"),
        ({"kind": "text", "name": "x"}, "incomplete or damaged: 'prompts'"),
        ({"kind": "text", "name": "x", "prompts": None, "response": "{a}"}, "incomplete or damaged"),
        ({"kind": "text", "name": "x", "prompts": [], "response": "{a}"}, "has no prompt"),
    ],
)
def test_damaged_mappings(mapping: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError) as caught:
        from_mapping(mapping)
    assert expected in str(caught.value)


def test_unknown_names_are_answered_with_the_nearest_and_all() -> None:
    with pytest.raises(DataError) as caught:
        resolve_template("koalpacca")
    message = str(caught.value)
    assert "(did you mean 'koalpaca'?)" in message
    assert all(name in message for name in list_templates())
    with pytest.raises(DataError, match=r"given as data\.template\.prompt="):
        resolve_template("{instruction}:")


def test_a_field_that_the_record_lacks() -> None:
    record = Record({"instruktion": "a", "output": "b"}, source="x.jsonl:7")
    for template in (
        resolve_template("koalpaca")[0],
        resolve_template(TemplateSettings(prompt="{instruction}"))[0],
    ):
        with pytest.raises(DataError) as caught:
            template.render(record)
        for part in (
            template.name,
            "'instruction'",
            "did you mean 'instruktion'",
            "x.jsonl:7",
            "instruktion, output",
        ):
            assert part in str(caught.value)
    with pytest.raises(DataError, match="needs the field 'context'"):
        resolve_template("koalpaca-question-first")[0].render_prompt(Record(PLAIN))
    with pytest.raises(DataError, match=r"conversation of 2 messages: data\.template=chat"):
        resolve_template("koat")[0].render(Record({}, (Turn("user", "a"), Turn("assistant", "b"))))


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        ("{instruction", "{output}", "cannot be read: expected '}' before end of string"),
        ("a } b", "{output}", "double braces that are meant literally"),
        ("{}", "{output}", "{} in the prompt is not a field"),
        ("{a!r}", "{output}", "{a!r} in the prompt is not a field"),
        ("{a}", "{output:>5}", "{output:>5} in the response is not a field"),
        ("{a}", "output", "the response 'output' names no field"),
    ],
)
def test_templates_that_cannot_be_read(prompt: str, response: str, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        resolve_template(TemplateSettings(prompt=prompt, response=response))
    assert expected in str(caught.value)


def test_chat_prompts(chatml: Any) -> None:
    template = resolve_template("chat")[0].bind(chatml)
    asked = "<|im_start|>user\n본문\n\n질문<|im_end|>\n<|im_start|>assistant\n"
    segments = template.render(Record(WITH_CONTEXT))
    assert template.render_prompt(Record(WITH_CONTEXT)) == asked
    assert "".join(segment.text for segment in segments) == asked + "답<|im_end|>"
    assert [segment.text for segment in segments if segment.is_context] == ["본문"]
    assert [segment.text for segment in segments if segment.supervised] == ["답<|im_end|>"]
    with_system = template.render_prompt(Record(PLAIN | {"system": "짧게"}))
    assert with_system.startswith("<|im_start|>system\n짧게<|im_end|>\n<|im_start|>user\n질문<|im_end|>")


def test_chat_prompts_of_conversations(chatml: Any) -> None:
    template = resolve_template("chat")[0].bind(chatml)
    talk = (Turn("user", "u"), Turn("assistant", "a"), Turn("user", "v"), Turn("assistant", "b"))
    before = "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\nv<|im_end|>\n"
    # The last answer is what is asked for, whether the record has it yet or not.
    for turns in (talk, talk[:3]):
        assert template.render_prompt(Record({}, turns)) == before + "<|im_start|>assistant\n"


def test_chat_needs_a_chat_template(plain: Any) -> None:
    with pytest.raises(DataError, match="'chat' needs a tokenizer with a chat template"):
        resolve_template("chat")[0].bind(plain)


def test_chat_templates_that_refuse(with_bos: Any) -> None:
    template = resolve_template("chat")[0].bind(with_bos)
    turns = (Turn("system", "s"), Turn("user", "u"), Turn("assistant", "a"))
    with pytest.raises(DataError, match=r"y:1: .*refuses the conversation \(roles: system, user\): no system turns"):
        template.render(Record({}, turns, source="y:1"))
    with pytest.raises(DataError, match="'chat' needs the field 'output'"):
        template.render(Record({"instruction": "a"}))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        # Drops the reasoning of earlier turns once a later one comes.
        (
            "{% for m in messages %}{{ m['role'] }}: {% if loop.last and m['role'] == 'assistant' %}<think></think>"
            "{% endif %}{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
            "message 4: the tokenizer's chat template rewrites earlier turns",
        ),
        # Opens an answer with a mark that it does not write into finished answers.
        (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: <think>{% endif %}",
            "message 2: the tokenizer's chat template begins an answer otherwise than it writes one",
        ),
    ],
)
def test_chat_templates_that_do_not_only_append(chatml: Any, source: str, expected: str) -> None:
    from copy import deepcopy

    tokenizer = deepcopy(chatml)
    tokenizer.chat_template = source
    turns = (Turn("user", "u"), Turn("assistant", "a"), Turn("user", "v"), Turn("assistant", "b"))
    with pytest.raises(DataError) as caught:
        resolve_template("chat")[0].bind(tokenizer).render(Record({}, turns, source="z:3"))
    assert str(caught.value).startswith(f"z:3, {expected}")
