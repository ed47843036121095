"""koat's model of lm-evaluation-harness against the harness' own Hugging Face backend, request by request."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra `eval`)")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from koat.core.errors import ConfigError, DataError
from koat.evaluation import spans
from koat.evaluation.harness.lm import HarnessOptions, KoatLM
from koat.forest.score import make_padded
from koat.forest.verify import verify_layout

FAMILIES = ("gpt_neox", "llama", "gpt2", "qwen2")
VOCABULARY = 400
CONTEXT = 48
SHOTS = "문장: 최고의 영화 ㅋㅋ\n감정: 긍정\n\n문장: 시간이 아깝다\n감정: 부정\n\n"
PAIRS = [
    *[(f"{SHOTS}문장: 정말 재미있어요!\n감정:", word) for word in (" 긍정", " 부정", " 또 보고 싶다", "?")],
    *[(f"{SHOTS}문장: 최악의 결말\n감정:", word) for word in (" 긍정", " 부정")],
    ("감정: ", "긍정"),
    ("감정:  \n", "부정"),
    ("", "감독은 반성하자"),
    ("", "<s>감독"),
    ("</s>문장", " 끝"),
    ("<s>문장", " 끝"),
    ("배우들 연기", " 굿"),
    ("배우들 연기", " 굿"),
    (SHOTS * 6, " 부정"),
    (SHOTS * 6 + "길다", " 긍정" * 9),
]
ROLLING = ["", "감", "문장: 최고의 영화", SHOTS, SHOTS * 6 + "끝"]
PROMPTS = ["문장:", SHOTS, "감정: 긍정\n문장", "또 보고 싶다♥ good 영화 추천", "최악", SHOTS * 4]


def ask(kind: str, *requests: tuple[Any, ...]) -> list[Instance]:
    """Return requests of the harness."""
    return [Instance(kind, {}, request, index) for index, request in enumerate(requests)]


def make_both(model: Any, tokenizer: Any, batch_size: int = 3, **options: Any) -> tuple[KoatLM, HFLM]:
    """Return koat's model and the harness' own, each with weights and tokenizer of its own."""
    layout, _ = verify_layout(model)
    theirs = copy.deepcopy(model)
    theirs.config._attn_implementation = "sdpa"
    max_length = options.get("max_length")
    given = {name: options[name] for name in ("add_bos_token", "prefix_token_id") if name in options}
    peer = HFLM(theirs, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, max_length=max_length, **given)
    return KoatLM(model, layout, copy.deepcopy(tokenizer), HarnessOptions(**options)), peer


@pytest.fixture(scope="module", params=FAMILIES)
def both(request: pytest.FixtureRequest, make_model: Callable[..., Any], tokenizer: Any) -> tuple[KoatLM, HFLM]:
    """Both models of one family, with a short context."""
    return make_both(make_model(request.param, vocab_size=VOCABULARY), tokenizer, max_length=CONTEXT)


def compare(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    for (ours, greedy), (theirs, their_greedy) in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
        assert greedy == their_greedy


# The same numbers ----------------------------------------------------------------------------------------------


def test_loglikelihoods_are_the_harness_own(both: tuple[KoatLM, HFLM]) -> None:
    koat, peer = both
    assert koat.layout.shares
    before = koat.tally.num_unique_tokens
    requests = ask("loglikelihood", *PAIRS)
    found = koat.loglikelihood(requests, disable_tqdm=True)
    compare(found, peer.loglikelihood(requests, disable_tqdm=True))
    assert len({round(logprob, 3) for logprob, _ in found}) > 10
    assert koat.tally.num_unique_tokens - before < 0.75 * koat.tally.num_tokens


@pytest.mark.parametrize("which", ["opening_tokenizer", "byte_tokenizer"])
def test_texts_are_cut_into_tokens_as_the_harness_cuts_them(
    which: str, request: pytest.FixtureRequest, make_model: Callable[..., Any]
) -> None:
    tokenizer = request.getfixturevalue(which)
    koat, peer = make_both(make_model("llama", vocab_size=VOCABULARY, max_position_embeddings=1024), tokenizer)
    for context, continuation in PAIRS:
        if context:
            span = koat.encoder.encode_pairs([(context, continuation)])[0]
            expected = peer._encode_pair(context, continuation)
            assert (list(span.context_ids), list(span.continuation_ids)) == expected
        assert koat.tok_encode(context) == peer.tok_encode(context)
        assert koat.tok_encode(context, add_special_tokens=True) == peer.tok_encode(context, add_special_tokens=True)
    requests = ask("loglikelihood", *PAIRS)
    compare(koat.loglikelihood(requests, disable_tqdm=True), peer.loglikelihood(requests, disable_tqdm=True))


@pytest.mark.parametrize("which", ["tokenizer", "opening_tokenizer"])
@pytest.mark.parametrize("options", [{"add_bos_token": True}, {"add_bos_token": False}, {"prefix_token_id": 77}])
def test_how_a_text_opens_is_chosen_as_the_harness_has_it(
    options: dict[str, Any], which: str, request: pytest.FixtureRequest, make_model: Callable[..., Any]
) -> None:
    tokenizer = request.getfixturevalue(which)
    koat, peer = make_both(make_model("llama", vocab_size=VOCABULARY), tokenizer, max_length=CONTEXT, **options)
    assert koat.prefix_token_id == peer.prefix_token_id == options.get("prefix_token_id", tokenizer.bos_token_id)
    for text in (*PROMPTS, tokenizer.decode(peer.prefix_token_id) + "문장"):
        assert koat.tok_encode(text) == peer.tok_encode(text)
    texts = [("", "감독은 반성하자"), ("배우들 연기", " 굿"), (SHOTS, " 긍정")]
    pairs, rolling = ask("loglikelihood", *texts), ask("loglikelihood_rolling", *[(text,) for text in ROLLING])
    compare(koat.loglikelihood(pairs, disable_tqdm=True), peer.loglikelihood(pairs, disable_tqdm=True))
    found, expected = (each.loglikelihood_rolling(rolling, disable_tqdm=True) for each in (koat, peer))
    assert found == pytest.approx(expected, abs=2e-3, rel=1e-6)


def test_greedy_flags_are_the_harness_own(both: tuple[KoatLM, HFLM]) -> None:
    koat, peer = both
    requests = []
    for prompt in PROMPTS[:4]:
        ids = peer.tok_encode(prompt)
        given = torch.tensor([ids])
        written = peer.model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=4, do_sample=False, pad_token_id=0
        )[0, len(ids) :].tolist()
        wrong = [*written[:3], (written[3] + 1) % VOCABULARY]
        requests += [(("", ""), ids, written), (("", ""), ids, written[:1]), (("", ""), ids, wrong)]
    found = koat._loglikelihood_tokens(requests, disable_tqdm=True)
    compare(found, peer._loglikelihood_tokens(requests, disable_tqdm=True))
    assert [greedy for _, greedy in found] == [True, True, False] * 4


def test_rolling_loglikelihoods_are_the_harness_own(both: tuple[KoatLM, HFLM]) -> None:
    koat, peer = both
    requests = ask("loglikelihood_rolling", *[(text,) for text in ROLLING])
    assert len(koat.tok_encode(ROLLING[-1])) > 3 * CONTEXT
    found = koat.loglikelihood_rolling(requests, disable_tqdm=True)
    assert found == pytest.approx(peer.loglikelihood_rolling(requests, disable_tqdm=True), abs=2e-3, rel=1e-6)


def test_greedy_texts_are_the_harness_own(both: tuple[KoatLM, HFLM]) -> None:
    koat, peer = both
    peer.batch_size_per_gpu = 1
    plain = {"until": [], "max_gen_toks": 14, "do_sample": False}
    free = peer.generate_until(ask("generate_until", *[(p, dict(plain)) for p in PROMPTS]), disable_tqdm=True)
    assert len(set(free)) > 2
    stops = sorted({text[len(text) // 2 :][:1] for text in free if len(text) > 3} - {""})[:2]
    for options in (plain, plain | {"until": stops, "temperature": 0.0}, {"until": stops[0], "max_gen_toks": 9}):
        requests = ask("generate_until", *[(prompt, dict(options)) for prompt in PROMPTS])
        expected = peer.generate_until(requests, disable_tqdm=True)
        assert koat.generate_until(requests, disable_tqdm=True) == expected
    assert any(text not in free for text in expected)


def test_padded_rows_give_the_same_numbers(make_model: Callable[..., Any], tokenizer: Any) -> None:
    model = make_model("llama", vocab_size=VOCABULARY)
    koat, peer = make_both(model, tokenizer, max_length=CONTEXT)
    koat.layout = make_padded(True)
    requests = ask("loglikelihood", *PAIRS)
    compare(koat.loglikelihood(requests, disable_tqdm=True), peer.loglikelihood(requests, disable_tqdm=True))


# What must not move them ---------------------------------------------------------------------------------------


@given(order=st.permutations(range(len(PAIRS))), budget=st.integers(64, 3000), block=st.integers(1, 20))
@settings(max_examples=12, deadline=None)
def test_scores_move_with_neither_order_nor_budget_nor_company(order: list[int], budget: int, block: int) -> None:
    koat, expected = settle()
    koat.options = HarnessOptions(max_length=CONTEXT, tokens=budget)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans, "BLOCK", block)
        found = koat.loglikelihood(ask("loglikelihood", *[PAIRS[index] for index in order]), disable_tqdm=True)
    for index, (logprob, greedy) in zip(order, found, strict=True):
        assert logprob == pytest.approx(expected[index][0], abs=1e-4)
        assert greedy == expected[index][1]


@pytest.mark.parametrize("budget", [64, 10_000])
def test_texts_move_with_neither_order_nor_budget(budget: int, make_model: Callable[..., Any], tokenizer: Any) -> None:
    koat, _ = make_both(make_model("gpt_neox", vocab_size=VOCABULARY), tokenizer, max_length=CONTEXT)
    options = {"until": ["\n", "감"], "max_gen_toks": 10}
    alone = [koat.generate_until(ask("generate_until", (p, dict(options))), disable_tqdm=True)[0] for p in PROMPTS]
    koat.options = HarnessOptions(max_length=CONTEXT, tokens=budget)
    turned = ask("generate_until", *[(prompt, dict(options)) for prompt in reversed(PROMPTS)])
    assert koat.generate_until(turned, disable_tqdm=True) == alone[::-1]


_SETTLED: dict[str, Any] = {}


def settle() -> tuple[KoatLM, list[tuple[float, bool]]]:
    """Return one model and its scores; hypothesis calls a test many times, a fixture of it only once."""
    if not _SETTLED:
        from tests.conftest import build_model
        from tests.evaluation.conftest import train_tokenizer

        koat, _ = make_both(
            build_model("llama", vocab_size=VOCABULARY), train_tokenizer(VOCABULARY), max_length=CONTEXT
        )
        scores = koat.loglikelihood(ask("loglikelihood", *PAIRS), disable_tqdm=True)
        _SETTLED.update(koat=koat, scores=scores)
    return _SETTLED["koat"], _SETTLED["scores"]


# What is told --------------------------------------------------------------------------------------------------


def test_what_is_cut_is_counted_and_told(
    make_model: Callable[..., Any], tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    koat, _ = make_both(make_model("llama", vocab_size=VOCABULARY), tokenizer, max_length=CONTEXT)
    koat.loglikelihood(ask("loglikelihood", ("감정:", " 긍정")), disable_tqdm=True)
    assert "cut" not in caplog.text
    assert koat.describe().parts["truncation"] == "none"
    lengths = [len(koat.tok_encode(context + word)) for context, word in PAIRS]
    over = [length for length in lengths if length > CONTEXT + 1]
    assert len(over) >= 2
    with caplog.at_level(logging.WARNING):
        koat.loglikelihood(ask("loglikelihood", *PAIRS), disable_tqdm=True)
    assert f"{len(over)} of {len(PAIRS)} requests" in caplog.text
    info = koat.get_model_info()["koat"]
    assert info["requests"]["num_cut"] == len(over)
    assert info["requests"]["num_tokens_cut"] == sum(over) - len(over) * (CONTEXT + 1)
    assert info["requests"]["longest"] == max(lengths)
    assert info["conditions"]["parts"]["truncation"] == f"left, {len(over)} of {len(PAIRS) + 1} requests"
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        koat.generate_until(ask("generate_until", (SHOTS * 6, {"max_gen_toks": 4})), disable_tqdm=True)
    assert "1 of 1 requests" in caplog.text


def test_what_cannot_be_asked_is_refused(make_model: Callable[..., Any], tokenizer: Any) -> None:
    koat, _ = make_both(make_model("llama", vocab_size=VOCABULARY), tokenizer, max_length=CONTEXT)
    with pytest.raises(DataError, match="adds no token"):
        koat.loglikelihood(ask("loglikelihood", ("감정:", "")), disable_tqdm=True)
    with pytest.raises(DataError, match=f"the model's context {CONTEXT}"):
        koat.loglikelihood(ask("loglikelihood", ("감정:", SHOTS * 5)), disable_tqdm=True)
    with pytest.raises(ConfigError, match="max_gen_toks=48"):
        koat.generate_until(ask("generate_until", ("감정:", {"max_gen_toks": CONTEXT})), disable_tqdm=True)
    with pytest.raises(ConfigError, match="no chat template"):
        koat.chat_template(True)


def test_chat_templates_are_the_harness_own(make_model: Callable[..., Any], tokenizer: Any) -> None:
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    koat, peer = make_both(make_model("llama", vocab_size=VOCABULARY), chatty)
    turns = [{"role": "system", "content": "가"}, {"role": "user", "content": "나"}]
    for generating in (True, False):
        expected = peer.apply_chat_template(list(turns), generating)
        assert koat.apply_chat_template(list(turns), generating) == expected
    assert koat.chat_template(True) == peer.chat_template(True)
    assert koat.tokenizer_name == peer.tokenizer_name
    assert koat.describe().parts["template"] == "chat"
