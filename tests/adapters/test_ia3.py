"""IA3 against PEFT's own layer, and against what the paper says is rescaled."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from peft.tuners.ia3.layer import IA3Layer
from transformers import AttentionInterface

from koat.adapters.attach import attach_adapter, count_trainable, restore_adapter, save_adapter
from koat.adapters.lean import Rescale
from koat.adapters.methods import Ia3Settings
from tests.family_models import FAMILIES as ALL_FAMILIES
from tests.family_models import make_family

FAMILIES = ["gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gpt2"]
FUSED = ["gpt_neox", "gpt2"]
TARGETS = ["paper", "attention", "all-linear", "peft"]
IDS = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(0))


def attach(model, targets="paper", **others):
    return attach_adapter(model, Ia3Settings(targets=targets, **others)).eval()


def list_vectors(model) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if "ia3_l" in name}


def copy_vectors(source, target) -> None:
    found, wanted = list_vectors(source), list_vectors(target)
    assert found.keys() == wanted.keys() != set()
    for name, weight in wanted.items():
        weight.data.copy_(found[name].data)


def run(model):
    """Return logits and the vectors' gradients under a loss that uses every logit."""
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=IDS).logits
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits.log_softmax(-1) * weight).sum().backward()
    return logits.detach(), {name: vector.grad.clone() for name, vector in list_vectors(model).items()}


def assert_near(found, expected, tolerance=1e-5) -> None:
    assert expected.norm() > 0
    assert (found - expected).norm() <= tolerance * expected.norm()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


# ---------------------------------------------------------------------------------------------- PEFT's own


def wrap_with_peft(model):
    """Return PEFT's own IA3 with PEFT's own choice of layers."""
    return get_peft_model(model, IA3Config(task_type="CAUSAL_LM")).eval()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_targets_equal_pefts_layer(make_model, randomise, family) -> None:
    base = make_model(family)
    theirs, ours = wrap_with_peft(copy.deepcopy(base)), attach(copy.deepcopy(base), "peft")
    randomise(theirs)
    copy_vectors(theirs, ours)
    expected, expected_gradients = run(theirs)
    found, gradients = run(ours)
    assert_near(found, expected)
    assert gradients.keys() == expected_gradients.keys()
    for name in expected_gradients:
        assert_near(gradients[name], expected_gradients[name])
    changed = (expected - base(input_ids=IDS).logits).norm()
    assert changed > 0.1 * expected.norm()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_koat_saves_peft_loads(make_model, randomise, tmp_path, family, targets) -> None:
    base = make_model(family)
    ours = attach(copy.deepcopy(base), targets)
    randomise_free(ours, randomise)
    save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    assert {type(m).__module__ for m in theirs.modules() if isinstance(m, IA3Layer)} == {"peft.tuners.ia3.layer"}
    with torch.no_grad():
        assert_near(theirs(input_ids=IDS).logits, ours(input_ids=IDS).logits)
        again = restore_adapter(copy.deepcopy(base), tmp_path).eval()
        assert torch.equal(again(input_ids=IDS).logits, ours(input_ids=IDS).logits)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("family", FAMILIES)
