"""koat as a model of lm-evaluation-harness: every request's shared prefix goes through the model once.

Requests mean what they mean to the harness' own Hugging Face backend (`lm_eval/models/huggingface.py`, HFLM):
the same tokens, the same windows, the same cuts; but a cut is counted and told. Needs the extra `eval`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from pydantic import Field
from torch import nn
from tqdm import tqdm  # type: ignore[import-untyped]

from koat.core.config import Section
from koat.core.errors import ConfigError, DataError
from koat.evaluation.continuations import Ending, continue_prompts
from koat.evaluation.contract import Parts, describe_conditions
from koat.evaluation.harness.request_tokens import RequestEncoder
from koat.evaluation.room import count_root_tokens
from koat.evaluation.spans import Span, score_spans
from koat.forest.score import Layout, unwrap

MAX_NEW_TOKENS = 256
"""What a request without a limit of its own may generate; the harness' own number."""
log = logging.getLogger(__name__)


@dataclass(slots=True)
class Tally:
    """What was asked so far, what of it did not fit the model's context, and what was computed."""

    num_requests: int = 0
    num_cut: int = 0
    num_tokens_cut: int = 0
    longest: int = 0
    num_tokens: int = 0
    num_unique_tokens: int = 0

    def to_mapping(self) -> dict[str, int]:
        """Return a JSON-safe mapping."""
        return {name: getattr(self, name) for name in self.__slots__}


class HarnessOptions(Section):
    """How requests are turned into tokens and answers; names and meanings are HFLM's, but for `tokens`."""

    tokens: int = Field(8192, ge=64, description="Tokens that go through the model at once; there is no batch size.")
    max_length: int | None = Field(None, ge=2, description="Context of the model, where it is not its configuration's.")
    add_bos_token: bool | None = Field(None, description="Whether special tokens open a text [the tokenizer's way].")
    prefix_token_id: int | None = Field(None, description="Token that stands before what has no context [BOS or EOS].")
    think_end_token: str | None = Field(None, description="Text that ends a model's thinking; what follows it counts.")
    enable_thinking: bool | None = Field(None, description="Handed to the chat template.")
    chat_template_args: dict[str, Any] = Field(default_factory=dict, description="Handed to the chat template.")

    def list_template_arguments(self) -> dict[str, Any]:
        """Return what goes to the tokenizer's chat template."""
        thinking = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return {**self.chat_template_args, **thinking}


