"""Bad files and rows: one message each that says where, what was received, and what to do."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from koat.core.errors import DataError
from koat.data.readers import clean_text, read_records

GOOD = {"instruction": "a", "output": "b"}


def refuse(path: Path, **options: Any) -> str:
    """Return the message with which a file is refused."""
    with pytest.raises(DataError) as caught:
        read_records(str(path), **options)
    return str(caught.value)


def save(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "a"}, "field 'output' is missing; the row has: instruction"),
        ({"instruction": "a", "outptu": "b"}, "field 'output' is missing (did you mean 'outptu'?)"),
        ({"instruction": 5, "output": "b"}, "field 'instruction' must be text, but holds the number 5"),
        ({"instruction": None, "output": "b"}, "field 'instruction' must be text, but holds nothing (null)"),
        ({"instruction": "a", "output": ["b"]}, "field 'output' must be text, but holds a list of 1"),
        (
            {"instruction": "a", "output": {"x": 1}},
            "field 'output' must be text, but holds an object with the keys x",
        ),
        ({"instruction": "a", "output": " \n"}, "field 'output' is empty; it must hold text"),
        ({"instruction": "", "output": "b"}, "field 'instruction' is empty"),
        (
            {"instruction": "a", "input": 3, "output": "b"},
            "field 'input' must be text, but holds the number 3",
        ),
        ({"instruction": "a", "output": "\ud83d"}, "field 'output' holds '\\ud83d', half of a character"),
        ("text", "a row must be an object with named fields, but is the text 'text'"),
    ],
)
def test_rows(tmp_path: Path, row: Any, expected: str) -> None:
    path = save(tmp_path / "a.jsonl", GOOD, row)
    message = refuse(path)
    assert message.startswith(f"{path}:2: {expected}")
    assert message.endswith("or set data.on_bad_row=skip to leave broken rows out")
    assert read_records(str(path), on_bad_row="skip").bad_rows[0].startswith(f"{path}:2: {expected}")


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ("hi", "field 'messages' must be a list of messages, but holds the text 'hi'"),
        ([], "field 'messages' has 0 messages and none from the assistant"),
        ([{"role": "user", "content": "u"}], "has 1 messages and none from the assistant"),
        (
            [{"role": "asistant", "content": "u"}],
            "messages[0]: unknown role 'asistant' (did you mean 'assistant'?)",
        ),
        (
            [{"role": "tool", "content": "u"}],
            "messages[0]: unknown role 'tool'; known: system, user, assistant",
        ),
        ([{"role": "user"}], "messages[0]: field 'content' is missing; the row has: role"),
        (
            [{"role": "user", "content": ["u"]}],
            "messages[0]: field 'content' must be text, but holds a list of 1",
        ),
        (["u"], "messages[0] must be an object with 'role' and 'content', not the text 'u'"),
        (
            [{"role": "user", "content": "u"}, {"role": "assistant", "content": ""}],
            "messages[1]: field 'content' is empty",
        ),
        (
            [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "weight": 0.5}],
            "messages[1]: field 'weight' must be 0 (not trained on) or 1, but holds the number 0.5",
        ),
        (
            [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "weight": 0}],
            "field 'messages' has 2 messages but all of weight 0: nothing to learn",
        ),
    ],
)
def test_conversations(tmp_path: Path, messages: Any, expected: str) -> None:
    assert expected in refuse(save(tmp_path / "a.jsonl", {"messages": messages}))


@pytest.mark.parametrize(
    ("paragraph", "expected"),
    [
        (
            {"qas": [{"question": "q", "answers": [{"text": "a"}]}]},
            "paragraphs[0].qas[0]: field 'context' is missing",
        ),
        ({"context": "c"}, "paragraphs[0]: field 'qas' must be a list, but holds nothing (null)"),
        ({"context": "c", "qas": [3]}, "paragraphs[0].qas[0]: must be an object, but is the number 3"),
        ({"context": "c", "qas": [{"answers": [{"text": "a"}]}]}, "qas[0]: field 'question' is missing"),
        ({"context": "c", "qas": [{"question": "q"}]}, "qas[0]: field 'answers' must be a list of answers"),
        (
            {"context": "c", "qas": [{"question": "q", "answers": []}]},
            "field 'answers' is empty; a question needs",
        ),
        (
            {"context": "c", "qas": [{"question": "q", "answers": [{"text": 3}]}]},
            "answers[0]: field 'text' must be text, but holds the number 3",
        ),
        (7, "paragraphs[0]: must be an object, but is the number 7"),
    ],
)
def test_squad_parts(tmp_path: Path, paragraph: Any, expected: str) -> None:
    path = tmp_path / "q.json"
    path.write_text(json.dumps({"data": [{"title": "t", "paragraphs": [paragraph]}]}), encoding="utf-8")
    assert f"{path}: data[0]." in refuse(path)
    assert expected in refuse(path)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.tsv", "x\ty\n1\t2\n3\n", "a.tsv:3: has 1 columns, but the header names 2: x, y"),
        ("a.csv", "x,y\n1,2,3\n", "a.csv:2: has 3 columns, but the header names 2: x, y"),
        ("a.csv", 'x,y\n1,"open\n', "a.csv:2: is not valid CSV"),
        ("a.tsv", "x\ty\tx\n1\t2\t3\n", "a.tsv:1: the header names x more than once"),
        ("a.tsv", "x\ty\n", "a.tsv: holds no rows; at least one is needed"),
        ("a.jsonl", " \n\n", "a.jsonl: the file is empty"),
        ("a.json", "[]", "a.json: holds no rows"),
        ("a.json", '[\n{"instruction": "a",\n]', "a.json:3: is not valid JSON"),
        ("a.jsonl", '{"instruction": "a"', "a.jsonl:1: is not valid JSON"),
        ("a.txt", "just some words\n", "is in no format that koat knows; it holds text that starts with"),
        ("a.json", "[" * 100_000, "nested too deeply"),
    ],
)
def test_files(tmp_path: Path, name: str, text: str, expected: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert expected in refuse(path)


@pytest.mark.parametrize(
    ("stray", "span"),
    [
        ({3: '3,"a'}, "lines 4 to 1001"),
        ({3: '3,"a', 400: '400,b "quoted" word'}, "lines 4 to 401"),
        ({999: '999,"a'}, "lines 1000 to 1001"),
    ],
)
def test_a_stray_quotation_mark_does_not_swallow_lines(tmp_path: Path, stray: dict[int, str], span: str) -> None:
    lines = ["instruction,output", *(stray.get(number, f"{number},b") for number in range(1, 1001))]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(lines), encoding="utf-8")
    for mode in ("error", "skip"):
        message = refuse(path, on_bad_row=mode)
        assert f"{path}: {span} cannot be read as CSV" in message
        assert f"Correct line {span.split()[1]}" in message


def test_a_bad_line_of_csv_is_one_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('instruction,output\n1,b\n2,"b" c\n3,"b\nb"\n4,"b', encoding="utf-8")
    found = read_records(str(path), on_bad_row="skip")
    assert [record.fields["instruction"] for record in found.records] == ["1", "3"]
    assert [line.split(" (")[0] for line in found.bad_rows] == [f"{path}:{n}: is not valid CSV" for n in (3, 6)]


def test_all_rows_bad_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl", {"instruction": "a", "output": ""}, {"instruction": "a", "output": 1})
    assert refuse(path, on_bad_row="skip").startswith(
        f"{path}: all 2 rows are bad. The first: {path}:1: field 'output'"
    )


def test_unknown_keys_are_shown_with_all_formats(tmp_path: Path) -> None:
    message = refuse(save(tmp_path / "a.jsonl", {"query": "q", "gold": 1}))
    assert "its rows have the keys: query, gold" in message
    for name in ("chat", "squad", "alpaca", "prompt-completion", "table", "datasets"):
        assert f"\n  {name}: " in message


def test_a_named_format_that_the_file_is_not_in(tmp_path: Path) -> None:
    table = tmp_path / "a.tsv"
    table.write_text("x\ty\n1\t2\n", encoding="utf-8")
    assert "is not in the format 'squad'; it holds a table with the columns" in refuse(table, format="squad")
    document = tmp_path / "a.json"
    document.write_text('{"version": 1}', encoding="utf-8")
    assert "'data' with 'paragraphs' is expected; found: version" in refuse(document, format="squad")
    assert "did you mean 'alpaca'" in refuse(document, format="alpacca")


def test_settings_that_name_fields_which_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("id\tdocument\tlabel\n1\tx\t0\n", encoding="utf-8")
    message = refuse(path, columns={"instruction": "documnet"})
    assert "columns names 'documnet', which is not there (did you mean 'document'?)" in message
    assert "id, document, label" in message
    assert "values names 'lable', which is not there (did you mean 'label'?)" in refuse(path, values={"lable": {}})
    assert "clean names 'text'" in refuse(path, clean={"text": "hangul"})
    assert "unknown cleaning 'hangull' (did you mean 'hangul'?)" in refuse(path, clean={"label": "hangull"})
    with pytest.raises(DataError, match="there are: hangul, strip"):
        clean_text("upper", "")
    assert "field 'output' is empty after cleaning" in refuse(
        path, columns={"output": "document"}, clean={"output": "hangul"}
    )


def test_cleaning_does_not_reach_into_conversations(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    path = save(tmp_path / "a.jsonl", {"messages": talk})
    assert "do not reach into conversations (output)" in refuse(path, clean={"output": "strip"})


def test_missing_files_suggest_their_neighbours(tmp_path: Path) -> None:
    save(tmp_path / "Train.jsonl", GOOD)
    assert "near it are: Train.jsonl" in refuse(tmp_path / "trian.jsonl")
    assert f"nor the folder {tmp_path / 'no'}" in refuse(tmp_path / "no/train.jsonl")
    assert "there is no such file" in refuse(Path("train.jsonl"))


def test_encodings_are_named_with_their_conversion(tmp_path: Path) -> None:
    text = "id\tdocument\n1\t정말 재미있는 영화였다\n"
    path = tmp_path / "reviews.tsv"
    names = {"utf-16": "UTF-16", "utf-16-le": "UTF-16LE", "utf-16-be": "UTF-16BE", "utf-32": "UTF-32"}
    for encoding, name in (names | {"cp949": "CP949"}).items():
        path.write_bytes(text.encode(encoding))
        message = refuse(path)
        assert f"it looks like {name}. Convert it: iconv -f {name} -t UTF-8 reviews.tsv > reviews.utf8.tsv" in message
    assert "in line 2 cannot be UTF-8" in message
    path.write_bytes(b"id\tdocument\n1\t\xff\xff\xff\n")
    assert "its encoding is unknown, or the file is damaged" in refuse(path)
    path.write_bytes(text.encode("utf-8-sig"))
    assert dict(read_records(str(path)).records[0].fields) == {
        "id": "1",
        "document": "정말 재미있는 영화였다",
    }


def test_damaged_gzip(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(GOOD).encode())[:-12])
    assert "starts like a gzip file but cannot be unpacked" in refuse(path)
    path.write_bytes(gzip.compress("영화 재미".encode("cp949") * 9))
    assert "unpack it, then iconv -f CP949 -t UTF-8 a.jsonl > a.utf8.jsonl" in refuse(path)


def test_damaged_stored_data(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    path = tmp_path / "a.parquet"
    path.write_bytes(b"not parquet")
    assert f"{path}: cannot be read as stored data" in refuse(path)