def test_what_peft_saves_koat_loads(make_model, randomise, tmp_path, family) -> None:
    base = make_model(family)
    theirs = wrap_with_peft(copy.deepcopy(base))
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path))
    ours = restore_adapter(copy.deepcopy(base), tmp_path, trainable=True).eval()
    expected, expected_gradients = run(theirs)
    found, gradients = run(ours)
    assert_near(found, expected)
    for name in expected_gradients:
        assert_near(gradients[name], expected_gradients[name])


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_merging_keeps_the_logits(make_model, randomise, family, targets) -> None:
    model = attach(make_model(family), targets)
    randomise_free(model, randomise)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        merged = model.merge_and_unload()
        assert not any(isinstance(module, IA3Layer) for module in merged.modules())
        assert_near(merged(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_changes_no_bit(make_model, family) -> None:
    base = make_model(family)
    with torch.no_grad():
        expected = base(input_ids=IDS).logits
        for targets in TARGETS:
            model = attach(copy.deepcopy(base), targets)
            assert torch.equal(model(input_ids=IDS).logits, expected)


def test_switched_off_it_is_the_base(make_model, randomise) -> None:
    base = make_model("llama")
    model = attach(copy.deepcopy(base))
    randomise(model)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, base(input_ids=IDS).logits)


# -------------------------------------------------------------------------------------------- the paper's


def find_queries(model, attention_inputs) -> dict[str, torch.Tensor]:
    """Return, per fused vector, a mark on the entries that reach the attention's queries, by autograd.

    The model is wrapped by plain PEFT on its fused projection: whatever a query depends on is a query entry.
    """
    name = {"gpt_neox": "query_key_value", "gpt2": "c_attn"}[model.config.model_type]
    wrapped = get_peft_model(
        model, IA3Config(target_modules=[name], feedforward_modules=[], fan_in_fan_out=name == "c_attn")
    )
    states = attention_inputs(wrapped)
    vectors = list(list_vectors(wrapped).values())
    marks = {}
    for layer, vector in enumerate(vectors):
        (gradient,) = torch.autograd.grad(states[layer][0].abs().sum(), vector, retain_graph=True)
        marks[layer] = gradient.flatten() != 0
    return marks


@pytest.fixture
def attention_inputs():
    """Return a function that runs a model and returns (query, key, value) of every layer, before rotation.

    Every position is 0, where rotary embeddings are the identity.
    """

    def capture(model):
        seen: list[tuple[torch.Tensor, ...]] = []

        def spy(module, query, key, value, attention_mask, scaling=None, **others):
            seen.append((query, key, value))
            groups = query.shape[1] // key.shape[1]
            out = torch.nn.functional.scaled_dot_product_attention(
                query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), is_causal=True
            )
            return out.transpose(1, 2).contiguous(), None

        AttentionInterface.register("spy", spy)
        causal = model.get_base_model() if isinstance(model, PeftModel) else model
        before = causal.config._attn_implementation
        causal.config._attn_implementation = "spy"
        try:
            model(input_ids=IDS, position_ids=torch.zeros_like(IDS), use_cache=False)
        finally:
            causal.config._attn_implementation = before
        assert len(seen) == 3
        return seen

    return capture


def randomise_free(model, randomise, seed: int = 0) -> None:
    """Randomise all vectors but the entries whose gradient is zero whatever the loss: they are not trainable."""
    before = {name: vector.detach().clone() for name, vector in list_vectors(model).items()}
    _, gradients = run(model)
    randomise(model, seed)
    for name, vector in list_vectors(model).items():
        vector.data = torch.where(gradients[name] == 0, before[name], vector.data)


@pytest.mark.parametrize("family", FUSED)
def test_held_entries_are_the_queries(make_model, attention_inputs, family) -> None:
    queries = find_queries(make_model(family), attention_inputs)
    _, gradients = run(attach(make_model(family)))
    fused = [gradient.flatten() for name, gradient in gradients.items() if gradient.numel() == 192]
    assert len(fused) == len(queries) == 3
    for layer, gradient in enumerate(fused):
        assert int(queries[layer].sum()) == 64
        assert torch.equal(gradient == 0, queries[layer])


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_values_are_scaled_and_queries_are_not(make_model, randomise, attention_inputs, family) -> None:
    """Seen where attention takes its inputs, in the first layer, which both models enter alike."""
    base = make_model(family)
    model = attach(copy.deepcopy(base))
    randomise_free(model, randomise)
    with torch.no_grad():
        (query, key, value), (new_query, new_key, new_value) = attention_inputs(base)[0], attention_inputs(model)[0]
    assert torch.equal(new_query, query)
    for name, old, new in (("key", key, new_key), ("value", value, new_value)):
        vector = take_first_vector(model, name, old)
        if family == "qwen3" and name == "key":
            # A norm over the head's width follows the projection, with a weight: it acts on the scaled keys.
            norm = base.model.layers[0].self_attn.k_norm
            raw = base.model.layers[0].self_attn.k_proj(first_input(base)).view(2, 17, 2, 16).transpose(1, 2)
            expected = norm(raw * vector)
        else:
            expected = old * vector
        torch.testing.assert_close(new, expected, rtol=1e-5, atol=1e-5)
        assert (new - old).abs().max() > 0.1


