"""Each training benchmark's two sides compute the same losses and gradients, on tiny models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("psutil", reason="the benchmarks describe the machine with psutil (extra `bench`)")
torch = pytest.importorskip("torch")

from benchmarks import peers, workload  # noqa: E402
from benchmarks.compare_training import STEP, build_ours, count_work  # noqa: E402
from benchmarks.peers import attach_peft, build_peft_peer, build_trl_peer, count_padded, pad_rows  # noqa: E402
from koat.adapters.attach import read_adapter_state, write_adapter_state  # noqa: E402
from koat.adapters.methods import Ia3Settings, LoraSettings  # noqa: E402
from koat.training.loop import accumulate_gradients  # noqa: E402


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> workload.Options:
    """Shrink the benchmarks' models."""
    monkeypatch.setitem(workload.SIZES, "small", (64, 2, 4))
    monkeypatch.setattr(workload, "VOCABULARY", 300)
    monkeypatch.setattr(peers, "BATCH_SIZES", (4,))
    return workload.Options(quick=True, device=torch.device("cpu"))


@pytest.mark.parametrize("family", workload.FAMILIES)
@pytest.mark.parametrize("adapter", [Ia3Settings(), LoraSettings()], ids=["ia3", "lora"])
def test_padded_peer_has_koats_losses(family: str, adapter: Any, tiny: Any, make_sequences: Any) -> None:
    """PEFT on padded batches gives every example the loss that koat's forest gives it."""
    sequences = make_sequences("shared") + make_sequences("unrelated")
    ours = build_ours(family, "float32", adapter, tiny)
    state = read_adapter_state(ours.model)
    model = attach_peft(workload.build_base(family, tiny), ours.model.peft_config["default"], state)
    peer = build_peft_peer(model, sequences, step=STEP, autocasts=(False,))
    write_adapter_state(model, state)
    torch.testing.assert_close(ours.measure_losses(sequences), peer.losses(), atol=1e-4, rtol=0)
    lengths = sorted(map(len, sequences), reverse=True)
    assert peer.num_tokens == count_padded(lengths, 4)
    assert peer.train() > 0


def test_padded_peer_has_koats_gradients(tiny: Any, make_sequences: Any) -> None:
    """One step's adapter gradients agree, the loss divided by the step's supervised tokens on both sides."""
    sequences = make_sequences("shared")
    ours = build_ours("llama", "float32", Ia3Settings(), tiny)
    config, state = ours.model.peft_config["default"], read_adapter_state(ours.model)
    theirs = attach_peft(workload.build_base("llama", tiny), config, state)
    accumulate_gradients(ours.model, sequences, ours.layout, ours.settings, ours.accelerator)
    from benchmarks.peers import make_row

    theirs(**pad_rows([make_row(sequence) for sequence in sequences])).loss.backward()
    expected = {name: weight.grad for name, weight in theirs.named_parameters() if weight.grad is not None}
    found = {name: weight.grad for name, weight in ours.model.named_parameters() if weight.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("family", workload.FAMILIES)
def test_packed_peer_has_koats_losses(family: str, tiny: Any, make_sequences: Any, tmp_path: Any) -> None:
    """TRL's packing without flash attention keeps examples apart: the losses are those of the forest."""
    pytest.importorskip("trl", reason="TRL is not installed (extra `bench`)")
    sequences = make_sequences("shared") + make_sequences("unrelated")
    ours = build_ours(family, "float32", Ia3Settings(), tiny)
    state = read_adapter_state(ours.model)
    model = attach_peft(workload.build_base(family, tiny), ours.model.peft_config["default"], state)
    peer = build_trl_peer(model, sequences, make_tokenizer(), step=STEP, autocasts=(False,))
    write_adapter_state(model, state)
    torch.testing.assert_close(ours.measure_losses(sequences), peer.losses(), atol=1e-4, rtol=0)
    assert peer.num_tokens == sum(map(len, sequences))


def test_a_wrong_mask_shows(tiny: Any, make_sequences: Any) -> None:
    """Losses of the random models depend on the context: without it they move by far more than is allowed."""
    sequences = make_sequences("shared")
    ours = build_ours("llama", "float32", Ia3Settings(), tiny)
    blind = [replace(sequence, token_ids=(5, *sequence.token_ids[1:])) for sequence in sequences]
    moved = (ours.measure_losses(sequences) - ours.measure_losses(blind)).abs()
    assert float(moved.median()) > 1e-3


def test_all_head_rows_change_no_loss(tiny: Any, make_sequences: Any) -> None:
    """The factor "head" compares two ways to the same losses."""
    sequences = make_sequences("shared")
    ours = build_ours("llama", "float32", Ia3Settings(), tiny)
    expected = ours.measure_losses(sequences)
    ours.layout = replace(ours.layout, split_head=False)
    torch.testing.assert_close(ours.measure_losses(sequences), expected, atol=1e-5, rtol=0)


def test_work_is_counted_once(tiny: Any, make_sequences: Any) -> None:
    """Distinct tokens are fewer than the original ones, and every one sees at least itself."""
    sequences = make_sequences("shared")
    work = count_work(build_ours("llama", "float32", Ia3Settings(), tiny), sequences)
    assert work.num_original == sum(map(len, sequences))
    assert work.num_unique < work.num_original
    assert work.num_padded >= work.num_unique
    assert work.num_keys >= work.num_unique
    assert 0 < work.num_head_rows <= sum(sequence.num_supervised for sequence in sequences)


def make_tokenizer() -> Any:
    """Return a tokenizer with an end-of-text and a padding token; the ids of the tests need no words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(298)} | {"<end>": 298, "<pad>": 299}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<pad>")
