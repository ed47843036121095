"""Which models share, which fall back, and whether a model that lies about its mask is found out."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook as note_every_pass
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoConfig, GPTNeoForCausalLM, LlamaForCausalLM, LlamaModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from koat.core.sequence import supervise_from
from koat.forest import verify
from koat.forest.attend import AttentionPlan
from koat.forest.pack import RowCost
from koat.forest.probe import make_probe, measure_difference, single_logprobs
from koat.forest.score import cut_sequences, estimate_row_cost, make_padded, set_kernel, token_logprobs
from koat.forest.twin import make_twin, pick_layer_types
from koat.forest.verify import TWIN_TOLERANCE, verify_layout
from koat.forest.verify_growth import verify_growth

EXACT = ["gpt_neox", "llama", "mistral", "qwen2", "qwen2-window", "qwen3", "gpt2", "gemma2", "granite", "opt"]


def measure_worst(model, sequences, layout, score_singly, token_budget=150) -> float:
    """Return the largest log-probability difference of a layout from the oracle's one pass per sequence."""
    worst, counted = 0.0, 0
    with torch.no_grad():
        expected = score_singly(model, sequences)
        for batch in cut_sequences(sequences, layout, token_budget):
            found = token_logprobs(model, batch, layout).tolist()
            at = (batch.position.flatten()[batch.source] + 1).tolist()
            for value, owner, place in zip(found, batch.owner.tolist(), at, strict=True):
                worst, counted = max(worst, abs(value - float(expected[owner][place]))), counted + 1
    assert counted == sum(sequence.num_supervised for sequence in sequences)
    return worst


@pytest.mark.parametrize("attention", ["walk", "sdpa", "eager"])
@pytest.mark.parametrize("family", EXACT)
def test_exact_families_share(make_model, make_sequences, score_singly, family, attention) -> None:
    if (family, attention) == ("gemma2", "walk"):
        pytest.skip("Gemma 2 caps its attention, which is for eager attention to compute")
    model = make_model(family, "sdpa" if attention == "walk" else attention)
    layout, found = verify_layout(model, "auto" if attention == "walk" else attention)
    assert layout.shares
    assert found.shares
    assert layout.split_head
    assert found.kernel == layout.plan.kernel == attention
    assert found.twin_difference <= TWIN_TOLERANCE
    assert measure_worst(model, make_sequences("mixed"), layout, score_singly) < 5e-5


@pytest.mark.parametrize("family", [*EXACT, "gptj"])
def test_exact_families_share_in_bfloat16(make_model, family) -> None:
    """Rounding is larger there, and a padded batch does not always show how large."""
    for seed in range(3):
        layout, found = verify_layout(make_model(family, seed=seed).bfloat16())
        assert layout.shares, found.reason


def test_gptj_shares_with_eager_attention(make_model, make_sequences, score_singly) -> None:
    model = make_model("gptj", "eager")
    layout, found = verify_layout(model)
    assert found.shares
    assert layout.plan.kernel == "eager"
    assert measure_worst(model, make_sequences("mixed"), layout, score_singly) < 5e-5
    # A boolean mask is what GPT-J would get wrong in silence.
    wrong = replace(layout, plan=AttentionPlan("sdpa"))
    assert measure_worst(model, make_sequences("mixed"), wrong, score_singly) > 0.1


@pytest.mark.parametrize("family", ["bloom", "mamba"])
def test_inexact_families_fall_back_to_padded_rows(make_model, make_sequences, score_singly, family, caplog) -> None:
    model = make_model(family)
    with caplog.at_level(logging.WARNING, "koat"):
        layout, found = verify_layout(model)
    assert not layout.shares
    assert not found.shares
    assert not layout.alone
    assert found.reason in caplog.text
    assert "padded" in caplog.text
    assert measure_worst(model, make_sequences("mixed"), layout, score_singly) < 5e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_longrope_runs_one_sequence_at_a_time(make_model, make_sequences, score_singly, attention, caplog) -> None:
    """Its rotation is chosen by the longest position of the batch, so not even padded rows are right."""
    model = make_model("phi3-longrope", attention)
    sequences = [*make_sequences("mixed"), supervise_from(tuple(range(40)), 3)]
    with caplog.at_level(logging.WARNING, "koat"):
        layout, found = verify_layout(model)
    assert not found.shares
    assert layout.alone
    assert "one sequence at a time" in caplog.text
    assert measure_worst(model, sequences, layout, score_singly) < 5e-5
    # Rows of all lengths in one micro-batch; apart by length they would happen to be right.
    joined = replace(make_padded(), cost=RowCost(0.0, start_up=1e9))
    assert measure_worst(model, sequences, joined, score_singly, 10_000) > 0.1


