"""Adapters on quantised bases: forests against single sequences, koat against PEFT, in outputs and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

from koat.adapters.attach import attach_adapter, count_trainable, restore_adapter, save_adapter
from koat.adapters.ia3 import Ia3Linear
from koat.adapters.lora import LoraLinear
from koat.adapters.methods import Ia3Settings, LoraSettings, QloraSettings
from koat.core.errors import AdapterError
from koat.forest.score import cut_sequences, make_padded, token_logprobs
from koat.workflows.training.prepare import enable_checkpointing
from tests.forest.test_score import CUTS, assert_near, assert_same, run_layout, run_single, share
from tests.quantised_base import SHAPES, load_quantised, write_wide

pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
FOUR_BIT = ["nf4", "nf4-double"]
METHODS = {
    "ia3": Ia3Settings(),
    "ia3 all-linear": Ia3Settings(targets="all-linear"),
    "qlora": QloraSettings(),
    # alpha over the root of 8 is 2, as in the row above: updates three times as large make float32 itself err by 3e-5.
    "qlora rank-stabilised": QloraSettings(rslora=True, alpha=6),
    "dora": LoraSettings(dora=True, targets="attention"),
}
WRAPPED = ("ia3", "lora", "dora")
IDS = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def load(make_model, tmp_path_factory):
    """`load(family, quantisation, dtype)`: a tiny quantised model, a new one at each call."""
    folder = tmp_path_factory.mktemp("bases")
    return lambda family, *how: load_quantised(write_wide(folder, make_model, family), *how)


def list_trained(model) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def take_gradients(model) -> dict[str, torch.Tensor]:
    taken = {name: weight.grad.clone() for name, weight in list_trained(model).items()}
    model.zero_grad(set_to_none=True)
    return taken


QUICK = {
    ("llama", "nf4-double"): METHODS,
    ("gpt_neox", "nf4"): ("ia3", "qlora"),
    ("qwen2", "nf4-double"): ("qlora",),
    ("gpt2", "nf4"): ("ia3",),
}
"""What every run of the tests tries; `make soak` tries all."""


def list_cases():
    """Every method on Llama and GPT-NeoX, IA3 and QLoRA on every other family."""
    for family, quantisation in itertools.product(SHAPES, FOUR_BIT):
        for method in METHODS if family in ("llama", "gpt_neox") else ("ia3", "qlora"):
            quick = method in QUICK.get((family, quantisation), ())
            marks = [] if quick else [pytest.mark.soak]
            yield pytest.param(family, method, quantisation, id=f"{family}-{method}-{quantisation}", marks=marks)


@pytest.mark.parametrize(("family", "method", "quantisation"), list_cases())
def test_forests_are_exact_in_four_bits(
    load, make_sequences, score_singly, randomise, family, method, quantisation
) -> None:
    model = attach_adapter(load(family, quantisation), METHODS[method]).eval()
    randomise(model)
    sequences = make_sequences("shared") + make_sequences("chat")
    layout = share(model)
    assert layout.shares
    model.train()
    assert_same(run_layout(model, sequences, layout, *CUTS["one row"]), run_single(model, sequences, score_singly))


@pytest.mark.parametrize("method", ["ia3", "lora"])
@pytest.mark.parametrize("family", ["gpt_neox", "qwen2"])
def test_forests_train_exactly_in_eight_bits_on_a_cpu(
    load, make_sequences, score_singly, randomise, family, method
) -> None:
    """The kernel that trains there, MatMul8bitFp, multiplies by the dequantised weight: nothing is rounded."""
    model = attach_adapter(load(family, "8bit"), {"ia3": Ia3Settings(), "lora": LoraSettings()}[method]).eval()
    randomise(model)
    sequences = make_sequences("shared")
    layout = share(model)
    model.train()
    assert {name_kernel(layer) for layer in list_bases(model)} == {"MatMul8bitFp"}
    assert_same(run_layout(model, sequences, layout, *CUTS["many rows"]), run_single(model, sequences, score_singly))


def test_recomputed_layers_give_the_same_gradients(load, make_sequences, randomise) -> None:
    model = attach_adapter(load("llama", "nf4-double"), QloraSettings())
    randomise(model)
    sequences, layout = make_sequences("shared"), share(model)
    model.train()
    expected = run_layout(model, sequences, layout, *CUTS["many rows"])
    enable_checkpointing(model)
    assert_same(run_layout(model, sequences, layout, *CUTS["many rows"]), expected)


def list_bases(model):
    return [module for module in model.modules() if type(module).__module__.startswith("bitsandbytes.")]


def name_kernel(layer) -> str:
    """Return the name of bitsandbytes' function that a layer runs, as autograd has it."""
    x = torch.zeros(1, 2, layer.in_features, requires_grad=True)
    return type(layer(x).grad_fn).__name__.removesuffix("Backward")


