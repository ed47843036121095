"""Pretrain the small base model that ships with koat (`src/koat/nano`).

Reads the public texts listed in `src/koat/nano/README.md`, trains a byte-level BPE tokenizer and a
Llama-shaped model of 8.8 million parameters on them, and writes model, tokenizer and the numbers that
the model card quotes. On 2 CPU cores with bfloat16 instructions it takes about an hour and a half.

    python scripts/pretrain_nano.py --data ../shared/data --out src/koat/nano
"""

from __future__ import annotations

import argparse
import copy
import csv
import gzip
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
PAD = "<|pad|>"
VOCABULARY = 8192
HELD_OUT_REVIEWS = 4000
# Words that the tokenizer must hold whole, because classification prompts compare single tokens.
LABEL_WORDS = (" 긍정", " 부정", " 예", " 아니요", " 참", " 거짓", " True", " False", " A", " B", " C", " D")
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}\n\n"
    "{% elif m['role'] == 'user' %}### 질문: {{ m['content'] }}\n\n"
    "{% else %}### 답변: {{ m['content'] }}{{ eos_token }}\n\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}### 답변:{% endif %}"
)


def read_reviews(path: Path) -> list[tuple[int, str]]:
    """Return (stars, text) pairs in the file's own order."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        next(rows)
        return [(int(stars), text.strip()) for stars, text in rows if text.strip()]


def write_with_stars(stars: int, text: str, form: int) -> str:
    """Give a review its stars in one of the ways reviewers write them."""
    drawn = "★" * (stars // 2) + "☆" * (5 - stars // 2)
    forms = (
        f"{text} {stars}점",
        f"{text} 별점 {stars}/10",
        f"{text} {drawn}",
        f"{text} 평점: {stars}",
        f"{text} 10점 만점에 {stars}점",
        f"별점 {stars}/10 {text}",
        f"{stars}점. {text}",
    )
    return forms[form] if form < len(forms) else text


def compose_review_pages(reviews: list[tuple[int, str]], rng: random.Random) -> Iterator[str]:
    """Yield pages of one to twelve reviews, each page keeping to one way of writing stars."""
    start = 0
    while start < len(reviews):
        size = rng.choice((1, 1, 2, 3, 5, 8, 12))
        # 7 of 10 pages carry stars; most of them after the text, where they have to be predicted.
        form = rng.choice((0, 0, 1, 1, 2, 3, 3, 4, 5, 6, 7, 7, 7))
        page = reviews[start : start + size]
        yield "\n".join(write_with_stars(stars, text, form) for stars, text in page)
        start += size


def read_documents(folder: Path) -> list[str]:
    """Return the paragraphs of every gzipped text in a folder, a few thousand characters each."""
    documents = []
    for path in sorted(folder.glob("*.txt.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            text = file.read()
        piece: list[str] = []
        size = 0
        for paragraph in text.split("\n\n"):
            piece.append(paragraph)
            size += len(paragraph)
            if size > 3000:
                documents.append("\n\n".join(piece).strip())
                piece, size = [], 0
        documents.append("\n\n".join(piece).strip())
    return [document for document in documents if document]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE and wrap it for transformers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, "".join(LABEL_WORDS) * 5000], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> np.ndarray:
    """Concatenate documents, each closed by the end-of-text token, into one array of token ids."""
    fast = tokenizer.backend_tokenizer
    end = tokenizer.eos_token_id
    ids: list[np.ndarray] = []
    for start in range(0, len(documents), 4096):
        for encoding in fast.encode_batch(documents[start : start + 4096]):
            ids.append(np.array([*encoding.ids, end], dtype=np.uint16))
    return np.concatenate(ids)


def build_corpus(data: Path, seed: int) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """Return review pages, other documents, and the held-out texts by source."""
    rng = random.Random(seed)
    reviews = read_reviews(data / "nsmc" / "korean_reviews_rated.tsv.gz")
    rng.shuffle(reviews)
    held_out, reviews = reviews[:HELD_OUT_REVIEWS], reviews[HELD_OUT_REVIEWS:]
    pages = list(compose_review_pages(reviews, rng))
    korean, english = read_documents(data / "text_ko"), read_documents(data / "text_en")
    rng.shuffle(korean)
    rng.shuffle(english)
    texts = {
        "reviews": [write_with_stars(stars, text, 1) for stars, text in held_out],
        "korean": korean[:40],
        "english": english[:40],
    }
    return pages, [*korean[40:], *english[40 : 40 + len(korean) // 2]], texts


def build_model() -> LlamaForCausalLM:
    """Return the untrained model: Llama's shape, 5 layers of 320, tied embeddings."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=320,
        intermediate_size=864,
        num_hidden_layers=5,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
        initializer_range=0.03,
    )
    return LlamaForCausalLM(config)


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    known = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in known]
    return [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.05, momentum=0.95, adjust_lr_fn="original"),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def compute_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss of `rows` [B, T + 1]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].reshape(-1))


