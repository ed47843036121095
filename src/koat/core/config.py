"""Typed settings from several sources: read, merge, validate once, and say all that is wrong in plain words.

A source is a `Layer` (a method's defaults, a recipe, a file, flags). `resolve` merges layers over a schema of
nested `Section` classes and remembers where each value came from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from math import isfinite
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from koat.core.errors import ConfigError, suggest


class Section(BaseModel):
    """Base of every group of settings: frozen, with unknown keys refused and defaults checked."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _prepare(cls, values: Any) -> Any:
        """Let one text stand for a list of one; make truth values fail where they would pass for 0 and 1."""
        if not isinstance(values, Mapping):
            return values
        prepared = dict(values)
        for name in cls.model_fields.keys() & prepared.keys():
            value = prepared[name]
            kinds = [
                kind for kind in _alternatives(cls.model_fields[name].annotation) if kind is not NoneType
            ]
            if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
                prepared[name] = str(value).lower()
            elif isinstance(value, str) and kinds and all(get_origin(kind) is list for kind in kinds):
                prepared[name] = [value]
        return prepared


S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class Layer:
    """One source of nested values; `origin` is "method", "recipe", "file" or "flag"."""

    origin: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Resolved(Generic[S]):
    """Valid settings and, by dotted leaf key, the origin of each value ("default" where no layer set it)."""

    settings: S
    origins: dict[str, str]


@dataclass(frozen=True)
class SettingRow:
    """One setting, for printing."""

    key: str
    value: Any
    origin: str
    help: str


def resolve(schema: type[S], layers: Sequence[Layer]) -> Resolved[S]:
    """Merge layers, later over earlier, and validate the result once.

    Sections merge key by key; plain mappings and lists are replaced whole. Raises one ConfigError that lists
    every problem, one per line.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge([schema], merged, _with_text_keys(layer.values))
    merged = _fill(schema, merged)
    try:
        settings = schema.model_validate(merged)
    except ValidationError:
        problems = _Diagnosis(schema, layers).of_section(schema, merged, "")
        head = [] if len(problems) == 1 else [f"{len(problems)} problems in the settings:"]
        raise ConfigError("\n  ".join(head + problems)) from None
    return Resolved(settings, {key: _origin(key, layers) for key, _, _ in _leaves(settings)})


def describe(resolved: Resolved[S]) -> list[SettingRow]:
    """List every leaf setting in schema order, with its value, origin and help."""
    return [
        SettingRow(key, value, resolved.origins.get(key, "default"), help)
        for key, value, help in _leaves(resolved.settings)
    ]


def known_keys(schema: type[Section]) -> list[str]:
    """List all dotted keys that can be set, over all branches of unions."""
    keys: dict[str, None] = {}
    for name, field in schema.model_fields.items():
        sections = _sections(field.annotation)
        if any(kind not in (*sections, NoneType) for kind in _alternatives(field.annotation)):
            keys[name] = None
        for section in sections:
            keys.update({f"{name}.{key}": None for key in known_keys(section)})
    return list(keys)


def to_mapping(settings: Section) -> dict[str, Any]:
    """Return settings as nested plain values (paths as text) that `resolve` accepts again unchanged."""
    return settings.model_dump(mode="json")


# Reading files and flags ------------------------------------------------------------------------------------


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
                raise ConfigError(
                    f"the key {key.value!r} is given twice, in lines {lines[key.value]} and {line}"
                )
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
        if path.suffix == ".json":
            value = json.loads(text, object_pairs_hook=_unique_keys)
        else:
            value = yaml.load(text, _Loader)
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
        raise ConfigError(f"{path}: holds {_show(value)}; a mapping of settings (key: value) is needed")
    settings: dict[str, Any] = _with_text_keys(value)
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
                raise ConfigError(
                    f"{key}: the quoted text {_show(text)} does not end with its quote"
                ) from None
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


# Merging ----------------------------------------------------------------------------------------------------


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            str(key).lower() if isinstance(key, bool) else str(key): _with_text_keys(item)
            for key, item in value.items()
        }
    return [_with_text_keys(item) for item in value] if isinstance(value, list) else value


def _merge(sections: list[type[Section]], base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        below = [
            child for section in sections if name in section.model_fields
            for child in _sections(section.model_fields[name].annotation)
        ]  # fmt: skip
        before = base.get(name)
        if below and isinstance(value, Mapping):
            value = _merge(below, before if isinstance(before, Mapping) else {}, value)
        merged[name] = value
    return merged


def _fill(section: type[Section], values: dict[str, Any]) -> dict[str, Any]:
    """Stand in for sections left out or blank, and for a union's tag that its default decides."""
    for name, field in section.model_fields.items():
        sections = _sections(field.annotation)
        if not sections or len(sections) < len(list(_alternatives(field.annotation))):
            continue
        if values.get(name) is None:
            values.pop(name, None)
            if field.is_required():
                values[name] = {}
        given, tag = values.get(name), _tag(sections)
        if isinstance(given, dict):
            if tag and not field.is_required():
                given.setdefault(tag, getattr(field.get_default(call_default_factory=True), tag, None))
            if branch := _branch(sections, given):
                _fill(branch, given)
    return values


def _origin(key: str, layers: Sequence[Layer]) -> str:
    for layer in reversed(layers):
        node: Any = layer.values
        for name in key.split("."):
            if not isinstance(node, Mapping):
                return "default"  # this layer replaced the whole section
            if name not in node:
                break
            node = node[name]
        else:
            return layer.origin
    return "default"


def _leaves(settings: Section, path: str = "") -> Iterator[tuple[str, Any, str]]:
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, Section):
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value, field.description or ""


# Looking at a schema ----------------------------------------------------------------------------------------


def _alternatives(annotation: Any) -> Iterator[Any]:
    """Yield the members of a union, through Annotated; anything else is its own only member."""
    if get_origin(annotation) is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from _alternatives(member)
    else:
        yield annotation


def _sections(annotation: Any) -> list[type[Section]]:
    return [
        kind for kind in _alternatives(annotation) if isinstance(kind, type) and issubclass(kind, Section)
    ]


def _choices(annotation: Any) -> list[Any]:
    return [
        choice
        for kind in _alternatives(annotation)
        if get_origin(kind) is Literal
        for choice in get_args(kind)
    ]


def _tag(sections: Sequence[type[Section]]) -> str | None:
    """Return the key whose value tells the branches of a union apart, if there is one."""
    for name in sections[0].model_fields if len(sections) > 1 else ():
        fields = [section.model_fields.get(name) for section in sections]
        if all(field is not None and _choices(field.annotation) for field in fields):
            return name
    return None


def _branch(sections: Sequence[type[Section]], values: Mapping[str, Any]) -> type[Section] | None:
    """Return the branch of a union that a mapping evidently means; None where its tag names no branch."""
    tag = _tag(sections)
    if tag is None:
        return max(sections, key=lambda section: len(section.model_fields.keys() & values.keys()))
    named = [
        section for section in sections if values.get(tag) in _choices(section.model_fields[tag].annotation)
    ]
    return named[0] if named else None


# Saying what is wrong ---------------------------------------------------------------------------------------


class _Diagnosis:
    """Turns the failure of a validation into one plain line per problem."""

    def __init__(self, schema: type[Section], layers: Sequence[Layer]) -> None:
        self.layers = layers
        self.known = known_keys(schema)

    def of_section(self, section: type[Section], values: Mapping[str, Any], path: str) -> list[str]:
        """List the problems of a section's values; `path` is its dotted key with a dot behind, or empty."""
        try:
            section.model_validate(values)
        except ValidationError as failure:
            errors = failure.errors(include_url=False)
        else:
            return []
        by_name: dict[str, list[ErrorDetails]] = {}
        for error in errors:
            by_name.setdefault(str(error["loc"][0]) if error["loc"] else "", []).append(error)
        problems: list[str] = []
        for name, group in by_name.items():
            field = section.model_fields.get(name)
            if not name:
                problems += [f"{path.rstrip('.') or 'settings'}: {_own_words(error)}" for error in group]
            elif field is None:
                problems.append(self.unknown(section, values, name, path))
            elif name not in values and group[0]["type"] == "missing":
                problems.append(self.missing(path + name, field))
            else:
                value = values.get(name, group[0]["input"])
                problems += self.of_value(field.annotation, value, path + name) or self.of_leaf(
                    field, value, path + name, group
                )
        return problems

    def of_value(self, annotation: Any, value: Any, key: str) -> list[str]:
        """List the problems inside the sections that a value holds, if it holds any."""
        sections = _sections(annotation)
        if isinstance(value, Mapping) and sections:
            branch = _branch(sections, value)
            return self.of_section(branch, value, f"{key}.") if branch else [self.tag(sections, value, key)]
        problems: list[str] = []
        for kind in _alternatives(annotation):
            if get_origin(kind) is list and isinstance(value, list):
                for index, item in enumerate(value):
                    problems += self.of_value(get_args(kind)[0], item, f"{key}[{index}]")
            elif get_origin(kind) is dict and isinstance(value, Mapping):
                for name, item in value.items():
                    problems += self.of_value(get_args(kind)[1], item, f"{key}.{name}")
        return problems

    def of_leaf(self, field: FieldInfo, value: Any, key: str, errors: list[ErrorDetails]) -> list[str]:
        """List the problems of a value that is no section: what was received, from where, what is allowed."""
        origin = self.origin(key)
        own = [_own_words(error) for error in errors if error["type"] in ("value_error", "assertion_error")]
        if own:
            return [f"{key}: received {_show(value)}{origin}; {words}" for words in own]
        problems: dict[str, None] = {}
        for error in errors:
            steps, annotation = _element(field.annotation, error)
            item = error["input"] if steps else value
            kinds = list(_alternatives(annotation))
            choices = [choice for choice in _choices(annotation) if isinstance(choice, str)]
            hint = suggest(item, choices) if isinstance(item, str) else ""
            if isinstance(item, (int, float)) and str in kinds and not isinstance(item, bool):
                hint = "; put it in quotes to make it text"
            allowed = _allowed(annotation, () if steps else field.metadata)
            problems[f"{key}{steps}: received {_show(item)}{origin}; allowed: {allowed}{hint}"] = None
        return list(problems)

    def missing(self, key: str, field: FieldInfo) -> str:
        allowed = _allowed(field.annotation, field.metadata)
        return f"{key}: missing. {field.description or f'Allowed: {allowed}.'} {_how_to_set(key)}"

    def tag(self, sections: Sequence[type[Section]], values: Mapping[str, Any], key: str) -> str:
        """Say which values of a union's tag there are."""
        tag = _tag(sections) or ""
        choices = [
            choice for section in sections for choice in _choices(section.model_fields[tag].annotation)
        ]
        allowed = ", ".join(map(repr, choices))
        value = values.get(tag)
        if value is None:
            purpose = sections[0].model_fields[tag].description
            words = [
                f"{key}.{tag}: missing.",
                purpose or "",
                f"Allowed: {allowed}.",
                _how_to_set(f"{key}.{tag}"),
            ]
            return " ".join(filter(None, words))
        hint = suggest(str(value), map(str, choices))
        return f"{key}.{tag}: received {_show(value)}{self.origin(f'{key}.{tag}')}; allowed: {allowed}{hint}"

    def unknown(self, section: type[Section], values: Mapping[str, Any], name: str, path: str) -> str:
        """Answer an unknown key with the nearest one beside it, and with a nearer one elsewhere."""
        key, origin = path + name, self.origin(path + name)
        if name in self.known and "." in name:
            nested = name.replace(".", ": {") + ": ..." + "}" * name.count(".")
            return f"{key}: a key with dots is for the command line; here write {nested}"
        if key in self.known:  # another branch of the union has it
            tag = next(
                (tag for tag in section.model_fields if _choices(section.model_fields[tag].annotation)), ""
            )
            chosen = f"{tag} {values.get(tag)!r}"
            return f"{key}: does not go with {chosen}{origin}; take it out, or change {path}{tag}"
        beside = max(section.model_fields, key=lambda other: _nearness(name, other), default="")
        elsewhere = max(self.known, key=lambda other: _nearness(name, other.rpartition(".")[2]), default="")
        near, far = _nearness(name, beside), _nearness(name, elsewhere.rpartition(".")[2])
        found = [path + beside] if near >= 0.6 else []
        if far >= 0.6 and far > near:
            found.append(elsewhere)
        answer = f"did you mean {' or '.join(map(repr, found))}?" if found else ""
        return f"{key}: there is no such setting{origin}; " + (
            answer or f"known: {', '.join(section.model_fields)}"
        )

    def origin(self, key: str) -> str:
        origin = _origin(key.partition("[")[0], self.layers)
        return "" if origin == "default" else f" (from {origin})"