def plant_outliers(model) -> None:
    """Raise some channels of every norm that feeds a layer, so that some tokens pass LLM.int8()'s threshold of 6."""
    for name, module in model.named_modules():
        if name.endswith("layernorm"):
            module.weight.data[::9] *= 5.0


def count_outlier_columns(model, ids) -> int:
    """Return how many columns of the first layer's input some token lifts over the threshold."""
    seen = []
    handle = list_bases(model)[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return int((seen[0].abs() >= 6).flatten(0, -2).any(0).sum())


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_eight_bit_scores_differ_no_more_than_their_batches_do(load, make_sequences, score_singly, family) -> None:
    """LLM.int8() takes columns out of the product that any token of the batch lifts over its threshold.

    Its output therefore depends on what else is in the batch: padded batches differ from single sequences, and
    from each other. A forest must stay within that.
    """
    model = load(family, "8bit")
    layout = share(model)
    assert layout.shares
    plant_outliers(model)
    assert {name_kernel(layer) for layer in list_bases(model)} == {"MatMul8bitLt"}
    sequences = make_sequences("shared") + make_sequences("chat")
    together = torch.tensor([[token for sequence in sequences for token in sequence.token_ids]])
    alone = [count_outlier_columns(model, torch.tensor([sequence.token_ids])) for sequence in sequences]
    assert 0 < min(alone) < count_outlier_columns(model, together)

    marks = [torch.tensor(sequence.supervised) for sequence in sequences]
    with torch.no_grad():
        singles = score_singly(model, sequences)
        expected = torch.cat([row[mark] for row, mark in zip(singles, marks, strict=True)])

        def score(layout, budget=9999):
            table = [torch.zeros(len(sequence)) for sequence in sequences]
            for batch in cut_sequences(sequences, layout, budget):
                places = zip(batch.owner.tolist(), (batch.position.flatten()[batch.source] + 1).tolist(), strict=True)
                for value, (owner, at) in zip(token_logprobs(model, batch, layout), places, strict=True):
                    table[owner][at] = value
            return torch.cat([row[mark] for row, mark in zip(table, marks, strict=True)])

        padded = [score(make_padded(), budget) - expected for budget in (40, 80, 160, 320)]
        forests = [score(layout, budget) - expected for budget in (9999, 60)]
    noise = max(float(difference.abs().max()) for difference in padded)
    spread = max(float(difference.norm()) for difference in padded)
    assert noise > 1e-3, "nothing was planted"
    for difference in forests:
        assert float(difference.abs().max()) <= 2 * noise
        assert float(difference.norm()) <= 2 * spread


def wrap_with_peft(model, method: str):
    """Return PEFT's own layers on a model, with PEFT's own choice of names."""
    if method == "ia3":
        return get_peft_model(model, IA3Config(task_type="CAUSAL_LM"))
    names = ["query_key_value", "dense"] if model.config.model_type == "gpt_neox" else ["q_proj", "v_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=names, use_dora=method == "dora"))


def run(model):
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=IDS).logits
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits.log_softmax(-1) * weight).sum().backward()
    return logits.detach(), take_gradients(model)


