"""Readers: every format, from every container, against rows written by hand."""

from __future__ import annotations

import csv
import gzip
import json
import unicodedata
from pathlib import Path

import pytest

from koat.core.errors import DataError
from koat.data.hub import looks_like_hub_id
from koat.data.readers import clean_text, read_records
from koat.data.splits import split_by_title
from koat.data.templates import TextTemplate

ALPACA = [
    {"instruction": "더하기", "input": "1 2", "output": "3"},
    {"instruction": "수도는?", "input": None, "output": "서울", "topic": 7, "tags": ["a"]},
]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def to_lines(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps(ALPACA)),
        ("b.json", json.dumps(ALPACA, indent=2)),
        ("c.json", json.dumps({"data": ALPACA}, indent=1)),
        ("d.json", json.dumps({"data": ALPACA}).replace("}, {", "},\n{")),
        ("e.jsonl", to_lines(ALPACA)),
        ("f.json", to_lines(ALPACA)),
        ("g.txt", "\n" + to_lines(ALPACA).replace("\n", "\r\n\n")),
        ("h.jsonl", "\ufeff" + to_lines(ALPACA)),
    ],
)
def test_alpaca_from_every_container(tmp_path: Path, name: str, text: str) -> None:
    found = read_records(write(tmp_path / name, text))
    assert found.format == "alpaca"
    assert found.bad_rows == []
    assert [dict(record.fields) for record in found.records] == [
        {"instruction": "더하기", "input": "1 2", "output": "3"},
        {"instruction": "수도는?", "input": "", "output": "서울", "topic": "7", "tags": '["a"]'},
    ]


def test_gzip_is_unpacked_whatever_it_is_called(tmp_path: Path) -> None:
    for name in ("rows.jsonl.gz", "rows.jsonl"):
        (tmp_path / name).write_bytes(gzip.compress(to_lines(ALPACA).encode()))
        assert len(read_records(str(tmp_path / name)).records) == 2


def test_sources_name_line_or_item(tmp_path: Path) -> None:
    lines = read_records(write(tmp_path / "a.jsonl", "\n" + to_lines(ALPACA)))
    assert [record.source for record in lines.records] == [f"{tmp_path}/a.jsonl:2", f"{tmp_path}/a.jsonl:3"]
    items = read_records(write(tmp_path / "a.json", json.dumps(ALPACA)))
    assert [record.source for record in items.records] == [f"{tmp_path}/a.json: item {n}" for n in (1, 2)]


def test_line_separators_inside_strings_do_not_split_rows(tmp_path: Path) -> None:
    rows = [{"instruction": "a\u2028b\x85c", "output": "d\u2029e"}]
    record = read_records(write(tmp_path / "a.jsonl", to_lines(rows))).records[0]
    assert (record.fields["instruction"], record.fields["output"]) == ("a\u2028b\x85c", "d\u2029e")


@pytest.mark.parametrize("answer", ["completion", "response"])
def test_prompt_completion_answers_to_both_names(tmp_path: Path, answer: str) -> None:
    found = read_records(write(tmp_path / "a.jsonl", to_lines([{"prompt": "p", answer: "c", "k": True}])))
    assert found.format == "prompt-completion"
    assert dict(found.records[0].fields) == {
        "prompt": "p", "completion": "c", "instruction": "p", "output": "c", "k": "true"
    }  # fmt: skip


