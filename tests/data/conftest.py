"""Tiny tokenizers of the kinds that matter at borders, and the real data where it is at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

TEXTS = [
    "### 질문: 한국의 수도는 어디인가요?\n\n### 맥락: 서울은 한국의 수도이다.\n\n### 답변: 서울입니다.",
    "### Instruction:\nWhat is the capital of Korea?\n\n### Response: It is Seoul.",
    "영화가 정말 재미있었어요. 긍정 부정 정답: 최고의 영화 별로였다",
] * 4
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }} {{ eos_token }}"
    "{% else %}{{ raise_exception('no system turns here') }}{% endif %}{% endfor %}"
)


def wrap(core: Any, **special: Any) -> Any:
    """Make the tokenizer that transformers would load from a folder."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def train_byte_level(special: list[str]) -> Any:
    """Train a byte-level BPE, as GPT-NeoX and the model that ships have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    return core


@pytest.fixture(scope="session")
def plain() -> Any:
    """Byte-level, `<|endoftext|>` at the end, nothing at the beginning."""
    return wrap(train_byte_level(["<|endoftext|>"]), eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def with_bos() -> Any:
    """Byte-level, with a post-processor that puts `<s>` in front, and a chat template that writes it too."""
    from tokenizers import processors

    core = train_byte_level(["<s>", "</s>"])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return wrap(core, bos_token="<s>", eos_token="</s>", chat_template=LLAMA_CHAT)


@pytest.fixture(scope="session")
def sentencepiece() -> Any:
    """Of SentencePiece's kind, as Llama 2 has: a word start before every text, bytes for rare characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    core.train_from_iterator(
        [text.replace("\n", " ") for text in TEXTS],
        trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False),
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrap(core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def chatml() -> Any:
    """Byte-level with ChatML, whose end of turn is not the end of text."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return wrap(
        train_byte_level(special),
        eos_token="<|endoftext|>",
        additional_special_tokens=special[1:],
        chat_template=CHATML,
    )


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the repository; tests that want it are skipped where it is absent."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder
