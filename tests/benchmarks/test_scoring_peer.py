"""The scoring benchmark's two sides give the same log-probabilities, and its prompts are the harness' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("psutil", reason="the benchmarks describe the machine with psutil (extra `bench`)")
torch = pytest.importorskip("torch")

from benchmarks import workload  # noqa: E402
from benchmarks.choice_prompts import Question, join_context, read_hellaswag, read_mmlu  # noqa: E402
from benchmarks.score_choices import Ours, list_spans, make_instances  # noqa: E402
from benchmarks.scoring import build_peer, count_peer_tokens, run_peer  # noqa: E402
from koat.evaluation.harness.local_tasks import tidy_wikihow  # noqa: E402
from koat.forest.verify import verify_layout  # noqa: E402

OPTIONS = workload.Options(quick=True, device=torch.device("cpu"))


def make_tokenizer() -> Any:
    """Return a tokenizer of single characters, so that any text has tokens."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {chr(number): number for number in range(128)} | {"<end>": 128, "<pad>": 129}
    made = Tokenizer(models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<pad>")


@pytest.mark.parametrize("family", workload.FAMILIES)
def test_harness_has_koats_logprobs(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices of one and of several tokens, behind shared and unshared contexts, at two batch sizes."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra `bench`)")
    monkeypatch.setitem(workload.SIZES, "small", (64, 2, 4))
    monkeypatch.setattr(workload, "VOCABULARY", 300)
    questions = [
        Question("one two three. What is it?", (" A", " B", " C"), 0),
        Question("one two three. Who was it?", (" Ann", " Bert and me", " no one"), 1),
        Question("four", ("x", "yz", "yy"), 2),
    ]
    model = workload.build_base(family, OPTIONS)
    ours = Ours(model, verify_layout(model)[0], make_tokenizer(), questions)
    peer = build_peer(model, make_tokenizer(), OPTIONS.device)
    for batch_size in (1, 4):
        expected = run_peer(peer, make_instances(questions), batch_size)
        torch.testing.assert_close(ours.score(), expected, atol=1e-3, rtol=0)
    assert float(expected.std()) > 0.1


def test_peer_tokens_are_counted_as_it_merges_them() -> None:
    """One-character choices behind one context are one input; a batch pads to its longest."""
    questions = [Question("abc", (" ", "x", "y"), 0), Question("abcdef", ("gh", "i"), 0)]
    ours = Ours(None, None, make_tokenizer(), questions)  # type: ignore[arg-type]
    # Inputs without their last token: abc, abcdefg, abcdef.
    assert count_peer_tokens(list_spans(ours.encode()), 1) == (16, 16)
    assert count_peer_tokens(list_spans(ours.encode()), 3) == (16, 21)


def test_contexts_are_written_as_the_harness_writes_them() -> None:
    """The unfinished sentence is capitalised and WikiHow's marks are gone."""
    assert join_context("A man sits on a roof. he") == "A man sits on a roof. He"
    assert join_context("How to rest. Sit down.") == "How to rest. Sit down."
    assert tidy_wikihow(" Sit [title] Rest. [step] Now  sleep. ") == "Sit. Rest. Now sleep."


def test_real_items_have_their_shots() -> None:
    """Ten solved items before a HellaSwag item, five before one of MMLU, and the subject's common beginning."""
    if not (Path(OPTIONS.data) / "benchmarks").is_dir():
        pytest.skip("../shared/data/benchmarks is not there")
    hellaswag = read_hellaswag(OPTIONS, 3, 10)
    assert all(question.context.count("\n\n") == 10 and len(question.continuations) == 4 for question in hellaswag)
    mmlu = read_mmlu(OPTIONS, 4, 5)
    assert all(question.context.count("Answer:") == 6 for question in mmlu)
    assert mmlu[0].context.split("\n\n")[:6] == mmlu[1].context.split("\n\n")[:6]
    assert mmlu[0].context.split("\n\n")[0] != mmlu[2].context.split("\n\n")[0]