def list_pairs():
    """Every method that runs on each base; 8-bit with DoRA does not."""
    for family, quantisation, method in itertools.product(("gpt_neox", "llama"), ("8bit", *FOUR_BIT), WRAPPED):
        if (quantisation, method) != ("8bit", "dora"):
            quick = (family == "gpt_neox") == (quantisation != "nf4")
            yield pytest.param(family, quantisation, method, marks=[] if quick else [pytest.mark.soak])


@pytest.mark.parametrize(("family", "quantisation", "method"), list_pairs())
def test_it_equals_pefts_layers_on_the_same_base(load, randomise, tmp_path, family, quantisation, method) -> None:
    theirs = wrap_with_peft(load(family, quantisation), method)
    randomise(theirs, spread=0.1)
    theirs.save_pretrained(str(tmp_path))
    ours = restore_adapter(load(family, quantisation), tmp_path, trainable=True)
    layers = [module for module in ours.modules() if isinstance(module, Ia3Linear | LoraLinear)]
    assert layers and {type(layer).__name__[-4:] for layer in layers} <= {"4bit", "itLt"}
    for model in (ours, theirs):
        model.train()
    expected, expected_gradients = run(theirs)
    found, gradients = run(ours)
    assert_near(found, expected)
    assert gradients.keys() == expected_gradients.keys() != set()
    for name in gradients:
        assert_near(gradients[name], expected_gradients[name])
    with theirs.disable_adapter(), torch.no_grad():
        base = theirs(input_ids=IDS).logits
    assert (expected - base).norm() > 0.05 * expected.norm()
    with ours.disable_adapter(), torch.no_grad():
        assert_near(ours(input_ids=IDS).logits, base)


@pytest.mark.parametrize("quantisation", ["8bit", "nf4-double"])
@pytest.mark.parametrize("method", ["ia3", "qlora"])
def test_files_load_in_plain_peft(load, randomise, tmp_path, method, quantisation) -> None:
    ours = attach_adapter(load("gpt_neox", quantisation), METHODS[method]).eval()
    randomise(ours)
    save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(load("gpt_neox", quantisation), str(tmp_path)).eval()
    with torch.no_grad():
        assert_near(theirs(input_ids=IDS).logits, ours(input_ids=IDS).logits)


@pytest.mark.parametrize("quantisation", ["8bit", "nf4"])
def test_queries_of_fused_projections_are_held(load, randomise, quantisation) -> None:
    model = attach_adapter(load("gpt_neox", quantisation), Ia3Settings()).train()
    randomise(model)
    _, gradients = run(model)
    fused = {name: vector for name, vector in gradients.items() if "query_key_value" in name}
    assert len(fused) == 3
    for vector in fused.values():
        by_head = vector.view(4, 3, 16)
        assert not by_head[:, 0].any()
        assert by_head[:, 1:].ne(0).all()
    assert count_trainable(model) == 3 * (2 * 64 + 128)


def test_dora_on_an_8_bit_base_is_refused(load) -> None:
    with pytest.raises(AdapterError, match=r"8-bit base. Set model.quantisation=nf4 or none"):
        attach_adapter(load("llama", "8bit"), METHODS["dora"])


@pytest.mark.parametrize("settings", [Ia3Settings(), QloraSettings()], ids=["ia3", "qlora"])
def test_bfloat16_activations_stay_bfloat16(load, settings) -> None:
    """PEFT casts every activation to float32; here the adapter is cast instead."""
    model = attach_adapter(load("llama", "nf4-double", "bfloat16"), settings).train()
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.get_base_model().model.layers[1].mlp(torch.randn(1, 9, 64, dtype=torch.bfloat16, requires_grad=True))
    activations = [tensor for tensor in kept if tensor.shape[-2:] in ((9, 64), (9, 128))]
    assert activations and all(tensor.dtype == torch.bfloat16 for tensor in activations)
    assert all(weight.dtype == torch.float32 for weight in list_trained(model).values())
