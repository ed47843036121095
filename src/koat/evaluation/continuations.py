"""Let a model continue prompts until a text or the end: greedily as a forest, else in left-padded batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from koat.evaluation.spans import settled
from koat.forest.grow import grow_forest
from koat.forest.kernels import pick_cached
from koat.forest.score import Layout, set_kernel, unwrap
from koat.forest.verify_growth import verify_growth

LOOK_BEHIND = 2
"""Tokens beyond a stop text's own that are decoded to find it: a model may write it in other pieces."""
HARMLESS = {
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "use_cache",
    "do_sample", "temperature", "top_k", "top_p", "max_length", "max_new_tokens", "_from_model_config",
}  # fmt: skip
"""Settings of generation that change nothing about which token is the likeliest."""


class StopTexts:
    """Texts at which writing stops, looked for in what was written last."""

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.texts: dict[int, list[str]] = {}
        for text in texts:
            size = len(tokenizer(text, add_special_tokens=False)["input_ids"]) + LOOK_BEHIND
            self.texts.setdefault(size, []).append(text)

    def find(self, written: Tensor) -> Tensor:
        """Return in which rows of `written [B, t]` a text has just been completed `[B]`."""
        found = [False] * len(written)
        for size, texts in self.texts.items():
            for row, last in enumerate(self.tokenizer.batch_decode(written[:, -size:])):
                found[row] = found[row] or any(text in last for text in texts)
        return torch.tensor(found, device=written.device)

    def cut(self, written: tuple[int, ...]) -> tuple[int, ...]:
        """Return what one row wrote up to where a text was first complete; all of it where none is."""
        places = range(1, len(written) + 1) if self.texts else ()
        return next((written[:end] for end in places if self.find(torch.tensor([written[:end]]))), written)


