"""What a model writes behind a prompt hangs on no other prompt: against plain passes over each text alone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from koat.evaluation.continuations import Ending, continue_prompts, list_end_tokens
from koat.forest.score import make_padded
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


def retell(tokenizer: Any, **tokens: int | None) -> Any:
    """Return the tokenizer with other special tokens."""
    other = copy.copy(tokenizer)
    other.__class__ = type("Other", (type(tokenizer),), tokens)
    return other


def write_two(make_model: Any, grows: bool) -> tuple[Any, Any, list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Return a model, a layout that grows or pads, two prompts, and what each is continued with by itself."""
    model = make_model("llama", vocab_size=VOCABULARY)
    prompts = draw_prompts(8, 12)
    layout = verify_layout(model)[0] if grows else make_padded()
    return model, layout, prompts, [write_singly(model, prompt) for prompt in prompts]


@pytest.mark.parametrize("grows", [True, False])
def test_a_model_stops_at_the_token_that_it_was_trained_to_end_with(make_model, tokenizer, grows) -> None:
    """The tokenizer's, beside those that its settings of generation name."""
    model, layout, prompts, whole = write_two(make_model, grows)
    own, trained = whole[0][3], whole[1][2]
    model.generation_config.eos_token_id = own
    other = retell(tokenizer, eos_token_id=trained)
    assert list_end_tokens(model, other) == {own, trained}
    passes: list[int] = []
    handle = model.register_forward_hook(lambda *given: passes.append(1))
    found = continue_prompts(model, layout, other, prompts, Ending((), NUM_NEW, {})).token_ids
    handle.remove()
    ends = [min(ids.index(end) for end in (own, trained) if end in ids) for ids in whole]
    assert found == [ids[: end + 1] for ids, end in zip(whole, ends, strict=True)]
    assert max(map(len, found)) < NUM_NEW and (grows or len(passes) == max(map(len, found))), "nobody writes on"


@pytest.mark.parametrize("grows", [True, False])
def test_an_end_that_is_asked_for_takes_the_place_of_the_model_s(make_model, tokenizer, grows) -> None:
    """`--gen_kwargs eos_token_id=...` of lm-eval."""
    model, layout, prompts, whole = write_two(make_model, grows)
    model.generation_config.eos_token_id = whole[0][1]
    for asked in (whole[0][3], [whole[0][3]]):
        found = continue_prompts(model, layout, tokenizer, prompts, Ending((), NUM_NEW, {"eos_token_id": asked}))
        ends = [ids.index(whole[0][3]) if whole[0][3] in ids else NUM_NEW for ids in whole]
        assert found.token_ids == [ids[: end + 1] for ids, end in zip(whole, ends, strict=True)]


def test_padding_is_a_token_that_the_model_knows(make_model, tokenizer) -> None:
    model = make_model("llama", vocab_size=VOCABULARY)
    other = retell(tokenizer, pad_token_id=VOCABULARY, unk_token_id=VOCABULARY + 1)
    prompts = draw_prompts(8, 12)
    found = continue_prompts(model, make_padded(), other, prompts, Ending((), NUM_NEW, {}))
    assert found.token_ids == [write_singly(model, prompt) for prompt in prompts]


def test_beams_stop_at_texts_as_well(make_model, tokenizer) -> None:
    """They are more than the prompts, and change places: each prompt's is what it has when it is asked alone."""
    model = make_model("llama", vocab_size=VOCABULARY)
    model.generation_config.num_beams = 2
    layout, prompts = verify_layout(model)[0], draw_prompts(8, 12, 20)

    def write(asked: list[tuple[int, ...]], *until: str) -> list[tuple[int, ...]]:
        return continue_prompts(model, layout, tokenizer, asked, Ending(until, NUM_NEW, {})).token_ids

    whole = write(prompts)
    stop = tokenizer.decode(whole[0][2:3])
    found = write(prompts, stop)
    assert found == [write([prompt], stop)[0] for prompt in prompts]
    assert any(len(ids) < NUM_NEW for ids in found)
    for ids in found:
        assert stop in tokenizer.decode(ids) or len(ids) == NUM_NEW
        assert stop not in tokenizer.decode(ids[:-1])