class Windows:
    """Random windows over a token stream, every token seen once before any is seen again."""

    def __init__(self, ids: np.ndarray, seed: int) -> None:
        self.ids, self.rng = ids, np.random.default_rng(seed)
        self.order, self.length = [], 0

    def take(self, rows: int, length: int) -> torch.Tensor:
        if length != self.length or len(self.order) < rows:
            self.length = length
            offset = int(self.rng.integers(length))
            starts = np.arange(offset, len(self.ids) - length - 1, length)
            self.order = list(self.rng.permutation(starts))
        picked = [self.order.pop() for _ in range(rows)]
        block = np.stack([self.ids[s : s + length + 1] for s in picked])
        return torch.from_numpy(block.astype(np.int64))


def schedule(progress: float) -> float:
    """Warm up over 2 %, hold, then fall linearly to zero over the last 40 %."""
    return min(1.0, progress / 0.02, max(0.0, (1.0 - progress) / 0.4))


@torch.no_grad()
def measure_perplexity(model: LlamaForCausalLM, ids: np.ndarray) -> float:
    """Perplexity per token over windows of 512."""
    count = min(len(ids) // 513, 48)
    rows = torch.from_numpy(ids[: count * 513].astype(np.int64)).view(count, 513)
    return math.exp(sum(float(compute_loss(model, part)) * len(part) for part in rows.split(8)) / count)


def train(
    model: LlamaForCausalLM, ids: np.ndarray, num_tokens: int, minutes: float, snapshot: Callable[[], None]
) -> list[dict[str, float]]:
    """Train to `num_tokens` or for `minutes`, whichever comes first; return the loss curve."""
    fast_loss = torch.compile(compute_loss, dynamic=False)
    optimizers = build_optimizers(model)
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    windows, curve = Windows(ids, seed=1), []
    seen, step, began, running = 0, 0, time.monotonic(), 0.0
    while (progress := max(seen / num_tokens, (time.monotonic() - began) / 60 / minutes)) < 1:
        rows = windows.take(24, 512) if progress < 0.85 else windows.take(6, 2048)
        loss = fast_loss(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * schedule(progress)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen, step = seen + rows[:, 1:].numel(), step + 1
        running = loss.item() if step == 1 else 0.95 * running + 0.05 * loss.item()
        if step % 25 == 0:
            rate = seen / (time.monotonic() - began)
            print(f"step {step} tokens {seen} loss {running:.3f} {rate:.0f} tok/s {progress:.1%}", flush=True)
            curve.append({"tokens": seen, "loss": round(running, 4)})
        if step % 300 == 0:
            snapshot()
    return curve


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a Hugging Face model folder in bfloat16."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with nsmc/, text_ko/ and text_en/")
    parser.add_argument("--out", type=Path, required=True, help="where model and tokenizer are written")
    parser.add_argument("--tokens", type=int, default=16_300_000, help="tokens to train on")
    parser.add_argument("--minutes", type=float, default=600, help="stop (with a finished schedule) after this long")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)

    pages, documents, held_out = build_corpus(arguments.data, arguments.seed)
    rng = random.Random(arguments.seed)
    sample = rng.sample(pages, min(60_000, len(pages))) + documents
    tokenizer = train_tokenizer(sample)
    mixed = pages + documents
    rng.shuffle(mixed)
    ids = encode(tokenizer, mixed)
    print(f"{len(ids)} training tokens, label words {[tokenizer.tokenize(w) for w in LABEL_WORDS]}", flush=True)

    model = build_model()
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    began = time.monotonic()
    curve = train(model, ids, arguments.tokens, arguments.minutes, lambda: save(model, tokenizer, arguments.out))
    seconds = time.monotonic() - began
    perplexity = {name: measure_perplexity(model, encode(tokenizer, texts)) for name, texts in held_out.items()}
    save(model, tokenizer, arguments.out)
    report = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "corpus_tokens": len(ids),
        "trained_tokens": curve[-1]["tokens"] if curve else 0,
        "seconds": round(seconds),
        "held_out_perplexity_per_token": {k: round(v, 2) for k, v in perplexity.items()},
        "loss_curve": curve[:: max(1, len(curve) // 40)],
    }
    (arguments.out / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report["held_out_perplexity_per_token"]))


if __name__ == "__main__":
    main()
