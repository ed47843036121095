"""What came of one task: scores with intervals, what they mean, every prediction, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from koat.evaluation.contract import Parts
from koat.evaluation.metrics import Score
from koat.evaluation.protocol import KeptOut


@dataclass(frozen=True, slots=True)
class TaskResult:
    """A score and a contract for each scoring, and every prediction.

    `values` are metrics over all items together, which have no value per item and so no interval. `seconds` covers
    building the prompts, tokenising and asking, not reading files. `num_tokens` counts each request with its whole
    context, `num_unique_tokens` what was computed.
    """

    task: str
    num_shots: int
    shot_seed: int | None
    scores: dict[str, Score]
    predictions: list[dict[str, Any]]
    contracts: dict[str, Parts]
    conditions: Parts
    notes: list[str]
    kept_out: list[KeptOut]
    seconds: float
    num_tokens: int
    num_unique_tokens: int
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_items(self) -> int:
        """How many items were asked."""
        return len(self.predictions)

    @property
    def seconds_per_item(self) -> float:
        """Mean time of one item."""
        return self.seconds / self.num_items

    def list_values(self, scoring: str) -> list[float]:
        """Return each item's own score."""
        return [float(row["correct"][scoring]) for row in self.predictions]

    def to_mapping(self) -> dict[str, Any]:
        """Return a JSON-safe mapping without the predictions."""
        return {
            "task": self.task,
            "num_shots": self.num_shots,
            "shot_seed": self.shot_seed,
            "scores": {scoring: score.to_mapping() for scoring, score in self.scores.items()},
            "values": dict(self.values),
            "contracts": {scoring: contract.to_mapping() for scoring, contract in self.contracts.items()},
            "conditions": self.conditions.to_mapping(),
            "notes": list(self.notes),
            "kept_out": [asdict(entry) for entry in self.kept_out],
            "seconds": self.seconds,
            "seconds_per_item": self.seconds_per_item,
            "num_items": self.num_items,
            "num_tokens": self.num_tokens,
            "num_unique_tokens": self.num_unique_tokens,
        }


def note_kept_out(kept_out: Sequence[KeptOut], num_asked: int) -> list[str]:
    """Say which items were too long to be asked; nothing when all fit."""
    if not kept_out:
        return []
    shown = ", ".join(f"{entry.item_id} ({entry.num_tokens} tokens)" for entry in kept_out[:5])
    more = f" and {len(kept_out) - 5} more" if len(kept_out) > 5 else ""
    return [
        f"{len(kept_out)} items do not fit the model's context of {kept_out[0].context_length} tokens and were not "
        f"asked: {shown}{more}. The scores are over the other {num_asked}."
    ]