class KoatLM(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """A causal model, its tokenizer and its verified layout, asked by lm-evaluation-harness.

    Scores depend neither on the token budget nor on the order of requests. The soft prompt of an adapter takes
    its tokens from `max_length`.
    """

    def __init__(self, model: nn.Module, layout: Layout, tokenizer: Any, options: HarnessOptions | None = None) -> None:
        super().__init__()
        self.model, self.layout, self.tokenizer = model, layout, tokenizer
        self.options = options or HarnessOptions()
        self.encoder = RequestEncoder(tokenizer, self.options.add_bos_token, self.options.prefix_token_id)
        self.tally = Tally()
        self.template = "none"
        self._device = unwrap(model).device

    @property
    def max_length(self) -> int:
        """Tokens that the model sees at once, the last target left out."""
        whole = self.options.max_length or resolve_max_length(unwrap(self.model).config, self.tokenizer)
        return int(whole) - count_root_tokens(self.model)

    @property
    def eot_token_id(self) -> int | None:
        """The tokenizer's end-of-sequence token."""
        return self.tokenizer.eos_token_id  # type: ignore[no-any-return]

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before what has no context."""
        return self.encoder.need_prefix()

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness caches requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encode one text as HFLM does."""
        return list(self.encoder.encode([string], special=add_special_tokens)[0])

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-probability, whether greedy decoding writes it) of each continuation."""
        pairs = [request.args for request in requests]
        spans = self.encoder.encode_pairs(pairs)
        answers = self._score(spans, "loglikelihood", disable_tqdm)
        for pair, answer in zip(pairs, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, answer)
        return answers

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        spans = [Span(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        return self._score(spans, "loglikelihood", bool(kwargs.get("disable_tqdm")))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each whole text, in windows of `max_length` tokens."""
        texts = [request.args[0] for request in requests]
        owners, spans = [], []
        for owner, ids in enumerate(self.encoder.encode(texts)):
            for window in get_rolling_token_windows(list(ids), self.prefix_token_id, self.max_length, 1):
                context, continuation = make_disjoint_window(window)
                owners.append(owner)
                spans.append(Span(tuple(context), tuple(continuation)))
        totals = [0.0] * len(texts)
        for owner, (logprob, _) in zip(owners, self._score(spans, "rolling", disable_tqdm), strict=True):
            totals[owner] += logprob
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def _score(self, spans: Sequence[Span], what: str, silent: bool) -> list[tuple[float, bool]]:
        fitting = self._fit(spans)
        with tqdm(total=len(spans), desc=f"koat {what}", disable=silent) as bar:
            scores = score_spans(
                self.model, self.layout, fitting, token_budget=self.options.tokens, on_progress=bar.update
            )
        self.tally.num_tokens += scores.num_tokens
        self.tally.num_unique_tokens += scores.num_unique_tokens
        return list(zip(scores.logprobs, scores.greedy, strict=True))

    def _fit(self, spans: Sequence[Span]) -> list[Span]:
        """Cut contexts from the left where a request is longer than the model's context, and count them."""
        limit, fitting = self.max_length, []
        for span in spans:
            if len(span.continuation_ids) > limit:
                raise DataError(
                    f"a continuation has {len(span.continuation_ids)} tokens, the model's context {limit}: it cannot "
                    "be scored as one. Ask it as `loglikelihood_rolling`, or give --model_args max_length=N."
                )
            spare = limit + 1 - len(span.continuation_ids)
            fitting.append(Span(span.context_ids[-spare:], span.continuation_ids))
        self._count_cuts([len(span.token_ids) for span in spans], limit + 1)
        return fitting

    def _count_cuts(self, lengths: Sequence[int], limit: int) -> None:
        over = [length for length in lengths if length > limit]
        self.tally.num_requests += len(lengths)
        self.tally.num_cut += len(over)
        self.tally.num_tokens_cut += sum(length - limit for length in over)
        self.tally.longest = max([self.tally.longest, *lengths])
        if over:
            log.warning(
                "%d of %d requests do not fit the model's context (%d tokens; the longest has %d) and were cut from "
                "the left: %d tokens were not seen. Fewer shots fit; the count stands in the results.",
                len(over), len(lengths), limit, max(over), sum(over) - limit * len(over),
            )  # fmt: skip

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes behind each context, up to a stop text that is left out."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(index)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="koat generate_until", disable=disable_tqdm) as bar:
            for indices in groups.values():
                asked = [requests[index].args for index in indices]
                for index, pair, text in zip(indices, asked, self._generate(asked, bar), strict=True):
                    answers[index] = text
                    self.cache_hook.add_partial("generate_until", pair, text)
        return answers

    def _generate(self, asked: Sequence[tuple[str, dict[str, Any]]], bar: Any) -> list[str]:
        """Answer requests of one kind of generation."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(asked[0][1], MAX_NEW_TOKENS))
        end = None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)
        until = [text for text in handle_stop_sequences(options.pop("until"), end) if text]
        num_new, limit = options.pop("max_gen_toks"), self.max_length
        if "max_length" in options or num_new >= limit:
            raise ConfigError(
                f"generation was given max_gen_toks={num_new} and max_length={options.get('max_length', 'none')}; the "
                f"model's context is {limit} tokens. Use max_gen_toks alone, smaller than the context."
            )
        if not options["do_sample"]:
            options.pop("temperature", None)
        prompts = [ids or (self.prefix_token_id,) for ids in self.encoder.encode([context for context, _ in asked])]
        self._count_cuts([len(ids) for ids in prompts], limit - num_new)
        prompts = [ids[num_new - limit :] for ids in prompts]
        written = continue_prompts(
            self.model, self.layout, self.tokenizer, prompts,
            Ending(until, num_new, options), token_budget=self.options.tokens, on_progress=bar.update,
        )  # fmt: skip
        self.tally.num_tokens += sum(map(len, prompts)) + sum(map(len, written.token_ids))
        self.tally.num_unique_tokens += written.num_tokens
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in written.token_ids]
        return [postprocess_generated_text(text, until, self.options.think_end_token) for text in texts]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Put a conversation into the tokenizer's chat template; where that knows no system role, without it."""
        from jinja2 import TemplateError

        options = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
            **self.options.list_template_arguments(),
        }
        try:
            return str(self.tokenizer.apply_chat_template(chat_history, **options))
        except TemplateError:
            log.warning("The chat template refused the conversation; trying it without the system's turn.")
        turns = [turn for turn in chat_history if turn["role"] != "system"]
        return str(self.tokenizer.apply_chat_template(turns, **options))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the chat template that was chosen. Raises ConfigError when the tokenizer has none."""
        if chat_template and not self.tokenizer.chat_template:
            raise ConfigError(
                "--apply_chat_template was given, but the tokenizer has no chat template. Leave it away, or evaluate a "
                "model that has one."
            )
        chosen: str | None = super().chat_template(chat_template)
        self.template = "chat" if chosen else "none"
        return chosen

    def describe(self) -> Parts:
        """Return the conditions: how this model is asked."""
        cut = f"left, {self.tally.num_cut} of {self.tally.num_requests} requests" if self.tally.num_cut else "none"
        return describe_conditions(self.model, self.layout, self.tokenizer, truncation=cut, template=self.template)

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness puts into `config` of its results: conditions and counts."""
        return {"koat": {"conditions": self.describe().to_mapping(), "requests": self.tally.to_mapping()}}
