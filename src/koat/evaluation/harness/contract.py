"""What an lm-evaluation-harness task asks, as a contract: the parts are named as in koat's own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

from koat.evaluation.contract import Parts, hash_value
from koat.evaluation.harness.samples import Samples
from koat.evaluation.harness.tasks import HarnessTask, list_pool

NORMALISATIONS = {"acc_norm": "per-character", "acc_bytes": "per-byte", "acc_mutual_info": "mutual information"}
"""What choices' log-probabilities are divided by; for the last, what is taken off them."""
PROMPT = ("doc_to_target", "doc_to_choice", "description", "target_delimiter", "gen_prefix")
SHOT_FORM = ("doc_to_text", "doc_to_target", "doc_to_choice", "fewshot_delimiter", "target_delimiter", "gen_prefix")
METRIC_FACTS = ("metric", "aggregation", "higher_is_better", "hf_evaluate")


def make_harness_contract(asked: HarnessTask, samples: Samples, scoring: str, shots: Mapping[str, Any]) -> Parts:
    """Pin what a score under `scoring` (`acc`, or `exact_match,strict-match`) means; `shots` is `describe_shots`'."""
    config, items = asked.task.config, samples.items
    metric, name = samples.list_scorings()[scoring]
    how: dict[str, Any] = {"by": asked.task.OUTPUT_TYPE}
    if name != "none":
        how["filter"] = name
    for part in ("filter_list", "process_results", "generation_kwargs"):
        if getattr(config, part, None):
            how[part] = to_plain(getattr(config, part))
    return Parts(
        {
            "items": {
                "num": len(items),
                "fingerprint": hash_value([[row["doc_id"], row["doc_hash"], row["target_hash"]] for row in items]),
            },
            "shots": shots,
            "prompt": {
                "source": to_plain(getattr(config, "doc_to_text", None) or type(asked.task)),
                "version": to_plain(asked.task.VERSION),
                **{part: to_plain(getattr(config, part)) for part in PROMPT if getattr(config, part, None)},
            },
            "normalisation": describe_normalisation(config, metric),
            "scoring": how,
            "metric": metric,
        }
    )


def describe_shots(asked: HarnessTask) -> dict[str, Any]:
    """Return how many examples stand before an item, how they are chosen and written, and from what.

    The seed is left out where the first rows are taken, and everything where there are no shots.
    """
    if not asked.num_shots:
        return {"num": 0}
    config, pool = asked.task.config, list_pool(asked.task)
    form = getattr(asked.task, "fewshot_cfg", config)
    first = getattr(form, "sampler", "") == "first_n"
    drawn_from = pool[: asked.num_shots] if first else pool
    return {
        "num": asked.num_shots,
        "rule": "first rows" if first else "per-item",
        **({} if first else {"seed": asked.seed}),
        "source": hash_value([hash_value(to_plain(row)) for row in drawn_from]),
        "form": {
            part: to_plain(value)
            for part in SHOT_FORM
            if (value := getattr(form, part, None) or getattr(config, part, None))
        },
    }


def describe_normalisation(config: Any, metric: str) -> Any:
    """Return what an answer's score is divided by, or how texts are cleaned before they are compared."""
    listed = getattr(config, "metric_list", None) or []
    options = next((each for each in listed if isinstance(each, Mapping) and each.get("metric") == metric), {})
    cleaning = {key: to_plain(value) for key, value in options.items() if key not in METRIC_FACTS}
    return cleaning or NORMALISATIONS.get(metric, "none")


def to_plain(value: Any) -> Any:
    """Return a JSON-safe value that is the same in every process: functions and classes as their source.

    A partial function is its function and what is filled in.
    """
    if isinstance(value, Mapping):
        return {str(key): to_plain(each) for key, each in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((to_plain(each) for each in value), key=repr)  # whose own order differs between processes
    if isinstance(value, list | tuple):
        return [to_plain(each) for each in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, partial):
        return {"partial": to_plain(value.func), "args": to_plain(value.args), "keywords": to_plain(value.keywords)}
    if not callable(value):
        return str(value)
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):
        return f"{type(value).__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
