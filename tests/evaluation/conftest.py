"""A tokenizer trained on the spot, a small file of reviews, and the tasks that ask them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PRAISE = [
    "정말 재미있어요!",
    "최고의 영화 ㅋㅋ",
    "감동 그 자체...",
    "배우들 연기 굿",
    "또 보고 싶다♥",
    "good 영화 추천",
]
BLAME = [
    "시간이 아깝다",
    "지루해서 잤음 ㅠㅠ",
    "돈 내고 보지 마세요",
    "최악의 결말 1점",
    "감독은 반성하자",
    "억지 {감동} 별로",
]
CORPUS = [f"문장: {text}\n감정: {word}\n정답: {word}\n" for text in PRAISE + BLAME for word in ("긍정", "부정")]
VOCABULARY = 400


def train_tokenizer(vocabulary: int, *, opening: bool = False) -> Any:
    """Return a byte-level BPE tokenizer, 256 entries bytes alone; `opening` puts <s> before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special, show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    if opening:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A tokenizer to which each label word, with its space, is one token."""
    made = train_tokenizer(VOCABULARY)
    assert [len(made(word).input_ids) for word in (" 긍정", " 부정")] == [1, 1]
    return made


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """A tokenizer that knows bytes alone: every label begins with the same space."""
    return train_tokenizer(258)


@pytest.fixture(scope="session")
def opening_tokenizer() -> Any:
    """A tokenizer that puts a beginning-of-sequence token before every text."""
    return train_tokenizer(VOCABULARY, opening=True)


def write_reviews(path: Path, rows: list[tuple[str, str, str]]) -> str:
    """Write rows (id, text, label) in NSMC's format and return the path."""
    lines = ["id\tdocument\tlabel"] + ["\t".join(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def make_rows(num_rows: int, first_id: int = 1000) -> list[tuple[str, str, str]]:
    """Return rows that alternate praise and blame, no two texts alike."""
    rows = []
    for number in range(num_rows):
        texts, label = (PRAISE, "1") if number % 2 else (BLAME, "0")
        text = texts[number // 2 % len(texts)] + " 진짜" * (number // 12 % 4) + f" {number}번"
        rows.append((str(first_id + number), text, label))
    return rows


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of reviews: `test` (40 rows), `train` (60 rows)."""
    folder = tmp_path_factory.mktemp("reviews")
    return {
        "test": write_reviews(folder / "test.tsv", make_rows(40)),
        "train": write_reviews(folder / "train.tsv", make_rows(60, 5000)),
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """`write(rows, name="rows.tsv")`: a file of reviews."""

    def write_rows(rows: list[tuple[str, str, str]], name: str = "rows.tsv") -> str:
        return write_reviews(tmp_path / name, rows)

    return write_rows


@pytest.fixture(scope="session")
def model(make_model: Callable[..., Any]) -> Any:
    """A tiny random Llama over the tokenizer's vocabulary."""
    return make_model("llama", vocab_size=VOCABULARY, max_position_embeddings=2048)