def first_input(base):
    """Return the normed embeddings that the first layer's projections take."""
    with torch.no_grad():
        return base.model.layers[0].input_layernorm(base.model.embed_tokens(IDS))


def take_first_vector(model, part: str, states) -> torch.Tensor:
    """Return the first layer's vector for keys or values as `[heads, 1, head_dim]`, from the layout's definition."""
    _, heads, _, width = states.shape
    vectors = {name: vector.detach().flatten() for name, vector in list_vectors(model).items()}
    family = model.get_base_model().config.model_type
    if family == "gpt_neox":  # heads outermost, then query, key, value
        fused = next(v for name, v in vectors.items() if "query_key_value" in name)
        return fused.view(heads, 3, 1, width)[:, 1 if part == "key" else 2]
    if family == "gpt2":  # all queries, then all keys, then all values
        fused = next(v for name, v in vectors.items() if "c_attn" in name)
        return fused.view(3, heads, 1, width)[1 if part == "key" else 2]
    return next(v for name, v in vectors.items() if f"{part[0]}_proj" in name).view(heads, 1, width)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_inner_activation_is_scaled_and_nothing_else(make_model, randomise, family) -> None:
    base = make_model(family)
    model = attach(copy.deepcopy(base))
    randomise_free(model, randomise)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, IA3Layer)}
    inner = [name for name in layers if name.endswith(("down_proj", "mlp.dense_4h_to_h", "mlp.c_proj"))]
    assert len(inner) == 3
    assert len(layers) == (6 if family in FUSED else 9)
    assert not any(name.endswith(("q_proj", "o_proj", "gate_proj", "up_proj")) for name in layers)

    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    outside: dict[str, torch.Tensor] = {}
    for name in inner:
        module = layers[name]
        module.register_forward_pre_hook(lambda _, inputs, name=name: outside.update({name: inputs[0]}))
        module.base_layer.register_forward_hook(
            lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)})
        )
        module.register_forward_hook(lambda _, __, output, name=name: outside.update({f"{name}.out": output}))
    with torch.no_grad():
        model(input_ids=IDS)
    for name in inner:
        vector = layers[name].ia3_l["default"].flatten()
        assert vector.numel() == outside[name].shape[-1]
        assert not torch.equal(vector, torch.ones_like(vector))
        torch.testing.assert_close(seen[name][0], outside[name] * vector, rtol=1e-6, atol=1e-6)
        assert torch.equal(outside[f"{name}.out"], seen[name][1])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("family", FUSED)
def test_held_entries_stay_one(make_model, attention_inputs, tmp_path, family, weight_decay) -> None:
    """Whatever the optimizer does, in use, in the file, and merged."""
    queries = find_queries(make_model(family), attention_inputs)
    base = make_model(family)
    model = attach(copy.deepcopy(base))
    optimizer = torch.optim.AdamW(list_vectors(model).values(), lr=0.05, weight_decay=weight_decay)
    for _ in range(5):
        run(model)
        optimizer.step()
    with torch.no_grad():
        trained = model(input_ids=IDS).logits
        first, plain = attention_inputs(model)[0], attention_inputs(base)[0]
    assert torch.equal(first[0], plain[0])
    assert not torch.allclose(first[1], plain[1], atol=0.01)

    save_adapter(model, tmp_path)
    from safetensors.torch import load_file

    stored = load_file(str(tmp_path / "adapter_model.safetensors"))
    fused = [tensor.flatten() for _, tensor in sorted(stored.items()) if tensor.numel() == 192]
    for layer, vector in enumerate(fused):
        assert (vector[queries[layer]] == 1).all()
        assert (vector[~queries[layer]] != 1).all()
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
        assert_near(theirs(input_ids=IDS).logits, trained)
        assert_near(model.merge_and_unload()(input_ids=IDS).logits, trained)


@pytest.mark.parametrize("family", FAMILIES)
def test_paper_targets_count_keys_values_and_inner(make_model, family) -> None:
    model = attach(make_model(family))
    width = 64 if family in FUSED else 32  # keys and values have half the heads outside the fused families
    inner = 256 if family == "gpt2" else 96
    assert count_trainable(model) == 3 * (2 * width + inner)


