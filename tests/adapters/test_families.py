"""Every family of the table: IA3 scales keys, values and inner activations and nothing else, and forests are exact."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as PEFT_DEFAULTS
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.models.falcon.modeling_falcon import FalconAttention
from transformers.models.gptj.modeling_gptj import GPTJAttention
from transformers.pytorch_utils import Conv1D

from koat.adapters.architectures import ARCHITECTURES, find_architecture, mark_queries
from koat.adapters.attach import attach_adapter, restore_adapter, save_adapter
from koat.adapters.methods import Ia3Settings, LoraSettings
from koat.adapters.remarks import describe_remarks
from koat.core.errors import AdapterError
from koat.forest.verify import verify_layout
from tests.family_models import FAMILIES, make_family, make_family_config
from tests.forest.test_score import assert_same, run_layout, run_single

ALL = sorted(FAMILIES)
FUSED = [name for name in ALL if FAMILIES[name].fused]
NORMED = [name for name in ALL if FAMILIES[name].key_norm]
# PEFT's default for Mixtral names a layer that today's transformers does not have.
DEFAULTED = [name for name in ALL if FAMILIES[name].kind in PEFT_DEFAULTS and name != "mixtral"]
IDS = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(0))


def attach(name: str, randomise, settings=None) -> PeftModel:
    """Return a family's model with random vectors, the queries' held entries among them."""
    model = attach_adapter(make_family(name), settings or Ia3Settings()).eval()
    randomise(model)
    return model


def list_vectors(model: nn.Module, gradients: bool = False) -> dict[str, Tensor]:
    """Return the IA3 vectors `[d]`, or their gradients, by the name that their layer has in the base model."""
    return {
        name.removeprefix("base_model.model.").split(".ia3_l")[0]: (weight.grad if gradients else weight.detach())
        .clone()
        .flatten()
        for name, weight in model.named_parameters()
        if ".ia3_l" in name
    }


def find_part(name: str, vector: Tensor, layer: str, part: int) -> Tensor:
    """Return a projection's vector with everything but one of queries, keys and values at one."""
    family = FAMILIES[name]
    if not layer.endswith(f".{family.roles[part]}"):
        return torch.ones_like(vector)
    if family.cut is None:
        return vector
    kept = family.cut(torch.arange(vector.numel()))[part]
    return torch.ones_like(vector).index_copy(0, kept, vector[kept])


def scale_by_hand(name: str, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the base model's weights with keys' and values' rows and inner columns multiplied by vectors."""
    base, family, scaled = make_family(name), FAMILIES[name], {}
    for path, vector in vectors.items():
        layer = base.get_submodule(path)
        transposed = isinstance(layer, Conv1D)
        if family.inner and path.endswith(f".{family.inner}"):
            scaled[f"{path}.weight"] = layer.weight * (vector[:, None] if transposed else vector)
            continue
        factor = find_part(name, vector, path, 1) * find_part(name, vector, path, 2)
        scaled[f"{path}.weight"] = layer.weight * (factor if transposed else factor[:, None])
        if layer.bias is not None:
            scaled[f"{path}.bias"] = layer.bias * factor
    return scaled


@contextmanager
def watch_attention(model: nn.Module, monkeypatch) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Collect what every layer's attention takes: queries, keys and values, in whatever shape it takes them."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def spy(module, query, key, value, attention_mask, scaling=None, **others):
        seen.append((query, key, value))
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    def watch(method):
        def watched(self, *args):
            result = method(self, *args)
            seen.append(result if len(result) == 3 else args[:3])
            return result

        return watched

    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    AttentionInterface.register("families_spy", spy)
    with monkeypatch.context() as patch:
        patch.setattr(BloomAttention, "_reshape", watch(BloomAttention._reshape))
        patch.setattr(FalconAttention, "_split_heads", watch(FalconAttention._split_heads))
        patch.setattr(GPTJAttention, "_attn", watch(GPTJAttention._attn))
        if causal.config.model_type not in ("bloom", "falcon", "gptj"):
            patch.setattr(causal.config, "_attn_implementation", "families_spy")
        yield seen


@torch.no_grad()
def read_attention(model: nn.Module, monkeypatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first layer's queries, keys and values, unrotated: all positions are 0."""
    positions = {} if model.config.model_type == "bloom" else {"position_ids": torch.zeros_like(IDS)}
    with watch_attention(model, monkeypatch) as seen:
        model(input_ids=IDS, use_cache=False, **positions)
    assert len(seen) == 2
    return seen[0]


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))


def test_every_family_of_the_table_is_tried() -> None:
    assert {family.kind for family in FAMILIES.values()} == set(ARCHITECTURES)


# ---------------------------------------------------------------------------------------------------- names


def adapted(model: PeftModel) -> dict[int, set[str]]:
    """Return the layers that PEFT wrapped as they end after the block's number, by block."""
    found: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            block, ending = re.fullmatch(r".*?\.(\d+)\.(.+)", name).groups()
            found.setdefault(int(block), set()).add(ending)
    return found


