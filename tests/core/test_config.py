"""Settings: layers merge, origins are kept, and every mistake gets one plain line."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, model_validator

from koat.core.config import Layer, Resolved, Section, describe, known_keys, resolve, to_mapping
from koat.core.config_files import dump_yaml, parse_overrides, read_config_file
from koat.core.errors import ConfigError
from koat.core.settings import DataSettings, ModelSettings, TrainingSettings


class Ia3(Section):
    method: Literal["ia3"] = Field("ia3", description="How the model is adapted.")
    targets: Literal["paper", "peft"] | list[str] = Field("paper", description="What is scaled.")


class Lora(Section):
    method: Literal["lora"] = Field("lora", description="How the model is adapted.")
    rank: Annotated[int, Field(gt=0)] = Field(8, description="Rank of the update.")


class Root(Section):
    model: ModelSettings
    data: DataSettings
    adapter: Annotated[Ia3 | Lora, Field(discriminator="method")]
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    other: Annotated[Ia3 | Lora, Field(discriminator="method")] = Field(default_factory=Lora)
    out: Path = Field(Path("runs/new"), description="Where the run is written.")


GOOD: dict[str, Any] = {"model": {"base": "nano"}, "data": {"train": ["a"]}, "adapter": {"method": "ia3"}}


def settle(*layers: dict[str, Any], origins: tuple[str, ...] = ("file", "flag")) -> Resolved[Root]:
    return resolve(Root, [Layer(origin, values) for origin, values in zip(origins, layers, strict=False)])


def complaint(*layers: dict[str, Any]) -> list[str]:
    """Return the lines of the one error, without the count in the first."""
    with pytest.raises(ConfigError) as caught:
        settle(*layers)
    lines = str(caught.value).split("\n")
    for word in ("pydantic", "http", "Input should", "validation error", "type=", "extra_forbidden"):
        assert word not in str(caught.value)
    if len(lines) > 1:
        assert lines[0] == f"{len(lines) - 1} problems in the settings:"
        return [line.strip() for line in lines[1:]]
    return lines


def only(*layers: dict[str, Any]) -> str:
    lines = complaint(*layers)
    assert len(lines) == 1, lines
    return lines[0]


def with_data(**values: Any) -> dict[str, Any]:
    return {**GOOD, "data": {"train": ["a"], **values}}


def with_training(**values: Any) -> dict[str, Any]:
    return {**GOOD, "training": values}


# Merging and origins


def test_later_layers_win_key_by_key_and_origins_follow() -> None:
    resolved = resolve(
        Root,
        [
            Layer("method", {"training": {"learning_rate": 0.02, "warmup": 0.1}}),
            Layer("recipe", {"training": {"warmup": 0.2, "epochs": 3}}),
            Layer("file", GOOD),
            Layer("flag", {"training": {"epochs": 4}}),
        ],
    )
    training = resolved.settings.training
    assert (training.learning_rate, training.warmup, training.epochs) == (0.02, 0.2, 4.0)
    origins = {key: resolved.origins[f"training.{key}"] for key in ("learning_rate", "warmup", "epochs", "seed")}
    assert origins == {"learning_rate": "method", "warmup": "recipe", "epochs": "flag", "seed": "default"}
    assert resolved.origins["adapter.method"] == "file" and resolved.origins["out"] == "default"


def test_plain_mappings_and_lists_are_replaced_whole() -> None:
    first = with_data(columns={"instruction": "q", "output": "a"}, validation=["v", "w"])
    data = settle(first, {"data": {"columns": {"output": "답"}, "validation": ["x"]}}).settings.data
    assert (data.columns, data.validation) == ({"output": "답"}, ["x"])


def test_a_section_replaced_by_a_name_leaves_no_origin_behind() -> None:
    own = {"prompt": "{q}", "response": "{a}"}
    resolved = settle(with_data(template=own), {"data": {"template": "koat"}})
    assert (resolved.settings.data.template, resolved.origins["data.template"]) == ("koat", "flag")
    back = settle(with_data(template="koat"), {"data": {"template": {"prompt": "{q}"}}})
    assert back.origins["data.template.prompt"] == "flag" and back.origins["data.template.response"] == "default"
    layers = [
        with_data(template=own),
        {"data": {"template": "koat"}},
        {"data": {"template": {"prompt": "x"}}},
    ]
    last = settle(*layers, origins=("recipe", "file", "flag"))
    assert to_mapping(last.settings)["data"]["template"]["response"] == "{output}"
    assert last.origins["data.template.response"] == "default"


def test_blank_sections_take_their_defaults() -> None:
    resolved = settle({**GOOD, "training": None, "other": {"rank": 4}})
    assert resolved.settings.training == TrainingSettings()
    assert resolved.settings.other == Lora(rank=4)


def test_layers_are_not_changed_by_resolving() -> None:
    layers = [{**GOOD, "other": {"rank": 4}}, {"training": {"epochs": 2}}]
    before = json.dumps(layers)
    settle(*layers)
    assert json.dumps(layers) == before


def test_one_text_stands_for_a_list_of_one_and_numbers_for_coded_keys() -> None:
    data = settle(with_data(train="a.jsonl", values={"label": {0: "부정", 1: "긍정"}})).settings.data
    assert data.train == ["a.jsonl"] and data.values == {"label": {"0": "부정", "1": "긍정"}}


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        settle(GOOD).settings.training.epochs = 2  # type: ignore[misc]


def test_settings_survive_the_way_through_a_file(tmp_path: Path) -> None:
    template = [{"prompt": "### 질문: {q}\n\n### 답변:", "response": "none"}, "koat"]
    values = {
        **with_data(template=template, splits="1e-3", values={"label": {0: "no"}}),
        "out": Path("실험/1"),
    }
    settings = settle(values).settings
    plain = to_mapping(settings)
    assert plain["out"] == "실험/1" and json.loads(json.dumps(plain)) == plain
    (tmp_path / "config.yaml").write_text(dump_yaml(plain), encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps(plain), encoding="utf-8")
    assert settle(read_config_file(tmp_path / "config.yaml")).settings == settings
    assert settle(read_config_file(tmp_path / "config.json")).settings == settings


def test_describe_lists_every_leaf_in_schema_order() -> None:
    rows = describe(settle(GOOD, {"training": {"epochs": 2}}))
    keys = [row.key for row in rows]
    assert keys[0] == "model.base" and keys[-1] == "out" and len(keys) == len(set(keys))
    assert keys.index("adapter.method") < keys.index("training.batch_size")
    row = rows[keys.index("training.epochs")]
    assert (row.value, row.origin) == (2.0, "flag") and row.help.startswith("Passes over")
    assert set(keys) <= set(known_keys(Root)) and set(keys) == set(settle(GOOD).origins)


def test_known_keys_descend_into_every_branch() -> None:
    keys = known_keys(Root)
    for key in (
        "adapter.targets",
        "adapter.rank",
        "data.template",
        "data.template.prompt",
        "data.columns",
        "out",
    ):
        assert keys.count(key) == 1
    assert "adapter" not in keys and "training" not in keys


# Complaints


def test_all_problems_are_told_at_once_with_their_origins() -> None:
    lines = complaint(
        {"model": {"base": "nano"}, "data": {"train": ["a"]}, "trainning": {}, "training": {"batch_size": 0}},
        {"adapter": {"method": "lora", "rank": "big"}, "training": {"schedule": "cosin"}},
    )
    assert [line.partition(":")[0] for line in lines] == [
        "adapter.rank", "training.batch_size", "training.schedule", "trainning",
    ]  # fmt: skip
    assert "'big'" in lines[0] and "a whole number greater than 0" in lines[0] and "(from flag)" in lines[0]
    assert "received 0 (from file)" in lines[1]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (with_training(learnin_rate=1), ["training.learnin_rate", "'training.learning_rate'?"]),
        (with_training(lr=1), ["training.lr", "did you mean 'training.learning_rate'?"]),
        (with_training(per_device_train_batch_size=1), ["did you mean 'training.batch_size'?"]),
        ({**GOOD, "learning_rate": 1}, ["learning_rate", "did you mean 'training.learning_rate'?"]),
        (with_data(learning_rate=1), ["data.learning_rate", "did you mean 'training.learning_rate'?"]),
        (with_training(zzz=1), ["training.zzz", "known: batch_size, epochs"]),
        ({**GOOD, "training.epochs": 1}, ["dots", "training: {epochs: ...}"]),
        (
            with_data(template={"prompt": "x", "respons": "y"}),
            ["data.template.respons", "'data.template.response'?"],
        ),
        (
            with_data(template=["koat", {"promt": "x", "prompt": "y"}]),
            ["data.template[1].promt", ".prompt'?"],
        ),
    ],
)
def test_unknown_keys_are_answered_with_the_nearest(values: dict[str, Any], words: list[str]) -> None:
    line = only(values)
    assert "(from file)" in line or "dots" in line
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (with_training(schedule="cosin"), ["'cosin'", "one of 'cosine', 'linear'", "did you mean 'cosine'?"]),
        (with_training(warmup=1.5), ["received 1.5", "a number of at least 0 and of at most 1"]),
        (with_training(epochs=True), ["received true", "a number greater than 0"]),
        (with_training(epochs=float("inf")), ["received inf", "a number"]),
        (with_training(max_steps="x"), ["'x'", "a whole number greater than 0, or none"]),
        (
            with_training(betas=[0.9]),
            ["training.betas: received [0.9]", "a list of 2: a number of at least 0 and less"],
        ),
        (with_training(betas=[0.9, 1]), ["training.betas[1]: received 1", "a number of at least 0 and less than 1"]),
        (with_training(betas=[-0.1, 0.9]), ["training.betas[0]: received -0.1", "of at least 0 and less than 1"]),
        (
            with_training(seed=2**63),
            ["received 9223372036854775808", "of at least 0 and less than 9223372036854775808"],
        ),
        (with_training(betas=[0.9, "x"]), ["training.betas[1]: received 'x'", "allowed: a number"]),
        (with_training(seed=None), ["received nothing", "a whole number"]),
        (with_data(train=[]), ["data.train: received []", "at least 1 item"]),
        (with_data(train=["a", 7]), ["data.train[1]: received 7", "text", "quotes"]),
        (with_data(columns={"a": 3}), ["data.columns.a: received 3", "text"]),
        (with_data(columns="x"), ["data.columns: received 'x'", "a mapping of text to text"]),
        (with_data(clean={"a": "hangull"}), ["data.clean.a: received 'hangull'", "did you mean 'hangul'?"]),
        (with_data(template=5), ["data.template: received 5", "text, or a group of settings (prompt"]),
        ({**GOOD, "model": {"base": "nano", "revision": 12}}, ["model.revision", "received 12", "quotes"]),
        ({**GOOD, "training": 5}, ["training: received 5", "a group of settings (batch_size"]),
        ({**GOOD, "adapter": {"method": "ia3", "targets": 5}}, ["'paper', 'peft', or a list of text"]),
        ({**GOOD, "out": 3}, ["out: received 3", "a path"]),
    ],
)
def test_wrong_values_say_what_came_and_what_is_allowed(values: dict[str, Any], words: list[str]) -> None:
    line = only(values)
    assert "(from file)" in line
    for word in words:
        assert word in line


def test_missing_keys_say_what_they_are_for_and_how_to_set_them() -> None:
    lines = complaint({})
    assert [line.partition(":")[0] for line in lines] == ["model.base", "data.train", "adapter.method"]
    assert "Folder or Hub id" in lines[0] and "model.base=..." in lines[0] and "in the file" in lines[0]
    assert "Files, folders or Hub ids to train on" in lines[1] and "data.train=..." in lines[1]
    assert "How the model is adapted." in lines[2] and "'ia3', 'lora'" in lines[2]


def test_a_mapping_is_judged_as_the_section_it_means() -> None:
    line = only(with_data(template={"response": "{output}"}))
    assert line.startswith("data.template.prompt: missing. What is given") and "text" not in line


def test_an_unknown_method_lists_the_known_ones() -> None:
    line = only({**GOOD, "adapter": {"method": "lorra", "rank": 3}})
    assert line.startswith("adapter.method: received 'lorra' (from file)")
    assert "'ia3', 'lora'" in line and "did you mean 'lora'?" in line


def test_a_key_of_another_method_is_named_as_such() -> None:
    line = only({**GOOD, "adapter": {"method": "lora", "rank": 4}}, {"adapter": {"method": "ia3"}})
    assert line.startswith("adapter.rank: does not go with method 'ia3' (from file)") and "adapter.method" in line


def test_the_helps_own_template_can_be_typed(tmp_path: Path) -> None:
    expected = "### 질문: {instruction}\n\n### 답변:"
    help = only(with_data(template={"response": "{output}"}))
    in_file, in_shell = re.findall(r"(prompt: \".*\") in a file, (data\.template\.prompt='.*') in a shell", help)[0]
    (tmp_path / "a.yaml").write_text(f"data:\n  template:\n    {in_file}\n", encoding="utf-8")
    (typed,) = shlex.split(in_shell)
    for given in (read_config_file(tmp_path / "a.yaml"), parse_overrides([typed])):
        template = settle(with_data(), given).settings.data.template
        assert template.prompt == expected


@pytest.mark.parametrize("field", ["prompt", "response"])
def test_a_line_break_that_is_spelt_out_is_refused(field: str) -> None:
    own = {"prompt": "{q}", "response": "{a}", field: "{x}\\n"}
    for template in (own, ["koat", own]):
        line = only(with_data(template=template))
        assert f"{field}: received '{{x}}\\\\n' (from file); it holds a backslash and the letter n" in line
        assert "double quotes" in line and "in a shell" in line


def test_long_values_are_shortened() -> None:
    assert len(only(with_training(schedule="x" * 500))) < 250


class Dates(Section):
    first: int = 0
    last: int = 0

    @model_validator(mode="after")
    def check_order(self) -> Dates:
        if self.last < self.first:
            raise ValueError("`last` comes before `first`; exchange them")
        return self


class Calendar(Section):
    dates: Dates = Field(default_factory=Dates)
    name: str = "x"


def test_a_sections_own_rule_speaks_in_its_own_words_beside_other_problems() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(Calendar, [Layer("file", {"dates": {"first": 3, "last": 1}, "nam": "y"})])
    lines = str(caught.value).split("\n  ")
    assert lines[1] == "dates: `last` comes before `first`; exchange them"
    assert "did you mean 'name'?" in lines[2]


# Files


def test_yaml_scalars_mean_what_they_look_like(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "a: 1e-3\nb: none\nc: no\nd: 010\ne: 2024-01-01\nf: 12e4567\ng: '1e-3'\nh: 1:30\ni: -.5\nj: true\n"
        "k: [1, 2.0]\nl:\n  0: 부정\n",
        encoding="utf-8",
    )
    assert read_config_file(file) == {
        "a": 0.001, "b": None, "c": "no", "d": 10, "e": "2024-01-01", "f": "12e4567", "g": "1e-3",
        "h": "1:30", "i": -0.5, "j": True, "k": [1, 2.0], "l": {"0": "부정"},
    }  # fmt: skip


def test_dump_yaml_reads_back_equal(tmp_path: Path) -> None:
    texts = [
        "1e-3",
        "none",
        "no",
        "yes",
        "010",
        "1",
        "",
        "~",
        "true",
        "<<",
        "# x",
        "a: b",
        "{q}",
        "한\n글",
        "1:30",
    ]
    value = {
        "texts": texts,
        "numbers": [1, -2, 1e-05, 1e300, 0.1, 2.0],
        "rest": [None, True, {}],
        "no": "x" * 3000,
    }
    file = tmp_path / "a.yaml"
    file.write_text(dump_yaml(value), encoding="utf-8")
    assert read_config_file(file) == value and "한" in dump_yaml({"a": "한글"})


def test_an_empty_file_and_a_byte_order_mark_are_fine(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("# nothing yet\n")
    (tmp_path / "b.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_config_file(tmp_path / "a.yaml") == {} and read_config_file(tmp_path / "b.yaml") == {"a": 1}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.yaml", b"a: 1\nb: [1, 2\nc: 3\n", ["line 3", "not valid YAML"]),
        ("a.yaml", b"a: 1\n\tb: 2\n", ["line 2", "YAML"]),
        ("a.yaml", b"- 1\n- 2\n", ["[1, 2]", "a mapping"]),
        ("a.yaml", b"t:\n  x: 1\n  y: 2\n  x: 3\n", ["'x'", "twice", "lines 2 and 4"]),
        ("a.yaml", b"t: {x: 1, x: 3}\n", ["'x'", "twice"]),
        ("a.yaml", b"t: !!python/object/apply:os.getcwd []\n", ["YAML", "line 1"]),
        ("a.yaml", "이름: 값".encode("cp949"), ["UTF-8"]),
        ("a.yaml", b"a: \x00\n", ["YAML"]),
        ("a.json", b'{"a": 1,\n "b" 2}', ["line 2", "JSON"]),
        ("a.json", b'{"a": {"b": 1, "b": 2}}', ["'b'", "twice"]),
        ("a.json", b"[1]", ["a mapping"]),
    ],
)
def test_broken_files_are_named_with_the_line(tmp_path: Path, name: str, content: bytes, words: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_config_file(tmp_path / name)
    for word in [str(tmp_path / name), *words]:
        assert word in str(caught.value)


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "my_run.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"no such file \(did you mean 'my_run.yaml'"):
        read_config_file(tmp_path / "my_runs.yaml")
    with pytest.raises(ConfigError, match=r"no such file$"):
        read_config_file(tmp_path / "nowhere" / "my_runs.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config_file(tmp_path)


# Overrides


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("3", 3),
        ("none", None),
        ("null", None),
        ("true", True),
        ("yes", "yes"),
        ("[a, 2]", ["a", 2]),
        ("{a: 1}", {"a": 1}),
        ("a=b=c", "a=b=c"),
        ('"줄\\n바꿈"', "줄\n바꿈"),
        ("'3'", "3"),
        ("한글 문장", "한글 문장"),
        ("### 질문: {q}", "### 질문: {q}"),
        ("{question}", "{question}"),
        ("[INST] {q}", "[INST] {q}"),
        ("{q} 정답:", "{q} 정답:"),
        ("C:\\data # 1", "C:\\data # 1"),
        ("*.jsonl", "*.jsonl"),
        ("", None),
    ],
)
def test_override_values(text: str, value: Any) -> None:
    parsed = parse_overrides([f"a.b={text}"])
    assert parsed == {"a": {"b": value}} and type(parsed["a"]["b"]) is type(value)


def test_overrides_nest_and_the_last_wins() -> None:
    assert parse_overrides(["a.b=1", "c=x", "a.d.e=2", "a.b=3"]) == {"a": {"b": 3, "d": {"e": 2}}, "c": "x"}
    assert parse_overrides([]) == {}


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (["training.epochs"], ["'training.epochs'", "key=value"]),
        (["=3"], ["key=value"]),
        (["a..b=3"], ["'a..b=3'", "key=value"]),
        (["a.=3"], ["key=value"]),
        (["a=1", "a.b=2"], ["'a'", "'a.b'", "keep one"]),
        (["a.b.c=2", "a.b={x: 1}"], ["'a.b'", "'a.b.c'"]),
        (['a="x'], ["a:", "quote"]),
    ],
)
def test_wrong_overrides_are_refused(items: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides(items)
    for word in words:
        assert word in str(caught.value)


def test_core_imports_no_torch() -> None:
    names = ("config", "fingerprint", "json_lines", "run_folder", "settings")
    code = "import sys, " + ", ".join(f"koat.core.{name}" for name in names) + "\n"
    code += "print('torch' in sys.modules)"
    path = str(Path(__file__).parents[2] / "src")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": path}, check=True
    )
    assert done.stdout.strip() == "False"


def test_none_is_a_word_where_it_is_a_choice() -> None:
    """On the command line and in files `none` is nothing; a choice of that name is meant all the same."""

    class Choice(Section):
        kind: Literal["none", "some"] = "some"
        perhaps: Literal["none", "some"] | None = "some"

    found = resolve(Choice, [Layer("flag", {"kind": None, "perhaps": None})]).settings
    assert (found.kind, found.perhaps) == ("none", None)


@pytest.mark.parametrize("prompt", [r"$\nabla f$ of {x}", "C:" + r"\new\{x}", "{x}\n" + r"\n is a line break"])
def test_a_backslash_before_other_letters_is_no_line_break(prompt: str) -> None:
    template = resolve(
        DataSettings, [Layer("flag", {"train": ["a"], "template": {"prompt": prompt}})]
    ).settings.template
    assert template.prompt == prompt
