"""Reading settings from files and flags, and writing them as YAML that reads back unchanged."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from koat.core.errors import ConfigError, suggest
from koat.core.explain import show_value


def _construct_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float | str:
    for kind in (int, float):
        try:
            number = kind(node.value)
        except ValueError:
            continue
        # A commit hash such as 12e4567 looks like a number too large for one: it stays text.
        return number if isfinite(number) else str(node.value)
    return str(node.value)


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2 (1e-3 is a number, no is text), `none`, and no double keys."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - as the base class has it

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                raise ConfigError(f"the key {key.value!r} is given twice, in lines {lines[key.value]} and {line}")
            lines[key.value if isinstance(key, yaml.ScalarNode) else ""] = line
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes whatever text `_Loader`, or a reader of YAML 1.1, would take for something else."""


for _kind, _pattern in {
    "bool": "true|True|TRUE|false|False|FALSE",
    "null": "~|null|Null|NULL|none|None|NONE|",
    "int": "[-+]?[0-9]+",
    "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?",
    "merge": "<<",
}.items():
    for _dialect in (_Loader, _Dumper):
        _dialect.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z"), None)
for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _construct_number)


def dump_yaml(value: Any) -> str:
    """Write plain values as YAML that `read_config_file` reads back unchanged."""
    return yaml.dump(value, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=1000)


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Read a YAML or JSON (`.json`) file that holds a mapping; an empty file is an empty mapping.

    Raises ConfigError for a missing or unreadable file, broken syntax (with its line) and double keys.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        is_json = path.suffix == ".json"
        value = json.loads(text, object_pairs_hook=_unique_keys) if is_json else yaml.load(text, _Loader)
    except FileNotFoundError:
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(f"{path}: there is no such file{suggest(path.name, names)}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}{_syntax_problem(error)}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds {show_value(value)}; a mapping of settings (key: value) is needed")
    settings: dict[str, Any] = with_text_keys(value)
    return settings


def parse_overrides(items: Sequence[str]) -> dict[str, Any]:
    """Turn `section.key=value` items into nested values; a key that comes twice takes its last value.

    A value is typed as YAML types a scalar; lists, mappings and quoted text are read as YAML, so "\\n" in
    double quotes is a line break. Anything else is text as it stands. Raises ConfigError.
    """
    leaves: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            raise ConfigError(f"{item!r} is not a setting; write key=value, for example training.epochs=2")
        leaves[key] = _parse_value(key, text.strip())
    nested: dict[str, Any] = {}
    for key, value in leaves.items():
        *parents, name = key.split(".")
        node = nested
        for depth, parent in enumerate(parents, 1):
            above = ".".join(parents[:depth])
            if above in leaves:
                raise ConfigError(f"{above!r} is given a value and so is {key!r} below it; keep one of them")
            node = node.setdefault(parent, {})
        node[name] = value
    return nested


def _parse_value(key: str, text: str) -> Any:
    if text[:1] in ("'", '"', "[", "{"):
        try:
            value = yaml.load(text, _Loader)
        except (yaml.YAMLError, ConfigError):
            if text[0] in "'\"":
                raise ConfigError(f"{key}: the quoted text {show_value(text)} does not end with its quote") from None
            return text  # a prompt such as `[INST] {question}` only looks like a list
        # `{question}` alone is a template, not a mapping.
        return text if isinstance(value, dict) and value and ":" not in text else value
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    return loader.construct_object(yaml.ScalarNode(tag, text))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise ConfigError(f"the key {key!r} is given twice")
        mapping[key] = value
    return mapping


def _syntax_problem(error: yaml.YAMLError | json.JSONDecodeError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f", line {error.lineno}: is not valid JSON: {error.msg}"
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or "broken syntax"
    return f"{f', line {mark.line + 1}' if mark else ''}: is not valid YAML: {what}"


def with_text_keys(value: Any) -> Any:
    """Make every key of nested mappings text, as flags write it (1 is "1", true is "true")."""
    if isinstance(value, Mapping):
        return {
            str(key).lower() if isinstance(key, bool) else str(key): with_text_keys(item) for key, item in value.items()
        }
    return [with_text_keys(item) for item in value] if isinstance(value, list) else value
