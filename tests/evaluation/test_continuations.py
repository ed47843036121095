"""What a model writes behind a prompt hangs on no other prompt: against plain passes over each text alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from koat.evaluation.continuations import Ending, continue_prompts
from koat.forest.verify import verify_layout
from tests.evaluation.conftest import VOCABULARY

NUM_NEW = 6


def draw_prompts(*lengths: int) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(0)
    return [tuple(int(token) for token in rng.integers(3, VOCABULARY, length)) for length in lengths]


def write_singly(model: Any, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """The oracle: one plain pass per token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(NUM_NEW):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "alone"), [("phi3-longrope", True), ("bloom", False), ("llama", False)])
def test_greedy_text_does_not_depend_on_neighbours(make_model, tokenizer, family, alone, attention) -> None:
    """Longrope turns all rows of a batch by the longest of them: beside 40 tokens, 8 are not turned as alone."""
    model = make_model(family, attention if family != "bloom" else None, vocab_size=VOCABULARY)
    layout, _ = verify_layout(model)
    assert layout.alone is alone
    prompts, done = draw_prompts(8, 40, 12, 9, 36), []
    found = continue_prompts(model, layout, tokenizer, prompts, Ending((), NUM_NEW, {}), on_progress=done.append)
    assert found.token_ids == [write_singly(model, prompt) for prompt in prompts]
    assert sum(done) == len(prompts)
    assert found.num_tokens == sum(map(len, prompts)) + len(prompts) * (NUM_NEW - 1)
