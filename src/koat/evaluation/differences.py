"""How two contracts, or two sets of conditions, differ: in words a practitioner understands."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from koat.evaluation.contract import compare_contracts

PHRASES = {
    "items": "other items",
    "shots": "other shots",
    "prompt": "another prompt",
    "labels": "other answer words",
    "normalisation": "another normalisation",
    "scoring": "another way to read off the answer",
    "metric": "another metric",
    "tokenizer": "another tokenizer",
    "template": "another template around the prompt",
    "truncation": "another truncation",
    "precision": "another precision",
    "layout": "another layout of batches",
    "koat": "another version of koat",
}
MEANINGLESS = "first tokens cannot tell the answer words apart in its tokenizer"
"""Why a score that means nothing is not ranked."""
UNSAID = "one of the two does not say which"
HASH = re.compile(r"[0-9a-f]{12,}")
LONGEST = 40
"""Values longer than this are not shown."""
_MISSING = object()


def explain_differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, str]:
    """Return, for each part that differs, what differs: `{"metric": "acc against acc_norm: another metric"}`.

    `left` and `right` are the parts of two contracts or of two sets of conditions.
    """
    names = compare_contracts({"parts": left}, {"parts": right})
    return {name: explain_part(name, left.get(name, _MISSING), right.get(name, _MISSING)) for name in names}


def explain_part(name: str, left: Any, right: Any) -> str:
    """Say how one part differs; values that say nothing to a reader (hashes, long texts) are left out."""
    phrase = PHRASES.get(name, f"another {name}")
    if left is _MISSING or right is _MISSING:
        return f"{phrase}: {UNSAID}"
    # Published tables do not say which items; of other parts contracts leave out what is not there.
    if name == "items" and all(None in pair for pair in _list_leaves(left, right)):
        return f"{phrase}: {UNSAID}"
    shown = ", ".join(_show_leaves(left, right))
    return f"{shown}: {phrase}" if shown else phrase


def _list_leaves(left: Any, right: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the values that differ, None for one that is on one side alone."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        for name in dict.fromkeys([*left, *right]):
            if left.get(name) != right.get(name):
                yield from _list_leaves(left.get(name), right.get(name))
    else:
        yield left, right


def _show_leaves(left: Any, right: Any, key: str = "") -> Iterator[str]:
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        for name in dict.fromkeys([*left, *right]):
            if left.get(name) != right.get(name):
                yield from _show_leaves(left.get(name), right.get(name), "" if name == "num" else f"{name} ")
    elif _is_readable(left) and _is_readable(right):
        yield f"{key}{_show(left)} against {_show(right)}"


def _is_readable(value: Any) -> bool:
    if isinstance(value, str):
        return 0 < len(value) <= LONGEST and "\n" not in value and not HASH.search(value)
    return isinstance(value, bool | int | float)


def _show(value: Any) -> str:
    if isinstance(value, str) and value != value.strip():
        return repr(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