@pytest.mark.parametrize("family", FUSED)
def test_a_restored_adapter_still_holds_its_queries(make_model, tmp_path, family) -> None:
    save_adapter(attach(make_model(family)), tmp_path)
    again = restore_adapter(make_model(family), tmp_path, trainable=True)
    _, gradients = run(again)
    assert sum(int((gradient == 0).sum()) for gradient in gradients.values()) == 3 * 64
    assert count_trainable(again) == count_trainable(attach(make_model(family)))


@pytest.mark.parametrize("family", FUSED)
def test_other_targets_hold_nothing(make_model, tmp_path, family) -> None:
    for targets in ("attention", "all-linear", "peft"):
        model = attach(make_model(family), targets)
        assert count_trainable(model) == sum(vector.numel() for vector in list_vectors(model).values())
        assert all((gradient != 0).all() for gradient in run(model)[1].values())


# --------------------------------------------------------------------------------------------- the multiply


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 4, 5)])
def test_rescale_is_a_product(dtype, shape) -> None:
    generator = torch.Generator().manual_seed(0)
    activation = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    vector = (1 + torch.randn(5, generator=generator)).requires_grad_()
    upstream = torch.randn(shape, generator=generator).to(dtype)
    found = Rescale.apply(activation, vector)
    gradients = torch.autograd.grad(found, [activation, vector], upstream)
    expected = activation.double() * vector.double()
    exact = torch.autograd.grad(expected, [activation, vector], upstream.double())
    assert found.dtype == gradients[0].dtype == dtype
    assert gradients[1].dtype == torch.float32
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=2 * step, atol=0)
    torch.testing.assert_close(gradients[0].double(), exact[0].double(), rtol=2 * step, atol=0)
    torch.testing.assert_close(
        gradients[1].double(), exact[1].double(), rtol=0, atol=4 * step * math.sqrt(activation.numel())
    )


def test_rescale_passes_a_numerical_check() -> None:
    generator = torch.Generator().manual_seed(0)
    activation = torch.randn(3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    vector = torch.randn(4, dtype=torch.float64, generator=generator, requires_grad=True)
    # The vector's gradient is summed in float32, whatever its type.
    assert torch.autograd.gradcheck(Rescale.apply, (activation, vector), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_bfloat16_bases_keep_float32_vectors(make_model, randomise, family) -> None:
    """Activations keep the base's type; gradients are near those of the same weights in float32."""
    model = make_model(family).bfloat16()
    exact = copy.deepcopy(model).float()
    model, exact = attach(model), attach(exact)
    randomise_free(exact, randomise)
    copy_vectors(exact, model)
    assert {vector.dtype for vector in list_vectors(model).values()} == {torch.float32}
    logits, gradients = run(model)
    assert logits.dtype == torch.bfloat16
    _, expected = run(exact)
    for name in expected:
        assert gradients[name].dtype == torch.float32
        assert (gradients[name] - expected[name]).norm() < 0.1 * expected[name].norm()


def test_nothing_is_kept_that_a_frozen_vector_does_not_need() -> None:
    """With the vector frozen, the activation is not saved for the backward pass."""
    saved: list[torch.Size] = []
    activation = torch.randn(6, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape) or tensor, lambda t: t):
        Rescale.apply(activation, torch.ones(5))
        assert saved == [torch.Size([5])]
        Rescale.apply(activation, torch.ones(5, requires_grad=True))
    assert saved[1:] == [torch.Size([6, 5]), torch.Size([5])]


@pytest.mark.parametrize("family", ["falcon-grouped", "llama"])
def test_a_last_layer_s_output_may_be_changed_in_place(family) -> None:
    """Falcon adds the attention's output to it in place, and a vector there needs what it scaled."""
    inner = ALL_FAMILIES[family].inner.rpartition(".")[2]
    wrapped = attach_adapter(make_family(family), Ia3Settings(targets=[inner], feedforward=[]))
    plain = get_peft_model(make_family(family), copy.deepcopy(wrapped.peft_config["default"]))
    gradients = []
    for each in (wrapped, plain):
        each(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([vector.grad for vector in list_vectors(each).values()])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for ours, theirs in zip(*gradients, strict=True):
        assert theirs.norm() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
