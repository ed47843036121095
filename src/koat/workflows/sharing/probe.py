"""Ask two models the same prompts and say how far their logits lie apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from koat.core.errors import DataError
from koat.core.settings import DataSettings
from koat.data.encode import encode_records
from koat.data.prompts import resolve_template
from koat.data.records import Record
from koat.data.templates import PromptTemplate
from koat.workflows.trained import Trained
from koat.workflows.training.examples import divide_records

NUM_PROMPTS = 6
MAX_TOKENS = 128
SENTENCES = (
    "오늘은 아침부터 비가 내려서 우산을 들고 나갔다.",
    "이 영화는 배우들의 연기가 좋았지만 이야기가 조금 길었다.",
    "대한민국의 수도는 어디이며 그 도시를 흐르는 강의 이름은 무엇인가?",
    "The library opens at nine, but on Sundays it stays closed until noon.",
    "Water boils at a lower temperature on a mountain than at the sea.",
    "Write a short letter that thanks a friend for a book.",
)
"""What is asked when a run's own data is not at hand."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """Token ids of a few prompts, and where they are from."""

    token_ids: list[list[int]]
    source: str

    @property
    def num_tokens(self) -> int:
        """Tokens of all prompts together."""
        return sum(map(len, self.token_ids))


@dataclass(frozen=True, slots=True)
class Difference:
    """How far logits lie apart, over all positions of all prompts."""

    max: float
    mean: float
    same_top: float
    """Share of positions at which both put the same token first."""

    def to_mapping(self) -> dict[str, float]:
        """Return a JSON-safe mapping."""
        return asdict(self)


def choose_prompts(trained: Trained, tokenizer: Any) -> Prompts:
    """Return a few sequences of the run's own data, or built-in sentences where that is gone.

    Validation rows come first: what the adapter was not fitted to is the harder question.
    """
    if trained.run is not None:
        config = trained.run.read_config()
        try:
            settings = DataSettings(**config["data"])
            train, held_out = divide_records(settings, int(config["training"]["seed"]), [])
            templates = resolve_template(settings.template)
            return Prompts(_encode((*held_out, *train)[:NUM_PROMPTS], templates, tokenizer), "the run's own data")
        except (DataError, ValidationError):
            pass  # the data, or what settings may hold, moved or changed since: the sentences below do as well
    encoded = [tokenizer(text)["input_ids"][:MAX_TOKENS] for text in SENTENCES]
    return Prompts([ids for ids in encoded if ids], "built-in sentences")


def _encode(records: Sequence[Record], templates: list[PromptTemplate], tokenizer: Any) -> list[list[int]]:
    found = encode_records(records, templates, tokenizer).sequences
    return [list(sequence.token_ids[:MAX_TOKENS]) for sequence in found[:NUM_PROMPTS]]


@torch.no_grad()
def collect_logits(model: Any, prompts: Prompts) -> list[Tensor]:
    """Return float32 logits `[tokens, vocabulary]` of each prompt on the CPU, each from a pass of its own."""
    device = next(model.parameters()).device
    return [
        model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0].float().cpu()
        for ids in prompts.token_ids
    ]


def compare_logits(expected: Sequence[Tensor], found: Sequence[Tensor]) -> Difference:
    """Return how far two models' logits on the same prompts lie apart; one that is not finite counts as infinite."""
    gaps = [
        (left - right).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
        for left, right in zip(expected, found, strict=True)
    ]
    same = [left.argmax(-1) == right.argmax(-1) for left, right in zip(expected, found, strict=True)]
    return Difference(
        max=float(max(gap.max() for gap in gaps)),
        mean=float(torch.cat([gap.mean(-1) for gap in gaps]).mean()),
        same_top=float(torch.cat(same).float().mean()),
    )