@pytest.mark.parametrize("name", ALL)
def test_presets_reach_the_layers_they_mean(name) -> None:
    family = FAMILIES[name]
    query, key, value = family.roles
    inner = {family.inner} - {None}
    attention = {query, key, value, f"{family.attention}.{family.output}"}
    for settings, wanted in (
        (Ia3Settings(targets="paper"), {key, value} | inner),
        (Ia3Settings(targets="attention"), attention | inner),
        (Ia3Settings(targets="all-linear"), family.linears),
        (LoraSettings(targets="paper"), {query, value}),
        (LoraSettings(targets="attention"), attention),
        (LoraSettings(targets="all-linear"), family.linears),
    ):
        assert adapted(attach_adapter(make_family(name), settings)) == {0: wanted, 1: wanted}


@pytest.mark.parametrize("name", ALL)
def test_all_linear_leaves_no_linear_layer_of_a_block_out(name) -> None:
    model = make_family(name)
    inside = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and re.search(r"\.\d+\.", n)}
    reached = adapted(attach_adapter(model, LoraSettings(targets="all-linear")))
    assert {ending for block in reached.values() for ending in block} == {
        re.fullmatch(r".*?\.\d+\.(.+)", path).group(1) for path in inside
    }
    assert sum(map(len, reached.values())) == len(inside)


# ---------------------------------------------------------------------------------------------- what IA3 does


@pytest.mark.parametrize("name", ALL)
def test_it_equals_weights_scaled_by_hand(randomise, name) -> None:
    """Keys' and values' rows and inner columns multiplied in the weights: the same logits, so nothing else moved."""
    model, base = attach(name, randomise), make_family(name)
    vectors = {path: vector.clone().requires_grad_() for path, vector in list_vectors(model).items()}
    expected = torch.func.functional_call(base, scale_by_hand(name, vectors), kwargs={"input_ids": IDS}).logits
    found = model(input_ids=IDS).logits
    with torch.no_grad():
        plain = base(input_ids=IDS).logits
        assert_near(model(input_ids=IDS).logits, expected)
    assert_near(found, expected)
    assert (expected - plain).abs().max() > 0.01 * plain.abs().max()

    for logits in (found, expected):
        (logits.square().mean() + logits[..., 7].mean()).backward()
    for path, gradient in list_vectors(model, gradients=True).items():
        assert_near(gradient, vectors[path].grad)
        if FAMILIES[name].cut and path.endswith(f".{FAMILIES[name].fused}"):
            queries = FAMILIES[name].cut(torch.arange(gradient.numel()))[0]
            assert (gradient == 0).nonzero().flatten().tolist() == sorted(queries.tolist())


@pytest.mark.parametrize("name", ALL)
def test_attention_takes_scaled_keys_and_values_and_plain_queries(randomise, monkeypatch, name) -> None:
    model, family = attach(name, randomise), FAMILIES[name]
    query, key, value = read_attention(make_family(name), monkeypatch)
    new_query, new_key, new_value = read_attention(model, monkeypatch)
    assert torch.equal(new_query, query)

    vectors = {path: vector for path, vector in list_vectors(model).items() if ".0." in path}
    for part, (new, old) in enumerate(((new_key, key), (new_value, value)), start=1):
        (path,) = [path for path in vectors if path.endswith(f".{family.roles[part]}")]
        vector = vectors[path]
        scale = vector if family.cut is None else vector[family.cut(torch.arange(vector.numel()))[part]]
        if part == 1 and family.key_norm:
            by_hand = make_family(name)
            by_hand.load_state_dict(scale_by_hand(name, vectors), strict=False)
            _, expected, _ = read_attention(by_hand, monkeypatch)
            assert not torch.allclose(new, old, rtol=1e-3)
        else:
            expected = old * lay_out(name, scale, old)
        assert_near(new, expected)


def lay_out(name: str, scale: Tensor, states: Tensor) -> Tensor:
    """Return a scale `[heads * width]` in the shape that a family's attention takes its states in."""
    heads = scale.view(-1, states.shape[-1])
    if name == "falcon-grouped":  # has repeated its keys and values for every query of a group
        heads = heads.repeat_interleave(2, 0)
    if name.startswith("falcon"):  # [batch, length, heads, width]
        return heads
    return heads if states.ndim == 3 else heads[:, None]


@pytest.mark.parametrize("name", [name for name in ALL if FAMILIES[name].inner])
def test_the_inner_layer_takes_a_scaled_activation(randomise, name) -> None:
    """In the first layer, keys and values left alone, so that the feed-forward is entered alike."""
    model, base = attach(name, randomise), make_family(name)
    path = next(path for path in list_vectors(model) if path.endswith(f".{FAMILIES[name].inner}"))
    seen = []
    for weight_name, weight in model.named_parameters():
        if ".ia3_l" in weight_name and path not in weight_name:
            weight.data.fill_(1.0)
    for each in (model.get_base_model().get_submodule(path).base_layer, base.get_submodule(path)):
        each.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for each in (model, base):
            each(input_ids=IDS)
    assert len(seen) == 2
    assert_near(seen[0], seen[1] * list_vectors(model)[path])