def test_chat_and_sharegpt_are_the_same_conversation(tmp_path: Path) -> None:
    talk = [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b")]
    names = {"user": "human", "assistant": "gpt"}
    messages = {"messages": [{"role": role, "content": text} for role, text in talk], "id": "x"}
    shares = {"conversations": [{"from": names.get(role, role), "value": text} for role, text in talk]}
    for row in (messages, shares):
        found = read_records(write(tmp_path / "a.jsonl", to_lines([row])))
        assert found.format == "chat"
        assert [(turn.role, turn.text) for turn in found.records[0].turns] == talk
        assert "instruction" not in found.records[0].fields
    short = {"messages": messages["messages"][:3]}
    record = read_records(write(tmp_path / "b.json", json.dumps([short]))).records[0]
    assert record.fields["instruction"] == "u"
    assert record.fields["output"] == "a"


SQUAD = {
    "version": "1",
    "data": [
        {
            "title": "서울",
            "paragraphs": [
                {
                    "context": "서울은 수도이다.",
                    "qas": [
                        {
                            "id": "q1",
                            "question": "수도는?",
                            "answers": [
                                {"text": "서울", "answer_start": 0},
                                {"text": "서울은", "answer_start": 0},
                            ],
                        },
                        {"id": "q2", "question": "무엇?", "answers": [{"text": "수도", "answer_start": 1}]},
                    ],
                },
                {
                    "context": "한강이 흐른다.",
                    "qas": [{"question": "강은?", "answers": [{"text": "한강", "answer_start": 99}]}],
                },
            ],
        }
    ],
}


@pytest.mark.parametrize("indent", [None, 1])
def test_squad(tmp_path: Path, indent: int | None) -> None:
    found = read_records(write(tmp_path / "q.json", json.dumps(SQUAD, indent=indent)))
    first, second, third = found.records
    assert found.format == "squad"
    assert dict(first.fields) == {
        "context": "서울은 수도이다.",
        "question": "수도는?",
        "instruction": "수도는?",
        "output": "서울",
        "title": "서울",
        "id": "q1",
        "answers": '["서울", "서울은"]',
    }
    assert first.group == second.group != third.group
    assert third.source.endswith("q.json: data[0].paragraphs[1].qas[0]")
    assert [warning.split(": ", 2)[2] for warning in found.warnings] == [
        "answers[0]: at answer_start 1 stands '울은', the answer is '수도'",
        "answers[0]: answer_start 99 lies outside the context (0 to 8)",
    ]


def test_flat_squad_rows(tmp_path: Path) -> None:
    row = {"context": "c d", "question": "q", "answers": {"text": ["d"], "answer_start": [2]}, "title": "t"}
    found = read_records(write(tmp_path / "q.jsonl", to_lines([row])))
    assert found.format == "squad"
    assert (found.records[0].fields["output"], found.records[0].fields["answers"]) == ("d", '["d"]')


def test_columns_of_squad_are_copied_to_their_new_names(tmp_path: Path) -> None:
    found = read_records(write(tmp_path / "q.json", json.dumps(SQUAD)), columns={"input": "context"})
    assert found.records[0].fields["input"] == found.records[0].fields["context"] == "서울은 수도이다."


def test_tsv_is_read_with_quoting_off(tmp_path: Path) -> None:
    text = 'id\tdocument\tlabel\r\n1\t"그는 말했다\t0\r\n\r\n2\t""최고""\t1\n'
    found = read_records(write(tmp_path / "a.tsv", text))
    assert found.format == "table"
    assert [record.fields["document"] for record in found.records] == ['"그는 말했다', '""최고""']
    assert [record.source.rsplit(":", 1)[1] for record in found.records] == ["2", "4"]


def test_csv_is_read_with_standard_quoting(tmp_path: Path) -> None:
    text = 'q,a\n"one, ""two""","line\nbreak"\nx,y\n'
    records = read_records(write(tmp_path / "a.csv", text)).records
    assert [dict(record.fields) for record in records] == [
        {"q": 'one, "two"', "a": "line\nbreak"},
        {"q": "x", "a": "y"},
    ]
    assert [record.source.rsplit(":", 1)[1] for record in records] == ["2", "4"]


def test_csv_cells_may_be_longer_than_the_csv_module_allows_by_itself(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    article = "긴 글, " * before
    records = read_records(write(tmp_path / "a.csv", f'q,a\n"{article}",x\ny,z\n')).records
    assert [record.fields["q"] for record in records] == [article, "y"]
    assert csv.field_size_limit() == before


def test_columns_values_and_cleaning(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "id\tdocument\tlabel\n1\t최고! ㅋㅋ (10/10)\t1\n2\t별로 :( \t 0\n")
    found = read_records(
        path,
        columns={"instruction": "document", "output": "label"},
        values={"output": {"0": "부정", "1": "긍정"}},
        clean={"instruction": "hangul", "output": "strip"},
    )
    assert [dict(record.fields) for record in found.records] == [
        {"id": "1", "instruction": "최고 ㅋㅋ ", "output": "긍정"},
        {"id": "2", "instruction": "별로  ", "output": "부정"},
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_rows_on_one_context_are_one_group(tmp_path: Path, name: str) -> None:
    contexts = ("갑", "을", "갑", "")
    rows = [{"context": text, "question": str(number), "answer": "x"} for number, text in enumerate(contexts)]
    table = "context,question,answer\n" + "".join(f"{','.join(row.values())}\n" for row in rows)
    path = write(tmp_path / name, table if name == "a.csv" else to_lines(rows))
    records = read_records(path, columns={"instruction": "question", "output": "answer"}).records
    first, second, third, fourth = (record.group for record in records)
    assert first == third != second
    assert first and second and not fourth
    # The context is the template's field, whatever the file calls it.
    renamed = read_records(path, columns={"input": "context", "context": "question", "output": "answer"}).records
    assert len({record.group for record in renamed}) == 4


def test_mapped_json_and_unmapped_json_as_a_table(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", to_lines([{"q": "x", "a": "y", "n": 1}]))
    mapped = read_records(path, columns={"instruction": "q", "output": "a"})
    assert (mapped.format, dict(mapped.records[0].fields)) == (
        "alpaca", {"n": "1", "instruction": "x", "input": "", "output": "y"}
    )  # fmt: skip
    assert dict(read_records(path, format="table").records[0].fields) == {"q": "x", "a": "y", "n": "1"}


def test_clean_text() -> None:
    assert clean_text("hangul", "재밌다!! ㅋㅋㅠㅠ 10점\n good漢字") == "재밌다 ㅋㅋㅠㅠ 점\n "
    assert clean_text("strip", " a b\n") == "a b"


def test_hangul_taken_apart_is_cleaned_as_if_it_were_joined(tmp_path: Path) -> None:
    text = "값이 재밌다!! ㅋㅋㅠㅠ 10점 漢字"
    apart = unicodedata.normalize("NFD", text)
    assert apart != text
    assert clean_text("hangul", apart) == clean_text("hangul", text) == "값이 재밌다 ㅋㅋㅠㅠ 점 "
    path = write(tmp_path / "a.tsv", f"d\tlabel\n{apart}\t1\n")
    assert read_records(path, clean={"d": "hangul"}).records[0].fields["d"] == "값이 재밌다 ㅋㅋㅠㅠ 점 "


@pytest.mark.parametrize("of_file", ["NFC", "NFD"])
@pytest.mark.parametrize("of_settings", ["NFC", "NFD"])
@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl"])
def test_names_are_the_same_however_their_letters_are_put_together(
    tmp_path: Path, name: str, of_file: str, of_settings: str
) -> None:
    def spell(text: str, kind: str = of_settings) -> str:
        return unicodedata.normalize(kind, text)  # type: ignore[arg-type]

    rows = [{"문장": "좋다", "분류": "긍정"}, {"문장": "싫다", "분류": "부정"}]
    mark = "," if name == "a.csv" else "\t"
    table = "".join(f"{mark.join(line)}\n" for line in (rows[0], *(row.values() for row in rows)))
    path = write(tmp_path / name, spell(to_lines(rows) if name == "a.jsonl" else table, of_file))
    found = read_records(
        path,
        columns={spell("지시"): spell("문장")},
        values={spell("분류"): {spell("긍정"): "+", spell("부정"): "-"}},
        clean={spell("분류"): "strip"},
    )
    assert [record.fields["분류"] for record in found.records] == ["+", "-"]
    # The text itself stays as it was written.
    assert [record.fields["지시"] for record in found.records] == [spell(row["문장"], of_file) for row in rows]
    own = TextTemplate("own", (spell("{지시}:"),), spell("{분류}"))
    assert own.render(found.records[0])[1].text == "+"


def test_skipping_counts_and_lists_bad_rows(tmp_path: Path) -> None:
    good = json.dumps({"instruction": "a", "output": "b"})
    lines = [good, '{"instruction": "a"', good, '{"instruction": "a"}', "[1]", '{"instruction": "a", "output": " "}']
    found = read_records(write(tmp_path / "a.jsonl", "\n".join(lines)), on_bad_row="skip")
    assert len(found.records) == 2
    assert [message.split(": ")[0].rsplit(":", 1)[1] for message in found.bad_rows] == ["2", "4", "5", "6"]
    with pytest.raises(DataError, match=r"a\.jsonl:2: is not valid JSON"):
        read_records(str(tmp_path / "a.jsonl"))


def test_values_outside_the_map_are_bad_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "d\tlabel\nx\t0\ny\t2\n")
    found = read_records(path, values={"label": {"0": "부정", "1": "긍정"}}, on_bad_row="skip")
    assert [record.fields["label"] for record in found.records] == ["부정"]
    assert found.bad_rows == [f"{path}:3: field 'label' holds '2'; values has words for: 0, 1"]


def test_saved_folder_parquet_and_arrow(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"instruction": "a", "output": "b", "n": 3}, {"instruction": "c", "output": "d", "n": 4}]
    part = datasets.Dataset.from_list(rows)
    expected = [{"instruction": "a", "input": "", "output": "b", "n": "3"}]
    part.save_to_disk(str(tmp_path / "one"))
    part.to_parquet(str(tmp_path / "rows.parquet"))
    datasets.DatasetDict({"first": part, "second": part.select([0])}).save_to_disk(str(tmp_path / "two"))
    arrow = next((tmp_path / "one").glob("*.arrow"))
    for path in (tmp_path / "one", tmp_path / "rows.parquet", arrow):
        found = read_records(str(path))
        assert (found.format, len(found.records)) == ("alpaca", 2)
        assert [dict(found.records[0].fields)] == expected
    assert [dict(record.fields) for record in read_records(f"{tmp_path}/two:second").records] == expected
    with pytest.raises(DataError, match=r"no part 'train'.*first, second.*two:first"):
        read_records(str(tmp_path / "two"))
    with pytest.raises(DataError, match=r"no part 'frist'.*did you mean 'first'"):
        read_records(f"{tmp_path}/two:frist")


def test_stored_rows_in_no_known_format_keep_their_columns(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"text": "t", "label": 1, "none": None}]).to_parquet(str(tmp_path / "x.parquet"))
    found = read_records(str(tmp_path / "x.parquet"), values={"label": {"1": "긍정"}})
    assert found.format == "table"
    assert dict(found.records[0].fields) == {"text": "t", "label": "긍정", "none": ""}


