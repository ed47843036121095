"""A model card: front matter for the Hub, and what a reader must know to use or doubt a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from koat.core.config_files import dump_yaml
from koat.report.scores import format_value


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What goes into a model card; every field may be empty but `name`, `method`, `base` and `licence`."""

    name: str
    method: str
    base: str
    licence: str
    base_fingerprint: str = ""
    is_local_base: bool = False
    """The base is a folder of someone's, so the Hub cannot link to it."""
    template: dict[str, Any] = field(default_factory=dict)
    num_parameters: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    """File name: its fingerprint, or a word on why there is none."""
    settings: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    scores: list[dict[str, Any]] = field(default_factory=list)
    merge: dict[str, Any] = field(default_factory=dict)
    """The record of the merge, for a merged model."""
    places: list[str] = field(default_factory=list)
    """Modules with vectors of koat's own, which plain PEFT passes over."""


def write_card(facts: CardFacts) -> str:
    """Return a model card in Markdown."""
    parts = [
        f"---\n{dump_yaml(front_matter(facts))}---\n",
        f"# {facts.name}\n",
        describe_model(facts),
        describe_use(facts),
        describe_scores(facts.scores),
        describe_training(facts),
        describe_merging(facts.merge),
        f"## Licence\n\n{facts.licence}. The base model's own licence holds as well.\n",
    ]
    return "\n".join(part for part in parts if part)


def front_matter(facts: CardFacts) -> dict[str, Any]:
    """Return the card's metadata as the Hub reads it."""
    matter: dict[str, Any] = {
        "license": facts.licence,
        "library_name": "transformers" if facts.merge else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["koat", facts.method],
    }
    if not facts.is_local_base:
        matter["base_model"] = facts.base
        matter["base_model_relation"] = "finetune" if facts.merge else "adapter"
    return matter


def describe_model(facts: CardFacts) -> str:
    """Return what the model is, in a few lines."""
    what = "merged into the weights of" if facts.merge else "an adapter for"
    lines = [f"{facts.method}, {what} `{facts.base}`, trained with koat.\n"]
    if facts.num_parameters:
        lines.append(f"- trained parameters: {facts.num_parameters:,}")
    if facts.base_fingerprint:
        lines.append(f"- fingerprint of the base model: `{facts.base_fingerprint}`")
    return "\n".join(lines) + "\n"


def describe_use(facts: CardFacts) -> str:
    """Return how to load it, and the prompt form it was trained on."""
    if facts.merge:
        code = 'model = AutoModelForCausalLM.from_pretrained("REPO")'
        head = "from transformers import AutoModelForCausalLM"
    else:
        head = "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM"
        code = f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{facts.base}"), "REPO")'
    text = f"## Use\n\n```python\n{head}\n\n{code}\n```\n"
    if facts.places and not facts.merge:
        text += (
            f"\n**Plain PEFT opens this adapter without its vectors in {', '.join(facts.places)}**, and says nothing. "
            "Evaluate or merge it with koat: `koat merge` puts them into the weights.\n"
        )
    prompts = facts.template.get("prompts")
    if prompts:
        shown = "\n\n".join(f"```text\n{prompt}\n```" for prompt in prompts)
        text += (
            f"\nPrompts must have the form that it was trained on (`{facts.template.get('name', '')}`):\n\n{shown}\n"
        )
    elif facts.template:
        text += "\nPrompts go through the tokenizer's chat template.\n"
    return text


def describe_scores(scores: list[dict[str, Any]]) -> str:
    """Return the scores as a table, with intervals and contracts."""
    if not scores:
        return "## Scores\n\nNone were measured with koat.\n"
    rows = [
        f"| {score['task']} | {score['scoring']} | {score['shots']} | {score['num_items']:,} "
        f"| {format_value(score)}{'' if score['meaningful'] else ', not meaningful'} | `{score['contract']}` |"
        for score in scores
    ]
    return (
        "## Scores\n\n| task | scoring | shots | items | score (95 % interval) | contract |\n"
        "|---|---|---|---|---|---|\n" + "\n".join(rows) + "\n\nA contract is the hash of what was asked; scores "
        "under different contracts cannot be compared.\n"
    )


def describe_training(facts: CardFacts) -> str:
    """Return data, settings, result and versions."""
    if not facts.settings and not facts.data:
        return "## Training\n\nNot recorded: the adapter was not trained by a koat run.\n"
    lines = ["## Training\n", "| data | SHA-256 | bytes |", "|---|---|---|"]
    for name, pinned in facts.data.items():
        digest, size = (f"`{pinned['sha256']}`", pinned["bytes"]) if isinstance(pinned, dict) else (pinned, "")
        lines.append(f"| {name} | {digest} | {size} |")
    lines.append(f"\n```yaml\n{dump_yaml(facts.settings)}```\n")
    shown = {key: value for key, value in facts.result.items() if value is not None}
    if shown:
        lines.append("\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in shown.items()) + "\n")
    if facts.versions:
        lines.append(f"Versions: {', '.join(f'{name} {version}' for name, version in facts.versions.items())}.\n")
    return "\n".join(lines)


def describe_merging(record: dict[str, Any]) -> str:
    """Return what the merge's check found, empty for an adapter."""
    if not record:
        return ""
    check = record["check"]
    return (
        f"## Merging\n\nMerged in float32, stored in {record['dtype']}. On {check['prompts']} prompts "
        f"({check['tokens']} tokens) the logits of this folder differ from the adapter's by at most "
        f"{check['folder']['max']:.2g} "
        f"(the largest logit is {check['largest_logit']:.3g}); {check['folder']['same_top']:.1%} of the positions keep "
        "their first token.\n"
    )
