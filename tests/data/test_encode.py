"""Encoding: borders, ends, overflow and counts, against texts decoded again and prompts encoded alone."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest

from koat.core.errors import DataError
from koat.core.settings import TemplateSettings
from koat.data.encode import encode_prompt, encode_records
from koat.data.prompts import resolve_template
from koat.data.records import Record, Turn
from koat.data.tokens import encode_continuations, find_opening, tokenise
from tests.data.conftest import wrap

TOKENIZERS = ("plain", "with_bos", "sentencepiece", "chatml")
RECORDS = [
    Record({"instruction": "한국의 수도는?", "input": "", "output": "서울입니다."}, source="a:1"),
    Record(
        {"instruction": "What is it?", "input": "Seoul\n", "output": "The capital 🙂", "context": "c"},
        source="a:2",
    ),
    Record({"instruction": "빈칸 ", "input": "x", "output": " 앞뒤 빈칸 \n", "context": "漢"}, source="a:3"),
]
CONTEXT = "서울은 한국의 수도이다. 한강이 흐른다. 사람이 많이 산다. 영화도 많이 만든다. 끝에는 정답이 있다."
ANSWERS = {"한강은?": ["흐른다"], "끝에는?": ["정답"], "무엇이 수도이며 누가 사는가?": ["서울", "사람"]}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def ask(context: str = CONTEXT) -> list[Record]:
    return [
        Record(
            {
                "context": context,
                "instruction": question,
                "output": answers[0],
                "answers": json.dumps(answers),
            },
            group="g",
            source=f"q:{index}",
        )
        for index, (question, answers) in enumerate(ANSWERS.items())
    ]


@pytest.mark.parametrize("name", ["koalpaca", "koalpaca-context", "koat", "alpaca"])
def test_tokens_spell_the_text_and_begin_as_inference_does(tokenizer: Any, name: str) -> None:
    template = resolve_template(name)[0]
    found = encode_records(RECORDS, [template], tokenizer)
    for record, sequence in zip(RECORDS, found.sequences, strict=True):
        prompt = template.render_prompt(record)
        text = prompt + " " + record.fields["output"]
        opening = "".join(tokenizer.convert_ids_to_tokens(find_opening(tokenizer)))
        decoded = tokenizer.decode(sequence.token_ids, clean_up_tokenization_spaces=False)
        assert decoded.replace(" ", "") == (opening + text + tokenizer.eos_token).replace(" ", "")
        start = sequence.supervised.index(True)
        assert list(sequence.token_ids[:start]) == encode_prompt(prompt, tokenizer)
        assert all(sequence.supervised[start:])
        assert sequence.token_ids.count(tokenizer.eos_token_id) == 1
        assert sequence.token_ids[-1] == tokenizer.eos_token_id


def test_byte_level_text_comes_back_to_the_letter(plain: Any) -> None:
    template = resolve_template("koalpaca")[0]
    found = encode_records(RECORDS, [template], plain)
    for record, sequence in zip(RECORDS, found.sequences, strict=True):
        expected = f"{template.render_prompt(record)} {record.fields['output']}<|endoftext|>"
        assert plain.decode(sequence.token_ids, clean_up_tokenization_spaces=False) == expected


def test_a_text_that_melts_into_the_break_changes_no_other(sentencepiece: Any) -> None:
    """A tokenizer to which two line breaks are one token: nothing can be cut off a text that begins with one."""
    core = copy.deepcopy(sentencepiece.backend_tokenizer)
    melting = wrap(core, unk_token="<unk>")
    melting.add_tokens(["\n\n"])
    texts = ["서울", "\n긍정", " 서울"]
    found = encode_continuations(texts, melting)
    assert found == [encode_continuations([text], melting)[0] for text in texts]
    assert found[1] == tokenise(texts, melting)[1]
    assert [melting.convert_ids_to_tokens(ids)[0][0] for ids in (found[0], found[2])] == ["서", "▁"]


def test_opening_tokens(plain: Any, with_bos: Any, sentencepiece: Any) -> None:
    assert find_opening(plain) == []
    assert find_opening(with_bos) == [with_bos.bos_token_id]
    assert encode_prompt("서울", with_bos) == with_bos("서울")["input_ids"]
    assert encode_prompt("<s>서울", with_bos) == encode_prompt("서울", with_bos)
    assert encode_prompt("", sentencepiece) == [sentencepiece.bos_token_id]
    assert encode_prompt("", plain) == []


def test_a_continuation_has_no_word_start_that_nobody_wrote(sentencepiece: Any, plain: Any) -> None:
    whole = sentencepiece.encode("수도는 서울", add_special_tokens=False)
    head = sentencepiece.encode("수도는", add_special_tokens=False)
    for text, mark in ((" 서울", "▁"), ("서울", "서")):
        ids = encode_continuations([text], sentencepiece)[0]
        assert sentencepiece.convert_ids_to_tokens(ids)[0][0] == mark
        assert sentencepiece.decode(head + ids) == "수도는" + text
    # With the space, it is what the text would have been as one piece.
    assert sentencepiece.decode(whole) == "수도는 서울"
    assert encode_continuations([" 서울", ""], plain) == [plain.encode(" 서울"), []]


def test_an_end_that_the_response_brings_is_not_doubled(plain: Any) -> None:
    record = Record({"instruction": "a", "output": "b<|endoftext|>"})
    (sequence,) = encode_records([record], resolve_template("koat"), plain).sequences
    assert sequence.token_ids.count(plain.eos_token_id) == 1
    assert sequence.supervised[-1]


def test_no_end_token_is_an_error(plain: Any) -> None:
    from copy import deepcopy

    tokenizer = deepcopy(plain)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"no end-of-text token.*tokenizer_config\.json"):
        encode_records(RECORDS, resolve_template("koat"), tokenizer)


def test_loss_on_all(tokenizer: Any) -> None:
    found = encode_records(RECORDS, resolve_template("koat"), tokenizer, loss_on="all")
    for sequence in found.sequences:
        assert sequence.supervised == (False, *[True] * (len(sequence) - 1))
    assert found.report.num_supervised == found.report.num_tokens - 3


def test_an_empty_prompt_leaves_the_first_token_unsupervised(plain: Any, with_bos: Any) -> None:
    templates = resolve_template(TemplateSettings(prompt="", response="{output}"))
    (bare,) = encode_records(RECORDS[:1], templates, plain).sequences
    assert bare.supervised == (False, *[True] * (len(bare) - 1))
    (opened,) = encode_records(RECORDS[:1], templates, with_bos).sequences
    assert opened.token_ids[0] == with_bos.bos_token_id
    assert opened.num_supervised == len(opened) - 1


def test_every_template_takes_every_record_in_turn(plain: Any) -> None:
    templates = resolve_template(["koat", "alpaca"])
    found = encode_records(ask(), templates, plain)
    singles = [encode_records([record], [template], plain).sequences[0] for record in ask() for template in templates]
    assert found.sequences == singles
    assert {sequence.group for sequence in found.sequences} == {"g"}
    assert (found.report.num_rows, found.report.num_templates, found.report.num_sequences) == (3, 2, 6)


def test_records_without_a_response_are_left_out_and_counted(plain: Any) -> None:
    empty = Record({"instruction": "a", "output": " "}, source="b:9")
    found = encode_records([*RECORDS, empty], resolve_template("koat"), plain)
    assert (len(found.sequences), found.report.num_unsupervised) == (3, 1)
    assert any("1 left out: no token of theirs" in line for line in found.report.lines())
    assert "Left out, for example: b:9." in found.report.lines()
    with pytest.raises(DataError, match="no sequence is left to work with"):
        encode_records([empty], resolve_template("koat"), plain)


TALK = (
    Turn("system", "짧게"), Turn("user", "수도는?"), Turn("assistant", "서울"),
    Turn("user", "강은?"), Turn("assistant", "한강"),
)  # fmt: skip


def test_every_assistant_turn_is_supervised_with_its_end(chatml: Any) -> None:
    (sequence,) = encode_records([Record({}, TALK)], resolve_template("chat"), chatml).sequences
    runs: list[list[int]] = []
    for index, (token, marked) in enumerate(zip(sequence.token_ids, sequence.supervised, strict=True)):
        if marked and not sequence.supervised[index - 1]:
            runs.append([])
        if marked:
            runs[-1].append(token)
    assert [chatml.decode(run) for run in runs] == ["서울<|im_end|>", "한강<|im_end|><|endoftext|>"]
    messages = [{"role": turn.role, "content": turn.text} for turn in TALK]
    whole = chatml.apply_chat_template(messages, tokenize=False).rstrip("\n")
    assert chatml.decode(sequence.token_ids) == whole + "<|endoftext|>"
    prompt = chatml.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    start = sequence.supervised.index(True)
    assert list(sequence.token_ids[:start]) == encode_prompt(prompt, chatml)


def test_a_chat_template_that_writes_beginning_and_end(with_bos: Any) -> None:
    (sequence,) = encode_records([Record({}, TALK[1:])], resolve_template("chat"), with_bos).sequences
    assert with_bos.decode(sequence.token_ids) == ("<s>[INST] 수도는? [/INST] 서울 </s>[INST] 강은? [/INST] 한강 </s>")
    assert sequence.token_ids.count(with_bos.bos_token_id) == 1
    supervised = [token for token, marked in zip(sequence.token_ids, sequence.supervised, strict=True) if marked]
    assert with_bos.decode(supervised) == " 서울 </s> 한강 </s>"


def test_turns_after_the_last_answer_are_counted(chatml: Any) -> None:
    whole = encode_records([Record({}, TALK)], resolve_template("chat"), chatml)
    longer = encode_records([Record({}, (*TALK, Turn("user", "그리고?")))], resolve_template("chat"), chatml)
    assert longer.sequences == whole.sequences
    assert (whole.report.num_trailing, longer.report.num_trailing) == (0, 1)


def test_overflow_error_names_count_longest_and_sources(plain: Any) -> None:
    templates = resolve_template("koat")
    lengths = [len(sequence) for sequence in encode_records(ask(), templates, plain).sequences]
    limit = sorted(lengths)[1]
    with pytest.raises(DataError) as caught:
        encode_records(ask(), templates, plain, max_length=limit)
    longest = lengths.index(max(lengths))
    for part in (
        f"1 of 3 sequences are longer than max_length={limit}",
        f"has {max(lengths)} (q:{longest})",
        "=drop",
    ):
        assert part in str(caught.value)
    assert encode_records(ask(), templates, plain, max_length=max(lengths)).report.num_sequences == 3
    with pytest.raises(DataError, match="unknown overflow 'dorp'"):
        encode_records(ask(), templates, plain, overflow="dorp")
    with pytest.raises(DataError, match="unknown loss_on 'respons'"):
        encode_records(ask(), templates, plain, loss_on="respons")


def test_overflow_drop(plain: Any) -> None:
    templates = resolve_template("koat")
    whole = encode_records(ask(), templates, plain).sequences
    limit = max(map(len, whole)) - 1
    found = encode_records(ask(), templates, plain, max_length=limit, overflow="drop")
    assert found.sequences == [sequence for sequence in whole if len(sequence) <= limit]
    assert found.report.num_dropped == 1
    assert found.report.longest == limit + 1
    assert any(line.startswith(f"1 left out: longer than max_length={limit}") for line in found.report.lines())


def cut_by_trial(records: list[Record], templates: list[Any], tokenizer: Any, limit: int) -> list[Any]:
    """The oracle: try every length of the context, and keep the longest with which all records fit."""
    for num_kept in range(len(CONTEXT), -1, -1):
        shorter = [replace(r, fields={**r.fields, "context": CONTEXT[:num_kept]}) for r in records]
        sequences = encode_records(shorter, templates, tokenizer).sequences
        if max(map(len, sequences)) <= limit:
            return sequences
    raise AssertionError("nothing fits")


@pytest.mark.parametrize("name", ["koalpaca-context", "koat", "chat", "koalpaca-question-first"])
def test_truncated_contexts_are_cut_alike_and_kept_as_long_as_can_be(chatml: Any, name: str) -> None:
    templates = resolve_template(name)
    whole = encode_records(ask(), templates, chatml).sequences
    limit = min(map(len, whole)) - 20
    found = encode_records(ask(), templates, chatml, max_length=limit, overflow="truncate_context")
    assert found.report.num_truncated == 3
    if name == "koalpaca-question-first":
        # Nothing is shared behind different questions, so each keeps what it can.
        expected = [cut_by_trial([record], templates, chatml, limit)[0] for record in ask()]
    else:
        expected = cut_by_trial(ask(), templates, chatml, limit)
    assert found.sequences == expected
    assert not any("\ufffd" in chatml.decode(sequence.token_ids) for sequence in found.sequences)


def test_answers_that_were_cut_away_are_counted(plain: Any) -> None:
    templates = resolve_template("koat")
    short = encode_records(ask(CONTEXT[:28]), templates, plain).report.longest
    report = encode_records(ask(), templates, plain, max_length=short, overflow="truncate_context").report
    # "정답" stood at the end; that the prompt's own words hold it does not count. "흐른다" and "서울" stay.
    assert (report.num_truncated, report.num_cut_away_answers) == (3, 1)
    assert any(line.startswith("1 of these lost their answer") for line in report.lines())


def test_what_does_not_fit_without_any_context_is_left_out(plain: Any) -> None:
    long = Record({"instruction": "x " * 200, "context": "c", "output": "y"}, source="l:1")
    bare = Record({"instruction": "x " * 200, "output": "y"}, source="l:2")
    found = encode_records(
        [*ask(), long, bare], resolve_template("koat"), plain, max_length=120, overflow="truncate_context"
    )
    assert (found.report.num_unfit, len(found.sequences)) == (2, 3)
    assert any(
        "2 left out: longer than max_length=120 tokens even with no context" in line for line in found.report.lines()
    )
    assert found.report.left_out == ["l:1", "l:2"]


def test_short_siblings_keep_their_whole_context(plain: Any) -> None:
    templates = resolve_template("koat")
    whole = encode_records(ask(), templates, plain).sequences
    limit = max(map(len, whole)) - 1
    found = encode_records(ask(), templates, plain, max_length=limit, overflow="truncate_context")
    assert found.report.num_truncated == 1
    assert [a == b for a, b in zip(found.sequences, whole, strict=True)] == [len(s) <= limit for s in whole]


def test_an_answer_of_weight_0_is_read_and_not_trained_on(chatml: Any) -> None:
    turns = (Turn("user", "u"), Turn("assistant", "a", supervised=False), Turn("user", "v"), Turn("assistant", "b"))
    template = resolve_template("chat")
    plain = tuple(replace(turn, supervised=True) for turn in turns)
    found = encode_records([Record({}, turns)], template, chatml).sequences[0]
    whole = encode_records([Record({}, plain)], template, chatml).sequences[0]
    assert chatml.decode(found.token_ids) == chatml.decode(whole.token_ids)
    trained = [token for token, mark in zip(found.token_ids, found.supervised, strict=True) if mark]
    assert chatml.decode(trained) == "b<|im_end|><|endoftext|>"
    # Behind the last answer that is trained on, nothing is left to learn, not even where to stop.
    last = (*plain[:2], plain[2], replace(plain[3], supervised=False))
    (shorter,) = encode_records([Record({}, last)], template, chatml).sequences
    assert shorter == encode_records([Record({}, plain[:2])], template, chatml).sequences[0]
    with pytest.raises(DataError, match=r"1 rows have messages of weight 0.*first is x:1.*loss_on=response"):
        encode_records([Record({}, turns, source="x:1")], template, chatml, loss_on="all")


def test_system_messages_without_a_place_are_counted(chatml: Any) -> None:
    fields = {"instruction": "u", "output": "a", "system": "s"}
    talk = (Turn("system", "s"), Turn("user", "u"), Turn("assistant", "a"))
    records = [Record(fields), Record(fields, talk), Record(fields | {"system": " "})]
    custom = TemplateSettings(prompt="{system} {instruction}")
    lines = encode_records(records, resolve_template(["koat", custom, "chat"]), chatml).report.lines()
    assert [line for line in lines if "system" in line] == [
        "2 rows have a system message, and the template koat has no place for it: use data.template=chat."
    ]


def test_rows_with_nothing_in_their_prompt_are_counted_and_kept(chatml: Any) -> None:
    records = [Record({"instruction": text, "input": "", "output": "a"}) for text in ("", " ", "u")]
    records.append(Record({"instruction": "", "input": "x", "output": "a"}))
    for template, expected in (("koat", 3), (["koat", "chat"], 3), ("chat", 2)):
        report = encode_records(records, resolve_template(template), chatml).report
        assert report.num_blank == expected, template
        assert f"{expected} rows have nothing in their prompt: all its fields are empty." in report.lines()
    assert report.num_sequences == 4
    talk = Record({}, (Turn("user", "u"), Turn("assistant", "a")))
    assert encode_records([talk], resolve_template("chat"), chatml).report.num_blank == 0