def test_split_by_title(tmp_path: Path) -> None:
    records = read_records(write(tmp_path / "q.json", json.dumps(SQUAD))).records
    split = write(tmp_path / "s.tsv", "title\tsplit\tquestions\n서울\ttrain\t3\n부산\ttest\t1\n")
    assert split_by_title(records, split, "train") == records
    with pytest.raises(DataError, match=r"no part 'tran'.*did you mean 'train'.*train, test"):
        split_by_title(records, split, "tran")
    with pytest.raises(DataError, match="none of the 3 records is in the part 'test'"):
        split_by_title(records, split, "test")
    other = write(tmp_path / "o.tsv", "title\tsplit\n부산\ttest\n")
    with pytest.raises(DataError, match=r"3 of 3 records have a title that it does not list \(1 titles.*'서울'"):
        split_by_title(records, other, "test")
    with pytest.raises(DataError, match=r"no column 'split'.*it has: title, spilt"):
        split_by_title(records, write(tmp_path / "b.tsv", "title\tspilt\n서울\ttrain\n"), "train")
    with pytest.raises(DataError, match=r"c\.tsv:3: '서울' is in 'test' here and in 'train' further up"):
        split_by_title(records, write(tmp_path / "c.tsv", "title\tsplit\n서울\ttrain\n서울\ttest\n"), "train")
    alpaca = read_records(write(tmp_path / "a.json", json.dumps(ALPACA))).records
    with pytest.raises(DataError, match="2 of 2 records have no 'title'"):
        split_by_title(alpaca, split, "train")