@pytest.mark.parametrize("hidden", [32, 64])
@pytest.mark.parametrize("large", [False, True])
def test_a_twin_shows_what_small_weights_would_hide(make_model, make_config, hidden, large) -> None:
    """As families draw them, keys and queries of a narrow model hardly tell one position from another.

    The verdict is of the class, whatever the weights: longrope and short convolutions are inexact.
    """
    torch.manual_seed(0)
    scale = {"initializer_range": 0.01 if not large else 0.2, "hidden_size": hidden}
    rope = make_config("phi3-longrope").rope_parameters
    factors = {name: [value[0]] * (hidden // 8) for name, value in rope.items() if isinstance(value, list)}
    longrope = make_config("phi3-longrope", rope_parameters={**rope, **factors}, **scale)
    mixing = AutoConfig.for_model(
        "lfm2", vocab_size=300, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, block_ff_dim=48,
        layer_types=["conv", "full_attention"], pad_token_id=None, bos_token_id=None, eos_token_id=None, **scale,
    )  # fmt: skip
    for config in (longrope, mixing):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False).eval()
        layout, found = verify_layout(model)
        assert not layout.shares and "on a float32 twin" in found.reason, config.model_type
        assert layout.alone is (config.model_type == "phi3")


@pytest.mark.parametrize("special", [2, 290])
def test_a_family_that_wants_numbers_for_special_tokens_has_a_twin(special) -> None:
    """Cwm types its beginning of sequence as a number: None is refused."""
    config = AutoConfig.for_model(
        "cwm", vocab_size=600, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=2, bos_token_id=2 * special, eos_token_id=special, pad_token_id=special,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False).eval()
    with pytest.raises(Exception, match="expected int"):
        config.bos_token_id = None
    assert make_twin(model).config.bos_token_id == 0
    assert verify_layout(model)[1].shares


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "alone"), [("phi3-longrope", True), ("llama", False), ("bloom", False)])
def test_without_a_twin_padded_rows_are_tried_on_the_weights(
    make_model, make_sequences, score_singly, monkeypatch, caplog, family, alone, dtype
) -> None:
    def refuse(model):
        raise TypeError("no twins\nhere")

    monkeypatch.setattr(verify, "make_twin", refuse)
    model = make_model(family).to(dtype)
    layout, found = verify_layout(model)
    assert not found.shares and layout.plan is None and layout.alone is alone
    assert found.reason == "no small twin of this model can be made: TypeError: no twins here"
    assert ("one sequence at a time" if alone else "padded batches") in caplog.text
    if dtype == torch.float32:
        sequences = [*make_sequences("mixed"), supervise_from(tuple(range(40)), 3)]
        assert measure_worst(model, sequences, layout, score_singly) < 5e-5


class IgnoresPositions(LlamaModel):
    def forward(self, position_ids=None, **others):
        return super().forward(**others)


class IgnoresMask(LlamaModel):
    def forward(self, attention_mask=None, trees=None, **others):
        return super().forward(**others)


class MixesNeighbours(LlamaModel):
    """Adds the token before in the row, as recurrent and convolutional layers do."""

    def forward(self, input_ids=None, inputs_embeds=None, **others):
        embedded = self.embed_tokens(input_ids)
        before = torch.nn.functional.pad(embedded, (0, 0, 1, 0))[:, :-1]
        return super().forward(inputs_embeds=embedded + 0.3 * before, **others)


class RefusesMasks(LlamaModel):
    def forward(self, attention_mask=None, **others):
        if attention_mask is not None and attention_mask.ndim == 4:
            raise RuntimeError("only two dimensions")
        return super().forward(attention_mask=attention_mask, **others)


def build_broken(config, body: type[LlamaModel], seed: int = 0):
    """Return a Llama with another body, its weights as the class itself draws them."""

    class Broken(LlamaForCausalLM):
        def __init__(self, config) -> None:
            super().__init__(config)
            self.model = body(config)
            self.post_init()

    torch.manual_seed(seed)
    return Broken._from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("hidden", [64, 128])
@pytest.mark.parametrize("body", [IgnoresPositions, IgnoresMask, MixesNeighbours, RefusesMasks])
def test_a_broken_model_is_found_out(make_config, make_sequences, score_singly, body, hidden) -> None:
    model = build_broken(make_config("llama", hidden_size=hidden), body)
    layout, found = verify_layout(model)
    assert not layout.shares
    assert not found.shares
    assert "differ by" in found.reason or "only two dimensions" in found.reason
    if body is not IgnoresMask:
        assert measure_worst(model, make_sequences("mixed"), layout, score_singly) < 5e-5


def test_a_sound_body_in_the_same_clothes_shares(make_config) -> None:
    assert verify_layout(build_broken(make_config("llama"), LlamaModel))[1].shares


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_tried_after_the_twin(make_model, dtype) -> None:
    """A model whose twin is sound and whose own forward pass is not."""
    model = make_model("llama").to(dtype)
    sound = model.base_model.forward
    model.base_model.forward = lambda attention_mask=None, trees=None, **others: sound(**others)
    layout, found = verify_layout(model)
    assert not layout.shares
    assert "twin" not in found.reason
    assert "differ by" in found.reason


class ScalesItsLogits(LlamaForCausalLM):
    def forward(self, *args, **others):
        output = super().forward(*args, **others)
        output.logits = output.logits * 0.5
        return output


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_unknown_head_is_run_whole(make_config, make_sequences, score_singly, attention) -> None:
    torch.manual_seed(0)
    config = make_config("llama", initializer_range=0.2)
    model = ScalesItsLogits._from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
    layout, found = verify_layout(model)
    assert layout.shares
    assert not layout.split_head
    assert not found.split_head
    assert measure_worst(model, make_sequences("mixed"), layout, score_singly) < 5e-5


@pytest.mark.parametrize("family", ["mistral", "qwen2-window", "gemma2"])
def test_a_forgotten_window_shows(make_model, family) -> None:
    model = make_model(family)
    layout, _ = verify_layout(model, "sdpa")
    open_wide = tuple((kind, None) for kind, _ in layout.plan.windows)
    probe = make_probe(300)
    assert measure_difference(model, probe, layout) < 1e-4
    assert measure_difference(model, probe, replace(layout, plan=replace(layout.plan, windows=open_wide))) > 0.01


