"""An experiment's file: bases, variants, seeds and what is asked of each, with room for what only the user knows."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from koat.core.config import Layer, Section, resolve, to_mapping
from koat.core.config_files import dump_yaml, parse_overrides, read_config_file
from koat.core.errors import ConfigError, suggest
from koat.evaluation.task import Words
from koat.workflows.config import RunConfig

SHIPPED = Path(__file__).parent.parent.parent / "experiments"
PLACEHOLDER = re.compile(r"\$\{([\w-]+)\}")
Name = Annotated[str, Field(pattern=r"^[\w-]+$")]
Seed = Annotated[int, Field(ge=0)]


class Evaluation(Section):
    """What is asked of every model."""

    tasks: list[str] = Field(description="Tasks by name or file.", min_length=1)
    data: str | None = Field(None, description="File with the items; none for tasks that bring their own.")
    shots_from: str | None = Field(None, description="File from which few-shot examples are drawn.")
    shots: int | None = Field(None, ge=0, description="Examples before each item; none: the task's.")
    limit: Annotated[int, Field(gt=0)] | Literal["all"] | None = Field(
        None, description="How many items; none: the task's."
    )
    seed: Seed | None = Field(None, description="Seed of the shots; none: the task's.")
    data_dir: str | None = Field(None, description="Folder with the files of tasks over local data.")


class Variant(Section):
    """One thing that is compared."""

    name: Name = Field(description="How tables and folders call it.")
    settings: dict[str, Any] = Field(default_factory=dict, description="What it sets otherwise than the others.")
    train: bool = Field(True, description="false: the base model is evaluated as it is.")
    seeds: list[Seed] | None = Field(None, description="Seeds of its own; none: the experiment's.", min_length=1)


class Experiment(Section):
    """A comparison: every variant on every base with every seed, asked the same."""

    name: Name = Field(description="Name of the experiment.")
    title: Words = Field(Words(), description="A line over the report.")
    description: Words = Field(Words(), description="What is compared, and what to set for another base.")
    inputs: dict[Name, str] = Field(
        default_factory=dict, description="What the user gives, and what it is; `${name}` stands for it below."
    )
    recipe: str | None = Field(None, description="A recipe that all variants start from.")
    settings: dict[str, Any] = Field(default_factory=dict, description="Settings of all runs, nested as for finetune.")
    seeds: list[Seed] = Field([0], description="Each variant is trained once with each.", min_length=1)
    bases: dict[Name, dict[str, Any]] = Field(
        default_factory=dict,
        description="Base models by name, each with its `model` settings; none: the one in settings.",
    )
    variants: list[Variant] = Field(description="What is compared.", min_length=1)
    evaluate: list[Evaluation] = Field(description="What is asked.", min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Experiment:
        names = [variant.name for variant in self.variants]
        if double := _find_double(names):
            raise ValueError(f"two variants are called {double!r}")
        taken = {*RunConfig.model_fields, "seeds", "evaluate"}
        if wrong := sorted(taken & {*names, *self.inputs}):
            raise ValueError(f"{wrong[0]!r} is the name of a group of settings; give the variant or input another")
        if double := _find_double([(each.tasks[0], each.shots, each.seed) for each in self.list_evaluations()]):
            raise ValueError(f"the task {double[0]!r} is asked twice with the same shots")
        return self

    def list_evaluations(self) -> list[Evaluation]:
        """Return what is asked, one task each."""
        return [each.model_copy(update={"tasks": [task]}) for each in self.evaluate for task in each.tasks]


def _find_double(items: Sequence[Any]) -> Any:
    return next((item for item, count in Counter(items).items() if count > 1), None)


def list_experiments() -> list[str]:
    """Return the names of the experiments that ship."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_experiment(
    name_or_path: str, inputs: Mapping[str, str] | None = None, overrides: Mapping[str, Any] | None = None
) -> Experiment:
    """Load an experiment that ships, or one's own from a YAML file, and fill in what the user gives.

    `overrides` are nested: `model: {base: ...}` is for all runs, `VARIANT: {training: ...}` for one variant,
    `seeds: [...]` and `evaluate: {limit: ...}` replace those of the file. Raises ConfigError for unknown names and
    keys, and for inputs that are missing.
    """
    values = read_experiment(name_or_path)
    experiment = _resolve(values, name_or_path)
    problems = list(find_input_problems(experiment, inputs or {})) + list(find_override_problems(experiment, overrides))
    if problems:
        raise ConfigError("\n  ".join([f"{experiment.name}:", *problems]))
    missing = {name: text for name, text in experiment.inputs.items() if name not in (inputs or {})}
    if missing:
        raise ConfigError(ask_for(experiment, name_or_path, missing))
    settled = {name: settle_path(value) for name, value in (inputs or {}).items()}
    filled = fill_in(override(to_mapping(experiment), overrides or {}), settled)
    return _resolve({**filled, "inputs": {}}, name_or_path)


def read_experiment(name_or_path: str) -> dict[str, Any]:
    """Read the file of an experiment as it stands. Raises ConfigError with the nearest name."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml", ".json") or len(path.parts) > 1:
        return read_config_file(path)
    known = list_experiments()
    if name_or_path not in known:
        raise ConfigError(
            f"there is no experiment {name_or_path!r}{suggest(name_or_path, known)}; there are: {', '.join(known)}. "
            "One of your own is named by its file, for example ./experiment.yaml"
        )
    return read_config_file(SHIPPED / f"{name_or_path}.yaml")


def is_filled_in(path: Path) -> bool:
    """Whether an experiment's file is one that koat filled in and wrote: no inputs, and not a letter of anyone else."""
    values = read_config_file(path)
    return values.get("inputs") == {} and path.read_text(encoding="utf-8") == dump_yaml(values)


