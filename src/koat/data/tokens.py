"""Text to token ids, for prompts and for what follows them. Used for training and for inference alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenise a prompt as it is given to the model.

    What the tokenizer puts in front of every text (a beginning-of-sequence token, usually) comes in front,
    unless the text already begins with it, as some chat templates do. Nothing is put behind.
    """
    return encode_prompts([text], tokenizer)[0]


def encode_prompts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokenise many prompts, each as `encode_prompt` would."""
    opening = find_opening(tokenizer)
    return [ids if ids[: len(opening)] == opening else opening + ids for ids in tokenise(texts, tokenizer)]


def encode_continuations(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokenise texts that follow other text: no special tokens, and no word start that is not there.

    Tokenizers of SentencePiece's kind put a space before every text. Behind a prompt that space would be one
    that nobody wrote, so such texts are tokenised behind a line break, whose tokens are then taken off; a text that
    melts into the break is tokenised by itself.
    """
    probe = tokenizer.convert_ids_to_tokens(tokenise(["a"], tokenizer)[0])
    if not probe or not str(probe[0]).startswith("▁"):
        return tokenise(texts, tokenizer)
    head = tokenise(["\n"], tokenizer)[0]
    behind = tokenise([f"\n{text}" for text in texts], tokenizer)
    own = iter(tokenise([text for text, ids in zip(texts, behind, strict=True) if ids[: len(head)] != head], tokenizer))
    return [ids[len(head) :] if ids[: len(head)] == head else next(own) for ids in behind]


def find_opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that the tokenizer puts in front of every text, often one or none."""
    bare = tokenise(["a"], tokenizer)[0]
    full = list(tokenizer("a")["input_ids"])
    starts = range(len(full) - len(bare) + 1)
    return next((full[:start] for start in starts if full[start : start + len(bare)] == bare), [])


def tokenise(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the token ids of each text, without special tokens around it."""
    listed = list(texts)
    if not listed:
        return []
    encoded = tokenizer(
        listed,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [list(ids) for ids in encoded["input_ids"]]
