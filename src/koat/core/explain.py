"""Saying what is wrong with settings: what was received, from where, and what is allowed, in plain words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from koat.core.errors import suggest
from koat.core.schema import choose_branch, find_choices, find_sections, find_tag, split_union


class Diagnosis:
    """Turns the failure of a validation into one plain line per problem.

    `known` are all dotted keys of the schema; `origin_of` says which layer set a key ("default" for none).
    """

    def __init__(self, known: Sequence[str], origin_of: Callable[[str], str]) -> None:
        self.known = known
        self.origin_of = origin_of

    def of_section(self, section: type[BaseModel], values: Mapping[str, Any], path: str) -> list[str]:
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
        sections = find_sections(annotation)
        if isinstance(value, Mapping) and sections:
            branch = choose_branch(sections, value)
            return self.of_section(branch, value, f"{key}.") if branch else [self.tag(sections, value, key)]
        problems: list[str] = []
        for kind in split_union(annotation):
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
            return [f"{key}: received {show_value(value)}{origin}; {words}" for words in own]
        problems: dict[str, None] = {}
        for error in errors:
            steps, annotation = _element(field.annotation, error)
            item = error["input"] if steps else value
            kinds = list(split_union(annotation))
            choices = [choice for choice in find_choices(annotation) if isinstance(choice, str)]
            hint = suggest(item, choices) if isinstance(item, str) else ""
            if isinstance(item, (int, float)) and str in kinds and not isinstance(item, bool):
                hint = "; put it in quotes to make it text"
            allowed = describe_allowed(annotation, () if steps else field.metadata)
            problems[f"{key}{steps}: received {show_value(item)}{origin}; allowed: {allowed}{hint}"] = None
        return list(problems)

    def missing(self, key: str, field: FieldInfo) -> str:
        """Say that a setting is missing, what it is for, and how to set it."""
        allowed = describe_allowed(field.annotation, field.metadata)
        return f"{key}: missing. {field.description or f'Allowed: {allowed}.'} {_how_to_set(key)}"

    def tag(self, sections: Sequence[type[BaseModel]], values: Mapping[str, Any], key: str) -> str:
        """Say which values of a union's tag there are."""
        tag = find_tag(sections) or ""
        choices = [choice for section in sections for choice in find_choices(section.model_fields[tag].annotation)]
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
        key = f"{key}.{tag}"
        return f"{key}: received {show_value(value)}{self.origin(key)}; allowed: {allowed}{hint}"

    def unknown(self, section: type[BaseModel], values: Mapping[str, Any], name: str, path: str) -> str:
        """Answer an unknown key with the nearest one beside it, and with a nearer one elsewhere."""
        key, origin = path + name, self.origin(path + name)
        if name in self.known and "." in name:
            nested = name.replace(".", ": {") + ": ..." + "}" * name.count(".")
            return f"{key}: a key with dots is for the command line; here write {nested}"
        if key in self.known:  # another branch of the union has it
            tag = next(
                (tag for tag in section.model_fields if find_choices(section.model_fields[tag].annotation)),
                "",
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
        return f"{key}: there is no such setting{origin}; " + (answer or f"known: {', '.join(section.model_fields)}")

    def origin(self, key: str) -> str:
        """Name the layer that set a key, as words to put behind the value."""
        origin = self.origin_of(key.partition("[")[0])
        return "" if origin == "default" else f" (from {origin})"


def _nearness(word: str, known: str) -> float:
    """Score how likely `word` was meant to be `known`, 0 to 1: spelling, initials (lr), or part of a name."""
    word, known = word.lower().replace("-", "_"), known.lower()
    if len(word) > 1 and word == "".join(part[:1] for part in known.split("_")):
        return 0.9
    score = SequenceMatcher(None, word, known).ratio()
    inside = min(len(word), len(known)) >= 4 and (word in known or known in word)
    return max(score, 0.6 + 0.3 * min(len(word), len(known)) / max(len(word), len(known))) if inside else score


def _how_to_set(key: str) -> str:
    return "Set it in the file." if "[" in key else f"Set it with {key}=... on the command line, or in the file."


def _own_words(error: ErrorDetails) -> str:
    """Return a validator's own message, without the validation library's words around it."""
    return str(error.get("ctx", {}).get("error", error["msg"]))


def _element(annotation: Any, error: ErrorDetails) -> tuple[str, Any]:
    """Return where in a list or mapping an error lies, and the type that is due there."""
    steps = ""
    for step in error["loc"][1:] if error["type"] != "missing" else ():
        kinds = [kind for kind in split_union(annotation) if kind is not NoneType]
        container, args = get_origin(kinds[0]), get_args(kinds[0])
        if len(kinds) > 1 or container not in (list, tuple, dict):  # in a union no one place can be named
            break
        annotation = (
            args[int(step)] if container is tuple and args[-1] is not Ellipsis else args[-1 if container is dict else 0]
        )
        steps += f".{step}" if container is dict else f"[{step}]"
    return steps, annotation


def show_value(value: Any) -> str:
    """Write a value as messages show it, in at most 80 characters."""
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


def describe_allowed(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Say in words what a type and its bounds allow."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return describe_allowed(args[0], [*metadata, *(bound for part in args[1:] for bound in _bounds_of(part))])
    if origin in (Union, UnionType):
        words = [describe_allowed(member, () if member is NoneType else metadata) for member in args]
        return ", or ".join(dict.fromkeys(words))
    if origin is Literal:
        text = f"one of {', '.join(map(repr, args))}"
    elif origin is list or (origin is tuple and args[-1] is Ellipsis):
        several = len(list(split_union(args[0]))) > 1
        text = f"a list of ({describe_allowed(args[0])})" if several else f"a list of {describe_allowed(args[0])}"
    elif origin is dict:
        text = f"a mapping of {describe_allowed(args[0])} to {describe_allowed(args[1])}"
    elif origin is tuple:
        text = f"a list of {len(args)}: {', '.join(map(describe_allowed, args))}"
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
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