def says_the_same(path: Path, experiment: Experiment) -> bool:
    """Whether a file as it stands, with nothing given beside it, is this experiment."""
    return to_mapping(_resolve(read_config_file(path), str(path))) == to_mapping(experiment)


def describe_experiment(name: str) -> str:
    """Return the line that a shipped experiment says about itself."""
    return _resolve(read_experiment(name), name).title.en


def split_items(items: Sequence[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """Divide `key=value` items into inputs (no dot in their name) and overrides (nested)."""
    inputs, settings = {}, []
    for item in items:
        name, equals, value = item.partition("=")
        if equals and "." not in name and name != "seeds":
            inputs[name] = value
        else:
            settings.append(item)
    return inputs, parse_overrides(settings)


# Filling in ---------------------------------------------------------------------------------------------------


def find_input_problems(experiment: Experiment, inputs: Mapping[str, str]) -> list[str]:
    """List inputs that the file does not know, and places in it that name one it does not declare."""
    problems = []
    for name in sorted(inputs.keys() - experiment.inputs.keys()):
        near = suggest(name, [*experiment.inputs, *(variant.name for variant in experiment.variants)])
        known = ", ".join(experiment.inputs) or "none"
        problems.append(f"{name}: there is no such input{near}; there are: {known}. Settings are written section.key")
    for name in sorted(set(PLACEHOLDER.findall(str(to_mapping(experiment)))) - experiment.inputs.keys()):
        problems.append(f"${{{name}}} is used, but `inputs` does not say what it is")
    return problems


def find_override_problems(experiment: Experiment, overrides: Mapping[str, Any] | None) -> list[str]:
    """List overrides that have no place, and those that variants set themselves, so that they would do nothing."""
    variants = {variant.name: variant for variant in experiment.variants}
    known = [*RunConfig.model_fields, *variants, "seeds", "evaluate"]
    masked = [each.name for each in experiment.variants if each.seeds] if "seeds" in (overrides or {}) else []
    problems = [f"seeds: {name} has seeds of its own; change them in the file" for name in masked]
    for section, values in (overrides or {}).items():
        if section not in known:
            problems.append(f"{section}: there is no such section or variant{suggest(section, known)}")
        keys = values if isinstance(values, Mapping) and section in RunConfig.model_fields else {}
        for key in keys:
            own = [name for name, each in variants.items() if key in (each.settings.get(section) or {})]
            if own:
                problems.append(
                    f"{section}.{key}: {', '.join(own)} set it themselves, which goes before what is set for all. "
                    f"Give {own[0]}.{section}.{key}=..."
                )
            if section == "model" and any(key in base for base in experiment.bases.values()):
                problems.append(f"model.{key}: the bases {', '.join(experiment.bases)} set it; change it in the file")
    return problems


def ask_for(experiment: Experiment, name_or_path: str, missing: Mapping[str, str]) -> str:
    """Say which inputs are missing, what they are, and how to give them."""
    width = max(map(len, missing))
    lines = [f"  {name:<{width}}  {text}" for name, text in missing.items()]
    given = " ".join(f"{name}=PATH" for name in experiment.inputs)
    example = f"koat experiment {shlex.quote(name_or_path)} {given} --out experiments/{experiment.name}"
    about = [text for text in (experiment.title.en, experiment.description.en) if text]
    return "\n".join([*about, f"{experiment.name} needs to know:", *lines, f"For example: {example}"])


def settle_path(value: str) -> str:
    """Return a local path in full, so that the experiment goes on from anywhere; anything else as it is."""
    path = Path(value).expanduser()
    return str(path.resolve()) if path.exists() else value


def fill_in(value: Any, inputs: Mapping[str, str]) -> Any:
    """Replace `${name}` in every text of nested values."""
    if isinstance(value, Mapping):
        return {key: fill_in(item, inputs) for key, item in value.items()}
    if isinstance(value, list):
        return [fill_in(item, inputs) for item in value]
    return PLACEHOLDER.sub(lambda found: inputs.get(found[1], found[0]), value) if isinstance(value, str) else value


def override(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return an experiment's values with overrides in their places."""
    own = {name: given for name, given in overrides.items() if name not in RunConfig.model_fields}
    shared = {name: given for name, given in overrides.items() if name in RunConfig.model_fields}
    return {
        **values,
        "seeds": own.get("seeds", values["seeds"]),
        "settings": merge_sections(values["settings"], shared),
        "variants": [
            {**each, "settings": merge_sections(each["settings"], own.get(each["name"], {}))}
            for each in values["variants"]
        ],
        "evaluate": [_merge(each, own.get("evaluate", {})) for each in values["evaluate"]],
    }


def merge_sections(settings: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with others over them, section by section."""
    return {**settings, **{section: _merge(settings.get(section), values) for section, values in over.items()}}


def _merge(values: Any, over: Any) -> Any:
    return {**values, **over} if isinstance(values, Mapping) and isinstance(over, Mapping) else over


def _resolve(values: Mapping[str, Any], name: str) -> Experiment:
    try:
        return resolve(Experiment, [Layer("file", values)]).settings
    except ConfigError as error:
        raise ConfigError(f"experiment {name}: {error}") from None