def test_the_measure_agrees_with_the_oracle(make_model, make_sequences, score_singly) -> None:
    model, sequences = make_model("gpt_neox"), make_sequences("mixed")
    for found, expected, sequence in zip(
        single_logprobs(model, sequences), score_singly(model, sequences), sequences, strict=True
    ):
        torch.testing.assert_close(found, expected[torch.tensor(sequence.supervised)], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt_neox", "qwen2-window", "mistral", "gpt2", "mamba"])
def test_the_twin_is_small_and_disturbs_nothing(make_model, family) -> None:
    model = make_model(family, num_hidden_layers=3) if family != "gpt2" else make_model(family)
    model.train()
    before, state = model.config.to_dict(), torch.random.get_rng_state()
    twin = make_twin(model.bfloat16())
    verify_layout(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert not twin.training
    assert model.config.to_dict() == {**before, "dtype": model.config.to_dict()["dtype"]}
    assert type(twin) is type(model)
    assert twin.dtype == torch.float32
    assert twin.config.num_hidden_layers <= 3
    kinds = getattr(model.config, "layer_types", None)
    assert kinds is None or set(twin.config.layer_types) == set(kinds)


@pytest.mark.parametrize(("family", "options"), [("llama", {"intermediate_size": 3000}), ("opt", {"ffn_dim": 3000})])
def test_the_twin_s_feed_forward_layers_are_narrow(make_model, family, options) -> None:
    model, (name,) = make_model(family, **options), options
    twin = make_twin(model)
    assert getattr(twin.config, name) == 1024 and getattr(model.config, name) == 3000
    assert sum(weight.numel() for weight in twin.parameters()) < sum(weight.numel() for weight in model.parameters())
    assert verify_layout(model)[1].shares


def test_a_twin_whose_width_cannot_be_another_keeps_it(make_model, monkeypatch) -> None:
    model, build = make_model("llama", intermediate_size=3000), LlamaForCausalLM._from_config

    def refuse(config, **options):
        if config.intermediate_size != 3000:
            raise ValueError("a width that hangs on another")
        return build(config, **options)

    monkeypatch.setattr(LlamaForCausalLM, "_from_config", refuse)
    assert make_twin(model).config.intermediate_size == 3000
    assert verify_layout(model)[1].shares


def test_the_finding_is_json(make_model) -> None:
    import json

    for family in ("llama", "bloom"):
        _, found = verify_layout(make_model(family))
        stored = json.loads(json.dumps(found.to_mapping()))
        assert stored["shares"] is (family == "llama")
        assert stored["reason"]


def test_products_are_exact_while_it_is_found_out(make_model, monkeypatch) -> None:
    """TF32, where a user allows it, is off by more than a twin may be."""
    model, seen = make_model("llama"), set()
    torch.set_float32_matmul_precision("high")
    try:
        with note_every_pass(lambda *_: seen.add(torch.get_float32_matmul_precision()) and None):
            layout, _ = verify_layout(model)
            verify_growth(model, layout)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == {"highest"}


def test_the_probe_shares_in_every_way() -> None:
    bodies = [sequence.token_ids for sequence in make_probe(300)]
    assert len(bodies) == len(set(bodies)) + 1
    assert sum(body[:20] == bodies[0][:20] for body in bodies) == 4
    assert sum(body[:30] == bodies[0][:30] for body in bodies) == 3
    assert all(0 <= token < 300 for body in bodies for token in body)


def test_a_model_without_finite_numbers_shares_nothing(make_model) -> None:
    model = make_model("llama")
    model.get_input_embeddings().weight.data *= float("nan")
    layout, found = verify_layout(model)
    assert not layout.shares
    assert "no finite numbers in torch.float32" in found.reason


def test_one_number_that_is_none_is_no_difference_of_zero(make_model, monkeypatch) -> None:
    model = make_model("llama")
    layout, _ = verify_layout(model)
    sound = token_logprobs
    spoil = lambda *arguments: sound(*arguments).index_fill(0, torch.tensor([0]), float("nan"))  # noqa: E731
    monkeypatch.setattr("koat.forest.probe.token_logprobs", spoil)
    assert measure_difference(model, make_probe(300), layout) == float("inf")


def test_a_padded_batch_that_cannot_run_allows_nothing(make_model, monkeypatch) -> None:
    """What it would have shown bounds what a forest may differ by."""
    model = make_model("llama")
    sound = verify._try_layout

    def fail(tried, probe, layout, *more):
        if tried is model:
            return (float("inf"), "broken") if layout.shares else (float("inf"), "no padding here")
        return sound(tried, probe, layout, *more)

    monkeypatch.setattr(verify, "_try_layout", fail)
    layout, found = verify_layout(model)
    assert not layout.shares
    assert found.reason == "broken"


def test_a_fall_from_a_walk_to_dense_masks_is_said(make_model, monkeypatch, caplog) -> None:
    def fail(*given):
        raise NotImplementedError("nothing walks here")

    monkeypatch.setattr("koat.forest.walk.Walk.attend", fail)
    assert verify_layout(make_model("llama"))[1].kernel == "sdpa"
    assert "dense masks, whose memory grows with the square of a row: NotImplementedError: nothing walks" in caplog.text
    caplog.clear()
    assert verify_layout(make_model("llama"), "sdpa")[1].kernel == "sdpa"
    assert not caplog.text


@pytest.mark.parametrize(("family", "kernel"), [("llama", "sdpa"), ("gemma2", "eager")])
def test_flex_attention_that_cannot_compile_gives_way(
    make_model, make_sequences, score_singly, monkeypatch, family, kernel
) -> None:
    """SDPA leaves out the cap on Gemma 2's scores without a word, in single sequences as in forests."""

    def fail(*_, **__):
        raise RuntimeError("no C compiler here")

    model = make_model(family, "flex_attention")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flex_attention", fail)
    layout, found = verify_layout(model, "auto")
    assert layout.shares and found.kernel == kernel
    right = make_model(family, "eager")
    with torch.no_grad():
        expected = torch.cat(score_singly(right, make_sequences("shared")))
        torch.testing.assert_close(torch.cat(score_singly(model, make_sequences("shared"))), expected)
    assert measure_worst(model, make_sequences("shared"), layout, score_singly) < 5e-5


def test_windows_by_row_index_are_tried_within_the_probe() -> None:
    """GPT-Neo's local layers count places in the row, not positions: nothing longer than the window may be shared."""
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=320, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=64, max_position_embeddings=256, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPTNeoForCausalLM(config).eval().requires_grad_(False)
    assert make_twin(model).config.window_size == 8 and config.window_size == 64
    layout, found = verify_layout(model)
    assert layout.plan is None and not found.shares


def fail_on_a_gpu(*given, **more):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def fail_on_a_cpu(*given, **more):
    """Ask PyTorch's own allocator for more than there is."""
    torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize("run_out", [fail_on_a_gpu, fail_on_a_cpu])
@pytest.mark.parametrize("place", ["twin", "layout", "growth"])
def test_memory_that_runs_out_is_no_fault_of_a_layout(make_model, monkeypatch, run_out, place) -> None:
    model = make_model("llama")
    layout, _ = verify_layout(model)
    if place == "layout":
        monkeypatch.setattr(verify._try_layout, "__defaults__", (run_out,))
    monkeypatch.setattr(verify, "make_twin" if place == "twin" else "measure_difference", run_out)
    monkeypatch.setattr("koat.forest.verify_growth.grow_forest", run_out)
    with pytest.raises(RuntimeError, match="memory"):
        verify_growth(model, layout) if place == "growth" else verify_layout(model)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_dropout_on_attention_is_trained_with_dense_masks(make_model, caplog, family) -> None:
    """koat's own kernels draw none: long rows would be priced as free, and cost their square."""
    name = "attn_pdrop" if family == "gpt2" else "attention_dropout"
    model = make_model(family, **{name: 0.1})
    assert verify_layout(model)[0].plan.kernel == "walk"  # nothing is trained, and nothing dropped
    assert "dense masks" not in caplog.text
    model.get_input_embeddings().weight.requires_grad_()
    layout, found = verify_layout(model)
    assert found.shares and found.kernel == layout.plan.kernel == "sdpa"
    assert layout.cost == estimate_row_cost(model.config, "sdpa")
    assert "drops 0.1 of its attention in training" in caplog.text and "dense masks" in caplog.text
    caplog.clear()
    model = make_model(family, **{name: 0.0})
    model.get_input_embeddings().weight.requires_grad_()
    assert verify_layout(model)[0].plan.kernel == "walk"
    assert not caplog.text


def test_flex_attention_may_be_compiled_for_every_kind_of_row(make_model, monkeypatch) -> None:
    config = pytest.importorskip("torch._dynamo.config")
    monkeypatch.setattr(config, "recompile_limit", 8)
    set_kernel(make_model("llama"), "flex")
    assert config.recompile_limit == 64
    monkeypatch.setattr(config, "recompile_limit", 100)
    set_kernel(make_model("llama"), "flex")
    assert config.recompile_limit == 100


def test_the_twin_has_a_layer_of_every_type() -> None:
    five = ["sliding_attention"] * 5
    assert pick_layer_types([*five, "full_attention", *five]) == ["sliding_attention", "full_attention"]
    assert pick_layer_types(["full_attention", "sliding_attention", "full_attention"]) == [
        "full_attention", "sliding_attention",
    ]  # fmt: skip
    assert pick_layer_types(["sliding_attention"] * 9) == ["sliding_attention"] * 2
    assert pick_layer_types([]) == []
