"""From the texts of lm-evaluation-harness' requests to tokens, with the boundaries its Hugging Face backend draws.

What is encoded is the whole text; the continuation is what stands behind as many tokens as the context alone has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from koat.core.errors import ConfigError, DataError
from koat.evaluation.spans import Span

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RequestEncoder:
    """A tokenizer and how it opens a text.

    `add_bos_token` says whether special tokens are added, None leaves it to the tokenizer. `prefix_token_id`
    stands before what has no context: by default the beginning-of-sequence token, else the end-of-sequence token.
    """

    tokenizer: Any
    add_bos_token: bool | None = None
    prefix_token_id: int | None = None

    @property
    def prefix(self) -> int | None:
        """The token that stands before what has no context, None where the tokenizer has none."""
        candidates = (self.prefix_token_id, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return next((token_id for token_id in candidates if token_id is not None), None)

    def need_prefix(self) -> int:
        """Return `prefix`. Raises ConfigError when there is none."""
        if self.prefix is None:
            raise ConfigError(
                "a request has no context, and the tokenizer has neither a beginning- nor an end-of-sequence token "
                "to stand in its place. Name one: --model_args prefix_token_id=N"
            )
        return self.prefix

    def encode(self, texts: Sequence[str], *, special: bool | None = None) -> list[Ids]:
        """Encode texts, equal ones once; `special` forces special tokens on or off.

        Where it is None, a text that begins with the prefix token's own text gets no special tokens.
        """
        opening = None if self.prefix is None or special is not None else self.tokenizer.decode(self.prefix)
        unique = dict.fromkeys(texts)
        opened = [text for text in unique if opening is not None and text.startswith(opening)]
        plain = [text for text in unique if opening is None or not text.startswith(opening)]
        known = self._encode_all(plain, self.add_bos_token if special is None else special)
        known |= self._encode_all(opened, False)
        return [known[text] for text in texts]

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Span]:
        """Encode (context, continuation) pairs. Raises DataError for a continuation without any token."""
        moved = [_move_spaces(*pair) for pair in pairs if pair[0]]
        contexts = iter(self.encode([context for context, _ in moved]))
        whole = iter(self.encode([context + continuation for context, continuation in moved]))
        alone = iter(self.encode([continuation for context, continuation in pairs if not context], special=False))
        spans = []
        for context, continuation in pairs:
            before = next(contexts) if context else ()
            after = next(whole)[len(before) :] if context else next(alone)
            if not before:
                before, after = self._stand_on_prefix(after)
            if not after:
                raise DataError(
                    f"the continuation {continuation!r} adds no token to its context, which ends in "
                    f"{context[-40:]!r}: there is nothing to score. Look at the task's choices and targets."
                )
            spans.append(Span(before, after))
        return spans

    def _stand_on_prefix(self, continuation: Ids) -> tuple[Ids, Ids]:
        prefix = self.need_prefix()
        if continuation and continuation[0] == prefix:
            return continuation[:1], continuation[1:]
        return (prefix,), continuation

    def _encode_all(self, texts: list[str], special: bool | None) -> dict[str, Ids]:
        if not texts:
            return {}
        options = {} if special is None else {"add_special_tokens": special}
        found = self.tokenizer(texts, return_attention_mask=False, **options)["input_ids"]
        return dict(zip(texts, map(tuple, found), strict=True))


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    """Move white space from the end of a context to the beginning of its continuation, where tokens keep it."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation
