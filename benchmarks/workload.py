"""Real texts and random models: what every benchmark computes on."""

from __future__ import annotations

import random
from collections.abc import Sequence as ListLike
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from koat.core.sequence import Sequence
from koat.core.settings import ModelSettings
from koat.data.encode import encode_records
from koat.data.prompts import resolve_template
from koat.data.readers import read_records
from koat.data.records import Record
from koat.data.splits import split_by_title
from koat.model import load_tokenizer, pick_attention, pick_device

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 30_080
"""That of polyglot-ko, so that the head has a realistic share; token ids come from the shipped tokenizer."""
SIZES = {"tiny": (128, 2, 4), "small": (512, 8, 8), "1.3b": (2048, 24, 16), "5.8b": (4096, 28, 16)}
"""Width, layers and attention heads; `tiny` is for quick runs, whose figures mean nothing."""
FAMILIES = ("gpt_neox", "llama")
AMOUNT = 0.12
"""Share of all items that a run takes unless told otherwise: all benchmarks take an hour and a half on two cores."""


class Absent(Exception):
    """Data or a peer is not there; the benchmark is skipped and says why."""


@dataclass(frozen=True)
class Options:
    """What a run of the benchmarks was asked for."""

    amount: float = AMOUNT
    """Share of all items."""
    quick: bool = False
    tokenizer: str = "nano"
    base: str = "nano"
    """Base model of the quality comparison."""
    data: Path = field(default_factory=lambda: ROOT.parent / "shared" / "data")
    device: torch.device = field(default_factory=lambda: pick_device("auto"))
    size: str = "small"
    families: tuple[str, ...] = FAMILIES
    precisions: tuple[str, ...] = ("float32", "bfloat16")
    seed: int = 0
    asked_rounds: int | None = None

    @property
    def rounds(self) -> int:
        """How often each side runs; the median counts."""
        return self.asked_rounds or (2 if self.quick else 3)

    def scale(self, number: int, least: int) -> int:
        """Return this run's share of `number`."""
        return least if self.quick else max(least, round(number * self.amount))


def build_base(family: str, options: Options, precision: str = "float32", **shape: Any) -> Any:
    """Build a frozen causal model with random weights, the same ones for the same family and seed.

    `shape` overrides what the size says, by the names of the model's configuration.

    Weights are drawn with a deviation of 0.045 at width 512, about one over the root of the width, so that losses
    depend on context: with the usual 0.02 they would not tell a wrong mask from a right one.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    width, layers, heads = SIZES[options.size]
    inner = 4 * width if family == "gpt_neox" else 1376 * width // 512
    usual = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 4096,
        "initializer_range": 0.045 * min(1.0, (512 / width) ** 0.5),
        "tie_word_embeddings": False,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = AutoConfig.for_model(family, **{**usual, **shape})
    attention = pick_attention("auto", config)
    torch.manual_seed(options.seed)
    on_gpu = options.device.type == "cuda"
    # A GPU draws billions of weights in seconds, and holds them in the one type that is wanted.
    dtype = getattr(torch, precision) if on_gpu else torch.float32
    with options.device if on_gpu else nullcontext():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model = model.to(getattr(torch, precision)).to(options.device)
    return model.requires_grad_(False).eval()


def open_tokenizer(options: Options) -> Any:
    """Load the shipped tokenizer, or the one that was named."""
    return load_tokenizer(ModelSettings(base=options.tokenizer))


def find_file(options: Options, *parts: str) -> str:
    """Return a data file's path. Raises Absent when it is not there."""
    path = options.data.joinpath(*parts)
    if not path.is_file():
        raise Absent(f"{path.name} is not in {options.data}")
    return str(path)


def read_context_qa(options: Options, tokenizer: Any, part: str, limit: int) -> list[Sequence]:
    """Return about `limit` KorQuAD questions of a part of the article split, whole paragraphs drawn at random."""
    records = read_records(find_file(options, "qa", "KorQuAD_v1.0_dev.json")).records
    records = split_by_title(records, find_file(options, "qa", "korquad_article_split.tsv"), part)
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.group, []).append(record)
    names = sorted(groups)
    random.Random(options.seed).shuffle(names)
    chosen: list[Record] = []
    while names and len(chosen) < limit:
        chosen += groups[names.pop()]
    return encode(chosen[:limit], "koalpaca-context", tokenizer)


def read_instructions(options: Options, tokenizer: Any, limit: int) -> list[Sequence]:
    """Return `limit` instructions drawn at random, half from KoBEST, half small talk, mixed."""
    rng = random.Random(options.seed)
    chosen: list[Record] = []
    for name in ("kobest_train_instructions.jsonl", "chatbot_songys.jsonl"):
        records = read_records(find_file(options, "instructions_ko", name)).records
        chosen += rng.sample(records, min(len(records), limit // 2))
    rng.shuffle(chosen)
    return encode(chosen, "koalpaca", tokenizer)


def encode(records: ListLike[Record], template: str, tokenizer: Any) -> list[Sequence]:
    """Turn records into sequences as training does."""
    return encode_records(
        records, resolve_template(template), tokenizer, loss_on="response", max_length=None, overflow="error"
    ).sequences
