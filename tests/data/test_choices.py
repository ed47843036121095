"""The other words of a coded field become wrong answers of the same prompt."""

from __future__ import annotations

from typing import Any

import pytest

from koat.data.encode import encode_records
from koat.data.prompts import TextTemplate
from koat.data.records import Record

WORDS = {"label": ["부정", "긍정", "긍정", "중립"]}
RECORDS = [Record({"document": "좋다", "label": "긍정"}), Record({"document": "나쁘다 정말", "label": "부정"})]
TEMPLATE = TextTemplate("review", ("{document}:",), " {label}")


def encode(tokenizer: Any, template: TextTemplate = TEMPLATE, **options: Any) -> Any:
    return encode_records(RECORDS, [template], tokenizer, **options)


def test_each_choice_is_what_a_record_with_that_word_would_be(plain: Any) -> None:
    found = encode(plain, choices=WORDS).sequences
    for record, sequence in zip(RECORDS, found, strict=True):
        others = [word for word in dict.fromkeys(WORDS["label"]) if word != record.fields["label"]]
        records = [record, *(Record({**record.fields, "label": word}) for word in others)]
        assert sequence.list_choices()[1:] == encode_records(records, [TEMPLATE], plain).sequences[1:]
        assert sequence.list_choices()[0] is sequence and len(sequence.alternatives) == 2


def test_without_choices_there_are_none(plain: Any) -> None:
    assert all(sequence.alternatives == () for sequence in encode(plain).sequences)
    both = TextTemplate("both", ("{document} {label}?",), " {label}")
    assert all(sequence.alternatives == () for sequence in encode(plain, both, choices=WORDS).sequences)
    assert all(sequence.list_choices() == [sequence] for sequence in encode(plain).sequences)


def test_the_longest_choice_counts_for_the_limit(plain: Any) -> None:
    long = {"label": ["부정", "긍정", "아주 아주 아주 긍정"]}
    longest = max(len(choice) for each in encode(plain, choices=long).sequences for choice in each.list_choices())
    kept = encode(plain, choices=long, max_length=longest - 1, overflow="drop")
    assert (kept.report.num_dropped, kept.report.longest) == (1, longest)
    with pytest.raises(Exception, match="longer than max_length"):
        encode(plain, choices=long, max_length=longest - 1)


def test_a_wrong_answer_ends_as_often_as_the_right_one(plain: Any) -> None:
    """Chat templates write the end themselves; a second one would be a token that only wrong answers have."""
    ending = TextTemplate("ending", ("{document}:",), " {label}<|endoftext|>")
    for sequence in encode(plain, ending, choices=WORDS).sequences:
        for choice in sequence.list_choices():
            assert choice.token_ids.count(plain.eos_token_id) == 1
            assert choice.token_ids[-1] == plain.eos_token_id
