"""Put a run, an adapter or a base model before lm-evaluation-harness, from Python or on its own command line."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from koat.core.config import Layer, resolve
from koat.core.errors import ConfigError, suggest
from koat.core.settings import ModelSettings
from koat.evaluation.harness.tasks import TASKS, drop_advice, import_lm_eval
from koat.workflows.evaluating.subject import Subject, open_subject

NAME = "koat"
"""What `--model` calls it."""


def import_harness() -> Any:
    """Import koat's model of the harness. Raises ConfigError when the extra is not installed."""
    return import_lm_eval("koat.evaluation.harness.lm")


def make_lm(subject: Subject, options: Any = None) -> Any:
    """Return a `KoatLM` for what `open_subject` or `koat.load` returned; `options` are its `HarnessOptions`."""
    return import_harness().KoatLM(subject.model, subject.layout, subject.tokenizer, options)


def open_lm(arguments: dict[str, Any]) -> Any:
    """Build a model from lm-eval's `--model_args`: `pretrained=RUN_OR_BASE`, its loading, how it is asked.

    `peft` names an adapter to put on `pretrained`, as in HFLM. Raises ConfigError for what is unknown.
    """
    schema = import_harness().HarnessOptions
    known = schema.model_fields.keys()
    options = {key: value for key, value in arguments.items() if key in known}
    loading = {key: value for key, value in arguments.items() if key not in known}
    target, adapter = loading.pop("pretrained", None), loading.pop("peft", None)
    if not target:
        raise ConfigError("--model_args says no model: give pretrained=RUN, an adapter folder or a base model.")
    unknown = sorted(loading.keys() - ModelSettings.model_fields.keys())
    if unknown:
        near = suggest(unknown[0], [*known, *ModelSettings.model_fields, "pretrained", "peft"])
        raise ConfigError(
            f"--model_args has {unknown[0]!r}, which koat does not know{near}. There are: pretrained, peft, "
            f"{', '.join(sorted({*known, *ModelSettings.model_fields}))}."
        )
    base = {"base": str(target)} if adapter else {"base": "", **loading}
    settings = resolve(ModelSettings, [Layer("flag", {**loading, **base})]).settings
    asked = resolve(schema, [Layer("flag", options)]).settings
    return make_lm(open_subject(str(adapter or target), settings), asked)


def register_model() -> None:
    """Make `--model koat` known to lm-evaluation-harness in this process."""
    harness = import_harness()
    import_module("lm_eval.models")  # an empty registry would be filled by nobody once it holds ours
    registry = import_module("lm_eval.api.registry")
    if NAME in registry.MODEL_REGISTRY:
        return

    @registry.register_model(NAME)
    class OpenedLM(harness.KoatLM):  # type: ignore[misc, name-defined]
        """A model that lm-eval opens by its arguments; a batch size means nothing to it."""

        @classmethod
        def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Any:
            return open_lm(_settle_device(arg_dict, additional_config or {}))

        @classmethod
        def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
            parse = import_module("lm_eval.utils").simple_parse_args_string
            return cls.create_from_arg_obj(parse(arg_string), additional_config)


def _settle_device(arguments: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Take lm-eval's `--device` where the arguments name none; its default is a GPU that may not be there."""
    device = given.get("device")
    if device is None or (str(device).startswith("cuda") and not torch.cuda.is_available()):
        return dict(arguments)
    return {"device": device, **arguments}


def run_harness(arguments: list[str], data_dir: Path | None) -> None:
    """Hand a command to lm-evaluation-harness' own command line, with `koat` among its models.

    koat's tasks are found beside the harness' own; `data_dir` is where their files lie. Raises ConfigError for
    a task that nobody knows, with the nearest names.
    """
    register_model()
    command_line = import_module("lm_eval._cli").HarnessCLI()
    import_module("lm_eval.utils").setup_logging()
    drop_advice()
    before, sys.argv = sys.argv, ["lm-eval", *arguments]
    try:
        parsed = command_line.parse_args()
    finally:
        sys.argv = before
    theirs = getattr(parsed, "include_path", None)
    parsed.include_path = [str(TASKS), *([theirs] if theirs else [])]
    if data_dir is not None:
        parsed.metadata = {**(getattr(parsed, "metadata", None) or {}), "data_dir": str(data_dir.resolve())}
    try:
        command_line.execute(parsed)
    except ValueError as error:
        if not str(error).startswith("Tasks not found"):
            raise
        raise ConfigError(_explain_unknown(str(error), parsed.include_path)) from error


def _explain_unknown(message: str, folders: list[str]) -> str:
    known = import_module("lm_eval.tasks").TaskManager(include_path=folders).all_tasks
    names = [name.strip() for name in message.partition(":")[2].split(",")]
    near = [f"{name!r}{suggest(name, known)}" for name in names]
    return f"lm-eval knows no task {', '.join(near)}. `koat lm-eval ls tasks` lists them all."
