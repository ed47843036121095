"""A report as one self-contained HTML page: what the template shows, in the order in which it shows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from koat.report.answers import find_leader, say_answer
from koat.report.charts import draw_keys, refer_key
from koat.report.comparison import list_comparisons, list_notes, list_rows, say_whole
from koat.report.figures import (
    Styles,
    draw_calibration,
    draw_cost,
    draw_differences,
    draw_scores,
    draw_training,
    find_costs,
)
from koat.report.groups import list_group_rows, title_group
from koat.report.scales import format_number
from koat.report.sentences import say_refusal
from koat.report.words import LANGUAGES, Language, has_words, say_both

MOST_ANSWERS = 6
MOST_PAIRS = 12
"""From so many pairs on, only those with the leader are shown."""
LONGEST = 700
"""Characters of an item's field that are shown."""
SCORE_COLUMNS = ("subject", "score", "num_items", "seeds", "over_seeds", "over_items")
SECTIONS = (
    "answer", "groups", "asked", "scores", "differences", "cost", "training", "items", "calibration", "settings",
    "conditions", "reproduce", "notes",
)  # fmt: skip


def render_page(facts: Mapping[str, Any], language: Language = "en") -> str:
    """Return the page of what `koat.workflows.comparing.report.gather_facts` returned, with `title` and `commands`.

    Both languages are in it; `language` is shown first, and alone where scripts do not run.
    """
    styles = {subject["name"]: number for number, subject in enumerate(facts["found"]["subjects"])}
    environment = Environment(
        loader=PackageLoader("koat", "report/template"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.globals |= {"t": translate, "words": say_both, "both": show_both}
    environment.globals["key"] = lambda name: Markup(refer_key(styles[name]))
    environment.filters["cut"] = cut
    return environment.get_template("page.html.jinja").render(language=language, **describe_page(facts, styles))


def translate(key: str, **values: Any) -> Markup:
    """Return a text in both languages, of which the page shows one."""
    return show_both(say_both(key, **values))


def show_both(texts: Mapping[Language, str]) -> Markup:
    """Return texts of which the page shows the one in its language; one alone where they are the same."""
    if len(set(texts.values())) == 1:
        return Markup(escape(texts["en"]))
    return Markup("").join(Markup('<span lang="{}">{}</span>').format(name, texts[name]) for name in LANGUAGES)


def cut(text: Any) -> str:
    """Return a text that is not too long to be shown."""
    shown = str(text)
    return shown if len(shown) <= LONGEST else shown[:LONGEST] + " …"


def describe_page(facts: Mapping[str, Any], styles: Styles) -> dict[str, Any]:
    """Return what the template fills in."""
    found = facts["found"]
    columns = [describe_column(facts, number, styles) for number in range(len(found["columns"]))]
    training, is_log_loss = draw_training(facts["runs"], styles)
    runs = [{"subject": name, **run} for name, held in facts["runs"].items() for run in held]
    conditions = list_conditions(found)
    present = {
        "answer": True, "groups": bool(found["groups"]), "asked": True, "scores": True, "reproduce": True,
        "differences": bool(found["comparisons"]), "cost": any(column["costs"] for column in columns),
        "training": bool(training), "items": any(column["items"] for column in columns),
        "calibration": any(column["calibration"] for column in columns),
        "settings": bool(facts["settings"]["rows"]), "conditions": bool(conditions), "notes": bool(list_notes(found)),
    }  # fmt: skip
    return {
        "title": facts["title"], "names": list(styles), "keys": Markup(draw_keys(len(styles))),
        "subjects": found["subjects"], "columns": columns,
        "groups": [describe_group(table) for table in found["groups"]],
        "summary": say_summary(found), "refusals": [say_each(say_refusal, entry) for entry in found["refusals"]],
        "answers": columns[:MOST_ANSWERS], "training": Markup(training), "is_log_loss": is_log_loss, "runs": runs,
        "settings": facts["settings"], "conditions": conditions, "commands": facts["commands"],
        "pins": list(list_pins(runs)),
        "notes": [dict(zip(LANGUAGES, pair, strict=True)) for pair in zip(
            *(list_notes(found, language) for language in LANGUAGES), strict=True)],
        "sections": [name for name in SECTIONS if present[name]],
    }  # fmt: skip


def describe_group(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page shows of a group's table: each cell in every language."""
    versions = [list_group_rows(table, language) for language in LANGUAGES]
    rows = [
        [dict(zip(LANGUAGES, cell, strict=True)) for cell in zip(*row, strict=True)]
        for row in zip(*versions, strict=True)
    ]
    return {"title": say_each(title_group, table), "names": table["subjects"], "rows": rows}


def say_summary(found: Mapping[str, Any]) -> dict[Language, str]:
    """Return how many subjects stand under how many scores."""
    number, columns = len(found["subjects"]), len(found["columns"])
    subjects = say_both("num_subjects" if number > 1 else "one_subject", number=number)
    scores = say_both("num_scores" if columns > 1 else "one_score", number=columns)
    comparisons = found["correction"]["num_comparisons"]
    key = "summary" if comparisons else "summary_single"
    return say_both(key, subjects=subjects, columns=scores, comparisons=comparisons)


def say_each(saying: Any, *arguments: Any) -> dict[Language, str]:
    """Return what a function of `koat.report.sentences` says in each language."""
    return {language: saying(*arguments, language=language) for language in LANGUAGES}


def describe_column(facts: Mapping[str, Any], number: int, styles: Styles) -> dict[str, Any]:
    """Return what the page shows of one score: words, charts, tables."""
    found, column = facts["found"], facts["found"]["columns"][number]
    pairs = list_comparisons(found, column)
    shown = pick_pairs(pairs, find_leader(column)["subject"])
    tables = {language: list_rows(column, language, SCORE_COLUMNS) for language in LANGUAGES}
    costs = list(find_costs(facts, number))
    charts = [(kind, *draw_cost(column, kind, values, styles)) for kind, values in costs]
    return {
        **{name: column[name] for name in ("task", "scoring", "metric", "contract", "rows")},
        "answer": say_answer(found, column),
        "chart": Markup(draw_scores(column, styles)),
        "headings": mix(*(tables[language][0] for language in LANGUAGES)),
        "table": [mix(*rows) for rows in zip(*(tables[language][1] for language in LANGUAGES), strict=True)],
        "has_seeds": any(len(row["values"]) > 1 for row in column["rows"]),
        "is_meaningful": all(row["meaningful"] for row in column["rows"]),
        "num_pairs": len(pairs),
        "pairs": [say_each(say_whole, pair, found["correction"]["num_comparisons"]) for pair in shown],
        "num_shown": len(shown),
        "differences": Markup(draw_differences(shown, column, styles)) if shown else "",
        "costs": [{"kind": kind, "chart": Markup(chart), "is_log": is_log} for kind, chart, is_log in charts],
        "figures": [{"kind": kind, "values": {name: format_number(value) for name, value in values.items()}}
                    for kind, values in costs],
        "items": facts["disagreements"][number],
        "calibration": Markup(draw_calibration(column, styles)),
        "parts": describe_contract(column["contract"]["parts"]),
        "means": {name: translate(f"means_{name}") for name in (column["scoring"], column["metric"])
                  if has_words(f"means_{name}")},
    }  # fmt: skip


def list_pins(runs: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    """Yield what pins the runs, each thing once: base models, data files, versions, hardware, times."""
    found: dict[tuple[str, str, str], None] = {}
    for run in runs:
        if run["base"]:
            found["base", run["base"]["name"], str(run["base"].get("fingerprint", ""))] = None
        for name, pinned in run["data"].items():
            found["data", name, str(pinned["sha256"] if isinstance(pinned, Mapping) else pinned)] = None
    for kind in ("versions", "hardware"):
        for run in runs:
            if run[kind]:
                found[kind, ", ".join(f"{name} {value}" for name, value in run[kind].items()), ""] = None
    for kind, name, value in sorted(found, key=lambda pin: ("base", "data", "versions", "hardware").index(pin[0])):
        yield {"kind": kind, "name": name, "value": value}


def mix(english: Sequence[str], korean: Sequence[str]) -> list[dict[str, str]]:
    """Return texts of two languages side by side."""
    return [{"en": first, "ko": second} for first, second in zip(english, korean, strict=True)]


def pick_pairs(pairs: Sequence[Mapping[str, Any]], leader: str) -> list[Mapping[str, Any]]:
    """Return all pairs, or those with the leader where they are too many to look at."""
    if len(pairs) <= MOST_PAIRS:
        return list(pairs)
    return [pair for pair in pairs if leader in (pair["left"], pair["right"])]


def describe_contract(parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of a contract, or of conditions, with their names in both languages."""
    return [{"name": name_part(name), "value": show_part(value)} for name, value in parts.items()]


def name_part(name: str) -> dict[Language, str]:
    """Return what a part is called; a part that only one paper knows keeps its name."""
    if has_words(f"part_{name}"):
        return say_both(f"part_{name}")
    return dict.fromkeys(LANGUAGES, name)


def show_part(value: Any) -> str:
    """Return a part of a contract as a text of one or more lines."""
    if isinstance(value, Mapping):
        held = {name: show_part(part) for name, part in value.items() if part not in (None, {}, "")}
        lines = [text if name == "num" else f"{name}: {text}" for name, text in held.items()]
        return ("\n" if any("\n" in line for line in lines) else " · ").join(lines)
    return ", ".join(show_part(part) for part in value) if isinstance(value, list | tuple) else str(value)


def list_conditions(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return tables of conditions that differ, each once, with the columns for which they do."""
    tables: list[dict[str, Any]] = []
    for column in found["columns"]:
        held = {row["subject"]: row["conditions"]["parts"] for row in column["rows"]}
        names = dict.fromkeys(name for parts in held.values() for name in parts)
        rows = [
            {"name": name_part(name), "values": [show_part(parts.get(name, "-")) for parts in held.values()]}
            for name in names
        ]
        table = {"subjects": list(held), "rows": [row for row in rows if len(set(row["values"])) > 1]}
        if not table["rows"]:
            continue
        same = [other for other in tables if (other["subjects"], other["rows"]) == (table["subjects"], table["rows"])]
        title = f"{column['task']}, {column['scoring']}"
        if same:
            same[0]["titles"].append(title)
        else:
            tables.append({**table, "titles": [title]})
    return tables