def _nearness(word: str, known: str) -> float:
    """Score how likely `word` was meant to be `known`, 0 to 1: spelling, initials (lr), or part of a name."""
    word, known = word.lower().replace("-", "_"), known.lower()
    if len(word) > 1 and word == "".join(part[:1] for part in known.split("_")):
        return 0.9
    score = SequenceMatcher(None, word, known).ratio()
    inside = min(len(word), len(known)) >= 4 and (word in known or known in word)
    return (
        max(score, 0.6 + 0.3 * min(len(word), len(known)) / max(len(word), len(known))) if inside else score
    )


def _how_to_set(key: str) -> str:
    return (
        "Set it in the file." if "[" in key else f"Set it with {key}=... on the command line, or in the file."
    )


def _own_words(error: ErrorDetails) -> str:
    """Return a validator's own message, without the validation library's words around it."""
    return str(error.get("ctx", {}).get("error", error["msg"]))


def _element(annotation: Any, error: ErrorDetails) -> tuple[str, Any]:
    """Return where in a list or mapping an error lies, and the type that is due there."""
    steps = ""
    for step in error["loc"][1:] if error["type"] != "missing" else ():
        kinds = [kind for kind in _alternatives(annotation) if kind is not NoneType]
        container, args = get_origin(kinds[0]), get_args(kinds[0])
        if len(kinds) > 1 or container not in (list, tuple, dict):  # in a union no one place can be named
            break
        annotation = (
            args[int(step)]
            if container is tuple and args[-1] is not Ellipsis
            else args[-1 if container is dict else 0]
        )
        steps += f".{step}" if container is dict else f"[{step}]"
    return steps, annotation


def _show(value: Any) -> str:
    if value is None:
        return "nothing"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


_PLAIN_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    NoneType: "none",
    Any: "anything",
}
_BOUNDS = {
    "gt": "greater than",
    "ge": "of at least",
    "lt": "less than",
    "le": "of at most",
    "multiple_of": "a multiple of",
}


def _allowed(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Say in words what a type and its bounds allow."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _allowed(args[0], [*metadata, *(bound for part in args[1:] for bound in _bounds_of(part))])
    if origin in (Union, UnionType):
        words = [_allowed(member, () if member is NoneType else metadata) for member in args]
        return ", or ".join(dict.fromkeys(words))
    if origin is Literal:
        text = f"one of {', '.join(map(repr, args))}"
    elif origin is list or (origin is tuple and args[-1] is Ellipsis):
        several = len(list(_alternatives(args[0]))) > 1
        text = f"a list of ({_allowed(args[0])})" if several else f"a list of {_allowed(args[0])}"
    elif origin is dict:
        text = f"a mapping of {_allowed(args[0])} to {_allowed(args[1])}"
    elif origin is tuple:
        text = f"a list of {len(args)}: {', '.join(map(_allowed, args))}"
    elif isinstance(annotation, type) and issubclass(annotation, Section):
        text = f"a group of settings ({', '.join(annotation.model_fields)})"
    else:
        text = _PLAIN_WORDS.get(annotation, str(getattr(annotation, "__name__", annotation)))
    return f"{text} {' and '.join(_bound_words(metadata))}".rstrip()


def _bounds_of(part: Any) -> Sequence[Any]:
    return part.metadata if isinstance(part, FieldInfo) else [part]


def _bound_words(metadata: Sequence[Any]) -> Iterator[str]:
    for bound in metadata:
        for name, words in _BOUNDS.items():
            if getattr(bound, name, None) is not None:
                yield f"{words} {getattr(bound, name)}"
        if getattr(bound, "min_length", None):
            yield f"with at least {bound.min_length} item(s)"
        if getattr(bound, "max_length", None) is not None:
            yield f"with at most {bound.max_length} item(s)"
        if getattr(bound, "pattern", None):
            yield f"of the form {bound.pattern}"
