"""The report's page: what is on it, in both languages, with nothing from elsewhere, and nothing that runs by itself."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import koat
from koat.core.errors import ConfigError, RunFolderError
from koat.workflows.comparing.report import write_report
from koat.workflows.comparing.run_facts import LONGEST, name_data, set_side_by_side
from koat.workflows.comparing.scored import Source, Subject
from tests.tiny_base import call_koat
from tests.workflows.scored_folders import make_answers, write_run, write_scores

EVIL = '<script>alert(1)</script> & "네이버" 영화'
VOID = {"meta", "input", "br", "link", "img", "hr"}
OPTIONAL = {"path", "circle", "line", "rect", "use", "polyline"}
"""Elements of SVG that close themselves."""


class Page(HTMLParser):
    """Reads a page, refusing elements that are left open, and keeps attributes, sections and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(self.source)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in OPTIONAL, f"<{tag}/> is left open by browsers"
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    @property
    def sections(self) -> list[str]:
        return [attrs["id"] for tag, attrs in self.found if tag == "section"]


def add_texts(folder: Path, text: str = EVIL) -> None:
    """Put a text and a raw answer into every prediction of a folder."""
    for path in folder.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        lines = [json.dumps({**row, "text": {"document": f"{text} {row['id']}"}}) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def add_training(run: Path, trainable: int, seconds: float) -> None:
    """Give a run a manifest and recorded steps; two of its data files have one name."""
    manifest = {
        "finished": True, "method": "ia3", "trainable_parameters": trainable, "total_parameters": 8_000_000,
        "base": {"name": "/somewhere/secret/my-base", "fingerprint": "abcdef0123456789"},
        "data": {f"/somewhere/secret/{name}": {"sha256": digits * 32, "bytes": 10} for name, digits in
                 (("rows.tsv", "12"), ("a/train.tsv", "34"), ("b/train.tsv", "56"))},
        "versions": {"koat": "0.1.0"}, "hardware": {"device": "cpu"},
        "result": {"steps": 4, "training_seconds": seconds, "peak_bytes": 2**30, "best_validation_loss": 0.5},
    }  # fmt: skip
    (run / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    steps: list[dict[str, Any]] = [{"step": step, "loss": 2.0 / step} for step in range(1, 5)]
    steps[2] |= {"loss": float("nan"), "validation_loss": 0.7}
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps), encoding="utf-8")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two runs of one method, one of another, and a base without training; the base is worst."""
    root = tmp_path_factory.mktemp("runs")
    runs = [
        write_run(root / "ia3-a", make_answers(200, range(10)), seed=0),
        write_run(root / "ia3-b", make_answers(200, range(5, 17)), seed=1),
        write_run(root / "lora", make_answers(200, range(20, 28)), rate=0.001),
    ]
    for number, run in enumerate(runs):
        add_training(run, (20_000, 20_000, 900_000)[number], 10.0 + number)
        add_texts(run / "predictions")
    base = write_scores(root / "base", make_answers(200, range(40, 160)), conditions={"precision": "bfloat16"})
    add_texts(base)
    return [*map(str, runs), str(base)]


@pytest.fixture(scope="module")
def page(places: list[str], tmp_path_factory: pytest.TempPathFactory) -> Page:
    out = tmp_path_factory.mktemp("page") / "report.html"
    names = dict(zip(places, ("IA3", "IA3", "LoRA <x>", "base"), strict=True))
    assert write_report(places, out, names=names, title="Mine & yours", reproduce=["koat experiment <mine>"]) == out
    return Page(out)


def test_all_parts_are_there_in_order(page: Page) -> None:
    assert page.sections == [
        "answer", "asked", "scores", "differences", "cost", "training", "items", "calibration", "settings",
        "conditions", "reproduce", "notes",
    ]  # fmt: skip
    links = [attrs["href"].removeprefix("#") for tag, attrs in page.found if tag == "a"]
    assert links == page.sections


def test_nothing_comes_from_elsewhere(page: Page) -> None:
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", page.source)
    for tag, attrs in page.found:
        assert tag not in ("link", "img", "iframe", "object", "base")
        assert "src" not in attrs and attrs.get("href", "#").startswith("#")
        assert not [name for name in attrs if name.startswith("on")]
    policy = next(attrs["content"] for _, attrs in page.found if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'")
    assert len(page.source) < 200_000


def test_texts_of_others_stay_texts(page: Page) -> None:
    assert page.source.count("<script>") == 1
    assert EVIL.split("&")[0] in page.text and "네이버" in page.text
    assert "LoRA <x>" in page.text and "<x>" not in page.source
    assert "Mine & yours" in page.text and "koat experiment <mine>" in page.text
    assert "secret" not in page.source, "paths of the machine are not passed on"
    assert "my-base" in page.text
    for name, digits in (("rows.tsv", "12"), ("a/train.tsv", "34"), ("b/train.tsv", "56")):
        assert f" {name} {digits * 32} " in page.text


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["data/train.tsv", "/x/test.tsv"], ["train.tsv", "test.tsv"]),
        (["/home/me/a/t.tsv", "/home/me/b/t.tsv"], ["a/t.tsv", "b/t.tsv"]),
        (["/x/a/1/t.tsv", "/x/b/1/t.tsv", "/x/b/2/t.tsv"], ["a/1/t.tsv", "b/1/t.tsv", "2/t.tsv"]),
        (["t.tsv", "/x/t.tsv", "y/x/t.tsv"], ["t.tsv", "x/t.tsv", "y/x/t.tsv"]),
        (["/a/t.tsv", "a/t.tsv"], ["a/t.tsv", "a/t.tsv (2)"]),
        (["/t.tsv", "/a/t.tsv"], ["t.tsv", "a/t.tsv"]),
        (["owner/reviews", "another/reviews"], ["owner/reviews", "another/reviews"]),
    ],
)
def test_data_files_keep_as_much_of_their_paths_as_it_takes(paths: list[str], names: list[str]) -> None:
    assert name_data({path: number for number, path in enumerate(paths)}) == dict(zip(names, range(9), strict=False))


def set_prompts_side_by_side(*prompts: str) -> dict[str, Any]:
    """Return the row of a setting that subjects have these values of."""
    sources = [Source(str(number), "", [], [], {"prompt": prompt}) for number, prompt in enumerate(prompts)]
    (row,) = set_side_by_side([Subject(source.name, [source]) for source in sources])["rows"]
    return dict(row)


@pytest.mark.parametrize("num_common", [LONGEST - 1, LONGEST, 500])
def test_settings_that_differ_late_differ_and_show_where(num_common: int) -> None:
    row = set_prompts_side_by_side("x" * num_common + "A" + "y" * 200, "x" * num_common + "B")
    assert row["differs"]
    first, second = row["values"]
    assert "xA" in first and second.endswith("xB") and max(map(len, row["values"])) <= LONGEST
    assert first.startswith("…") and first.endswith("…")


def test_long_settings_that_are_equal_are_cut_at_their_end() -> None:
    row = set_prompts_side_by_side("x" * 300, "x" * 300)
    assert row == {"name": "prompt", "values": ["x" * (LONGEST - 1) + "…"] * 2, "differs": False}
    row = set_prompts_side_by_side("a" + "x" * 300, "b")
    assert row == {"name": "prompt", "values": ["a" + "x" * (LONGEST - 2) + "…", "b"], "differs": True}


def test_both_languages_are_there(page: Page) -> None:
    assert page.found[0] == ("html", {"lang": "en"})
    spoken = {name: sum(attrs.get("lang") == name for _, attrs in page.found[1:]) for name in ("en", "ko")}
    assert spoken["en"] == spoken["ko"] > 40
    assert "The answer" in page.text and "결론" in page.text
    assert {attrs["data-to"] for _, attrs in page.found if "data-to" in attrs} == {"en", "ko"}


def test_the_answer_and_the_figures(page: Page, places: list[str]) -> None:
    found = koat.compare(places, names=dict(zip(places, ("IA3", "IA3", "LoRA <x>", "base"), strict=True)))
    best = max(found["columns"][0]["rows"], key=lambda row: row["value"])
    assert best["subject"] == "LoRA <x>"
    assert f"LoRA <x> scores highest ({100 * best['value']:.1f} %" in page.text
    assert "better than base by" in page.text and "보다" in page.text
    assert "bfloat16" in page.text, "conditions that differ are shown"
    assert "training.learning_rate" in page.text and "0.001" in page.text
    assert "2 of 3 settings differ" not in page.text and "1 of 2 settings differ." in page.text


def test_charts_say_what_they_are(page: Page) -> None:
    charts = [attrs for tag, attrs in page.found if tag == "svg" and "chart" in attrs.get("class", "")]
    assert len(charts) == 1 + 1 + 3 + 1 + 1, "scores, differences, three costs, losses, calibration"
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in charts)
    assert {f"key{number}" for number in range(3)} <= {attrs.get("id") for _, attrs in page.found}


def test_the_same_input_gives_the_same_page(places: list[str], tmp_path: Path) -> None:
    pages = [write(places, out=tmp_path / "report.html").read_bytes() for write in (write_report, koat.write_report)]
    assert pages[0] == pages[1]


@pytest.mark.parametrize("number", [0, 3], ids=["a run", "a folder of scores"])
def test_one_subject_will_do(places: list[str], number: int, tmp_path: Path) -> None:
    page = Page(write_report([places[number]], tmp_path / "report.html"))
    assert {"answer", "asked", "scores", "calibration", "reproduce"} <= set(page.sections)
    assert not {"differences", "items", "cost", "conditions"} & set(page.sections)
    assert ("training" in page.sections) == (number == 0)


def test_a_published_table_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "kgoat.html"
    out.parent.mkdir()
    status, said, _ = call_koat("report", "kgoat", "--out", out, "--language", "ko", "--title", "표")
    assert status == 0 and str(out) in said
    page = Page(out)
    assert page.found[0] == ("html", {"lang": "ko"})
    assert page.sections == ["answer", "asked", "scores", "differences", "reproduce", "notes"]
    assert "K(G)OAT scores highest (71.2 %, 67.1–75.0)" in page.text
    assert "with 500 items cannot be told apart from KoAlpaca (about 2,300 would tell)" in page.text


def test_only_what_is_named_on_the_command_line_is_on_the_page(tmp_path: Path) -> None:
    for only, shown in ((["--only", "KoAlpaca", "--only", "K(G)OAT"], False), ([], True)):
        out = tmp_path / f"{len(only)}.html"
        status, _, error = call_koat("report", "kgoat", "--out", out, *only)
        assert status == 0, error
        page = Page(out)
        assert "KoAlpaca" in page.text and "K(G)OAT" in page.text
        assert ("polyglot-ko 55.6" in page.text) == shown


def test_what_may_not_be_ranked_is_said_first(tmp_path: Path) -> None:
    places = [
        str(write_scores(tmp_path / name, make_answers(50, wrong), scoring=name, contract={"metric": name}))
        for name, wrong in (("acc", range(5)), ("acc_norm", range(20)))
    ]
    page = Page(write_report(places, tmp_path / "report.html"))
    assert page.sections[:3] == ["answer", "refusals", "asked"] and "differences" not in page.sections
    assert "acc against acc_norm: another metric" in page.text and "acc 대 acc_norm: 지표가 다름" in page.text
    assert "One pair is not ranked" in page.text


def test_what_is_not_there_is_said(places: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such run"):
        write_report([str(tmp_path / "nothing")], tmp_path / "report.html")
    with pytest.raises(ConfigError, match="one of en, ko"):
        write_report(places, tmp_path / "report.html", language="fr")  # type: ignore[arg-type]
    with pytest.raises(RunFolderError, match="the name is too long"):
        write_report(places[:1], tmp_path / ("x" * 300))
    assert call_koat("report", "nothing-here")[0] == 2


def test_comparisons_speak_korean(places: list[str]) -> None:
    status, said, _ = call_koat("compare", "kgoat", "--language", "ko")
    assert status == 0
    assert "점수(95 % 구간)" in said and "구별되지 않습니다" in said and "비고: " in said and "subject" not in said