class StopAtTexts:
    """A stopping criterion of transformers: a row is done when one of `texts` stands in what it has written last.

    It keeps nothing of its rows: with beams they are more than the prompts, and change places.
    """

    def __init__(self, texts: StopTexts, num_prompt_tokens: int) -> None:
        self.texts, self.num_prompt_tokens = texts, num_prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return which rows are done `[B]`."""
        return self.texts.find(input_ids[:, self.num_prompt_tokens :])


@dataclass(frozen=True, slots=True)
class Ending:
    """When a continuation is done: at a text of `until` (in it), an end token, or `max_new_tokens`.

    `options` go to transformers' `generate`.
    """

    until: Sequence[str]
    max_new_tokens: int
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Continuations:
    """What was written behind each prompt, in the order given, and how many tokens went through the model.

    Padding is not counted; a prompt that was done while others of its batch were not is.
    """

    token_ids: list[tuple[int, ...]]
    num_tokens: int


@torch.no_grad()
def continue_prompts(
    model: nn.Module,
    layout: Layout,
    tokenizer: Any,
    prompts: Sequence[tuple[int, ...]],
    ending: Ending,
    *,
    token_budget: int = 8192,
    on_progress: Callable[[int], None] = lambda num_done: None,
) -> Continuations:
    """Return what the model writes behind each prompt.

    Greedy results depend neither on the budget nor on the order.
    """
    writer = _Writer(model, layout, tokenizer, ending)
    with settled(model):
        grows = is_greedy(unwrap(model), ending) and verify_growth(model, layout)
        write = writer.grow if grows else writer.write_batches
        return write(prompts, token_budget, on_progress)


def read_text(token_ids: Sequence[int], until: Sequence[str], tokenizer: Any) -> str:
    """Return what was written as text, up to the first of the texts that end it."""
    text = str(tokenizer.decode(list(token_ids), skip_special_tokens=True))
    ends = [place for end in until if (place := text.find(end)) >= 0]
    return text[: min(ends, default=len(text))].strip()


def is_greedy(causal: Any, ending: Ending) -> bool:
    """Whether the likeliest token is all that is asked for: no sampling, beams, penalties or processors."""
    asked = {**causal.generation_config.to_diff_dict(), **ending.options}
    return not asked.get("do_sample", False) and asked.keys() <= HARMLESS


@dataclass(frozen=True, slots=True)
class _Writer:
    """A model, and when it is done with a prompt."""

    model: nn.Module
    layout: Layout
    tokenizer: Any
    ending: Ending

    def find_ends(self) -> set[int]:
        """Return the tokens that end a text: those asked for, else the model's and training's."""
        asked = self.ending.options.get("eos_token_id")
        if asked is None:
            return list_end_tokens(unwrap(self.model), self.tokenizer)
        return set(asked) if isinstance(asked, list) else {asked}

    def grow(
        self, prompts: Sequence[tuple[int, ...]], token_budget: int, on_progress: Callable[[int], None]
    ) -> Continuations:
        """Continue all prompts as a forest, what they share computed once."""
        texts, causal = StopTexts(self.tokenizer, self.ending.until), unwrap(self.model)
        ends = torch.tensor(sorted(self.find_ends()), dtype=torch.int64, device=causal.device)

        def is_done(places: Sequence[int], written: Tensor) -> Tensor:
            return torch.isin(written[:, -1], ends) | texts.find(written)

        limit = self.ending.max_new_tokens
        grown, num_tokens = grow_forest(
            self.model, self.layout, prompts, limit, is_done, token_budget=token_budget, on_progress=on_progress
        )
        return Continuations([tuple(each.token_ids) for each in grown], num_tokens)

    def write_batches(
        self, prompts: Sequence[tuple[int, ...]], token_budget: int, on_progress: Callable[[int], None]
    ) -> Continuations:
        """Continue prompts of similar lengths together, padded on the left, or each alone where the layout says so."""
        num_tokens = 0
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        found: dict[int, tuple[int, ...]] = {}
        while len(found) < len(order):
            longest = len(prompts[order[len(found)]]) + self.ending.max_new_tokens
            together = 1 if self.layout.alone else max(1, token_budget // longest)
            chosen = order[len(found) : len(found) + together]
            batch = [prompts[index] for index in chosen]
            written = self._write_batch(batch)
            found.update(zip(chosen, written, strict=True))
            num_tokens += sum(map(len, batch)) + len(batch) * (max(map(len, written)) - 1)
            on_progress(len(chosen))
        return Continuations([found[index] for index in range(len(prompts))], num_tokens)

    def _write_batch(self, prompts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        from transformers import StoppingCriteriaList

        causal, caller = unwrap(self.model), _prepare(self.model, self.layout)
        ends, texts = self.find_ends(), StopTexts(self.tokenizer, self.ending.until)
        width, padding = len(prompts[0]), _find_padding(self.tokenizer, causal)
        ids = torch.tensor([(padding,) * (width - len(prompt)) + prompt for prompt in prompts], device=causal.device)
        mask = torch.tensor(
            [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=causal.device
        )
        options = {"pad_token_id": padding, "use_cache": True, **self.ending.options}
        fixed = {"eos_token_id": sorted(ends) or None, "num_return_sequences": 1}
        output = caller.generate(
            input_ids=ids,
            attention_mask=mask,
            stopping_criteria=StoppingCriteriaList([StopAtTexts(texts, width)]),
            **{**options, **fixed, "max_new_tokens": self.ending.max_new_tokens},
        )
        return [texts.cut(_cut(tuple(row), ends)) for row in output[:, width:].tolist()]


def _prepare(model: nn.Module, layout: Layout) -> Any:
    """Give the model back the attention that a cache and padding work with: scoring may have set another."""
    if layout.plan is not None:
        set_kernel(unwrap(model), pick_cached(unwrap(model), layout.plan.kernel))
    return model


def _find_padding(tokenizer: Any, causal: Any) -> int:
    """Return what fills a row; it is masked, so that any token that the model knows will do."""
    candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id)
    num_known = len(causal.get_input_embeddings().weight)
    return next((token_id for token_id in candidates if token_id is not None and token_id < num_known), 0)


def list_end_tokens(causal: Any, tokenizer: Any) -> set[int]:
    """Return the tokens at which a model is done: its own, and the one that koat trains each response to end with."""
    own = causal.generation_config.eos_token_id
    return {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}


def _cut(written: tuple[int, ...], ends: set[int]) -> tuple[int, ...]:
    """Return what stands up to the first end token; behind it come padding or what nobody asked for."""
    end = next((place for place, token_id in enumerate(written) if token_id in ends), len(written))
    return written[: end + 1]
