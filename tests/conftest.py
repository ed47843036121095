"""Tiny random models of every family, token sequences of every shape, and the oracle: one pass per sequence."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# The same examples in every run, on every machine: what fails once fails again.
settings.register_profile("koat", derandomize=True, database=None, deadline=None)
settings.load_profile("koat")

# Without a GPU, Triton interprets its kernels; it asks for this when it is first imported.
if shutil.which("nvidia-smi") is None or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
    os.environ.setdefault("TRITON_INTERPRET", "1")

VOCABULARY = 300
WINDOW = 6
"""Shorter than the sequences below, so that a window that is ignored shows."""

_LLAMA_LIKE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neox": (
        "gpt_neox",
        {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 3},
    ),
    "llama": ("llama", _LLAMA_LIKE),
    "mistral": ("mistral", {**_LLAMA_LIKE, "sliding_window": WINDOW}),
    "qwen2": ("qwen2", _LLAMA_LIKE),
    "qwen2-window": (
        "qwen2",
        {**_LLAMA_LIKE, "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _ALTERNATING},
    ),
    "qwen3": ("qwen3", {**_LLAMA_LIKE, "head_dim": 16}),
    "gpt2": (
        "gpt2",
        {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 512, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        | {"attn_pdrop": 0.0},
    ),
    "gemma2": (
        "gemma2",
        {**_LLAMA_LIKE, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}
        | {"layer_types": _ALTERNATING, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0},
    ),
    "granite": ("granite", {**_LLAMA_LIKE, "logits_scaling": 3.0, "residual_multiplier": 0.5}),
    "gptj": ("gptj", {"n_embd": 64, "n_head": 4, "n_layer": 3, "rotary_dim": 8, "n_positions": 512}),
    "opt": (
        "opt",
        {"hidden_size": 64, "ffn_dim": 96, "num_attention_heads": 4, "num_hidden_layers": 3, "dropout": 0.0}
        | {"word_embed_proj_dim": 64, "max_position_embeddings": 512},
    ),
    "bloom": ("bloom", {"hidden_size": 64, "n_head": 4, "n_layer": 3}),
    "mamba": ("mamba", {"hidden_size": 64, "num_hidden_layers": 3, "state_size": 8}),
    "phi3-longrope": (
        "phi3",
        {**_LLAMA_LIKE, "max_position_embeddings": 64, "original_max_position_embeddings": 32}
        | {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [4.0] * 8,
                "original_max_position_embeddings": 32,
            }
        },
    ),
}


def build_config(family: str, **options: Any) -> Any:
    """Return the configuration of a tiny model; `options` override it."""
    from transformers import AutoConfig

    kind, shape = _FAMILIES[family]
    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return AutoConfig.for_model(kind, **{"vocab_size": VOCABULARY, **special, **shape, **options})


def build_model(family: str, attention: str | None = None, seed: int = 0, **options: Any) -> Any:
    """Return a tiny frozen float32 model in evaluation mode.

    Weights are drawn large enough that every token, position and mask matters to the outcome: with the
    usual 0.02 a model this small is all but a table of its last token.
    """
    import torch
    from transformers import AutoModelForCausalLM

    keywords = {} if attention is None else {"attn_implementation": attention}
    model = AutoModelForCausalLM.from_config(build_config(family, **options), dtype=torch.float32, **keywords)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 2 and "A_log" not in name:
            weight.data = noise * (0.5 if "emb" in name or "wte" in name else 1.2 * weight.shape[-1] ** -0.5)
        else:
            weight.data += 0.1 * noise
    return model.requires_grad_(False).eval()


def draw_sequences(kind: str, seed: int = 0) -> list[Any]:
    """Return sequences of a named shape.

    `shared`: questions on articles. `chat`: conversations with several supervised turns that branch late.
    `unrelated`: rows with nothing in common. `mixed`: all of it, with repeats, prefixes and single tokens.
    """
    import numpy as np

    from koat.core.sequence import Sequence, supervise_from

    rng = np.random.default_rng(seed)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(int(token) for token in rng.integers(3, VOCABULARY, length))

    def ask(article: tuple[int, ...], question: int, answer: int) -> Sequence:
        return supervise_from(article + draw(question) + draw(answer), len(article) + question)

    def converse(turns: Iterable[tuple[int, bool]], before: Sequence | None = None) -> Sequence:
        ids, marks = (before.token_ids, before.supervised) if before else ((), ())
        for length, supervised in turns:
            ids, marks = ids + draw(length), marks + (supervised,) * length
        return Sequence(ids, marks)

    if kind == "shared":
        articles = [draw(length) for length in (17, 11)]
        return [ask(each, int(rng.integers(2, 6)), int(rng.integers(1, 5))) for each in articles for _ in range(4)]
    if kind == "chat":
        opening = converse([(4, False), (5, True), (3, False), (4, True)])
        branches = [converse([(length, False), (3, True), (2, False), (2, True)], opening) for length in (2, 4, 1)]
        return [*branches, opening, converse([(3, False), (6, True), (2, False), (1, True)])]
    if kind == "unrelated":
        return [ask((), int(rng.integers(2, 9)), int(rng.integers(1, 9))) for _ in range(9)]
    whole = draw_sequences("shared", seed) + draw_sequences("chat", seed) + draw_sequences("unrelated", seed)
    again = supervise_from(whole[1].token_ids, 2)
    prefix = supervise_from(whole[3].token_ids[:9], 4)
    single = Sequence((7,), (False,))
    return [whole[index] for index in rng.permutation(len(whole))] + [again, whole[0], prefix, single]


def pass_singly(model: Any, sequences: list[Any]) -> list[Any]:
    """Return log-probabilities `[len(sequence)]` of every token of every sequence, each from its own plain pass.

    Entry 0, which nothing predicts, is zero. Differentiable.
    """
    import torch

    results = []
    for sequence in sequences:
        ids = torch.tensor([sequence.token_ids])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        picked = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0]
        results.append(torch.cat([torch.zeros(1), picked]))
    return results


def randomise_adapter(model: Any, seed: int = 0, spread: float = 0.3) -> None:
    """Move every trainable entry of an adapter away from where it starts."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            noise = spread * torch.randn(weight.shape, generator=generator)
            weight.data += noise if "lora" not in name else noise / 2


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """`make_model(family, attention=None, seed=0, **options)`: a tiny random model."""
    return build_model


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Any]:
    """`make_config(family, **options)`: a tiny model's configuration."""
    return build_config


@pytest.fixture(scope="session")
def make_sequences() -> Callable[..., list[Any]]:
    """`make_sequences(kind, seed=0)`: token sequences of a named shape."""
    return draw_sequences


@pytest.fixture(scope="session")
def score_singly() -> Callable[..., list[Any]]:
    """`score_singly(model, sequences)`: the oracle, one plain pass per sequence."""
    return pass_singly


@pytest.fixture(scope="session")
def randomise() -> Callable[..., None]:
    """`randomise(model, seed=0)`: move a fresh adapter away from the identity."""
    return randomise_adapter


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache of the Hub, and let no call reach further."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True, raising=False)
    for name in ("huggingface_hub.constants.HF_HUB_CACHE", "huggingface_hub.file_download.HF_HUB_CACHE"):
        monkeypatch.setattr(name, str(tmp_path / "hub"), raising=False)
    return tmp_path / "hub"