@pytest.mark.parametrize(
    ("name", "named", "expected"),
    [
        ("owner/name", False, True),
        ("owner/name:validation", False, True),
        ("owner/name.jsonl", False, False),
        ("./owner/name", False, False),
        ("a/b/c", False, False),
        ("name", False, False),
        ("name", True, True),
        ("tests/name", False, False),
    ],
)
def test_what_may_be_a_hub_id(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, named: bool, expected: bool
) -> None:
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path)
    assert looks_like_hub_id(name, named=named) is expected


def read_turns(path: Path, row: dict[str, object]) -> list[tuple[str, str]]:
    """Write one conversation to a file, read it, and return its roles and texts."""
    (record,) = read_records(write(path, to_lines([row]))).records
    return [(turn.role, turn.text) for turn in record.turns]


def test_a_system_message_beside_the_turns_comes_first(tmp_path: Path) -> None:
    talk = [("human", "u"), ("gpt", "a")]
    shares = {"system": "s", "conversations": [{"from": role, "value": text} for role, text in talk]}
    expected = [("system", "s"), ("user", "u"), ("assistant", "a")]
    assert read_turns(tmp_path / "a.jsonl", shares) == expected
    for nothing in ("", " ", None):
        assert read_turns(tmp_path / "a.jsonl", shares | {"system": nothing}) == expected[1:]
    own = {"system": "s", "messages": [{"role": role, "content": text} for role, text in [("system", "t"), *talk]]}
    assert read_turns(tmp_path / "a.jsonl", own) == [("system", "t"), *expected[1:]]
    # A column may be mapped onto it, and a template that names it has it from the turns too.
    found = read_records(write(tmp_path / "b.jsonl", to_lines([shares])), columns={"system": "system"})
    assert found.records[0].turns[0].text == "s"
    record = read_records(write(tmp_path / "c.jsonl", to_lines([{"messages": own["messages"]}]))).records[0]
    assert record.fields["system"] == "t"


def test_what_messages_hold_and_nothing_renders_is_counted(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "a", "tool_calls": [{"id": 1}], "reasoning_content": "r", "refusal": None}
    rows = [{"messages": [{"role": "user", "content": "u", "weight": 1}, call]}] * 2
    plain = {"messages": [{"role": "user", "content": "u", "name": ""}, {"role": "assistant", "content": "a"}]}
    found = read_records(write(tmp_path / "a.jsonl", to_lines([*rows, plain])))
    expected = "2 messages hold what no template renders, under the keys: tool_calls, reasoning_content"
    assert found.remarks == [expected]
    assert found.describe_oddities() == [expected]
    assert read_records(write(tmp_path / "b.jsonl", to_lines([plain]))).remarks == []