@pytest.mark.parametrize("name", FUSED)
def test_marks_are_the_queries(name) -> None:
    config = make_family_config(name)
    marks = mark_queries(find_architecture(config), config)
    queries, keys, values = FAMILIES[name].cut(torch.arange(marks.numel()))
    assert marks.nonzero().flatten().tolist() == sorted(queries.tolist())
    assert marks.numel() == queries.numel() + keys.numel() + values.numel()


@pytest.mark.parametrize("name", ALL)
def test_a_norm_takes_the_common_factor_of_a_head_s_keys(randomise, name) -> None:
    """Then what is learned has no part along the vector itself, head by head (OLMo 2: over all heads)."""
    family = FAMILIES[name]
    model = attach(name, randomise)
    model(input_ids=IDS).logits.square().mean().backward()
    worst = []
    for path, weight in model.get_base_model().named_parameters():
        if f".{family.roles[1]}.ia3_l" in path:
            along = (weight * weight.grad).detach().flatten()
            along = along if family.cut is None else along[family.cut(torch.arange(along.numel()))[1]]
            heads = 1 if family.kind == "olmo2" else 2
            summed, sizes = along.view(heads, -1).sum(1), along.view(heads, -1).norm(dim=1)
            worst.append(float((summed.abs() / sizes).max()))
    assert len(worst) == 2
    assert (max(worst) < 1e-3) == bool(family.key_norm)
    norm = find_architecture(make_family_config(name)).key_norm
    assert (norm is None) == (family.key_norm is None)
    assert norm is None or family.key_norm.endswith(f".{norm}")


# ------------------------------------------------------------------------------------------------ interchange


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(
    ("name", "targets"), [*((name, "paper") for name in ALL), *((name, "peft") for name in DEFAULTED)]
)
def test_files_load_in_both_directions(randomise, tmp_path, name, targets) -> None:
    model = attach(name, randomise, Ia3Settings(targets=targets))
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(make_family(name), str(tmp_path)).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = restore_adapter(make_family(name), tmp_path / "theirs").eval()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        assert_near(theirs(input_ids=IDS).logits, expected)
        assert_near(again(input_ids=IDS).logits, expected)
        assert_near(model.merge_and_unload()(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("name", sorted(set(ALL) - set(DEFAULTED)))
def test_without_a_default_that_fits_peft_s_targets_are_refused(name) -> None:
    with pytest.raises(AdapterError, match="no default targets" if name != "mixtral" else "'w2' matches no layer"):
        attach_adapter(make_family(name), Ia3Settings(targets="peft"))


@pytest.mark.parametrize(
    ("name", "targets"),
    [("mixtral", ["q_proj", "w1", "w2", "w3"]), ("qwen3_moe", ["q_proj", "gate_proj", "up_proj", "down_proj"])],
)
@pytest.mark.filterwarnings("ignore:The following")
def test_pefts_lora_on_experts_loads(randomise, tmp_path, name, targets) -> None:
    """koat puts none there itself; PEFT's own layer around the 3-D parameters stays as it is."""
    theirs = get_peft_model(make_family(name), LoraConfig(task_type="CAUSAL_LM", target_modules=targets)).eval()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path))
    ours = restore_adapter(make_family(name), tmp_path).eval()
    with torch.no_grad():
        expected = theirs(input_ids=IDS).logits
        assert_near(ours(input_ids=IDS).logits, expected)
        assert not torch.allclose(make_family(name)(input_ids=IDS).logits, expected, atol=0.1)


# --------------------------------------------------------------------------------------------------- forests


@pytest.mark.parametrize("name", ALL)
def test_forests_are_exact_or_not_used(randomise, make_sequences, score_singly, name) -> None:
    """Log-probabilities and the gradients of IA3 and LoRA are those of one sequence at a time."""
    sequences = make_sequences("shared")
    for settings in (Ia3Settings(), LoraSettings()):
        model = attach(name, randomise, settings)
        expected = run_single(model, sequences, score_singly)
        layout, found = verify_layout(model)
        assert found.shares == layout.shares == FAMILIES[name].shares, found.reason
        assert_same(run_layout(model, sequences, layout, 150, 100), expected)


# --------------------------------------------------------------------------------------------------- remarks


@pytest.mark.parametrize("name", ALL)
def test_what_is_out_of_reach_is_said(name) -> None:
    config, family = make_family_config(name), FAMILIES[name]
    routed = family.kind in ("mixtral", "qwen3_moe")
    for settings, about_keys, about_experts in (
        (Ia3Settings(), True, True),
        (Ia3Settings(targets="all-linear"), True, True),
        (Ia3Settings(targets=["k_proj"]), True, False),
        (Ia3Settings(targets=["v_proj"]), False, False),
        (LoraSettings(), False, True),
        (LoraSettings(targets="attention"), False, False),
    ):
        text = " ".join(describe_remarks(settings, config))
        assert ("norms its keys" in text) == (about_keys and bool(family.key_norm))
        assert ("experts" in text) == (about_experts and routed)
        assert not text or family.key_norm or routed


def test_an_unknown_family_is_no_matter_for_remarks(make_config) -> None:
    assert describe_remarks(Ia3Settings(), make_config("mamba")) == []
